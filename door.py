"""The door between HTTP and the engine: requests in, tokens out, one thread on either side.

    HTTP's event loop    submit -> inbox ..........   Stream: Pieces of text             drop -> dropped
    the engine's thread           enter -> llm.step() -> deliver, one call to the event loop per iteration -> leave

The engine's thread alone touches the LLM. It never waits for a reader: a stream that falls `buffer` tokens behind is
aborted. It sleeps while nothing is in flight. Metrics are Prometheus's.
"""
import asyncio
import math
import sys
import threading
import time
import traceback
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LEAVING = "the server is shutting down"
MOST_FAILURES = 3           # steps that may fail in a row before the engine gives up
ILL_SECONDS = 10.0          # that /health tells of a step that failed, if no other step has succeeded since
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)      # histogram buckets


class Refused(Exception):
    """Not now: an HTTP status, its headers, and why."""

    def __init__(self, status, message, **headers):
        super().__init__(message)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}


class Piece(NamedTuple):
    """What one iteration added to one prompt of a call; all of it, in the end."""
    index: int
    text: str
    token_ids: list
    logprobs: list              # empty unless asked for
    finish_reason: str          # None before the end


class Stream:
    """The tokens of one call's prompts: iterate, on the event loop that made it, for Pieces. Afterwards `outs` are the
    RequestOutputs, and `error` is None or says why it broke off."""

    def __init__(self, door, num_prompts, patience):
        self.patience = patience                        # pieces it may fall behind
        self.door, self.loop, self.events = door, asyncio.get_running_loop(), asyncio.Queue()
        self.outs, self.text, self.ids = [None] * num_prompts, [0] * num_prompts, [0] * num_prompts  # shown so far
        self.sent = self.read = 0                       # the first written by the engine's thread, the other by the reader
        self.open, self.error, self.started, self.first = num_prompts, None, time.perf_counter(), [None] * num_prompts

    async def __aiter__(self):
        while (event := await self.events.get()) is not None:
            self.read += 1
            yield event

    def close(self):
        """No more is wanted. Harmless at the end."""
        self.door.drop(self)


class Door:
    """Starts the engine's thread.

    max_queue  requests that may wait for their prefill;  buffer  tokens a reader may fall behind
    """

    def __init__(self, llm, max_queue=256, buffer=1024):
        self.llm, self.max_queue, self.buffer = llm, max_queue, buffer
        self.cond = threading.Condition()               # guards the next four
        self.inbox, self.dropped = [], []               # (Stream, prompts, params); Streams
        self.closing = self.aborting = False
        self.failure, self.failed_at, self.dead = None, 0.0, False      # why and when the last step failed; for good?
        self.streams = {}                               # request id -> (Stream, index)
        self.meters = Meters(llm)
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    # ---- HTTP's side

    def submit(self, prompts, params, streamed=True):
        """Queue checked prompts (lists of token ids); their Stream. One that is not streamed is read at its end and may fall
        behind. Raises Refused if the queue is full or the engine is gone, ValueError if the queue could never take so many."""
        if len(prompts) > self.max_queue:
            raise ValueError(f"{len(prompts)} prompts in one call: at most {self.max_queue} may wait here (--max-queue)")
        with self.cond:
            if self.dead or self.closing:
                raise Refused(503, self.failure or LEAVING)
            waiting = sum(len(entering) for _, entering, _ in self.inbox) + len(self.llm.scheduler.waiting)
            if waiting + len(prompts) > self.max_queue:
                raise Refused(429, f"{waiting} requests are waiting, of at most {self.max_queue}: try again later",
                              Retry_After="1")
            stream = Stream(self, len(prompts), self.buffer * len(prompts) if streamed else math.inf)
            self.inbox.append((stream, prompts, params))
            self.cond.notify()
        return stream

    def drop(self, stream):
        with self.cond:
            if stream.open:
                self.dropped.append(stream)
                self.cond.notify()

    def close(self):
        """Take no more requests; the thread ends with the last one in flight."""
        with self.cond:
            self.closing = True
            self.cond.notify()

    def abort_all(self):
        """Take no more requests and end those in flight."""
        with self.cond:
            self.closing = self.aborting = True
            self.cond.notify()

    def join(self):
        self.thread.join()

    def illness(self):
        """Why the engine is not to be trusted just now, or None."""
        return self.failure if self.dead or time.perf_counter() - self.failed_at < ILL_SECONDS else None

    # ---- the engine's side

    def _run(self):
        """The loop. A step that fails has aborted the requests it worked on; the rest go on, unless several fail in a row."""
        failures = 0
        try:
            while self._enter_and_leave():
                try:
                    outs = self.llm.step()
                    failures, self.failure = 0, None
                except Exception as error:
                    traceback.print_exc(file=sys.stderr)
                    failures, self.failed_at = failures + 1, time.perf_counter()
                    self.failure = f"the engine failed: {type(error).__name__}: {error}"
                    if failures == MOST_FAILURES:
                        raise
                    for stream in {s for request_id, (s, _) in self.streams.items() if request_id not in self.llm.outputs}:
                        self._abort(stream, self.failure)
                    continue
                self._deliver(outs)
        except BaseException as error:                  # whatever it is, nobody may be left waiting
            with self.cond:
                self.dead, self.failure = True, self.failure or f"the engine failed: {type(error).__name__}: {error}"
                orphans = {s for s, _ in self.streams.values()} | {s for s, _, _ in self.inbox}
                self.inbox.clear()
            for stream in orphans:
                self._end(stream, self.failure)

    def _enter_and_leave(self):
        """Sleep until there is something to do; let requests in and out. False: all is over."""
        with self.cond:
            self.cond.wait_for(lambda: self.inbox or self.dropped or self.llm.outputs or self.closing)
            for stream, prompts, params in self.inbox:
                for i, ids in enumerate(prompts):
                    request_id = self.llm.add_request(ids, params)
                    stream.outs[i], self.streams[request_id] = self.llm.outputs[request_id], (stream, i)
            self.inbox.clear()
            dropped, self.dropped = self.dropped, []
            if self.aborting:
                dropped += {s for s, _ in self.streams.values()}
            over = self.closing and not self.llm.outputs
        for stream in dropped:
            self._abort(stream, LEAVING if self.aborting else None)
        return not over

    def _abort(self, stream, error=None):
        """End a stream and what is left of its requests; some may have been aborted already."""
        stream.error = stream.error or error
        for out in stream.outs:
            self.llm.abort(out.request_id)
        self._deliver([out for out in stream.outs if out.request_id in self.streams])

    def _deliver(self, outs):
        """Hand out what a step produced, with one call to each event loop."""
        now, batches, slow = time.perf_counter(), {}, []
        for out in outs:
            stream, i = self.streams[out.request_id]
            if stream.first[i] is None and out.token_ids:
                stream.first[i] = now
                self.meters.ttft.observe(now - stream.started)
            text, ids = out.settled_text(), len(out.token_ids)
            new = slice(stream.ids[i], ids)
            piece = Piece(i, text[stream.text[i]:], out.token_ids[new], out.logprobs[new], out.finish_reason)
            stream.text[i], stream.ids[i] = len(text), ids
            stream.sent += 1
            batch = batches.setdefault(stream.loop, [])
            batch.append((stream, piece))
            if out.finish_reason:
                del self.streams[out.request_id]
                self.meters.finished(out, now - (stream.first[i] or now))
                stream.open -= 1
                if not stream.open:
                    batch.append((stream, None))
            elif stream.sent - stream.read > stream.patience:
                slow.append(stream)
        for loop, batch in batches.items():
            self._call(loop, batch)
        for stream in dict.fromkeys(slow):
            self._abort(stream, f"aborted: the client fell more than {self.buffer} tokens behind")

    def _end(self, stream, error):
        stream.open, stream.error = 0, error
        self._call(stream.loop, [(stream, None)])

    @staticmethod
    def _call(loop, batch):
        def put():
            for stream, event in batch:
                stream.events.put_nowait(event)
        try:
            loop.call_soon_threadsafe(put)
        except RuntimeError:                            # the event loop has ended: nobody reads any more
            pass


class Meters:
    """What /metrics tells."""

    def __init__(self, llm):
        self.llm, self.registry = llm, CollectorRegistry()
        new = lambda kind, name, text, *labels, **kw: kind(f"neo_{name}", text, labels, registry=self.registry, **kw)
        self.waiting = new(Gauge, "requests_waiting", "Requests that wait for their prefill")
        self.running = new(Gauge, "requests_running", "Requests that hold KV, by tier", "tier")
        self.used = new(Gauge, "kv_blocks_used", "KV blocks in use, by tier", "tier")
        self.total = new(Gauge, "kv_blocks_total", "KV blocks, by tier", "tier")
        self.ttft = new(Histogram, "ttft_seconds", "Time to the first token", buckets=SECONDS)
        self.tpot = new(Histogram, "tpot_seconds", "Time per output token after the first", buckets=SECONDS)
        self.prompts = new(Counter, "prompt_tokens", "Prompt tokens of finished requests")
        self.tokens = new(Counter, "output_tokens", "Output tokens of finished requests")
        self.requests = new(Counter, "requests", "Finished requests, by reason", "reason")

    def finished(self, out, seconds):
        """seconds: from its first token to its last."""
        self.requests.labels(out.finish_reason).inc()
        self.prompts.inc(len(out.prompt_token_ids))
        self.tokens.inc(len(out.token_ids))
        if len(out.token_ids) > 1:
            self.tpot.observe(seconds / (len(out.token_ids) - 1))

    def text(self):
        """Prometheus text."""
        scheduler = self.llm.scheduler
        self.waiting.set(len(scheduler.waiting))
        for tier in ("gpu", "cpu"):
            self.running.labels(tier).set(len(scheduler.running[tier]))
            self.total.labels(tier).set(scheduler.num_blocks[tier])
            self.used.labels(tier).set(scheduler.num_blocks[tier] - scheduler.free[tier])
        return generate_latest(self.registry)
