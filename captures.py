"""Decodes in a few sizes, whose GPU work is captured once per size (CUDA graphs) and then replayed.

Launching a kernel costs the host 3 to 10 us, and a decode of a 7B model launches 300 of them: more
than the GPU takes for a small batch. A replay costs one launch. What is captured reads and writes
fixed memory, so each sub-batch is copied to static tensors and padded to a size that was captured.

Knows the fields of a SubBatch and of the model's activations, but no weights, no requests and no
policy. How a capture is made: queues.py. Glossary of symbols: model.py.
"""
import warnings
from functools import partial

import torch
from tqdm import tqdm

from kvcache import SubBatch

RESERVED = 2            # sub-batches whose static memory is made at the start


def up(n):
    """Rows -> rows to pad them to: any number up to 8, then four steps to a power of two."""
    step = max(1, 2 ** (n - 1).bit_length() // 8)
    return -(-n // step) * step if n else 0


class Captures:
    """The captured sizes of a model's decodes, and the static memory of each sub-batch index, of
    which a sub-batch uses the first rows. Two kinds of captures:

        a whole pass    all layers, head and largest logit, of GPU rows that run alone: one launch
        stages          `linear` of each layer by the number of rows, of whatever kind; `attend` of
                        decodes by the number of GPU rows. CPU attention comes between them, and
                        the attention of prompts is launched kernel by kernel

    model      gives linear(b, act, layer), attend(b, act, kv, layer), head, activations(N), device
    width      blocks of the widest block table
    most_rows  decodes of a tier in a sub-batch; larger ones are not captured
    budget     bytes that captures may take; when they are spent, other sizes are launched kernel by
               kernel. measure.py sets it
    """

    def __init__(self, model, width, most_rows):
        self.model, self.width, self.most_rows = model, width, up(most_rows)
        self.budget = float("inf")
        self.static = {}        # index -> (fields of a SubBatch, Activations)
        self.logits, self.best = model.head_rows(self.most_rows)        # of whole passes
        self.passes = {}        # rows -> (replay, logits, best), or None: not captured
        self.stages = {}        # (stage, index, rows) -> replays of the layers, or None
        self.spent = 0                      # bytes of all captures
        self.costs = {}                     # kind -> bytes of its last capture
        self.captured_now = False           # did the last run stop to capture something?
        for index in range(RESERVED):
            self._reserve(index)

    def _reserve(self, index):
        rows = 2 * self.most_rows
        shapes = {"tokens": (rows,), "positions": (rows,), "host_slots": (rows,),
                  "sampled_rows": (rows,), "gpu_slots": (rows,), "gpu_lens": (rows,),
                  "gpu_table": (rows, self.width)}
        inputs = {name: torch.zeros(shape, dtype=torch.int32, device=self.model.device)
                  for name, shape in shapes.items()}
        inputs["host_slots"].fill_(-1)
        act = self.model.activations(rows)
        for t in (act.x, act.qkv, act.o):
            t.zero_()
        self.static[index] = inputs, act

    def padded_rows(self, num_gpu, num_cpu, num_prefill=0):
        """Rows -> (GPU rows, CPU rows) to pad the decodes to, so that few captures serve all sizes:
        GPU rows without prompts and all rows together are numbers that `up` gives."""
        if max(num_gpu, num_cpu) > self.most_rows or num_prefill + num_gpu > self.most_rows:
            return num_gpu, num_cpu
        if not num_prefill:
            num_gpu = up(num_gpu)
        before = num_prefill + num_gpu
        return num_gpu, up(before + num_cpu) - before if num_cpu or num_prefill else 0

    def capture_passes(self, kv):
        """Capture whole passes of all sizes that GPU rows are padded to, for as many decodes as the
        GPU tier can hold, and linear stages of as many rows, while the budget lasts. The largest
        comes first: its temporaries serve all others."""
        most = min(kv.tiers["gpu"].num_blocks, self.most_rows)
        sizes = sorted({up(n) for n in range(1, most + 1)})
        for n in tqdm(sizes[-1:] + sizes[:-1], "CUDA graphs", disable=None, leave=False):
            self._capture_pass(n, kv)
        for n in sizes:         # of iterations with prompts; sub-batch B's are made when used
            self._stage("linear", 0, n, kv)

    def whole_pass(self, b, kv):
        """-> (replay, logits, best: where it writes) for a sub-batch that runs alone, after copying
        it to its static memory; None if it has other rows than GPU decodes, or was not captured."""
        N = len(b.tokens)
        if N != b.num_gpu_rows or kv.is_swapping:
            return None
        if N not in self.passes and N <= self.most_rows:
            self._capture_pass(N, kv)
        if self.passes.get(N):
            self._fill(b)
        return self.passes.get(N)

    def stages_of(self, b, kv):
        """-> (Activations, linear(layer), attend(layer)), after copying a sub-batch to its static
        memory; None if it is too large, or was not captured."""
        N, num_gpu, index = len(b.tokens), b.num_gpu_rows, b.index
        if max(num_gpu, N - num_gpu) > self.most_rows or (b.num_prefill and N != up(N)):
            return None
        num_gpu = 0 if b.num_prefill else num_gpu       # rows whose attention is captured
        if index not in self.static:
            self._reserve(index)
        linear_replays = self._stage("linear", index, N, kv)
        attend_replays = self._stage("attend", index, num_gpu, kv) if num_gpu else ()
        if linear_replays is None or attend_replays is None:
            return None
        act = self._fill(b)

        def attend(layer):
            if b.num_prefill:
                self.model.attend(b, act, kv, layer)
            elif num_gpu:               # without GPU rows there is no attention to launch
                attend_replays[layer]()
        return act, lambda layer: linear_replays[layer](), attend

    def _stage(self, stage, index, rows, kv):
        """Replays of a stage's layers, captured now if need be; None: not captured."""
        key = stage, index, rows
        if key not in self.stages:
            b, act = self._dummy(index, rows, rows if stage == "attend" else 0)
            launch = partial(self.model.linear, b, act)
            if stage == "attend":
                launch = partial(self.model.attend, b, act, kv)
            calls = [partial(launch, i) for i in range(len(self.model.layers))]
            self.stages[key] = self._capture(calls, stage, rows)
        return self.stages[key]

    def _fill(self, b):
        """Copy a sub-batch to its static memory -> its Activations."""
        inputs, act = self.static[b.index]

        def copy():                     # on the stream: the last replay may still read this memory
            for name in ("tokens", "positions", "host_slots", "gpu_slots", "gpu_lens"):
                new = getattr(b, name)
                inputs[name][:len(new)].copy_(new)
            inputs["gpu_table"][:b.num_gpu_rows, :b.gpu_table.shape[1]].copy_(b.gpu_table)
        self.model.queue.launch(copy)
        return act.first(len(b.tokens))

    def _dummy(self, index, N, num_gpu):
        """A SubBatch in static memory whose rows are padding: slot -1 and length 0 make kernels
        write nothing. It says that it has CPU rows, or else has only GPU rows."""
        inputs, act = self.static[index]
        inputs["gpu_slots"].fill_(-1)
        inputs["host_slots"].fill_(-1)
        inputs["gpu_lens"].zero_()
        torch.arange(len(inputs["sampled_rows"]), out=inputs["sampled_rows"])
        rows = {"tokens": N, "positions": N, "host_slots": N, "sampled_rows": N}
        fields = {name: t[:rows.get(name, num_gpu)] for name, t in inputs.items()}
        b = SubBatch(index=index, prefill_lens=[], prefill_past=[], num_stored=0, num_prefill=0,
                     num_gpu_rows=num_gpu, num_cpu=N - num_gpu, stored_slots=None, cpu_slots=None,
                     cpu_table=None, cpu_lens=None, **fields)
        return b, act.first(N)

    def _capture_pass(self, N, kv):
        b, act = self._dummy(0, N, N)
        model, L, logits, best = self.model, len(self.model.layers), self.logits[:N], self.best[:N]

        def run():
            for i in range(L):
                model.linear(b, act, i)
                model.attend(b, act, kv, i)
            model.linear(b, act, L)
            model.head([act], logits, best)
        replays = self._capture([run], "pass", N)
        self.passes[N] = (replays[0], logits, best) if replays else None

    def _capture(self, calls, kind, rows):
        """Replays of the calls, or None once the budget is spent or a capture has failed."""
        ranks = self.model.ranks            # all try to capture it, or none does
        if not ranks.least(self.spent + self.costs.get(kind, 0) <= self.budget):
            return None
        self.captured_now = True
        queue = self.model.queue
        try:
            free = queue.free_bytes()
            replays = queue.capture(calls)
            cost = max(0, free - queue.free_bytes())
            if self.spent:                  # the first one's is mostly temporaries'
                self.costs[kind] = cost
            self.spent += cost
            return replays
        except RuntimeError as error:       # torch.OutOfMemoryError, AcceleratorError: all of it
            if ranks.size > 1:              # the others have captured it
                raise
            # No other one can be trusted: none is made, not even one that costs nothing.
            self.budget = -1
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"could not capture {kind} of {rows} rows ({reason}): sizes that are not "
                          "captured yet are launched kernel by kernel", stacklevel=2)
            return None
