"""The engine's thread: HTTP hands requests in, the thread steps the LLM and hands text out.

    HTTP's event loop   submit -> inbox           async for delta in stream     drop -> dropped
                                    |                       ^                              |
    engine's thread              enter -> llm.step() -> deliver -----------------------> abort

Only the engine's thread changes the LLM. It never waits for a reader: a stream that falls too far
behind is aborted. It sleeps while nothing is in flight. An error anywhere in it ends the streams
that it may have left half served, and no others. Refuses to know JSON, routes and how a step works.
Test: pytest server
"""
import asyncio
import contextlib
import itertools
import math
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import NamedTuple

from ranks import RankError
from scheduler import StrategyError
from server.metrics import Metrics

LEAVING = "the server is shutting down"
MAX_FAILURES = 3            # iterations that fail in a row: then the engine ends
RANKS_WATCHED = 1.0         # seconds between looks at the other ranks while nothing is in flight
UNHEALTHY_SECONDS = 10.0    # that /health reports a failure, unless a later one succeeds


class Refused(Exception):
    """The engine takes no call now. Carries the HTTP status and headers of the answer."""

    def __init__(self, status, message, headers=None):
        super().__init__(message)
        self.status, self.headers = status, headers


class Delta(NamedTuple):
    """What one iteration added to one prompt's output."""
    index: int                  # of the prompt in its call
    text: str
    token_ids: list
    logprobs: list              # of token_ids; empty unless the client asks for them
    top_logprobs: list          # see RequestOutput
    finish_reason: str          # None before the end


class Stream:
    """The outputs of one call: `async for delta in stream`, in the event loop.

    Afterwards `outs` holds a RequestOutput per prompt; `error` says why it was cut off, or None.
    """

    def __init__(self, num_prompts, max_behind):
        self.started = time.perf_counter()
        self.max_behind = max_behind        # Deltas that may wait for the reader
        self.events = asyncio.Queue()       # Deltas; None at the end
        # What follows is set by the engine's thread.
        self.num_open = num_prompts         # prompts that are not finished
        self.outs, self.error = [None] * num_prompts, None

    async def __aiter__(self):
        while (delta := await self.events.get()) is not None:
            yield delta


@dataclass
class Progress:
    """How much of one prompt's output is in its Stream."""
    stream: Stream
    index: int
    num_chars: int = 0
    num_tokens: int = 0
    first_token_at: float = None    # time.perf_counter

    def advance(self, out):
        """RequestOutput -> the Delta that is new in it."""
        text, start = out.settled_text(), self.num_tokens
        delta = Delta(self.index, text[self.num_chars:], out.token_ids[start:],
                      out.logprobs[start:], out.top_logprobs[start:], out.finish_reason)
        self.num_chars, self.num_tokens = len(text), len(out.token_ids)
        return delta


class EngineThread(threading.Thread):
    """A running thread that steps an LLM for callers in one event loop.

    max_queue  requests that may wait for their prefill
    buffer     tokens that the reader of a streamed prompt may fall behind
    """

    def __init__(self, llm, max_queue=256, buffer=1024):
        super().__init__(name="engine", daemon=True)
        self.llm, self.max_queue, self.buffer = llm, max_queue, buffer
        self.metrics = Metrics(llm)
        self.ids = itertools.count()    # of requests
        self.in_flight = {}             # request id -> Progress
        self.open = set()               # Streams that have not ended
        self.delivering = set()         # those of them that get Deltas right now
        self.loop = None                # the event loop; set by submit()
        self.changed = threading.Condition()    # guards the next four
        self.inbox = []                 # (Stream, prompts, params) that the LLM has not got yet
        self.dropped = []               # Streams that nobody reads
        self.closing = False            # take no more requests
        self.aborting = False           # and end those in flight
        self.num_failures = 0           # iterations that failed in a row
        self.failure = None             # why the last one failed, in words for clients
        self.failed_at = 0.0            # time.perf_counter
        self.dead = False               # too many failures in a row ended the thread
        self.start()

    # ---- called by other threads

    def submit(self, prompts, params, streamed=True):
        """Queue the prompts of one call. Returns their Stream.

        prompts   lists of token ids that LLM.check_prompt has accepted
        params    SamplingParams of each
        streamed  False: nobody reads before the end, so any number of Deltas may wait

        Raises Refused if the queue is full or no more requests are taken, ValueError if the call
        is longer than the queue.
        """
        if len(prompts) > self.max_queue:
            raise ValueError(f"{len(prompts)} prompts in one call: at most {self.max_queue} "
                             "may wait here (--max-queue)")
        with self.changed:
            if self.dead or self.closing:
                raise Refused(503, self.failure or LEAVING)
            waiting = len(self.llm.scheduler.waiting) + sum(len(call[1]) for call in self.inbox)
            if waiting + len(prompts) > self.max_queue:
                raise Refused(429, f"{waiting} requests are waiting, of at most "
                              f"{self.max_queue}: try again later", {"Retry-After": "1"})
            self.loop = asyncio.get_running_loop()
            max_behind = self.buffer * len(prompts) if streamed else math.inf
            stream = Stream(len(prompts), max_behind)
            self.inbox.append((stream, prompts, params))
            self.changed.notify()
        return stream

    def drop(self, stream):
        """Abort what is not finished of a Stream: nobody reads it any more."""
        with self.changed:
            if stream.num_open:
                self.dropped.append(stream)
                self.changed.notify()

    def close(self, abort=False):
        """Take no more requests; the thread ends with the last one. abort: end them now."""
        with self.changed:
            self.closing = True
            self.aborting |= abort
            self.changed.notify()

    def health_error(self):
        """The reason why /health should return 503, or None."""
        recent = time.perf_counter() - self.failed_at < UNHEALTHY_SECONDS
        return self.failure if self.dead or recent else None

    # ---- the thread itself

    def run(self):
        finished = False
        try:
            while not (finished or self.dead):
                try:
                    finished = not self._enter_and_abort()
                    if not finished:
                        self._deliver(self.llm.step())
                        self.num_failures, self.failure = 0, None
                except BaseException as error:      # of any kind: no reader may be left waiting
                    self._recover(error)
        finally:
            if not (finished or self.dead):         # an error in _recover itself
                self._die()

    def _recover(self, error):
        """End the Streams that an error has touched; after too many errors in a row, all."""
        log(error)
        self.num_failures += 1
        self.failure, self.failed_at = failure_text(error), time.perf_counter()
        dying = self.num_failures >= MAX_FAILURES or isinstance(error, RankError)
        try:
            for stream in [s for s in self.open if not dying and self._is_broken(s)]:
                self._end(stream, self.failure)
        except BaseException as second:
            log(second)
            dying = True
        self.delivering.clear()
        if dying:
            self._die()

    def _is_broken(self, stream):
        """Has a Stream lost a prompt or a Delta?"""
        return stream in self.delivering or any(
            out is None or (out.request_id in self.in_flight
                            and out.request_id not in self.llm.outputs) for out in stream.outs)

    def _die(self):
        """Tell every reader, and take no more requests. The LLM is not asked: it may be broken."""
        with self.changed:
            self.dead = True
            streams = self.open | {stream for stream, _, _ in self.inbox}
            self.inbox.clear()
        for stream in streams:
            stream.num_open, stream.error = 0, stream.error or self.failure
        self._send([(stream, None) for stream in streams])

    def _enter_and_abort(self):
        """Sleep until there is work. Add new requests to the LLM, abort dropped Streams.

        Returns False at the end: no more requests are taken, and none is in flight.
        """
        with self.changed:
            while not (self.inbox or self.dropped or self.llm.outputs or self.closing):
                self.changed.wait(RANKS_WATCHED)
                self.llm.ranks.check()
            calls = [call for call in self.inbox if not call[0].error]
            self.open |= {stream for stream, _, _ in calls}
            self.inbox.clear()
            for call in calls:
                self._enter(*call)
            dropped = [stream for stream in self.dropped if stream in self.open]
            if self.aborting:
                dropped += self.open
        for stream in dropped:
            self._abort(stream, LEAVING if self.aborting else None)
        with self.changed:
            self.dropped = [stream for stream in self.dropped if stream in self.open]
            return bool(self.open or self.inbox or not self.closing)

    def _enter(self, stream, prompts, params):
        """Add one call to the LLM. An error ends this call alone."""
        try:
            for i, (ids, p) in enumerate(zip(prompts, params, strict=True)):
                request_id = next(self.ids)     # known before anything is added: see _end
                self.in_flight[request_id] = Progress(stream, i)
                self.llm.add_checked(ids, p, request_id)
                stream.outs[i] = self.llm.outputs[request_id]
        except BaseException as error:
            log(error)
            self._end(stream, failure_text(error))

    def _abort(self, stream, error=None):
        """Abort what a Stream still waits for, and tell its reader."""
        stream.error = stream.error or error
        for out in stream.outs:
            self.llm.abort(out.request_id)
        self._deliver([out for out in stream.outs if out.request_id in self.in_flight])

    def _end(self, stream, error):
        """End a Stream in whatever state it is. No Delta of it can be trusted any more."""
        stream.error = stream.error or error
        for request_id in [i for i, p in self.in_flight.items() if p.stream is stream]:
            self.llm.abort(request_id)
            del self.in_flight[request_id]
        stream.num_open = 0
        self._send([(stream, None)])
        self.open.discard(stream)

    def _deliver(self, outs):
        """Send what is new in some RequestOutputs to their readers. One may be there twice."""
        outs = list({out.request_id: out for out in outs}.values())
        now, events, too_slow = time.perf_counter(), [], set()
        self.delivering = {self.in_flight[out.request_id].stream for out in outs}
        for out in outs:
            progress = self.in_flight[out.request_id]
            stream = progress.stream
            if progress.first_token_at is None and out.token_ids:
                progress.first_token_at = now
                self.metrics.ttft.observe(now - stream.started)
            events.append((stream, progress.advance(out)))
            if out.finish_reason:
                del self.in_flight[out.request_id]
                self.metrics.finished(out, now - (progress.first_token_at or now))
                stream.num_open -= 1
                if not stream.num_open:
                    events.append((stream, None))
            elif stream.events.qsize() > stream.max_behind:
                too_slow.add(stream)
        self._send(events)
        self.open -= {stream for stream, event in events if event is None}
        self.delivering = set()
        for stream in too_slow:
            self._abort(stream, f"aborted: the client fell more than {self.buffer} tokens behind")

    def _send(self, events):
        """Put [(Stream, Delta or None)] into the Streams; only the event loop's thread may."""
        def put():
            for stream, event in events:
                stream.events.put_nowait(event)
        try:
            self.loop.call_soon_threadsafe(put)
        except RuntimeError:
            if not self.loop.is_closed():   # if it is, nobody reads
                raise


def log(error):
    """Print a traceback. A log that cannot be written must not end the engine."""
    with contextlib.suppress(Exception):
        traceback.print_exception(error, file=sys.stderr)


def failure_text(error):
    """An error in words for clients: its message may quote another user's request."""
    reasons = {MemoryError: ": out of memory", StrategyError: ": the strategy broke a rule",
               RankError: ": one of its processes has ended"}
    return f"the engine failed: {type(error).__name__}{reasons.get(type(error), '')}"
