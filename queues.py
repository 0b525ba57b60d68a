"""How work is launched on the GPU: a CUDA stream, or with no GPU a worker thread that plays it.

One interface for both:

    begin(timed)                       a new run: forget the spans of the last one
    submit(stage, layer, index, fn)    fn(layer), in order, without waiting for it
    launch(fn)                         fn(), which writes only what a sub-batch owns, before its
                                       first `submit`
    mark()                             a handle on all that was submitted so far, for `wait`
    send(stage, layer, index, fn)      a copy to the host, after what was submitted -> a handle
    wait(handle)                       until this is done
    bring(tensor)                      starts a copy to the host -> a function that waits for it
                                       and returns the numbers as a list
    drain()                            until a worker thread has done everything; raises its first
                                       error. On CUDA what uses a result waits for it by itself
    settle()                           after an error: wait, and forget it
    spans()                            perfmodel.Spans of the run; waits for the GPU. On CUDA none
                                       if the run was not timed
    capture(calls)                     calls without arguments -> calls that cost less to launch
    free_bytes()                       of the GPU's memory

`index` is the sub-batch's. A queue knows stages only by their names.
"""
import contextlib
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

import cpu_attn
from perfmodel import Span


def on_cuda(device):
    """Do streams, events and pinned memory exist for this torch.device? The tests of stream orders
    pretend so; about the card itself, ask device.type."""
    return device.type == "cuda"


def mark():
    """An Event that the current stream records."""
    event = torch.cuda.Event()
    event.record()
    return event


def host_tensor(shape, dtype, pinned):
    """An empty tensor in host memory, `pinned` where the GPU copies from or to it."""
    return torch.empty(shape, dtype=dtype, pin_memory=pinned)


class ThreadQueue:
    """A worker thread that plays the GPU: it runs what is submitted in order, on its cores."""

    def __init__(self, threads):
        self.pool = ThreadPoolExecutor(1, "gpu", initializer=self._start, initargs=(threads,))
        self.pending, self.recorded, self.failed = [], [], False

    @staticmethod
    def _start(threads):
        cpu_attn.set_threads(threads)       # thread-local: the main thread has its own number
        torch.set_num_threads(threads)

    def begin(self, timed):
        """Spans cost nothing here: they are always recorded."""
        self.recorded = []

    def submit(self, stage, layer, index, fn):
        job = self.pool.submit(self._work, stage, layer, index, fn)
        self.pending.append(job)
        return job

    send = submit                           # the worker makes the copies, too

    def mark(self):
        return self.pending[-1]

    def bring(self, tensor):
        return tensor.tolist                # it is on the host already

    @torch.inference_mode()                 # thread-local: the worker must enter it itself
    def _work(self, stage, layer, index, fn):
        if self.failed:
            return                          # its inputs do not exist; drain() raises the error
        start = time.perf_counter()
        try:
            fn(layer)
        except BaseException:
            self.failed = True
            raise
        self.recorded.append(Span("gpu", stage, layer, index, start, time.perf_counter()))

    @staticmethod
    def launch(fn):
        """At once: it writes what nothing that was submitted reads."""
        fn()

    def wait(self, job):
        job.result()

    def drain(self):
        errors = [e for e in (job.exception() for job in self.pending) if e]
        self.pending, self.failed = [], False
        if errors:
            raise errors[0]

    def settle(self):
        """After an error: wait until nothing runs, and forget what went wrong."""
        self.pool.submit(int).result()          # the worker works in order
        self.pending, self.failed = [], False

    def spans(self):
        return self.recorded

    def capture(self, calls):
        """Nothing to capture: here a launch is a call."""
        return calls

    def free_bytes(self):
        return 0                                # captures take nothing


class CudaQueue:
    """The current CUDA stream, and one stream for copies of prompts to the host. Work is launched
    at once; waiting is done by events."""

    def __init__(self):
        # High priority: otherwise these copies would wait behind an attention kernel that fills
        # the GPU.
        self.to_host = torch.cuda.Stream(priority=-1)
        self.capturing = torch.cuda.Stream()
        self.graph_pool = None  # made by the first capture
        self.timed = False
        self.records = []       # (lane, stage, layer, index, start event, end event)
        self.spare_events = []  # with times

    def begin(self, timed):
        self.spare_events += [event for *_, start, end in self.records for event in (start, end)]
        self.records, self.timed = [], timed
        if timed:                   # the iteration before may still be in flight
            torch.cuda.current_stream().synchronize()
            self.base_time, self.base = time.perf_counter(), self._time()

    def _time(self):
        spare = self.spare_events
        event = spare.pop() if spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def submit(self, stage, layer, index, fn, lane="gpu"):
        if not self.timed:
            self.launch(fn, layer)
            return
        start = self._time()
        self.launch(fn, layer)
        self.records.append((lane, stage, layer, index, start, self._time()))

    @staticmethod
    def launch(fn, *args):
        """All that is put on a stream goes through here: a test makes other orders of it."""
        fn(*args)

    def mark(self):
        return mark()

    def send(self, stage, layer, index, fn):
        # The copies read what the main stream has just been told to compute.
        self.to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.to_host):
            self.submit(stage, layer, index, fn, lane="copy")
            return self.mark()

    def wait(self, event):
        event.synchronize()

    def bring(self, tensor):
        host = host_tensor(tensor.shape, tensor.dtype, pinned=True)
        self.launch(partial(host.copy_, non_blocking=True), tensor)
        # An event, not the stream: the next iteration may be on the stream by then.
        copied = self.mark()

        def arrived():
            copied.synchronize()
            return host.tolist()
        return arrived

    def drain(self):
        """Nothing to wait for: what uses a result comes after it on the stream."""

    def settle(self):
        with contextlib.suppress(RuntimeError):     # it has been raised before
            torch.cuda.synchronize()

    def spans(self):
        if not self.timed:
            return []
        # `send` is not waited for by the main stream, but its copies have been waited for.
        torch.cuda.current_stream().synchronize()

        def seconds(event):
            return self.base_time + self.base.elapsed_time(event) / 1e3
        return [Span(*label, seconds(start), seconds(end)) for *label, start, end in self.records]

    def capture(self, calls):
        """Inputs and outputs of the calls must lie in memory that stays.

        One pool serves the temporaries of all graphs, because replays follow each other on one
        stream. torch.cuda.graph would collect garbage and synchronise each time, and there are
        many captures; so this is done by hand. Raises RuntimeError, torch.OutOfMemoryError and
        AcceleratorError among them. Then the pool is given up: the allocator may count a capture
        in it as under way for ever.
        """
        replays = []
        self.graph_pool = self.graph_pool or torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        collects = gc.isenabled()
        gc.disable()                        # CUDA objects must not be freed inside a capture
        try:
            with torch.cuda.stream(self.capturing):
                for call in calls:          # kernels are compiled, workspaces allocated
                    call()
                self.capturing.synchronize()
                # PyTorch cannot free its cached blocks while capturing. Free them now, or the
                # capture may run out of memory.
                torch.cuda.empty_cache()
                for call in calls:
                    graph = torch.cuda.CUDAGraph()
                    graph.capture_begin(pool=self.graph_pool, capture_error_mode="thread_local")
                    try:
                        call()
                    except BaseException:
                        with contextlib.suppress(RuntimeError):
                            graph.capture_end()
                        raise
                    graph.capture_end()
                    replays.append(graph.replay)
            torch.cuda.synchronize()
        except BaseException:
            self.graph_pool = None
            raise
        finally:
            if collects:
                gc.enable()
        return replays

    @staticmethod
    def free_bytes():
        """Of the GPU, what torch keeps for later included."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
