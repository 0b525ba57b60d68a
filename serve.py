"""An OpenAI-compatible server on the engine: completions, chat, streaming, metrics.

    python serve.py --model PATH [--port 8000]
    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
         -d '{"model": "PATH", "prompt": "The capital of France is", "max_tokens": 16, "stream": true}'

The engine's loop runs in one thread of its own (door.py), HTTP in another. Knows nothing of the engine beyond LLM.
"""
import argparse
import asyncio
import contextlib
import hmac
import json
import signal
import socket
import sys
import time
import uuid

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from checkpoint import load_chat_template
from door import Door, Piece, Refused
from neo import LLM, STRATEGIES, add_engine_args, engine_args
from protocol import Chat, Completion, choice, problem, said_error, usage


class Limits:
    """ASGI middleware: the API key, and a bound on the size of a body, before anybody reads either."""

    def __init__(self, app, api_key, max_body):
        self.app, self.max_body, self.key = app, max_body, api_key and f"Bearer {api_key}".encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, size = dict(scope["headers"]), 0
        given = headers.get(b"authorization", b"")
        if self.key and scope["path"].startswith("/v1/") and not hmac.compare_digest(given, self.key):
            return await problem(401, "missing or wrong API key", "invalid_api_key")(scope, receive, send)

        async def bounded():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"the body is larger than {self.max_body} bytes (--max-body)")
            return message
        await self.app(scope, bounded, send)


def make_app(llm, door, template=None, api_key=None, max_body=1 << 22):
    """The FastAPI application on a running Door. template: chat messages -> prompt token ids, or None."""
    app = FastAPI(title="NEO")
    app.add_middleware(Limits, api_key=api_key, max_body=max_body)
    app.exception_handler(HTTPException)(lambda request, e: problem(e.status_code, e.detail))

    @app.exception_handler(RequestValidationError)
    def invalid(request, error):
        first = error.errors()[0]
        return problem(400, f"{'.'.join(map(str, first['loc'][1:])) or 'body'}: {first['msg']}")

    async def answer(http, kind, body, make_prompts, logprobs):
        """Both endpoints: check, hand to the engine, stream or collect."""
        try:
            if body.model != llm.name:
                raise ValueError(f"unknown model {body.model!r}: this server has {llm.name!r}")
            params = body.params(logprobs)
            ids = await run_in_threadpool(lambda: [llm.check(p, params) for p in make_prompts()])
            stream = door.submit(ids, params, bool(body.stream))
        except Refused as refusal:
            return problem(refusal.status, refusal, headers=refusal.headers)
        except ValueError as error:
            return problem(400, error)
        head = {"id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                "model": llm.name}
        name = "chat.completion" if kind == "chat" else "text_completion"
        if body.stream:
            head["object"] = name + ".chunk" if kind == "chat" else name
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(events(stream, kind, head, logprobs, with_usage), media_type="text/event-stream")
        collecting, gone = asyncio.ensure_future(collect(stream)), asyncio.ensure_future(disconnected(http))
        try:
            await asyncio.wait((collecting, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not collecting.done():
                collecting.cancel()
                stream.close()
        if not collecting.done():
            return PlainTextResponse("", 499)                                          # nobody is there to read it
        if stream.error:
            return problem(503, stream.error)
        whole = (Piece(i, o.text, o.token_ids, o.logprobs, o.finish_reason) for i, o in enumerate(stream.outs))
        choices = [choice(kind, piece, names(piece) if logprobs else None, False) for piece in whole]
        return JSONResponse(head | {"object": name, "choices": choices, "usage": usage(stream.outs)})

    def names(piece):
        return [llm.tokenizer.decode([t]) if llm.tokenizer else str(t) for t in piece.token_ids]

    async def disconnected(http):
        while (await http.receive())["type"] != "http.disconnect":
            pass

    async def collect(stream):
        async for _ in stream:
            pass

    async def events(stream, kind, head, logprobs, with_usage):
        line = lambda data: f"data: {json.dumps(data)}\n\n"
        try:
            begun = set()
            async for piece in stream:
                said = choice(kind, piece, names(piece) if logprobs else None, True, piece.index not in begun)
                yield line(head | {"choices": [said]})
                begun.add(piece.index)
            if stream.error:
                yield line(said_error(503, stream.error))
            elif with_usage:
                yield line(head | {"choices": [], "usage": usage(stream.outs)})
            yield "data: [DONE]\n\n"
        finally:
            stream.close()

    @app.post("/v1/completions")
    async def completions(body: Completion, http: Request):
        return await answer(http, "text", body, body.prompts, body.logprobs is not None)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, http: Request):
        if template is None:
            return problem(400, f"{llm.name} comes without a chat template: use /v1/completions")
        asked = (body.max_completion_tokens, body.max_tokens, llm.max_request_len)     # by default to the end, as OpenAI's chat
        body.max_tokens = next(n for n in asked if n is not None)
        prompts = lambda: [template([{"role": m.role, "content": m.text()} for m in body.messages])]
        return await answer(http, "chat", body, prompts, bool(body.logprobs))

    model = {"id": llm.name, "object": "model", "created": 0, "owned_by": "neo", "max_model_len": llm.max_request_len}

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str):
        return model if name == llm.name else problem(404, f"unknown model {name!r}: this server has {llm.name!r}")

    @app.get("/health")
    def health():
        illness = door.illness()
        return problem(503, illness) if illness else {"status": "ok"}

    @app.get("/metrics")
    def metrics():
        return PlainTextResponse(door.meters.text(), media_type="text/plain; version=0.0.4")

    return app


class Server(uvicorn.Server):
    """uvicorn that on SIGTERM or Ctrl-C stops accepting, gives requests a grace time, and leaves with 0; at the second
    signal at once."""

    def __init__(self, config, door, grace):
        super().__init__(config)
        self.door, self.grace = door, grace

    @contextlib.contextmanager
    def capture_signals(self):
        loop = asyncio.get_running_loop()

        def leave():
            if self.should_exit:
                self.door.abort_all()
                self.force_exit = True
            else:
                self.door.close()
                loop.call_later(self.grace, self.door.abort_all)
                self.should_exit = True
        for s in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(s, leave)
        yield


def main(argv=None):
    parser = argparse.ArgumentParser(description="Serve a model through OpenAI's HTTP interface.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint folder, or a preset (random weights)")
    parser.add_argument("--strategy", default="neo", help=", ".join(STRATEGIES))
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", metavar="KEY", help="ask clients for this key")
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests that may wait; more get HTTP 429")
    parser.add_argument("--max-body", type=int, default=1 << 22, metavar="BYTES", help="of a request; larger ones get HTTP 413")
    parser.add_argument("--buffer", type=int, default=1024, metavar="N",
                        help="tokens a client may fall behind before its request is aborted")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S",
                        help="seconds that requests in flight get when the server leaves")
    add_engine_args(parser)
    args = parser.parse_args(argv)
    try:
        for name, least, most in (("max_queue", 1, 10 ** 9), ("max_body", 1, 10 ** 12), ("buffer", 1, 10 ** 9),
                                  ("grace", 0, 10 ** 6), ("port", 0, 65535)):
            if not least <= getattr(args, name) <= most:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {least} to {most}")
        if args.api_key == "":
            raise ValueError("--api-key is empty: give a key, or leave the flag out to ask for none")
        try:                                                                           # now, not after minutes of loading
            listening = socket.create_server((args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET)
        except OSError as error:
            raise ValueError(f"cannot listen on {args.host}, port {args.port} ({error}): choose another with --port") from None
        llm = LLM(args.model, args.strategy, **engine_args(args))
        template = load_chat_template(llm.name, llm.tokenizer)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first request")
    print(llm.describe(), file=sys.stderr)
    door = Door(llm, args.max_queue, args.buffer)
    config = uvicorn.Config(make_app(llm, door, template, args.api_key, args.max_body), log_level="warning",
                            timeout_graceful_shutdown=int(args.grace) + 10)            # an iteration may take a while to end
    print(f"serving    http://{args.host}:{listening.getsockname()[1]}/v1", file=sys.stderr, flush=True)
    Server(config, door, args.grace).run([listening])
    signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGINT, signal.SIG_IGN)
    door.abort_all()
    door.join()


if __name__ == "__main__":
    main()
