"""Who runs the GPU's part of a layer: a CUDA stream, or with no GPU a worker thread that plays it. One interface:

    begin()                       a new run
    submit(fn, i, batch, *args)   fn(i, batch, *args), in order, without waiting for it
    send(fn, i, batch)            copies to the host, behind what was submitted; a handle for `wait`
    fetch(fn, i, batch)           copies from the host, before what is submitted next
    wait(handle)  drain()         until that is done; until everything is, raising the first error
    records()                     (lane "gpu" or "copy", stage, layer, sub-batch, start s, end s) of the run
    capture(calls)                calls without arguments -> calls that cost less to launch

Knows nothing of what it runs.
"""
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import cpu_attn


class ThreadQueue:
    """A worker thread that plays the GPU: runs what is submitted, in order, on `threads` cores."""

    def __init__(self, threads):
        self.pool = ThreadPoolExecutor(1, "gpu", initializer=self._start, initargs=(threads,))
        self.pending, self.spans, self.failed = [], [], False

    @staticmethod
    def _start(threads):
        cpu_attn.set_threads(threads)           # thread-local: CPU attention on the main thread has its own number
        torch.set_num_threads(threads)

    def begin(self):
        self.spans = []

    def submit(self, fn, i, batch, *args):
        job = self.pool.submit(self._work, fn, i, batch, *args)
        self.pending.append(job)
        return job

    send = fetch = submit                       # copies to the host and back: here there is no second engine for them

    @torch.inference_mode()                     # thread-local: the worker must enter it itself
    def _work(self, fn, i, batch, *args):
        if self.failed:
            return                              # its inputs were never made; drain() raises the first error
        start = time.perf_counter()
        try:
            fn(i, batch, *args)
        except BaseException:
            self.failed = True
            raise
        self.spans.append(("gpu", fn.__name__, i, batch.index, start, time.perf_counter()))

    def wait(self, job):
        job.result()

    def drain(self):
        pending, self.pending = self.pending, []
        errors = [e for e in (job.exception() for job in pending) if e]
        self.failed = False
        if errors:
            raise errors[0]

    def records(self):
        return self.spans

    def capture(self, calls):
        """Nothing to capture: here a launch is a call."""
        return calls


class CudaQueue:
    """The current CUDA stream, and one for the copies each way. Work is launched at once; waiting is by events."""

    def __init__(self):
        self.out, self.back = (torch.cuda.Stream(priority=-1) for _ in range(2))     # first: attention takes all the GPU
        self.side = torch.cuda.Stream()         # captures
        self.pool = torch.cuda.graph_pool_handle()
        self.spans, self.spare = [], []         # (lane, stage, layer, sub-batch, start event, end event); events to reuse

    def begin(self):
        self.spare += [e for span in self.spans for e in span[4:]]
        self.spans, self.base_time, self.base = [], time.perf_counter(), self._mark()

    def _mark(self):
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def submit(self, fn, i, batch, *args, lane="gpu"):
        start = self._mark()
        fn(i, batch, *args)
        end = self._mark()
        self.spans.append((lane, fn.__name__, i, batch.index, start, end))
        return end

    def send(self, fn, i, batch):
        self.out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.out):
            return self.submit(fn, i, batch, lane="copy")

    def fetch(self, fn, i, batch):
        with torch.cuda.stream(self.back):
            self.submit(fn, i, batch, lane="copy")
        torch.cuda.current_stream().wait_stream(self.back)

    def wait(self, event):
        event.synchronize()

    def drain(self):
        """Nothing to wait for: whatever uses a result is behind it on the stream."""

    def records(self):
        torch.cuda.current_stream().synchronize()            # the copies are behind it: what they feed was waited for
        at = lambda event: self.base_time + self.base.elapsed_time(event) / 1e3
        return [(*span[:4], at(span[4]), at(span[5])) for span in self.spans]

    def capture(self, calls):
        """Their inputs and outputs must lie in memory that stays. One pool serves the temporaries of all, as replays follow
        each other on one stream. By hand, as torch.cuda.graph collects garbage and synchronises each time, and there are two
        captures a layer. If one fails nothing is left half captured, and the error is raised."""
        replays = []
        torch.cuda.synchronize()
        with torch.cuda.stream(self.side):
            for call in calls:                  # kernels compiled, workspaces allocated
                call()
            self.side.synchronize()
            torch.cuda.empty_cache()            # during a capture the allocator cannot take back what it keeps for others
            for call in calls:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    call()
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
                replays.append(graph.replay)
        torch.cuda.synchronize()
        return replays
