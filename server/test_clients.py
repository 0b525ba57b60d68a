"""Clients that people use, driven against the server: openai, LangChain, LiteLLM, the `llm` tool;
and schemathesis, which holds the server to its own OpenAPI document.

    pip install -r server/requirements-clients.txt
    pytest server/test_clients.py       what is not installed is skipped
    NEO_EXAMPLES=200 NEO_PHASES=coverage,fuzzing pytest server/test_clients.py -k schemathesis
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")
import openai  # noqa: E402

from chat import load_chat_template  # noqa: E402
from neo import LLM  # noqa: E402
from server.test_server import (  # noqa: E402
    SMALL,
    TEMPLATE,
    running,
    text_server,  # noqa: F401  a fixture
)

HISTORY = [("system", "be brief"), ("human", "what is a block"), ("ai", "a page"),
           ("human", "and a table")]


@pytest.mark.parametrize("as_dict", [True, False])
def test_openai_goes_on_with_its_own_replies(text_server, as_dict):  # noqa: F811
    """messages.append(reply.model_dump()), whose fields are mostly null, or the reply itself. The
    next prompt contains what was answered."""
    ask = dict(model=text_server.llm.name, max_tokens=6, temperature=0,
               extra_body={"ignore_eos": True})
    messages, prompt = [], ""
    for question in ("what is a block", "and a table", "go on"):
        messages.append({"role": "user", "content": question})
        prompt += f"<user>{question}"
        reply = text_server.openai.chat.completions.create(messages=messages, **ask)
        message = reply.choices[0].message
        again = text_server.openai.completions.create(prompt=prompt + "<assistant>", **ask)
        assert message.content == again.choices[0].text and reply.usage.completion_tokens == 6
        messages.append(message.model_dump() if as_dict else message)
        assert not as_dict or messages[-1]["refusal"] is messages[-1]["tool_calls"] is None
        prompt += f"<assistant>{message.content}"


def test_langchain(text_server):  # noqa: F811
    langchain = pytest.importorskip("langchain_openai")
    ask = dict(base_url=text_server.url + "/v1", api_key="none", model=text_server.llm.name,
               max_retries=0)
    chat = langchain.ChatOpenAI(**ask, max_tokens=6, temperature=0,
                                extra_body={"ignore_eos": True})
    reply = chat.invoke(HISTORY)
    assert reply.content and reply.usage_metadata["output_tokens"] == 6
    assert "".join(part.content for part in chat.stream(HISTORY)) == reply.content
    assert chat.invoke([*HISTORY, reply, ("human", "go on")]).content
    assert [r.content for r in chat.batch([HISTORY, HISTORY])] == [reply.content] * 2
    text = langchain.OpenAI(**ask, max_tokens=6, temperature=0, model_kwargs={
        "extra_body": {"ignore_eos": True}}).invoke("the cache")
    assert text
    schema = {"title": "Block", "type": "object", "properties": {"size": {"type": "integer"}}}
    for method, field in (("json_schema", "response_format"), ("function_calling", "tools"),
                          ("json_mode", "response_format")):
        with pytest.raises(openai.BadRequestError, match=f"{field} = .*not supported"):
            chat.with_structured_output(schema, method=method).invoke(HISTORY)


def test_litellm(text_server):  # noqa: F811
    litellm = pytest.importorskip("litellm")
    messages = [{"role": "user", "content": "what is a block"}]
    ask = dict(api_base=text_server.url + "/v1", api_key="none", max_tokens=5, temperature=0)
    name = text_server.llm.name
    for provider in ("openai", "hosted_vllm"):
        reply = litellm.completion(model=f"{provider}/{name}", messages=messages, **ask)
        assert reply.choices[0].message.content
        messages += [reply.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    text = litellm.text_completion(model=f"text-completion-openai/{name}", prompt="the cache",
                                   **ask)
    assert text.choices[0].text


def test_llm_tool(text_server, tmp_path):  # noqa: F811
    pytest.importorskip("llm")
    models = [{"model_id": "neo", "model_name": text_server.llm.name,
               "api_base": text_server.url + "/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))    # JSON is YAML
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    done = subprocess.run([sys.executable, "-m", "llm", "-m", "neo", "-o", "max_tokens", "5",
                           "what is a block"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_schemathesis_finds_no_difference(text_models, tmp_path):
    """Random requests: no server error, no status and no content type that is not documented."""
    st = shutil.which("st", path=str(Path(sys.executable).parent))
    if not st:
        pytest.skip("schemathesis is not installed")
    folder = tmp_path / "model"
    shutil.copytree(text_models["tokenizers"], folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    llm = LLM(str(folder), "neo", **SMALL | {"max_model_len": 24})      # short answers
    with running(llm, template=load_chat_template(llm.name, llm.tokenizer)) as server:
        done = subprocess.run(
            [st, "run", server.url + "/openapi.json", "--max-examples",
             os.environ.get("NEO_EXAMPLES", "10"), "--phases", os.environ.get(
                 "NEO_PHASES", "fuzzing"), "--seed", "1", "--checks",
             "not_a_server_error,status_code_conformance,content_type_conformance,"
             "unsupported_method"], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]
