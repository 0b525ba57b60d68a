"""Tests of the server: real HTTP on a loopback port, the tiny model, the engine in its own thread.

    pytest -q test_serve.py
"""
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_neo import text_models  # noqa: F401  a fixture; first, as it keeps profiles out of the user's cache
from neo import LLM, SamplingParams

httpx, openai, uvicorn = (pytest.importorskip(name) for name in ("httpx", "openai", "uvicorn"))
from door import Door  # noqa: E402
from serve import Server, make_app  # noqa: E402

SMALL = dict(device="cpu", dtype="fp32", gpu_blocks=26, cpu_mem=0.001, max_model_len=400)


class Running:
    """A server on a free port, in threads of this process."""

    def __init__(self, llm, max_queue=256, buffer=1024, grace=5.0, **app):
        self.llm, self.door = llm, Door(llm, max_queue, buffer)
        config = uvicorn.Config(make_app(llm, self.door, **app), host="127.0.0.1", port=0, log_level="warning",
                                timeout_graceful_shutdown=int(grace) + 2)
        self.server = Server(config, self.door, grace)
        self.server.capture_signals = contextlib.nullcontext        # signals are the main thread's
        listening = config.bind_socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)        # so that a reader that stalls is noticed soon
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key=app.get("api_key") or "none", max_retries=0)

    def post(self, body, path="/v1/completions", **kwargs):
        content = {"content": body} if isinstance(body, bytes) else {"json": {"model": self.llm.name} | body}
        return httpx.post(self.url + path, timeout=60, **content, **kwargs)

    def stop(self):
        self.door.abort_all()
        self.server.should_exit = True
        self.thread.join(20)
        self.door.join()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def idle(llm):
    """Nothing in flight, every block free in both tiers."""
    s = llm.scheduler
    return not llm.outputs and not llm.kv.sequences and s.free == s.num_blocks


@pytest.fixture(scope="module")
def server():
    running = Running(LLM("tiny", "neo", **SMALL), max_body=50_000)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def text_server(text_models):  # noqa: F811
    """A checkpoint with a tokenizer and a chat template."""
    folder = text_models["tokenizers"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template":
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"}))
    from checkpoint import load_chat_template
    llm = LLM(str(folder), "neo", **SMALL)
    running = Running(llm, template=load_chat_template(llm.name, llm.tokenizer))
    yield running
    running.stop()


# ------------------------------------------------------------------------------------------------- the openai client

def test_openai_client_gets_the_tokens_of_generate(text_server):
    """Streamed and whole, greedy and seeded, text and ids, log-probabilities and usage."""
    prompt, other = "the scheduler plans", LLM(text_server.llm.name, "gpu-only", **SMALL)
    for temperature, seed in ((0.0, None), (0.9, 7)):
        want = other.generate([prompt], SamplingParams(max_tokens=12, temperature=temperature, seed=seed, ignore_eos=True, logprobs=True))[0]
        ask = dict(model=text_server.llm.name, prompt=prompt, max_tokens=12, temperature=temperature, seed=seed, logprobs=1,
                   extra_body={"ignore_eos": True})
        whole = text_server.openai.completions.create(**ask)
        assert whole.choices[0].text == want.text and whole.choices[0].token_ids == want.token_ids
        assert whole.choices[0].logprobs.token_logprobs == pytest.approx(want.logprobs, abs=1e-3) and max(want.logprobs) < 0
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(want.prompt_token_ids), 12)
        chunks = list(text_server.openai.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        *tokens, last = chunks
        assert "".join(c.choices[0].text for c in tokens) == want.text and len(tokens) == 12
        assert sum((c.choices[0].token_ids for c in tokens), []) == want.token_ids
        assert tokens[-1].choices[0].finish_reason == "length" and last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens


def test_chat_uses_the_template(text_server):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "what is a block"}]}]
    llm = LLM(text_server.llm.name, "gpu-only", **SMALL)
    want = llm.generate(["<system>be brief<user>what is a block<assistant>"], SamplingParams(max_tokens=8, ignore_eos=True))[0]
    ask = dict(model=text_server.llm.name, messages=messages, max_completion_tokens=8, temperature=0, extra_body={"ignore_eos": True})
    whole = text_server.openai.chat.completions.create(**ask, logprobs=True)
    assert whole.choices[0].message.content == want.text and len(whole.choices[0].logprobs.content) == 8
    chunks = list(text_server.openai.chat.completions.create(**ask, stream=True))
    assert "".join(c.choices[0].delta.content for c in chunks) == want.text
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * 7
    assert all(t.token in want.text or "\ufffd" in t.token for t in whole.choices[0].logprobs.content)
    with pytest.raises(openai.BadRequestError, match="no tools here"):
        text_server.openai.chat.completions.create(**ask | {"messages": [{"role": "tool", "content": "x"}]})


def test_stop_strings_never_reach_the_client(text_server):
    ask = dict(model=text_server.llm.name, prompt="the cache", max_tokens=60, temperature=1, seed=1, extra_body={"ignore_eos": True})
    text = text_server.openai.completions.create(**ask).choices[0].text
    at = next(i for i in range(len(text) // 2, len(text)) if "\ufffd" not in text[i:i + 3] and text.find(text[i:i + 3]) == i)
    pieces = [c.choices[0].text for c in text_server.openai.completions.create(**ask, stop=[text[at:at + 3]], stream=True)]
    assert "".join(pieces) == text[:at]


def test_prompts_of_ids_and_batches(server):
    prompts = [[1, 2, 3], [4, 5], [6]]
    want = [o.token_ids for o in LLM("tiny", "gpu-only", **SMALL).generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))]
    ask = dict(max_tokens=6, temperature=0, ignore_eos=True)
    got = server.post({"prompt": prompts, **ask}).json()
    assert [c["token_ids"] for c in got["choices"]] == want and got["usage"]["completion_tokens"] == 18
    ids = {0: [], 1: [], 2: []}
    with httpx.stream("POST", server.url + "/v1/completions", json={"model": "tiny", "prompt": prompts, "stream": True, **ask}) as r:
        lines = [line[6:] for line in r.iter_lines() if line]
    for line in lines[:-1]:
        for c in json.loads(line)["choices"]:
            ids[c["index"]] += c["token_ids"]
    assert list(ids.values()) == want and lines[-1] == "[DONE]"
    assert server.post({"prompt": [1, 2], **ask}).json()["choices"][0]["token_ids"]


def test_what_a_load_generator_sends(server):
    """The fields of vLLM's benchmark client, /v1/models, /health and /metrics."""
    body = {"prompt": [5] * 20, "max_tokens": 5, "temperature": 0.0, "repetition_penalty": 1.0, "logprobs": None, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True, "best_of": 1}
    lines = [json.loads(x[6:]) for x in server.post(body).text.split("\n\n")[:-2]]
    assert len(lines) == 6 and lines[-1]["usage"]["completion_tokens"] == 5
    assert server.openai.models.list().data[0].id == server.openai.models.retrieve("tiny").id == "tiny" and httpx.get(server.url + "/health").json() == {"status": "ok"}
    wait_for(lambda: idle(server.llm))
    text = httpx.get(server.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["neo_ttft_seconds_count"]) >= 1 and float(values["neo_tpot_seconds_count"]) >= 1
    assert float(values["neo_requests_waiting"]) == 0 and float(values['neo_kv_blocks_used{tier="gpu"}']) == 0
    assert float(values["neo_output_tokens_total"]) >= 5 and float(values['neo_kv_blocks_total{tier="gpu"}']) == 26


# ------------------------------------------------------------------------------------------------ coming and leaving

def test_many_clients_some_leave(server):
    """200 at once, a third cut their connection in mid-stream: then both tiers are empty and the server answers."""
    rng = random.Random(3)

    async def one(client, leave):
        body = {"model": "tiny", "prompt": [rng.randrange(512) for _ in range(rng.randrange(1, 60))], "max_tokens": rng.randrange(1, 30),
                "stream": True, "ignore_eos": True, "temperature": 0}
        async with client.stream("POST", server.url + "/v1/completions", json=body) as r:
            assert r.status_code == 200
            got = 0
            async for line in r.aiter_lines():
                got += line.startswith("data: {")
                if leave and got > leave:
                    return None
        return got == body["max_tokens"]

    async def all_of_them():
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(one(client, rng.choice((0, 0, 2))) for _ in range(200)))
    results = asyncio.run(all_of_them())
    assert all(r is not False for r in results) and results.count(True) > 50
    wait_for(lambda: idle(server.llm))
    server.llm.kv.check()
    assert len(server.post({"prompt": [1], "max_tokens": 3, "ignore_eos": True}).json()["choices"][0]["token_ids"]) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_dropped_at_the_next_iteration(server, stream):
    llm, body = server.llm, {"model": "tiny", "prompt": [1] * 40, "max_tokens": 350, "ignore_eos": True, "stream": stream}
    content = json.dumps(body).encode()
    s = socket.create_connection(("127.0.0.1", server.port))
    s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
    wait_for(lambda: llm.outputs and next(iter(llm.outputs.values())).token_ids)
    out = next(iter(llm.outputs.values()))
    s.close()
    wait_for(lambda: idle(llm))
    assert out.finish_reason == "abort" and len(out.token_ids) < 350


def test_a_reader_that_stalls_is_aborted_and_holds_nobody_up():
    running = Running(LLM("tiny", "neo", **SMALL), buffer=20)
    try:
        body = {"model": "tiny", "prompt": [[i] for i in range(1, 13)], "max_tokens": 390, "ignore_eos": True, "stream": True}
        content = json.dumps(body).encode()
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.connect(("127.0.0.1", running.port))
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        wait_for(lambda: running.llm.outputs)
        outs = list(running.llm.outputs.values())
        assert running.post({"prompt": [7], "max_tokens": 5, "ignore_eos": True}).status_code == 200
        wait_for(lambda: idle(running.llm), 60)
        assert any(o.finish_reason == "abort" for o in outs)
        s.settimeout(20)
        told = b""
        while b"[DONE]" not in told and (part := s.recv(1 << 16)):
            told += part
        assert b"the client fell more than 20 tokens behind" in told
        s.close()
        whole = running.post(body | {"stream": False})                              # nobody reads before the end: no hurry
        assert whole.status_code == 200 and {c["finish_reason"] for c in whole.json()["choices"]} == {"length"}
    finally:
        running.stop()


def test_a_full_queue_says_429_and_a_key_is_asked_for():
    running = Running(LLM("tiny", "gpu-only", **SMALL | {"gpu_blocks": 8, "max_model_len": 128}), max_queue=3, api_key="s3cret")
    auth = {"headers": {"Authorization": "Bearer s3cret"}}
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            r = running.post({"prompt": [1]}, headers=headers)
            assert r.status_code == 401 and r.json()["error"]["code"] == "invalid_api_key"
        codes = []

        def ask():
            codes.append(running.post({"prompt": [1] * 60, "max_tokens": 60, "ignore_eos": True}, **auth))
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        refused = [r for r in codes if r.status_code == 429]
        assert refused and len(refused) < 12 and {r.status_code for r in codes} == {200, 429}
        assert refused[0].headers["retry-after"] == "1" and refused[0].json()["error"]["type"] == "rate_limit_error"
        assert running.post({"prompt": [[1]] * 4}, **auth).status_code == 400                       # could never fit the queue
        assert running.post({"prompt": [1], "max_tokens": 1}, **auth).status_code == 200
    finally:
        running.stop()


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_failure_is_an_error_not_a_hang(stream, monkeypatch):
    running = Running(LLM("tiny", "neo", **SMALL))
    try:
        monkeypatch.setattr(running.llm.model, "run", lambda *a: 1 / 0)
        r = running.post({"prompt": [1, 2], "stream": stream})
        assert "ZeroDivisionError" in r.text and (stream or r.status_code == 503)
        assert httpx.get(running.url + "/health").status_code == 503
        assert running.post({"prompt": [1, 2]}).status_code == 503
    finally:
        running.stop()


def test_a_step_that_fails_costs_its_requests_alone():
    """The others go on, /health recovers with the next step that works."""
    running = Running(LLM("tiny", "gpu-only", **SMALL | {"gpu_blocks": 4, "max_model_len": 64}))
    try:
        llm, run, calls = running.llm, running.llm.model.run, []

        def fails_once(batches, kv):
            calls.append(1)
            if len(calls) == 5:
                raise RuntimeError("one bad step")
            run(batches, kv)
        llm.model.run = fails_once
        answers = []
        ask = lambda: answers.append(running.post({"prompt": [1] * 30, "max_tokens": 20, "ignore_eos": True}))
        threads = [threading.Thread(target=ask) for _ in range(4)]               # two fit at a time
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        codes = sorted(r.status_code for r in answers)
        assert codes[0] == 200 and codes[-1] == 503 and codes.count(503) <= 2
        assert all("one bad step" in r.text for r in answers if r.status_code == 503)
        assert httpx.get(running.url + "/health").status_code == 200 and idle(llm)
    finally:
        running.stop()


def test_sampling_at_the_edges_hurts_nobody(text_server):
    for extreme in ({"temperature": 1e-50}, {"top_p": 1e-50}, {"top_k": 10 ** 400}, {"temperature": 10 ** 400}, {"temperature": 1e9}):
        r = text_server.post({"prompt": "x", "max_tokens": 3} | extreme)
        assert r.status_code == 400, r.text
    for edge in ({"temperature": 1e-4}, {"temperature": 1e4}, {"top_p": 1e-6, "temperature": 1}, {"top_k": 2 ** 31 - 1, "temperature": 1}):
        assert text_server.post({"prompt": "x", "max_tokens": 3} | edge).status_code == 200
    chat = {"messages": [{"role": "user", "content": "\ud800"}]}
    for path, body in (("/v1/completions", {"prompt": "\ud800"}), ("/v1/completions", {"prompt": ["a", "\ud800"]}), ("/v1/chat/completions", chat)):
        r = text_server.post(json.dumps({"model": text_server.llm.name} | body).encode(), path, headers={"Content-Type": "application/json"})
        assert r.status_code == 400, r.text
    assert httpx.get(text_server.url + "/health").status_code == 200


def test_a_large_bad_body_does_not_stop_the_loop():
    running = Running(LLM("tiny", "neo", **SMALL))
    try:
        bodies = [b'{"model": "tiny", "prompt": [%s "x"]}' % (b"1," * 400_000), b'{"model": "tiny", "messages": [%s 1]}' % (b"1," * 400_000),
                  b'{"model": "tiny", "prompt": [1], "stop": [%s "x"]}' % (b'"y",' * 200_000)]
        for body, path in zip(bodies, ("/v1/completions", "/v1/chat/completions", "/v1/completions")):
            r = running.post(body, path, headers={"Content-Type": "application/json"})
            assert r.status_code == 400 and len(r.text) < 1000
    finally:
        running.stop()


def test_serve_refuses_what_cannot_work_before_loading():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for flags, message in ((["--port", str(taken.getsockname()[1])], "cannot listen"), (["--port", "99999"], "--port 99999"),
                               (["--api-key", ""], "--api-key is empty"), (["--grace", "nan"], "--grace nan"), (["--max-queue", "0"], "--max-queue")):
            done = subprocess.run([sys.executable, "serve.py", "--model", "tiny", "--device", "cpu", *flags], capture_output=True, text=True,
                                  timeout=60, cwd=Path(__file__).parent)
            assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr and "device" not in done.stderr


@pytest.mark.parametrize("grace, ended", [("30", "length"), ("0.3", "abort")])
def test_sigterm_in_mid_stream(grace, ended):
    """Within the grace time the stream runs to its end, beyond it the request is aborted; the exit code is 0 either way."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "serve.py", "--model", "llama-160m", "--device", "cpu", "--port", str(port), "--grace", grace,
                                "--max-model-len", "400", "--gpu-blocks", "30", "--cpu-mem", "0.1"], stderr=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parent)
    try:
        while "serving" not in (line := process.stderr.readline()):
            assert line, "the server never came up"
        url = f"http://127.0.0.1:{port}"

        def up():
            try:
                return httpx.get(url + "/health").status_code == 200
            except httpx.TransportError:
                return False
        wait_for(up)
        body = {"model": "llama-160m", "prompt": [1, 2, 3], "max_tokens": 80 if ended == "length" else 390, "ignore_eos": True, "stream": True}
        reasons = []
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as r:
            for n, line in enumerate(x for x in r.iter_lines() if x.startswith("data: {")):
                if n == 3:
                    process.send_signal(signal.SIGTERM)
                said = json.loads(line[6:])
                reasons.append(said["choices"][0]["finish_reason"] if "choices" in said else said["error"]["message"])
        if ended == "abort":                             # said as an error, too: an abort is no way for a completion to end
            assert reasons.pop() == "the server is shutting down"
        assert reasons[-1] == ended and set(reasons[:-1]) == {None}
        assert process.wait(20) == 0
    finally:
        process.kill()


# -------------------------------------------------------------------------------------------------------- bad requests

@pytest.mark.parametrize("body, message", [
    ({"prompt": [1] * 400}, "400 tokens.*limit is 400"), ({"prompt": "text"}, "without a tokenizer"), ({"prompt": []}, "empty"), ({}, "prompt"),
    ({"prompt": [1], "model": "gpt"}, "unknown model"), ({"prompt": [1], "max_tokens": -1}, "max_tokens = -1"), ({"prompt": [1, 512]}, "0..511"),
    ({"prompt": [1, "x"]}, "must be a string"), ({"prompt": [1, True]}, "must be a string"), ({"prompt": [1], "logprobs": 5}, "logprobs"),
    ({"prompt": [1], "stream_options": {"x": 1}}, "stream_options"), ({"prompt": [1], "temperature": -1}, "temperature"), ({"prompt": [1], "n": 2}, "n = 2"), ({"prompt": [1], "max_tokens": "7"}, "max_tokens"),
    ({"prompt": [1], "frobnicate": 1}, "frobnicate"), ({"prompt": [1], "stream": 1}, "stream"), ({"prompt": [1], "top_p": 0}, "top_p"),
    ({"prompt": [[]]}, "empty"), ({"prompt": [1], "echo": True}, "echo"), ({"prompt": [1], "stop": "x"}, "stop strings")])
def test_bad_requests_get_400_in_openais_shape(server, body, message):
    r = server.post(body)
    error = r.json()["error"]
    assert r.status_code == 400 and error["type"] == "invalid_request_error" and re.search(message, error["message"]), r.text


@pytest.mark.parametrize("content, status", [
    (b"{", 400), (b"\xff\xfe\x00", 400), (b"", 400), (b"[1]", 400), (b'"x"', 400), (b"[" * 20000, 400), (b'{"model": "' + b"x" * 60_000 + b'"}', 413),
    (b'{"model": "tiny", "prompt": [1], "temperature": NaN}', 400), (b'{"model": "\\ud800", "prompt": [1]}', 400),
    (b'{"model": "tiny", "prompt": [1], "seed": ' + b"9" * 5000 + b"}", 400), (b'{"model": "tiny", "prompt": ["\\ud800"]}', 400)])
def test_bodies_that_are_no_request(server, content, status):
    r = server.post(content, headers={"Content-Type": "application/json"})
    assert r.status_code == status and "message" in r.json()["error"]


def test_no_chat_template_is_said(server):
    r = server.post({"messages": [{"role": "user", "content": "hi"}]}, "/v1/chat/completions")
    assert r.status_code == 400 and "no chat template" in r.json()["error"]["message"].replace("without a", "no")
    assert httpx.get(server.url + "/v1/nothing").status_code == 404


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)
FIELDS = ("prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options", "logprobs", "n", "messages", "user",
          "ignore_eos", "model", "logit_bias", "echo")


@settings(max_examples=int(os.environ.get("NEO_EXAMPLES", 60)), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
       body=st.one_of(st.binary(max_size=60), JSON.map(lambda x: json.dumps(x).encode()),
                      st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5).map(
                          lambda d: json.dumps({"model": "tiny", "prompt": [1, 2], "max_tokens": 2} | d).encode())))
def test_no_body_makes_the_server_fail(server, path, body):
    r = server.post(body, path, headers={"Content-Type": "application/json"})
    assert r.status_code < 500
    assert r.status_code == 200 or "message" in r.json()["error"]


def test_settled_text_holds_back_what_may_begin_a_stop_string():
    from neo import RequestOutput
    out = RequestOutput(0, [], SamplingParams(stop=["abc", "z"]), [], "xxab")
    assert out.settled_text() == "xx"
    out.finish_reason = "length"
    assert out.settled_text() == "xxab"
