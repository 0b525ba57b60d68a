"""How work is launched on the GPU, and how launches are captured and replayed.

The GPU is a CUDA stream, or with no GPU a worker thread that plays it. One interface for both:

    begin()                            a new run: forget the spans of the last one
    submit(stage, layer, index, fn)    fn(layer), in order, without waiting for it
    send(stage, layer, index, fn)      a copy to the host, after what was submitted; for `wait`
    fetch(stage, layer, index, fn)     a copy from the host, before what is submitted next
    wait(handle)                       until this is done
    drain()                            until a worker thread has done everything; raises its first
                                       error. On CUDA what uses a result waits for it by itself
    settle()                           after an error: wait, and forget it
    spans()                            perfmodel.Spans of the run; waits for the GPU
    capture(calls)                     calls without arguments -> calls that cost less to launch

`index` is the sub-batch's. A queue knows stages only by their names. `Captures` knows the fields
of a SubBatch and of the model's activations, but no weights and no policy.
"""
import contextlib
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

import cpu_attn
from perfmodel import Span

MAX_CAPTURED = 512      # GPU or CPU decode rows of a captured sub-batch. Beyond that, launches cost
#                         little beside the work.
MAX_SIZES = 64          # sizes that are captured; each holds two graphs a layer, some MB of memory
RESERVED = 2            # sub-batches whose static memory is made at the start


class ThreadQueue:
    """A worker thread that plays the GPU: it runs what is submitted in order, on its cores."""

    def __init__(self, threads):
        self.pool = ThreadPoolExecutor(1, "gpu", initializer=self._start, initargs=(threads,))
        self.pending, self.recorded, self.failed = [], [], False

    @staticmethod
    def _start(threads):
        cpu_attn.set_threads(threads)       # thread-local: the main thread has its own number
        torch.set_num_threads(threads)

    def begin(self):
        self.recorded = []

    def submit(self, stage, layer, index, fn):
        job = self.pool.submit(self._work, stage, layer, index, fn)
        self.pending.append(job)
        return job

    send = fetch = submit                   # the worker makes the copies, too

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


class CudaQueue:
    """The current CUDA stream, and one stream for the copies each way. Work is launched at once;
    waiting is done by events."""

    def __init__(self):
        # High priority: otherwise these copies would wait behind an attention kernel that fills
        # the GPU.
        self.to_host, self.from_host = (torch.cuda.Stream(priority=-1) for _ in range(2))
        self.capturing = torch.cuda.Stream()
        self.graph_pool = torch.cuda.graph_pool_handle()
        self.timed = []         # (lane, stage, layer, index, start event, end event)
        self.spare_events = []

    def begin(self):
        self.spare_events += [event for *_, start, end in self.timed for event in (start, end)]
        self.timed, self.base_time, self.base = [], time.perf_counter(), self._mark()

    def _mark(self):
        spare = self.spare_events
        event = spare.pop() if spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def submit(self, stage, layer, index, fn, lane="gpu"):
        start = self._mark()
        fn(layer)
        end = self._mark()
        self.timed.append((lane, stage, layer, index, start, end))
        return end

    def send(self, stage, layer, index, fn):
        self.to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.to_host):
            return self.submit(stage, layer, index, fn, lane="copy")

    def fetch(self, stage, layer, index, fn):
        with torch.cuda.stream(self.from_host):
            self.submit(stage, layer, index, fn, lane="copy")
        torch.cuda.current_stream().wait_stream(self.from_host)

    def wait(self, event):
        event.synchronize()

    def drain(self):
        """Nothing to wait for: what uses a result comes after it on the stream."""

    def settle(self):
        with contextlib.suppress(RuntimeError):     # it has been raised before
            torch.cuda.synchronize()

    def spans(self):
        # The main stream waits for every copy, so synchronising it is enough.
        torch.cuda.current_stream().synchronize()

        def seconds(event):
            return self.base_time + self.base.elapsed_time(event) / 1e3
        return [Span(*label, seconds(start), seconds(end)) for *label, start, end in self.timed]

    def capture(self, calls):
        """Inputs and outputs of the calls must lie in memory that stays.

        One pool serves the temporaries of all graphs, because replays follow each other on one
        stream. torch.cuda.graph would collect garbage and synchronise each time, and there are two
        captures a layer; so this is done by hand. If a capture fails, the error is raised and
        nothing is left half captured.
        """
        replays = []
        torch.cuda.synchronize()
        with torch.cuda.stream(self.capturing):
            for call in calls:              # kernels are compiled, workspaces allocated
                call()
            self.capturing.synchronize()
            # PyTorch cannot free its cached blocks while capturing. Free them now, or the capture
            # may run out of memory.
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
        return replays


class Captures:
    """Sub-batches of decodes, padded to a few sizes, whose stages are captured once per size and
    then replayed.

    A captured launch reads and writes fixed memory. So each sub-batch index has static tensors, and
    a sub-batch of any size uses their first rows.

    model  gives linear(b, act, layer), attend(b, act, kv, layer), activations(N) and the device
    width  blocks of the widest block table
    """

    def __init__(self, model, width):
        self.model, self.width = model, width
        self.static = {}        # index -> (fields of a SubBatch, Activations), MAX_CAPTURED rows
        self.replays = {}       # (index, GPU rows, rows) -> {(stage, layer): replay}, or None
        self.captured_now = False       # did the last run stop to capture something?
        for index in range(RESERVED):
            self._reserve(index)

    def _reserve(self, index):
        rows = 2 * MAX_CAPTURED
        shapes = {"tokens": (rows,), "positions": (rows,), "gpu_slots": (rows,),
                  "gpu_lens": (rows,), "gpu_table": (rows, self.width)}
        inputs = {name: torch.zeros(shape, dtype=torch.int32, device=self.model.device)
                  for name, shape in shapes.items()}
        act = self.model.activations(rows)
        for t in (act.x, act.qkv, act.o):
            t.zero_()
        self.static[index] = inputs, act

    @staticmethod
    def padded_rows(num_gpu, num_cpu):
        """Decode rows -> rows to pad them to, so that few captures serve all sizes.

        GPU rows alone go up in steps, eight to a power of two. Beside CPU rows, both go up in
        powers of two.
        """
        if max(num_gpu, num_cpu) > MAX_CAPTURED:
            return num_gpu, num_cpu

        def up(n, parts):
            step = max(1, 2 ** (n - 1).bit_length() // parts)
            return -(-n // step) * step if n else 0
        return up(num_gpu, 1 if num_cpu else 8), up(num_cpu, 1)

    def place(self, b, kv):
        """Copy a sub-batch into its static memory -> (Activations, linear(layer), attend(layer)),
        or None if it has prompts, is too large, or could not be captured."""
        N, num_gpu = len(b.tokens), b.num_gpu_rows
        if b.num_prefill or max(num_gpu, N - num_gpu) > MAX_CAPTURED:
            return None
        if b.index not in self.static:
            self._reserve(b.index)
        key = b.index, num_gpu, N
        if key not in self.replays and len(self.replays) < MAX_SIZES:
            self.replays[key] = self._capture(b, kv)
        replays = self.replays.get(key)
        if replays is None:
            return None
        inputs, act = self.static[b.index]
        for name in ("tokens", "positions", "gpu_slots", "gpu_lens"):
            new = getattr(b, name)
            inputs[name][:len(new)].copy_(new)
        inputs["gpu_table"][:num_gpu, :b.gpu_table.shape[1]].copy_(b.gpu_table)

        def linear(layer):
            replays["linear", layer]()

        def attend(layer):
            if num_gpu:                 # without GPU rows there is no attention to capture
                replays["attend", layer]()
        return act.first(N), linear, attend

    def _capture(self, b, kv):
        """{(stage, layer): replay} for sub-batches of b's size; None if memory is short.

        Capturing runs the kernels on dummy rows; slot -1 and length 0 make them write nothing.
        """
        inputs, act = self.static[b.index]
        N, num_gpu, layers = len(b.tokens), b.num_gpu_rows, range(len(self.model.layers))
        inputs["gpu_slots"].fill_(-1)
        inputs["gpu_lens"].zero_()
        rows = {"tokens": N, "positions": N}
        b = replace(b, **{name: t[:rows.get(name, num_gpu)] for name, t in inputs.items()})
        act = act.first(N)
        calls = {("linear", i): partial(self.model.linear, b, act, i) for i in layers}
        if num_gpu:
            calls |= {("attend", i): partial(self.model.attend, b, act, kv, i) for i in layers}
        self.captured_now = True
        try:
            return dict(zip(calls, self.model.queue.capture(list(calls.values())), strict=True))
        except torch.OutOfMemoryError as error:
            warnings.warn(f"no memory to capture decodes of {N} rows ({error}): these are launched "
                          "kernel by kernel", stacklevel=2)
            return None
