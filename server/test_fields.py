"""Tests of a request's fields. What clients send is not refused without need: see the tables SAME
and HISTORIES. What would change the answer and is not supported is: see REFUSED.

    pytest server/test_fields.py
"""
import json
import re

import pytest

from server import protocol
from server.test_server import TEMPLATE, text_server  # noqa: F401  a fixture

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "what is a block"}]
PROMPT = {COMPLETIONS: {"prompt": "the cache"}, CHAT: {"messages": MESSAGES}}
BOTH, TOOL = (COMPLETIONS, CHAT), {"type": "function", "function": {"name": "f", "parameters": {}}}


def text_of(reply):
    assert reply.status_code == 200, reply.text
    return [choice["text"] if "text" in choice else choice["message"]["content"]
            for choice in reply.json()["choices"]]


# ------------------------------------------------------------------------- accepted

# Fields with values that change nothing, and fields that only label a request.
SAME = [(paths, {name: value}) for paths, fields in (
    (BOTH, dict(
        response_format={"type": "text"}, tools=[], tool_choice="none", parallel_tool_calls=True,
        functions=[], function_call="none", store=False, service_tier="auto", modalities=["text"],
        reasoning_effort="low", verbosity="low", safety_identifier="x", prompt_cache_key="x",
        metadata={"a": "b"}, user="u", prediction=None, web_search_options=None, audio=None,
        top_k=-1, top_p=1, min_p=0, min_tokens=0, stop_token_ids=[], logit_bias={},
        skip_special_tokens=True, spaces_between_special_tokens=True, add_special_tokens=True,
        include_stop_str_in_output=False, chat_template_kwargs={}, priority=0,
        truncate_prompt_tokens=None, length_penalty=1.0, use_beam_search=False,
        guided_json=None, structured_outputs=None, prompt_logprobs=None, best_of=1, n=1,
        presence_penalty=0, frequency_penalty=0.0, repetition_penalty=1, echo=False, seed=7,
        temperature=1e-6, stop=[], suffix="", stream=False, frobnicate={"x": [1]},
        stream_options={"include_usage": False, "continuous_usage_stats": False, "x": 1})),
    (BOTH, dict.fromkeys((
        "model", "n", "stop", "top_p", "top_k", "seed", "stream", "stream_options", "logprobs",
        "top_logprobs", "echo", "min_tokens", "stop_token_ids", "logit_bias", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "tools", "tool_choice", "response_format",
        "max_completion_tokens", "user", "chat_template", "frobnicate"))),
    ((CHAT,), dict(add_special_tokens=False, max_completion_tokens=4, logprobs=False,
                   add_generation_prompt=True, continue_final_message=False, top_logprobs=0)),
    # log-probabilities stand beside the text
    ((COMPLETIONS,), dict(logprobs=5)),
    ((CHAT,), dict(logprobs=True)),
) for name, value in fields.items()]
SAME += [(BOTH, {"tools": [TOOL], "tool_choice": "none"}), (BOTH, {"n": 1, "best_of": 1}),
         ((CHAT,), {"logprobs": True, "top_logprobs": 2})]


@pytest.fixture(scope="module")
def plain(text_server):  # noqa: F811
    """The answer to each path's PROMPT without another field."""
    texts = {path: text_of(text_server.post(PROMPT[path] | ASK, path)) for path in BOTH}
    assert all(len(text) > 1 for (text,) in texts.values())
    return texts


@pytest.mark.parametrize("paths, fields", SAME, ids=lambda x: json.dumps(x)[:50])
def test_neutral_and_unknown_fields_change_no_text(text_server, plain, paths, fields):  # noqa: F811
    for path in paths:
        assert text_of(text_server.post(PROMPT[path] | ASK | fields, path)) == plain[path]


# Messages that go on from MESSAGES, and what TEMPLATE makes of them.
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HISTORIES = [
    ([{"role": "assistant", "content": "a page", "refusal": None, "annotations": None,
       "audio": None, "function_call": None, "tool_calls": None}], "<assistant>a page"),
    ([{"role": "assistant", "content": "a page", "refusal": None, "annotations": [],
       "provider_specific_fields": {"refusal": None}, "reasoning_content": "hm"}],
     "<assistant>a page"),
    ([{"role": "assistant"}], "<assistant>"),
    ([{"role": "assistant", "content": None, "tool_calls": [CALL]},
      {"role": "tool", "tool_call_id": "1", "content": "16 tokens"}],
     "<assistant><tool>16 tokens"),
    ([{"role": "tool", "tool_call_id": "1", "name": "f",
       "content": [{"type": "text", "text": "16 tokens"}]}], "<tool>16 tokens"),
    ([{"role": "user", "content": [{"type": "text", "text": "go ", "cache_control": {
        "type": "ephemeral"}}, {"type": "text", "text": "on"}]}], "<user>go on"),
    ([{"role": "developer", "content": "be brief", "name": "me", "frobnicate": 1}],
     "<developer>be brief")]


@pytest.mark.parametrize("more, prompt", HISTORIES, ids=lambda x: str(x)[:50])
def test_messages_of_agents_and_proxies(text_server, more, prompt):  # noqa: F811
    got = text_server.post({"messages": MESSAGES + more} | ASK, CHAT)
    assert "<{{ m.role }}>{{ m.content }}" in TEMPLATE
    whole = f"<user>what is a block{prompt}<assistant>"
    assert text_of(got) == text_of(text_server.post({"prompt": whole} | ASK))


def test_usage_so_far_in_every_chunk(text_server):  # noqa: F811
    """stream_options.continuous_usage_stats, with several answers to one of several prompts."""
    options = {"continuous_usage_stats": True, "include_usage": True}
    body = ASK | {"prompt": ["the cache", "a"], "n": 2, "stream": True}
    *chunks, total = [json.loads(line[6:]) for line in text_server.post(
        body | {"stream_options": options}).text.split("\n\n")[:-2]]
    last = {}
    for chunk in chunks:
        choice, usage = chunk["choices"][0], chunk["usage"]
        before = last.get(choice["index"], {"completion_tokens": 0})
        assert usage["completion_tokens"] == before["completion_tokens"] + len(choice["token_ids"])
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        last[choice["index"]] = usage
    assert [last[i]["completion_tokens"] for i in range(4)] == [4] * 4
    assert last[0] == last[1] and last[2]["prompt_tokens"] == 1 < last[0]["prompt_tokens"]
    assert total["usage"]["prompt_tokens"] == last[0]["prompt_tokens"] + 1
    lines = text_server.post(body).text.split("\n\n")[:-2]
    assert not any("usage" in json.loads(line[6:]) for line in lines)


def test_what_harnesses_ask_for(text_server, plain):  # noqa: F811
    body = PROMPT[COMPLETIONS] | ASK
    one = plain[COMPLETIONS][0]
    assert text_of(text_server.post(body | {"echo": True})) == ["the cache" + one]
    for path in BOTH:
        ask = PROMPT[path] | ASK
        assert text_of(text_server.post(ask | {"n": 2}, path)) == plain[path] * 2
        for fields in ({"presence_penalty": 1}, {"frequency_penalty": -1}, {"top_k": 5},
                       {"repetition_penalty": 1.2}, {"min_tokens": 2}, {"stop_token_ids": [511]},
                       {"logit_bias": {"7": 1}}, {"top_p": 0.9}, {"seed": 3}):
            assert len(text_of(text_server.post(ask | fields, path))) == 1


# ------------------------------------------------------------------------- refused

SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
# (paths, fields, the name in the error, the value in it, what it says to do)
REFUSED = [
    (BOTH, {"response_format": {"type": "json_object"}}, "response_format", "json_object",
     'send {"type": "text"}'),
    (BOTH, {"response_format": SCHEMA}, "response_format", "json_schema", "leave it out"),
    (BOTH, {"tools": [TOOL]}, "tools", "function", "leave it out"),
    (BOTH, {"tools": [TOOL], "tool_choice": "auto"}, "tools", "function", "leave it out"),
    (BOTH, {"tool_choice": "required"}, "tool_choice", "'required'", 'send "none"'),
    (BOTH, {"functions": [{"name": "f"}]}, "functions", "'f'", "leave it out"),
    (BOTH, {"modalities": ["text", "audio"]}, "modalities", "'audio'", 'send ["text"]'),
    (BOTH, {"min_p": 0.1}, "min_p", "0.1", "send 0"),
    (BOTH, {"best_of": 2}, "best_of", "2", "send 1"),
    (BOTH, {"guided_json": {}}, "guided_json", "{}", "leave it out"),
    (BOTH, {"skip_special_tokens": False}, "skip_special_tokens", "False", "send true"),
    (BOTH, {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "'x': 1", "send {}"),
    (BOTH, {"truncate_prompt_tokens": 8}, "truncate_prompt_tokens", "8", "leave it out"),
    (BOTH, {"prompt_logprobs": 0}, "prompt_logprobs", "0", "leave it out"),
    (BOTH, {"n": 17}, "n", "17", "less than or equal to 16"),
    (BOTH, {"top_k": -2}, "top_k", "-2", "must be 0 or more"),
    (BOTH, {"temperature": "hot"}, "temperature", "'hot'", "number"),
    ((COMPLETIONS,), {"add_special_tokens": False}, "add_special_tokens", "False", "send true"),
    ((COMPLETIONS,), {"echo": True, "logprobs": 1}, "echo", "True", "leave one of them out"),
    ((COMPLETIONS,), {"max_completion_tokens": 9}, "max_completion_tokens", "9", "leave it out"),
    ((CHAT,), {"echo": True}, "echo", "True", "send false"),
    ((CHAT,), {"top_logprobs": 2}, "top_logprobs", "2", "needs logprobs = true"),
    ((CHAT,), {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "image_url",
     'send {"type": "text"'),
    ((CHAT,), {"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages.0.audio",
     "{'id': 'a'}", "leave it out"),
    ((CHAT,), {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "5",
     "string or a list")]


@pytest.mark.parametrize("paths, fields, name, value, advice", REFUSED,
                         ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_refused_names_the_field_the_value_and_what_to_do(
        text_server, paths, fields, name, value, advice):  # noqa: F811
    for path in paths:
        reply = text_server.post(PROMPT[path] | ASK | fields, path)
        message = reply.json()["error"]["message"]
        assert reply.status_code == 400 and re.match(re.escape(name) + "[ :]", message), message
        assert value in message and advice in message, message


def test_model_none_and_unknown(text_server, plain):  # noqa: F811
    for path in BOTH:
        body = PROMPT[path] | ASK
        assert text_of(text_server.post(json.dumps(body).encode(), path)) == plain[path]
        reply = text_server.post(body | {"model": "gpt"}, path)
        assert reply.status_code == 404
        assert "unknown model 'gpt'" in reply.json()["error"]["message"]


# ------------------------------------------------------------------------- warnings

def warnings(capfd):
    return re.findall("warning: field (.*) of a request is unknown, and ignored",
                      capfd.readouterr().err)


def test_an_unknown_field_is_warned_about_once(text_server, capfd):  # noqa: F811
    body = ASK | {"novel": None, "user": "u", "stream_options": {"rare": 1}, "messages": [
        {"role": "user", "content": "x", "odd": 1, "refusal": None}] * 2}
    capfd.readouterr()
    for _ in range(3):
        assert text_server.post(body, CHAT).status_code == 200
    assert warnings(capfd) == ["'novel'", "'stream_options.rare'", "'messages.odd'"]


def test_clients_cannot_fill_the_log_or_the_memory_with_names(
        text_server, capfd, monkeypatch):  # noqa: F811
    monkeypatch.setattr(protocol, "_warned", set())
    monkeypatch.setattr(protocol, "MAX_WARNED", 20)
    capfd.readouterr()
    for i in range(5):
        names = {f"{i}{j}" + "x" * 1000: 1 for j in range(10)}
        body = ASK | names | {"stream_options": names, "messages": [MESSAGES[0] | names]}
        assert text_server.post(body, CHAT).status_code == 200
    found = warnings(capfd)
    assert len(found) == len(set(found)) == len(protocol._warned) == 20
    assert max(map(len, found)) < 80
    names = {f"f{i}": 1 for i in range(30_000)}
    for body in ({"messages": [MESSAGES[0] | names]}, {"stream_options": names}, names):
        reply = text_server.post(PROMPT[CHAT] | body | {"x": "x" * 100_000}, CHAT)
        assert reply.status_code == 400 and "at most 25000" in reply.json()["error"]["message"]
