"""An OpenAI-compatible server on the engine: completions, chat, streaming, metrics, a live page.

    python serve.py --model PATH --port 8000        (clients: see README)

The engine runs in a thread of its own: server/engine_thread.py. Refuses to know how a step
works. Test: pytest server
"""
import asyncio
import contextlib
import gc
import json
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from chat import load_chat_template
from neo import LLM
from options import Parser, add_engine_flags, engine_options
from server.engine_thread import EngineThread, Refused
from server.guard import BoundedProtocol, Guard
from server.live import LiveView, load_page
from server.openapi_doc import describe
from server.protocol import Chat, Completion, Reply, error_json, error_response, parse_body


class Routes:
    """What the server answers, for one LLM that an EngineThread steps.

    template  chat messages -> prompt token ids (see chat.py), or None
    name      of the model, for clients; default: the engine's
    """

    def __init__(self, llm, engine, template=None, name=None):
        self.llm, self.engine, self.name = llm, engine, name or llm.name
        self.template = template and partial(template, max_tokens=llm.max_request_len)
        self.model = {"id": self.name, "object": "model", "created": 0, "owned_by": "neo",
                      "max_model_len": llm.max_request_len}
        self.view, self.page = LiveView(llm, self.name, template is not None), load_page()
        self.parsing = ThreadPoolExecutor(1, "parse")           # see parse_body
        self.tokenizing = ThreadPoolExecutor(2, "tokenize")     # a long prompt takes a core

    def app(self, api_key=None, max_body=1 << 22):
        """The FastAPI application. api_key: None asks for none; max_body: bytes."""
        app = FastAPI(title="NEO", separate_input_output_schemas=False)
        app.add_middleware(Guard, api_key=api_key, max_body=max_body)
        app.add_exception_handler(
            HTTPException, lambda request, error: error_response(
                error.status_code, error.detail, headers=error.headers))
        for path, route in (("/v1/models", self.models), ("/v1/models/{name:path}", self.one_model),
                            ("/health", self.health), ("/metrics", self.metrics),
                            ("/live", self.live)):
            app.get(path, **describe(path))(route)
            app.head(path, include_in_schema=False)(route)
        app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(self.live_page)
        for path, route in (("/v1/completions", self.completions),
                            ("/v1/chat/completions", self.chat)):
            app.post(path, **describe(path))(route)
        return app

    # Routes have no docstrings: FastAPI would publish them under /docs.
    async def completions(self, http: Request):
        return await self.answer(Completion, http)

    async def chat(self, http: Request):
        if self.template is None:
            return error_response(
                400, f"{self.name} comes without a chat template: use /v1/completions")
        return await self.answer(Chat, http)

    async def answer(self, kind, http):
        """Both POST routes: check the body, give its prompts to the engine, stream or collect."""
        loop = asyncio.get_running_loop()
        try:
            raw = await http.body()
            body = await loop.run_in_executor(self.parsing, parse_body, raw, kind)
            if body.model not in (None, self.name):
                return error_response(404, self.unknown(body.model), "model_not_found")
            if kind is Chat:
                # without a limit it is the engine's, as in OpenAI's chat
                limits = body.max_completion_tokens, body.max_tokens, self.llm.max_request_len
                body.max_tokens = next(n for n in limits if n is not None)
            samples = body.params()
            ids, echo = await loop.run_in_executor(
                self.tokenizing, self.token_ids, body, samples[0])
            prompts = [p for p in ids for _ in samples]
            stream = self.engine.submit(prompts, samples * len(ids), bool(body.stream))
        except ClientDisconnect:
            return PlainTextResponse("", 499)       # nobody reads it
        except Refused as refusal:
            return error_response(refusal.status, refusal, headers=refusal.headers)
        except ValueError as error:
            return error_response(400, error)
        reply = Reply(body, self.name, self.llm.tokenizer, prompts,
                      [t for t in echo for _ in samples])
        if body.stream:
            return StreamingResponse(self.events(stream, reply), media_type="text/event-stream")
        leaving = asyncio.create_task(self.drop_if_client_leaves(stream, http))
        try:
            async for _ in stream:
                pass
        finally:
            leaving.cancel()
            self.engine.drop(stream)
        if leaving.done():
            return PlainTextResponse("", 499)       # nobody reads it
        if stream.error:
            return error_response(503, stream.error)
        text = await loop.run_in_executor(self.tokenizing, reply.whole, stream.outs)
        return Response(text, media_type="application/json")

    def token_ids(self, body, params):
        """(token ids of each prompt of a body, the texts to echo). Runs in a thread, because it
        would block the event loop."""
        prompts = body.prompts(self.template)
        ids = [self.llm.check_prompt(prompt, params) for prompt in prompts]
        echoes = isinstance(body, Completion) and body.echo
        return ids, [self.as_text(prompt) for prompt in prompts] if echoes else []

    def as_text(self, prompt):
        if isinstance(prompt, str):
            return prompt
        return self.llm.tokenizer.decode(prompt) if self.llm.tokenizer else ""

    async def drop_if_client_leaves(self, stream, http):
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.engine.drop(stream)

    async def events(self, stream, reply):
        """The server-sent events of a Stream."""
        def event(data):
            return f"data: {json.dumps(data)}\n\n"
        try:
            async for delta in stream:
                yield event(reply.chunk(delta))
            if stream.error:
                yield event(error_json(503, stream.error))
            elif reply.wants_usage:
                yield event(reply.usage_chunk(stream.outs))
            yield "data: [DONE]\n\n"
        finally:
            self.engine.drop(stream)

    def models(self):
        return JSONResponse({"object": "list", "data": [self.model]})

    def one_model(self, http: Request):
        name = http.path_params["name"]
        if name != self.name:
            return error_response(404, self.unknown(name), "model_not_found")
        return JSONResponse(self.model)

    def unknown(self, name):
        return f"unknown model {name!r:.200}: this server has {self.name!r}"

    def health(self):
        failed = self.engine.health_error()
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    def metrics(self):
        text = self.engine.metrics.text()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def live(self):
        return JSONResponse(self.view.report())

    def live_page(self):
        html, headers = self.page
        return HTMLResponse(html, headers=headers)


class Server(uvicorn.Server):
    """uvicorn, but on SIGTERM or Ctrl-C it takes no more requests, gives those in flight `grace`
    seconds and exits with 0. A second signal ends them at once. It leaves, too, when the engine
    is dead."""

    def __init__(self, config, engine, grace):
        super().__init__(config)
        self.engine, self.grace = engine, grace

    async def on_tick(self, counter):
        return await super().on_tick(counter) or self.engine.dead

    @contextlib.contextmanager
    def capture_signals(self):
        loop = asyncio.get_running_loop()

        def leave():
            self.force_exit = self.should_exit      # at the second signal
            self.should_exit = True
            self.engine.close(abort=self.force_exit)
            loop.call_later(self.grace, self.engine.close, True)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, leave)
        yield


# ------------------------------------------------------------------------------ command line

RANGES = {"max_queue": (1, 10**9), "max_body": (1, 10**12), "buffer": (1, 10**9),
          "grace": (0, 10**6), "port": (0, 65535)}


def parse_args(argv, parser):
    """The flags of a Parser, and a server's. Raises ValueError on values that cannot work."""
    parser.add_argument("--model", required=True,
                        help="checkpoint folder, name on the Hugging Face hub, smollm2, or a "
                        "preset (random weights)")
    parser.add_argument("--served-model-name", metavar="NAME",
                        help="the model's name for clients (default: as --model)")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to bind (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", metavar="KEY", help="ask clients for this key")
    parser.add_argument("--max-queue", type=int, default=256, metavar="N",
                        help="requests that may wait; more get HTTP 429")
    parser.add_argument("--max-body", type=int, default=1 << 22, metavar="BYTES",
                        help="of a request; larger ones get HTTP 413")
    parser.add_argument("--buffer", type=int, default=1024, metavar="N",
                        help="tokens a client may fall behind before its request is aborted")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S",
                        help="seconds that requests in flight get when the server leaves")
    add_engine_flags(parser, leave_out=("simulate",))
    args = parser.parse_args(argv)
    for name, (lowest, highest) in RANGES.items():
        value = getattr(args, name)
        if not lowest <= value <= highest:      # so that NaN is refused, too
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value}: must be from {lowest} to {highest}")
    if args.api_key == "":
        raise ValueError("--api-key is empty: give a key, or leave the flag out to ask for none")
    return args


def bind(host, port):
    """A socket that is bound but does not listen yet, so that a client is refused while weights
    load, and does not hang. Raises ValueError if it cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with says_where(host, port):
        listener.bind((host, port))
    return listener


@contextlib.contextmanager
def says_where(host, port):
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}): "
                         "choose another with --port") from None


def application(args):
    """Parsed flags -> an LLM, its running EngineThread and their FastAPI application."""
    llm = LLM(args.model, args.strategy, **engine_options(args))
    template = load_chat_template(llm.path, llm.tokenizer)
    engine = EngineThread(llm, args.max_queue, args.buffer)
    routes = Routes(llm, engine, template, args.served_model_name)
    return llm, engine, routes.app(args.api_key, args.max_body)


def main(argv=None):
    try:
        args = parse_args(argv, Parser("Serve a model through OpenAI's HTTP interface."))
        listener = bind(args.host, args.port)       # before loading, which may take minutes
        llm, engine, app = application(args)
        with says_where(args.host, args.port):
            listener.listen(1024)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first request")
    print(llm.describe(), file=sys.stderr)
    # 10 s more than `grace`, because aborted requests end only with the present iteration.
    config = uvicorn.Config(app, log_level="warning", http=BoundedProtocol,
                            timeout_graceful_shutdown=int(args.grace) + 10)
    url = f"http://{args.host}:{listener.getsockname()[1]}"
    print(f"serving    {url}/v1, and a live page at {url}/", file=sys.stderr, flush=True)
    sys.setswitchinterval(0.001)    # the engine gets the GIL back after 1 ms, not after 5
    gc.collect()
    gc.freeze()         # the garbage collector need not search what stays, which takes 0.1 s
    Server(config, engine, args.grace).run([listener])
    if engine.dead:     # the exit code tells a supervisor to start anew
        sys.exit(f"error: {engine.failure} ({engine.num_failures} in a row); see above")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    engine.close(abort=True)
    engine.join()
    llm.close()


if __name__ == "__main__":
    main()
