"""Tests of the server: real HTTP on a loopback port, the tiny model, the engine in its own thread.

    pytest server
"""
import asyncio
import contextlib
import functools
import json
import os
import random
import re
import shutil
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

from neo import LLM, SamplingParams
from request import Request, RequestOutput

httpx, openai, uvicorn = (pytest.importorskip(name) for name in ("httpx", "openai", "uvicorn"))
import serve  # noqa: E402
from chat import load_chat_template  # noqa: E402
from server import guard  # noqa: E402
from server import live as live_view  # noqa: E402
from server.engine_thread import EngineThread  # noqa: E402
from server.protocol import Message  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(device="cpu", dtype="fp32", gpu_blocks=26, cpu_mem=0.001, max_model_len=400)
# One client for all tests, as reading the system's certificates takes longer than a request; a
# connection for each request, as the server closes those that rest.
CLIENT = httpx.Client(
    timeout=60, verify=False, limits=httpx.Limits(max_keepalive_connections=0))


class Running:
    """A server on a free port, in threads of this process."""

    def __init__(self, llm, max_queue=256, buffer=1024, grace=5.0, template=None, api_key=None,
                 http="auto", **app):
        self.llm, self.api_key = llm, api_key
        self.engine = EngineThread(llm, max_queue, buffer)
        self.routes = serve.Routes(llm, self.engine, template)
        config = uvicorn.Config(
            self.routes.app(api_key, **app), host="127.0.0.1", port=0, log_level="warning",
            http=http, timeout_graceful_shutdown=int(grace) + 2)
        self.server = serve.Server(config, self.engine, grace)
        self.server.capture_signals = contextlib.nullcontext    # only the main thread gets them
        listener = config.bind_socket()
        # A small buffer, so that a reader that stalls is noticed soon.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @functools.cached_property
    def openai(self):
        return openai.OpenAI(
            base_url=self.url + "/v1", api_key=self.api_key or "none", max_retries=0)

    def get(self, path):
        return CLIENT.get(self.url + path)

    def post(self, body, path="/v1/completions", **kwargs):
        """body: bytes that are sent as they are, or a dict to which the model is added."""
        if isinstance(body, bytes):
            kwargs |= {"content": body, "headers": {"Content-Type": "application/json"}}
        else:
            kwargs["json"] = {"model": self.llm.name} | body
        return CLIENT.post(self.url + path, **kwargs)

    def post_raw(self, connection, body):
        """Send a completion request on a socket, and read nothing."""
        content = json.dumps({"model": self.llm.name} | body).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content)

    def close(self):
        self.engine.close(abort=True)
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.join()


@contextlib.contextmanager
def running(llm, **kwargs):
    server = Running(llm, **kwargs)
    try:
        yield server
    finally:
        server.close()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def nothing_held(llm):
    """Nothing is in flight, and every block of both tiers is free."""
    scheduler = llm.scheduler
    return (not llm.outputs and not llm.kv.sequences
            and scheduler.num_free == scheduler.num_blocks)


def run_threads(num_threads, function):
    threads = [threading.Thread(target=function) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture(scope="module")
def server():
    with running(LLM("tiny", "neo", **SMALL), max_body=50_000) as server:
        yield server


TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'critic' %}{{ raise_exception('no critics here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="module")
def text_server(text_models, tmp_path_factory):
    """A checkpoint with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(text_models["tokenizers"], folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    llm = LLM(str(folder), "neo", **SMALL)
    with running(llm, template=load_chat_template(llm.name, llm.tokenizer)) as server:
        yield server


# ------------------------------------------------------------------------- the openai client

def test_openai_client_gets_the_tokens_of_generate(text_server):
    """Streamed and whole, greedy and seeded, text and ids, log-probabilities and usage."""
    prompt, other = "the scheduler plans", LLM(text_server.llm.name, "gpu-only", **SMALL)
    for temperature, seed in ((0.0, None), (0.9, 7)):
        want = other.generate([prompt], SamplingParams(
            max_tokens=12, temperature=temperature, seed=seed, ignore_eos=True, logprobs=True))[0]
        ask = dict(model=text_server.llm.name, prompt=prompt, max_tokens=12,
                   temperature=temperature, seed=seed, logprobs=1,
                   extra_body={"ignore_eos": True})
        whole = text_server.openai.completions.create(**ask)
        choice = whole.choices[0]
        assert choice.text == want.text and choice.token_ids == want.token_ids
        assert choice.logprobs.token_logprobs == pytest.approx(want.logprobs, abs=1e-3)
        assert max(want.logprobs) < 0
        assert whole.usage.prompt_tokens == len(want.prompt_token_ids)
        assert whole.usage.completion_tokens == 12
        *chunks, usage = text_server.openai.completions.create(
            **ask, stream=True, stream_options={"include_usage": True})
        assert "".join(c.choices[0].text for c in chunks) == want.text and len(chunks) == 12
        assert sum((c.choices[0].token_ids for c in chunks), []) == want.token_ids
        assert chunks[-1].choices[0].finish_reason == "length" and usage.choices == []
        assert usage.usage.total_tokens == whole.usage.total_tokens


def test_chat_uses_the_template(text_server):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is a block"}]}]
    want = LLM(text_server.llm.name, "gpu-only", **SMALL).generate(
        ["<system>be brief<user>what is a block<assistant>"],
        SamplingParams(max_tokens=8, ignore_eos=True))[0]
    chat = text_server.openai.chat.completions
    ask = dict(model=text_server.llm.name, messages=messages, max_completion_tokens=8,
               temperature=0, extra_body={"ignore_eos": True})
    choice = chat.create(**ask, logprobs=True).choices[0]
    assert choice.message.content == want.text and len(choice.logprobs.content) == 8
    chunks = list(chat.create(**ask, stream=True))
    assert "".join(c.choices[0].delta.content for c in chunks) == want.text
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [None] * 7
    assert all(t.token in want.text or "\ufffd" in t.token for t in choice.logprobs.content)
    with pytest.raises(openai.BadRequestError, match="no critics here"):
        chat.create(**ask | {"messages": [{"role": "critic", "content": "x"}]})


def test_stop_strings_never_reach_the_client(text_server):
    create = text_server.openai.completions.create
    ask = dict(model=text_server.llm.name, prompt="the cache", max_tokens=60, temperature=1,
               seed=1, extra_body={"ignore_eos": True})
    text = create(**ask).choices[0].text
    cut = next(i for i in range(len(text) // 2, len(text))
               if "\ufffd" not in text[i:i + 3] and text.find(text[i:i + 3]) == i)
    chunks = create(**ask, stop=[text[cut:cut + 3]], stream=True)
    assert "".join(c.choices[0].text for c in chunks) == text[:cut]


def test_prompts_of_ids_and_batches(server):
    prompts = [[1, 2, 3], [4, 5], [6]]
    want = [out.token_ids for out in LLM("tiny", "gpu-only", **SMALL).generate(
        prompts, SamplingParams(max_tokens=6, ignore_eos=True))]
    ask = dict(max_tokens=6, temperature=0, ignore_eos=True)
    got = server.post({"prompt": prompts, **ask}).json()
    assert [c["token_ids"] for c in got["choices"]] == want
    assert got["usage"]["completion_tokens"] == 18
    ids = {0: [], 1: [], 2: []}
    body = {"model": "tiny", "prompt": prompts, "stream": True, **ask}
    with CLIENT.stream("POST", server.url + "/v1/completions", json=body) as r:
        *chunks, end = [line[6:] for line in r.iter_lines() if line]
    for chunk in chunks:
        for c in json.loads(chunk)["choices"]:
            ids[c["index"]] += c["token_ids"]
    assert list(ids.values()) == want and end == "[DONE]"
    assert server.post({"prompt": [1, 2], **ask}).json()["choices"][0]["token_ids"]


def test_what_a_load_generator_sends(server):
    """The fields of vLLM's benchmark client, /v1/models, /health and /metrics."""
    body = {"prompt": [5] * 20, "max_tokens": 5, "temperature": 0.0, "repetition_penalty": 1.0,
            "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
            "ignore_eos": True, "best_of": 1}
    lines = [json.loads(x[6:]) for x in server.post(body).text.split("\n\n")[:-2]]
    assert len(lines) == 6 and lines[-1]["usage"]["completion_tokens"] == 5
    models = server.openai.models
    assert models.list().data[0].id == models.retrieve("tiny").id == "tiny"
    assert server.get("/health").json() == {"status": "ok"}
    wait_for(lambda: nothing_held(server.llm))
    lines = server.get("/metrics").text.splitlines()
    values = {name: float(value) for name, value in
              (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
    assert values["neo_ttft_seconds_count"] >= 1 and values["neo_tpot_seconds_count"] >= 1
    assert values["neo_requests_waiting"] == 0 and values['neo_kv_blocks_used{tier="gpu"}'] == 0
    assert values["neo_output_tokens_total"] >= 5
    assert values['neo_kv_blocks_total{tier="gpu"}'] == 26


# ------------------------------------------------------------------------- coming and leaving

def test_many_clients_some_leave(server):
    """200 at once, a third leave in mid-stream: then both tiers are empty, the server answers."""
    rng = random.Random(3)

    async def one(client, leave):
        body = {"model": "tiny", "max_tokens": rng.randrange(1, 30), "stream": True,
                "prompt": [rng.randrange(512) for _ in range(rng.randrange(1, 60))],
                "ignore_eos": True, "temperature": 0}
        async with client.stream("POST", server.url + "/v1/completions", json=body) as r:
            assert r.status_code == 200
            got = 0
            async for line in r.aiter_lines():
                got += line.startswith("data: {")
                if leave and got > leave:
                    return None
        return got == body["max_tokens"]

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, verify=False, limits=limits) as client:
            return await asyncio.gather(
                *(one(client, rng.choice((0, 0, 2))) for _ in range(200)))

    results = asyncio.run(all_of_them())
    assert all(r is not False for r in results) and results.count(True) > 50
    wait_for(lambda: nothing_held(server.llm))
    server.llm.kv.check()
    r = server.post({"prompt": [1], "max_tokens": 3, "ignore_eos": True})
    assert len(r.json()["choices"][0]["token_ids"]) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_dropped_at_the_next_iteration(server, stream):
    llm = server.llm
    connection = socket.create_connection(("127.0.0.1", server.port))
    server.post_raw(connection, {"prompt": [1] * 40, "max_tokens": 350, "ignore_eos": True,
                                 "stream": stream})
    wait_for(lambda: llm.outputs and next(iter(llm.outputs.values())).token_ids)
    out = next(iter(llm.outputs.values()))
    connection.close()
    wait_for(lambda: nothing_held(llm))
    assert out.finish_reason == "abort" and len(out.token_ids) < 350


def test_a_reader_that_stalls_is_aborted_and_holds_nobody_up():
    with running(LLM("tiny", "neo", **SMALL | {"gpu_blocks": 200}), buffer=20) as server:
        body = {"prompt": [[i] for i in range(1, 13)], "max_tokens": 250, "ignore_eos": True}
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        server.post_raw(connection, body | {"stream": True})
        wait_for(lambda: server.llm.outputs)
        outs = list(server.llm.outputs.values())
        r = server.post({"prompt": [7], "max_tokens": 5, "ignore_eos": True})
        assert r.status_code == 200
        wait_for(lambda: nothing_held(server.llm), 60)
        assert any(out.finish_reason == "abort" for out in outs)
        connection.settimeout(20)
        received = b""
        while b"[DONE]" not in received and (part := connection.recv(1 << 16)):
            received += part
        assert b"the client fell more than 20 tokens behind" in received
        connection.close()
        whole = server.post(body)       # not streamed: nobody reads before the end
        assert whole.status_code == 200
        assert {c["finish_reason"] for c in whole.json()["choices"]} == {"length"}


def test_a_full_queue_says_429_and_a_key_is_asked_for():
    llm = LLM("tiny", "gpu-only", **SMALL | {"gpu_blocks": 8, "max_model_len": 128})
    with running(llm, max_queue=3, api_key="s3cret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            r = server.post({"prompt": [1]}, headers=headers)
            assert r.status_code == 401 and r.json()["error"]["code"] == "invalid_api_key"
        key = {"Authorization": "Bearer s3cret"}
        body = {"prompt": [1] * 60, "max_tokens": 60, "ignore_eos": True}
        answers = []
        run_threads(12, lambda: answers.append(server.post(body, headers=key)))
        refused = [r for r in answers if r.status_code == 429]
        assert refused and len(refused) < 12
        assert {r.status_code for r in answers} == {200, 429}
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        longer_than_the_queue = server.post({"prompt": [[1]] * 4}, headers=key)
        assert longer_than_the_queue.status_code == 400
        assert server.post({"prompt": [1], "max_tokens": 1}, headers=key).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_failure_is_an_error_not_a_hang(stream, monkeypatch):
    with running(LLM("tiny", "neo", **SMALL)) as server:
        monkeypatch.setattr(server.llm.model, "run", lambda *a: 1 / 0)
        r = server.post({"prompt": [1, 2], "stream": stream})
        assert "ZeroDivisionError" in r.text and (stream or r.status_code == 503)
        assert server.get("/health").status_code == 503
        assert server.post({"prompt": [1, 2]}).status_code == 503


def test_a_step_that_fails_costs_its_requests_alone():
    """The others go on, /health recovers with the next step that works."""
    llm = LLM("tiny", "gpu-only", **SMALL | {"gpu_blocks": 4, "max_model_len": 64})
    with running(llm) as server:
        run, calls = llm.model.run, []

        def fails_once(*args):
            calls.append(1)
            if len(calls) == 5:
                raise RuntimeError("one bad step")
            return run(*args)

        llm.model.run = fails_once
        body = {"prompt": [1] * 30, "max_tokens": 20, "ignore_eos": True}
        answers = []
        run_threads(4, lambda: answers.append(server.post(body)))       # two fit at a time
        codes = sorted(r.status_code for r in answers)
        assert codes[0] == 200 and codes[-1] == 503 and codes.count(503) <= 2
        # the error's kind, but not its message, which may quote another user's prompt
        assert all("RuntimeError" in r.text and "one bad step" not in r.text
                   for r in answers if r.status_code == 503)
        assert server.get("/health").status_code == 200 and nothing_held(llm)


def test_a_log_that_cannot_be_written_hurts_nobody(monkeypatch):
    """The disk is full, or the terminal is gone: a failing step still costs its requests alone."""
    class Full:
        def write(self, text):
            raise OSError("no space left on device")
        flush = write
    llm = LLM("tiny", "gpu-only", **SMALL)
    with running(llm) as server:
        body = {"prompt": [1] * 3, "max_tokens": 4, "ignore_eos": True}
        run = llm.model.run
        monkeypatch.setattr(sys, "stderr", Full())
        llm.model.run = None
        assert server.post(body).status_code == 503
        llm.model.run = run
        assert server.post(body | {"unheard_of": 1}).status_code == 200
        assert nothing_held(llm)


def test_what_may_be_read_without_the_key():
    """/health, which says nothing but its state, and the page at /, which asks for the key; the
    scheme has no case; HEAD works."""
    with running(LLM("tiny", "gpu-only", **SMALL), api_key="s3cret") as server:
        for path in ("/metrics", "/docs", "/redoc", "/openapi.json", "/v1/models", "/live"):
            assert server.get(path).status_code == 401
            for scheme in ("Bearer", "bearer", "BEARER"):
                headers = {"Authorization": f"{scheme} s3cret"}
                assert CLIENT.get(server.url + path, headers=headers).status_code == 200
                assert CLIENT.head(server.url + path, headers=headers).status_code in (200, 405)
        assert CLIENT.head(server.url + "/health").status_code == 200
        server.engine.failure, server.engine.failed_at = "prompt [1, 2]", time.perf_counter()
        r = server.get("/health")
        assert r.status_code == 503 and r.json() == {"status": "failed"}


def test_connections_and_the_time_of_a_header_and_a_body_are_limited(monkeypatch):
    monkeypatch.setattr(guard, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", 20)
    with running(LLM("tiny", "gpu-only", **SMALL), http=guard.BoundedProtocol) as server:
        def connect(sent):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.settimeout(20)
            with contextlib.suppress(OSError):          # one too many may be closed already
                connection.sendall(sent)
            return connection
        halves = [connect(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n") for _ in range(40)]
        for connection in halves:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        slow = connect(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in slow.recv(1000)
        assert server.get("/health").status_code == 200
        body = {"prompt": [1], "max_tokens": 200, "ignore_eos": True}
        assert server.post(body).status_code == 200


def test_a_dead_engine_ends_the_process_with_an_error():
    """So that a supervisor starts it anew."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    code = ("import model, serve\n"
            "LLM = serve.LLM\n"
            "def broken(*args, **kwargs):\n"
            "    llm = LLM(*args, **kwargs)\n"
            "    llm.model.run = lambda *a: 1 / 0\n"
            "    return llm\n"
            "serve.LLM = broken\n"
            f"serve.main(['--model', 'tiny', '--device', 'cpu', '--port', '{port}'])\n")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                               cwd=ROOT)
    while "serving" not in (line := process.stderr.readline()):
        assert line, "the server never came up"
    answers = []
    for _ in range(3):
        with contextlib.suppress(httpx.TransportError):     # it may be gone already
            answers.append(CLIENT.post(f"http://127.0.0.1:{port}/v1/completions",
                                       json={"prompt": [1, 2]}))
    assert answers and all(r.status_code == 503 and "ZeroDivisionError" in r.text for r in answers)
    assert process.wait(30) == 1
    assert "error: the engine failed: ZeroDivisionError" in process.communicate()[1]


def test_sampling_at_the_edges_hurts_nobody(text_server):
    for extreme in ({"top_p": 1e-50}, {"top_k": 10 ** 400}, {"temperature": 10 ** 400},
                    {"temperature": 1e9}, {"temperature": -1e-9}):
        r = text_server.post({"prompt": "x", "max_tokens": 3} | extreme)
        assert r.status_code == 400, r.text
    for edge in ({"temperature": 1e-50}, {"temperature": 1e-4}, {"temperature": 1e4},
                 {"top_p": 1e-6, "temperature": 1},
                 {"top_k": 2 ** 31 - 1, "temperature": 1}):
        r = text_server.post({"prompt": "x", "max_tokens": 3} | edge)
        assert r.status_code == 200, r.text
    chat = {"messages": [{"role": "user", "content": "\ud800"}]}
    for path, body in (("/v1/completions", {"prompt": "\ud800"}),
                       ("/v1/completions", {"prompt": ["a", "\ud800"]}),
                       ("/v1/chat/completions", chat)):
        content = json.dumps({"model": text_server.llm.name} | body).encode()
        r = text_server.post(content, path)
        assert r.status_code == 400, r.text
    assert text_server.get("/health").status_code == 200


def test_a_large_bad_body_does_not_stop_the_loop():
    with running(LLM("tiny", "neo", **SMALL)) as server:
        for path, start, item, end, count in (
                ("/v1/completions", b'"prompt": [', b"1,", b' "x"]', 400_000),
                ("/v1/chat/completions", b'"messages": [', b"1,", b" 1]", 400_000),
                ("/v1/completions", b'"prompt": [1], "stop": [', b'"y",', b' "x"]', 200_000)):
            r = server.post(b'{"model": "tiny", ' + start + item * count + end + b"}", path)
            assert r.status_code == 400 and len(r.text) < 1000
        fields = b"".join(b'"f%d": 1, ' % i for i in range(300_000))
        r = server.post(b"{" + fields + b'"prompt": [1]}')
        assert r.status_code == 400 and "300001 keys" in r.text
        r = server.post(b"{" + fields[:fields.index(b'"f300"')] + b'"prompt": [1]}')
        assert r.status_code == 400 and "entries" in r.text
        r = server.post({"prompt": ["\\\"" + 100_000 * ':,"\\']})    # none of it is structure
        assert r.status_code == 400 and "without a tokenizer" in r.text


def test_a_prompt_is_refused_by_its_characters_before_it_is_tokenized(text_server, monkeypatch):
    monkeypatch.setattr(type(text_server.llm.tokenizer), "encode", lambda *a: pytest.fail("called"))
    longest = text_server.llm.tokenizer.longest
    text = "x" * (400 * longest + 1)
    message = [{"role": "user", "content": text}]
    for body, path in (({"prompt": text}, "/v1/completions"),
                       ({"messages": message}, "/v1/chat/completions")):
        r = text_server.post(body, path)
        assert r.status_code == 400 and "characters" in r.json()["error"]["message"]


# ------------------------------------------------------------------------- the command line

def serve_command(*flags):
    return [sys.executable, "serve.py", "--model", "tiny", "--device", "cpu", *flags]


def test_serve_refuses_what_cannot_work_before_loading(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(serve_command("--port", port), capture_output=True, text=True,
                              timeout=60, cwd=ROOT)
    assert done.returncode == 1 and "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr and "device" not in done.stderr
    # The others in this process, as a new one takes seconds to import torch.
    monkeypatch.setattr(serve, "LLM", lambda *args, **kwargs: pytest.fail("loads the model"))
    for flag, value, message in (("--port", "99999", "--port 99999"),
                                 ("--api-key", "", "--api-key is empty"),
                                 ("--grace", "nan", "--grace nan"),
                                 ("--max-queue", "0", "--max-queue")):
        with pytest.raises(SystemExit, match="^error: .*" + message) as end:
            serve.main(["--model", "tiny", "--device", "cpu", flag, value])
        assert isinstance(end.value.code, str)      # Python prints it, and exits with 1
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", [["--simulate", "t4"], ["--testbed", "tp=2"], ["--tp", "2"]])
def test_a_simulation_cannot_be_served(flags, capsys):
    with pytest.raises(SystemExit) as end:
        serve.main(["--model", "tiny", *flags])
    assert end.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def leaving_servers():
    """grace -> a process of serve.py and its port. They start side by side, which takes seconds."""
    servers = {}
    for grace in ("30", "0.3"):
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        command = serve_command("--port", str(port), "--grace", grace, "--dtype", "fp32",
                                "--max-model-len", "400", "--gpu-blocks", "30",
                                "--cpu-mem", "0.1")
        servers[grace] = port, subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    yield servers
    for _, process in servers.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("grace, ended", [("30", "length"), ("0.3", "abort")])
def test_sigterm_in_mid_stream(leaving_servers, grace, ended):
    """Within the grace time the stream runs to its end, beyond it the requests are aborted; the
    exit code is 0 either way. Many prompts, so that a stream takes much longer than 0.3 s."""
    port, process = leaving_servers[grace]
    while "serving" not in (line := process.stderr.readline()):
        assert line, "the server never came up"
    url = f"http://127.0.0.1:{port}"

    def is_up():
        try:
            return CLIENT.get(url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    wait_for(is_up)
    body = {"model": "tiny", "prompt": [[1, 2, i] for i in range(24)], "ignore_eos": True,
            "max_tokens": 80 if ended == "length" else 390, "stream": True}
    reasons, errors = {}, []            # index of a prompt -> finish reasons of its chunks
    with CLIENT.stream("POST", url + "/v1/completions", json=body) as r:
        lines = (line for line in r.iter_lines() if line.startswith("data: {"))
        for n, line in enumerate(lines):
            if n == 3:
                process.send_signal(signal.SIGTERM)
            data = json.loads(line[6:])
            for choice in data.get("choices", []):
                reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
            if "error" in data:
                errors.append(data["error"]["message"])
    # An abort is also said as an error, because it is no way for a completion to end.
    assert errors == (["the server is shutting down"] if ended == "abort" else [])
    assert len(reasons) == 24
    for *earlier, final in reasons.values():
        assert final == ended and set(earlier) <= {None}
    assert process.wait(20) == 0


# ------------------------------------------------------------------------- bad requests

@pytest.mark.parametrize("body, message", [
    ({"prompt": [1] * 400}, "400 tokens.*limit is 400"),
    ({"prompt": "text"}, "without a tokenizer"),
    ({"prompt": []}, "empty"),
    ({}, "prompt"),
    ({"prompt": [1], "max_tokens": -1}, "max_tokens = -1"),
    ({"prompt": [1, 512]}, "0..511"),
    ({"prompt": [1, "x"]}, "must be a string"),
    ({"prompt": [1, True]}, "must be a string"),
    ({"prompt": [1], "logprobs": 21}, "logprobs"),
    ({"prompt": [1], "stream_options": {"include_usage": 1}}, "stream_options"),
    ({"prompt": [1], "temperature": -1}, "temperature"),
    ({"prompt": [1], "n": 17}, "n = 17: .*16"),
    ({"prompt": [1], "n": 0}, "n = 0: .*1"),
    ({"prompt": [1], "max_tokens": "7"}, "max_tokens = '7': .*integer"),
    ({"prompt": 5}, "prompt = 5: .*string or a list"),
    ({"prompt": [1], "stop": [5]}, r"stop = \[5\]: .*strings"),
    ({"prompt": [1], "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": [1], "logit_bias": {"x": 1}}, "logit_bias = {'x': 1.0}: .*token ids"),
    ({"prompt": [1], "logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias: 1025"),
    ({"prompt": [1], "logit_bias": {"512": 1}}, "logit_bias.*512"),
    ({"prompt": [1], "logit_bias": {"5": 101}}, "logit_bias"),
    ({"prompt": [1], "stop_token_ids": [512]}, "stop_token_ids.*512"),
    ({"prompt": [1], "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"prompt": [1], "stream": 1}, "stream"),
    ({"prompt": [1], "top_p": 0}, "top_p"),
    ({"prompt": [[]]}, "empty"),
    ({"prompt": [1], "echo": True, "logprobs": 1}, "echo"),
    ({"prompt": [1], "stop": "x"}, "stop strings")])
def test_bad_requests_get_400_in_openais_shape(server, body, message):
    r = server.post(body)
    error = r.json()["error"]
    assert r.status_code == 400 and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), r.text


def test_several_answers_to_one_prompt(server):
    """n answers, prompt by prompt; with a seed they differ from each other but not from run to
    run. The usage counts a prompt once."""
    ask = {"prompt": [[1, 2, 3], [4]], "n": 3, "max_tokens": 8, "temperature": 1.0, "seed": 5,
           "ignore_eos": True}
    first, second = server.post(ask).json(), server.post(ask).json()
    tokens = [c["token_ids"] for c in first["choices"]]
    assert tokens == [c["token_ids"] for c in second["choices"]]
    assert len(tokens) == 6 and len({tuple(t) for t in tokens}) > 3
    assert first["usage"] == {"prompt_tokens": 4, "completion_tokens": 48, "total_tokens": 52}
    alone = server.post(ask | {"prompt": [4], "n": 1, "seed": 7}).json()
    assert alone["choices"][0]["token_ids"] == tokens[5]        # seeds 5, 6, 7


def test_top_logprobs_and_echo(text_server):
    ask = {"prompt": "the cache", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    plain = text_server.post(ask).json()["choices"][0]
    assert text_server.post(ask | {"echo": True}).json()["choices"][0]["text"] == \
        "the cache" + plain["text"]
    lines = text_server.post(ask | {"echo": True, "stream": True}).text.split("\n\n")[:-2]
    assert json.loads(lines[0][6:])["choices"][0]["text"].startswith("the cache")
    found = text_server.post(ask | {"logprobs": 20}).json()["choices"][0]["logprobs"]
    for chosen, top in zip(found["token_logprobs"], found["top_logprobs"]):
        assert len(top) > 10 and max(top.values()) == pytest.approx(chosen)    # greedy
    reply = text_server.openai.chat.completions.create(
        model=text_server.llm.name, messages=[{"role": "user", "content": "x"}], max_tokens=3,
        logprobs=True, top_logprobs=2, temperature=0, extra_body={"ignore_eos": True})
    for entry in reply.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
    drawn = text_server.post(ask | {"logprobs": 1, "temperature": 1e4, "max_tokens": 20})
    found = drawn.json()["choices"][0]["logprobs"]
    for name, p, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"]):
        assert name in top and len(top) <= 2        # the chosen token, likely or not
        assert top[name] == pytest.approx(p) or max(top.values()) > p


def test_penalties_biases_and_ends(server):
    ask = {"prompt": [1, 2, 3], "max_tokens": 12, "temperature": 0, "ignore_eos": True}

    def tokens(**more):
        choice = server.post(ask | more).json()["choices"][0]
        return choice["token_ids"]
    plain = tokens()
    assert tokens(logit_bias={"7": 100}) == [7] * 12
    spread = tokens(logit_bias={"7": 100, "8": 99.5, "9": 99}, frequency_penalty=2)
    assert set(spread) == {7, 8, 9}
    assert set(tokens(logit_bias={"7": 100, "8": 99.5}, presence_penalty=2)) == {7, 8}
    assert tokens(repetition_penalty=100.0) != plain or len(set(plain)) == 12
    stop = plain[3]
    assert tokens(stop_token_ids=[stop]) == plain[:plain.index(stop) + 1]
    late = tokens(stop_token_ids=[stop], min_tokens=8)
    assert len(late) >= 8 and stop not in late[:8]


@pytest.mark.parametrize("given, wanted", [('{"x": 1}', {"x": 1}), ("{x", "{x"), (None, None)])
def test_templates_get_the_arguments_of_tool_calls_as_objects(given, wanted):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    message = Message(role="assistant", tool_calls=[call])
    assert message.for_template()["tool_calls"][0]["function"]["arguments"] == wanted
    assert call["function"]["arguments"] == given
    assert "tool_calls" not in Message(role="assistant", tool_calls=[]).for_template()


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer_config.json", b"[]", "must be a JSON object"),
    ("tokenizer_config.json", b"{", "not valid JSON"),
    ("tokenizer_config.json", b'{"chat_template": 5}', "must be a text, not a int"),
    ("tokenizer_config.json", b'{"chat_template": [1, {"template": "x"}]}', None),
    ("tokenizer_config.json", b'{"chat_template": "x", "bos_token": 5}', None),
    ("tokenizer_config.json", b'{"chat_template": "{{"}', "not one that jinja2 reads"),
    ("chat_template.jinja", b"\xff\xfe", "not UTF-8")])
def test_a_damaged_chat_template_is_said_by_its_file(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    if message is None:
        load_chat_template(str(tmp_path), object())
        return
    with pytest.raises(ValueError, match=message) as error:
        load_chat_template(str(tmp_path), object())
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content, status", [
    (b"{", 400),
    (b"\xff\xfe\x00", 400),
    (b"", 400),
    (b"[1]", 400),
    (b'"x"', 400),
    (b"[" * 20000, 400),
    (b'{"model": "' + b"x" * 60_000 + b'"}', 413),
    (b'{"model": "tiny", "prompt": [1], "temperature": NaN}', 400),
    (b'{"model": "\\ud800", "prompt": [1]}', 400),
    (b'{"model": "tiny", "prompt": [1], "seed": ' + b"9" * 5000 + b"}", 400),
    (b'{"model": "tiny", "prompt": ["\\ud800"]}', 400)])
def test_bodies_that_are_no_request(server, content, status):
    r = server.post(content)
    assert r.status_code == status and "message" in r.json()["error"]


def test_no_chat_template_is_said(server):
    messages = [{"role": "user", "content": "hi"}]
    r = server.post({"messages": messages}, "/v1/chat/completions")
    assert r.status_code == 400 and "without a chat template" in r.json()["error"]["message"]
    assert server.get("/v1/nothing").status_code == 404


def test_the_served_model_has_a_name_of_its_own(server):
    """--served-model-name is the name for clients, in every answer and error."""
    from starlette.testclient import TestClient  # fastapi brings it
    app = TestClient(serve.Routes(server.llm, server.engine, name="nick").app())
    assert [m["id"] for m in app.get("/v1/models").json()["data"]] == ["nick"]
    r = app.post("/v1/completions", json={"model": "tiny", "prompt": [1], "max_tokens": 1})
    assert r.status_code == 404 and "this server has 'nick'" in r.text
    r = app.post("/v1/completions", json={"model": "nick", "prompt": [1], "max_tokens": 1})
    assert r.status_code == 200 and r.json()["model"] == "nick"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (st.lists(inner, max_size=4)
                   | st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8)
FIELDS = st.sampled_from((
    "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream",
    "stream_options", "logprobs", "n", "messages", "user", "ignore_eos", "model", "logit_bias",
    "echo"))
VALID = {"model": "tiny", "prompt": [1, 2], "max_tokens": 2}
BODIES = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda x: json.dumps(x).encode()),
    st.dictionaries(FIELDS, JSON, max_size=5).map(lambda d: json.dumps(VALID | d).encode()))


@settings(max_examples=int(os.environ.get("NEO_EXAMPLES", 60)), deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]), body=BODIES)
def test_no_body_makes_the_server_fail(server, path, body):
    r = server.post(body, path)
    assert r.status_code < 500
    assert r.status_code == 200 or "message" in r.json()["error"]


def test_settled_text_holds_back_what_may_begin_a_stop_string():
    out = RequestOutput(Request(0, [], 16), SamplingParams(stop=["abc", "z"]), "xxab")
    assert out.settled_text() == "xx"
    out.request.finish_reason = "length"
    assert out.settled_text() == "xxab"
    short = RequestOutput(Request(0, [], 16), SamplingParams(stop=["abcde"]), "abc")
    assert short.settled_text() == ""


# ------------------------------------------------------------------------------ the live page

def test_live_page_asks_no_other_site(server):
    """Its policy allows its own script and style alone; text becomes HTML nowhere."""
    r = server.get("/")
    assert r.status_code == 200 and r.headers["content-type"].startswith("text/html")
    assert not re.search(r"https?:|//\w|src=|@import|innerHTML|insertAdjacent|eval\(", re.sub(
        r"^ *//.*|; +//.*", "", r.text, flags=re.M))
    policy = r.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and policy.count("'sha256-") == 2


def test_live_tells_the_owners_that_the_cache_knows():
    """While requests run, after a swap to the CPU tier, and none at the end."""
    llm, truth = LLM("tiny", "neo", **SMALL), {}
    with running(llm) as server:
        record = llm.on_iteration

        def record_and_check(plan, spans, start, end):
            record(plan, spans, start, end)
            truth[llm.scheduler.iteration] = {
                (seq.tier, block): request for request, seq in llm.kv.sequences.items()
                for block in seq.blocks}
            time.sleep(0.002)
        llm.on_iteration = record_and_check
        server.get("/live")
        body = {"prompt": [[i] * 40 for i in range(1, 13)], "max_tokens": 80, "ignore_eos": True}
        call = threading.Thread(target=server.post, args=(body,))
        call.start()
        seen = []
        while call.is_alive():
            seen.append(server.get("/live").json())
        call.join()
        seen = [live for live in seen if live["iteration"] and live["busy"]]
        for live in seen:
            assert truth[live["iteration"]] == {
                (tier, block): request for tier, part in live["tiers"].items()
                for block, request in enumerate(part["squares"]) if request >= 0}
            assert len(live["iterations"]) <= 8
            assert all(0 <= start <= end <= it["length"] + 1 for it in live["iterations"]
                       for _, _, _, start, end in it["spans"])
        assert {tier for live in seen for tier, block in truth[live["iteration"]]} == {"gpu", "cpu"}
        assert max(live["tokens_per_s"] for live in seen) > 0
        end = server.get("/live").json()
        assert not end["busy"] and end["tokens_per_s"] == 0 and end["waiting"] == 0
        for tier in end["tiers"].values():
            assert tier["used"] == 0 and set(tier["squares"]) <= {-1}
        assert end["swapped_blocks"] == llm.stats()["swapped_blocks"]
    assert live_view.squares([(7, (0, 5)), (8, (4,))], 6, 2) == [7, -1, 8]


def test_nothing_is_recorded_while_nobody_looks_and_an_error_costs_the_picture_alone(monkeypatch):
    body = {"prompt": [1] * 20, "max_tokens": 5, "ignore_eos": True}
    with running(LLM("tiny", "neo", **SMALL), api_key="s3cret") as server:
        key, view = {"Authorization": "Bearer s3cret"}, server.routes.view
        assert server.get("/live").status_code == 401 and server.get("/").status_code == 200
        server.post(body, headers=key)
        assert view.latest is None
        assert CLIENT.get(server.url + "/live", headers=key).json()["iterations"] == []
        server.post(body, headers=key)
        first = view.latest
        assert len(first.iterations) == 5 and hash(first)       # of immutable parts alone
        server.post(body, headers=key)
        assert view.latest is not first and len(first.iterations) == 5
        view.until, before = 0.0, view.latest                   # as if 2 seconds had passed
        server.post(body, headers=key)
        assert view.latest is before
        assert CLIENT.get(server.url + "/live", headers=key).json()["iterations"] == []
        monkeypatch.setattr(view, "_snapshot", lambda *args: 1 / 0)
        assert server.post(body, headers=key).json()["usage"]["completion_tokens"] == 5
        assert server.llm.on_iteration is None and nothing_held(server.llm)


def browser_page(stack):
    """A page of a headless Chromium, or the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium")
    browser = stack.enter_context(playwright.sync_playwright()).chromium.launch(
        executable_path=chromium, args=["--no-sandbox"])
    stack.callback(browser.close)
    return browser.new_page()


COUNT_COLOURS = """canvas => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const colours = new Set();
    for (let i = 0; i < data.length; i += 4) {
        if (data[i + 3] === 255) colours.add((data[i] << 16) + (data[i + 1] << 8) + data[i + 2]);
    }
    return colours.size;
}"""


def test_live_page_in_a_browser(text_server):
    """Chat answers, a flood's blocks appear and leave, Esc ends an answer; no error is logged."""
    server, errors = text_server, []
    with contextlib.ExitStack() as stack:
        page = browser_page(stack)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))

        def colours():      # of both tiers: 2 if all blocks are free
            return sum(page.eval_on_selector(f"#{tier}", COUNT_COLOURS) for tier in ("gpu", "cpu"))
        page.goto(server.url + "/")
        page.wait_for_selector("#numbers dd")
        page.fill("#max-tokens", "12")
        page.fill("#text", "<b>hello</b>")
        page.press("#text", "Enter")
        wait_for(lambda: "assistant" in page.inner_html("#log") and page.is_enabled("#send"))
        assert page.inner_text("#log .user") == "<b>hello</b>"
        assert page.locator("#log .error, #log b").count() == 0
        page.fill("#num", "12")
        page.fill("#output-len", "300")
        page.click("#flood button")
        wait_for(lambda: colours() > 4)
        page.fill("#max-tokens", "300")
        page.fill("#text", "again")
        page.press("#text", "Enter")
        wait_for(lambda: page.is_enabled("#stop"))
        page.press("#text", "Escape")
        wait_for(lambda: page.is_enabled("#send"))
        wait_for(lambda: "output tokens/s" in page.inner_text("#flood-text"))
        wait_for(lambda: nothing_held(server.llm) and colours() == 2)
        assert page.inner_text("#gpu-text").startswith("GPU tier: 0 of 26 blocks used")
        assert errors == []
