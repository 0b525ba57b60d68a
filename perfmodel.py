"""How long things take: predicted milliseconds per layer, and a virtual clock that runs on them.

    linear(n_tokens)  prefill(lengths)  gpu_decode(n_kv_tokens)       each in ms of one layer
    cpu_decode(n_requests, n_kv_tokens)  transfer(n_bytes)
    lm_head(n_rows)   embedding, output matrix and what else an iteration does once, for the
                      sampled rows of all sub-batches together

`Profile` interpolates what was measured on this machine, `Roofline` computes a testbed that is
not here, and `SimulatedModel` runs the engine's loop on either.

With l, g, c = one layer's linear, GPU-attention and CPU-attention time of sub-batches A and B,
and m = the time in which the KV of prompts moves between the tiers, a layer takes

    max(lA + gA + lB + gB,  cA + cB,  lA + cA,  lB + cB,  mA + mB)      (NEO, section 3.2)
        the GPU's work      the CPU's  A's own chain  B's own chain

One sub-batch alone is the case without B. Nobody waits for m in its own layer: what is stored is
read in later iterations, and what is fetched comes a layer ahead. Knows no torch, no queues: plain
numbers only, except the logits that the simulated model returns. Tested in test_neo.py.
"""
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np


class Work(NamedTuple):
    """What one sub-batch does in a layer, counted in rows and tokens."""
    num_rows: int           # rows of the linear layers
    prompts: tuple = ()     # of each prompt: (tokens cached before, tokens cached after)
    num_stored: int = 0     # prompt rows whose k and v go to the CPU tier
    num_fetched: int = 0    # tokens of earlier chunks that are fetched from the CPU tier
    gpu_kv: int = 0         # cached tokens that the GPU decodes read
    num_cpu: int = 0        # CPU decodes
    cpu_kv: int = 0         # cached tokens that the CPU decodes read


class Load(NamedTuple):
    """How long one sub-batch keeps the devices busy, in ms per layer."""
    linear_ms: float
    gpu_ms: float           # attention of prefill and GPU-decode rows
    cpu_ms: float           # attention and KV store of CPU decodes
    move_ms: float = 0.0    # KV of prompts on its way between the tiers


class Prediction(NamedTuple):
    """One iteration, in ms; also used for what was measured."""
    total_ms: float
    gpu_ms: float           # the GPU is busy
    cpu_ms: float           # CPU attention is busy


class Span(NamedTuple):
    """Who worked on what, when. The model records one span for each stage of each layer."""
    lane: str               # "gpu", "cpu", "copy" (to the host) or "move" (KV of prompts)
    stage: str              # "linear", "attend", "send", "cpu_attend", "store", "fetch", "head"
    #                         or "pass"; of a simulation's timeline also "swap"
    layer: int
    sub_batch: int          # its index: 0 for A, 1 for B
    start: float            # seconds
    end: float
    rank: int = 0


class Result(NamedTuple):
    """What a run of the model leaves for its S sampled rows. Reading it may wait for the GPU."""
    logits: object          # [S, V] float32 tensor, valid until the next run
    best: object            # [S] tensor: the token of the largest logit, valid until the next run
    arrived: object         # a function that returns `best` as a list


def busy_seconds(spans):
    """{lane: seconds of work} of a list of Spans, in the rank that worked longest."""
    busy = dict.fromkeys(("gpu", "cpu", "copy", "move"), 0.0)
    for (_, lane), seconds in busy_of_ranks(spans).items():
        busy[lane] = max(busy[lane], seconds)
    return busy


def busy_of_ranks(spans):
    """Counter {(rank, lane): seconds of work} of a list of Spans."""
    busy = Counter()
    for span in spans:
        busy[span.rank, span.lane] += span.end - span.start
    return busy


def layer_ms(*loads):
    """One layer of sub-batches that take turns, in ms: the formula above, for any number."""
    gpu = sum(ms for load in loads for ms in (load.linear_ms, load.gpu_ms))
    chains = (load.linear_ms + load.cpu_ms for load in loads)
    return max(gpu, sum(load.cpu_ms for load in loads), sum(load.move_ms for load in loads),
               *chains)


def layer_spans(loads, n_layer, once_ms, start):
    """The layers of one iteration at their predicted proportions -> [Span], for pictures.

    loads    Load of each sub-batch
    once_ms  the head, which comes after the layers
    start    of the first layer, in seconds

    Every layer begins layer_ms(*loads) after the one before. In it, each stage begins as early as
    the formula lets it: the GPU takes the sub-batches in turn; the CPU does, too, and begins with
    a sub-batch when its linear stage is over, the attention of B often in the next layer's time:

        GPU   lin0A att0A lin0B att0B | lin1A att1A lin1B att1B | ...
        CPU         [   cpu A,0   ][ cpu B,0   ][   cpu A,1   ][ cpu B,1   ] ...

    The formula leaves out the end, where nobody is left to hide the last attention of B. Here it
    runs beside the head and is cut where the iteration ends.
    """
    period = layer_ms(*loads)
    end_ms = n_layer * period + once_ms
    gpu_start = [0.0, *accumulate(x.linear_ms + x.gpu_ms for x in loads)]
    linear_end = [ms + x.linear_ms for ms, x in zip(gpu_start, loads, strict=False)]
    cpu_start = _take_turns(linear_end, [x.cpu_ms for x in loads], period)
    move_start = _take_turns(linear_end, [x.move_ms for x in loads], period)
    stages = []                         # of layer 0: (lane, stage, sub-batch, start, duration)
    for i, x in enumerate(loads):
        stages += [("gpu", "linear", i, gpu_start[i], x.linear_ms),
                   ("gpu", "attend", i, linear_end[i], x.gpu_ms),
                   ("cpu", "cpu_attend", i, cpu_start[i], x.cpu_ms),
                   ("move", "store", i, move_start[i], x.move_ms)]
    spans = []
    for layer in range(n_layer):
        for lane, stage, i, first_ms, ms in stages:
            start_ms = layer * period + first_ms
            stop_ms = min(start_ms + ms, end_ms)
            if start_ms < stop_ms:
                spans.append(Span(lane, stage, layer, i, start + start_ms / 1e3,
                                  start + stop_ms / 1e3))
    if once_ms:
        layers_end = start + n_layer * period / 1e3
        spans.append(Span("gpu", "head", n_layer, 0, layers_end, start + end_ms / 1e3))
    return spans


def _take_turns(ready, durations, period):
    """Earliest starts of jobs that one device repeats every period, in this order, in ms.

    ready  before which each may not start. sum(durations) is at most the period, so the second
    time around, when the first job waits for the last one of the period before, settles it.
    """
    start = list(ready)
    for _ in range(2):
        for i, before in enumerate(range(-1, len(start) - 1)):
            free = start[before] + durations[before] - (0.0 if i else period)
            start[i] = max(start[i], free)
    return start


class PerfModel:
    """What the scheduler asks. A subclass gives the six times of the module's docstring.

    n_layer      layers of the model
    token_bytes  {tier: bytes of one token's K and V in one layer}
    """
    gpu_scale = cpu_scale = 1.0     # measured / predicted, moving averages
    overhead_ms = 0.0               # what an iteration spends outside the layers and the head

    def __init__(self, n_layer, token_bytes):
        self.n_layer, self.token_bytes = n_layer, token_bytes
        # Of a token's k and v on their way to the CPU tier. Roofline has what is sent; Profile's
        # `transfer` was measured over the bytes that the tier holds, so there it is those.
        self.sent_bytes = token_bytes["cpu"]

    def load(self, work):
        """Work of a sub-batch -> its Load.

        The attention of a chunk costs prefill(tokens after) - prefill(tokens before), because the
        earlier chunks have paid for the rest.
        """
        gpu_ms = 0.0
        if work.prompts:
            gpu_ms += self.prefill([after for _, after in work.prompts])
        if work.gpu_kv:
            gpu_ms += self.gpu_decode(work.gpu_kv)
        begun = [before for before, _ in work.prompts if before]
        if begun:
            gpu_ms -= self.prefill(begun)
        moved = work.num_stored * self.sent_bytes + work.num_fetched * self.token_bytes["cpu"]
        move_ms = self.transfer(moved) if moved else 0.0
        linear_ms = self.linear(work.num_rows) * self.gpu_scale if work.num_rows else 0.0
        return Load(linear_ms, gpu_ms * self.gpu_scale, self.cpu_time(work.num_cpu, work.cpu_kv),
                    move_ms)

    def cpu_time(self, num_cpu, cpu_kv):
        """CPU attention of num_cpu decodes over cpu_kv tokens, corrected; 0 for no decodes."""
        return self.cpu_decode(num_cpu, cpu_kv) * self.cpu_scale if num_cpu else 0.0

    def iteration(self, loads, num_sampled):
        """Loads of the sub-batches, and the rows that get a token in all -> Prediction."""
        once_ms = self.once_ms(num_sampled)
        return Prediction(
            self.n_layer * layer_ms(*loads) + once_ms + self.overhead_ms,
            self.n_layer * sum(x.linear_ms + x.gpu_ms for x in loads) + once_ms,
            self.n_layer * sum(x.cpu_ms for x in loads))

    def once_ms(self, num_sampled):
        """What an iteration does once, for num_sampled rows that get a token, corrected."""
        return self.lm_head(num_sampled) * self.gpu_scale if num_sampled else 0.0

    def observe(self, predicted, measured):
        """Correct later predictions by one iteration's measured times (both Prediction).

        A single odd measurement changes little: scale *= ratio^0.1, with the ratio within 2.
        """
        def corrected(scale, predicted_ms, measured_ms):
            if predicted_ms <= 0 or measured_ms <= 0:
                return scale
            return scale * min(max(measured_ms / predicted_ms, 0.5), 2.0) ** 0.1
        self.gpu_scale = corrected(self.gpu_scale, predicted.gpu_ms, measured.gpu_ms)
        self.cpu_scale = corrected(self.cpu_scale, predicted.cpu_ms, measured.cpu_ms)
        beyond = max(0.0, measured.total_ms - predicted.total_ms + self.overhead_ms)
        self.overhead_ms += 0.1 * (beyond - self.overhead_ms)


# -------------------------------------------------------------------------- measured profile

class Profile(PerfModel):
    """Times interpolated from `points`, measured on the real model (measure.measure_profile):

    {"linear": [[n_tokens, ms], ...], "lm_head": [[n_rows, ms], ...],
     "prefill": [[n_tokens, ms], ...], "gpu_decode": [[n_kv_tokens, ms], ...],
     "cpu_decode": [[n_requests, n_kv_tokens, ms], ...], "transfer": [[n_bytes, ms], ...]}
    """

    def __init__(self, points, n_layer, token_bytes):
        super().__init__(n_layer, token_bytes)
        self._linear, self._lm_head = _curve(points["linear"]), _curve(points["lm_head"])
        self._prefill = _fit([[1, n, n * n] for n, _ in points["prefill"]], points["prefill"])
        self._gpu_decode = _fit([[1, kv] for kv, _ in points["gpu_decode"]], points["gpu_decode"])
        self._cpu_decode = _fit(
            [[1, n, kv] for n, kv, _ in points["cpu_decode"]], points["cpu_decode"])
        self._transfer = _fit([[1, size] for size, _ in points["transfer"]], points["transfer"])

    def linear(self, n_tokens):
        return _interpolate(self._linear, n_tokens)

    def lm_head(self, n_rows):
        return _interpolate(self._lm_head, n_rows)

    def prefill(self, lengths):
        a, b, c = self._prefill
        return sum(a + b * n + c * n * n for n in lengths)

    def gpu_decode(self, n_kv_tokens):
        a, b = self._gpu_decode
        return a + b * n_kv_tokens

    def cpu_decode(self, n_requests, n_kv_tokens):
        a, b, c = self._cpu_decode
        return a + b * n_requests + c * n_kv_tokens

    def transfer(self, n_bytes):
        a, b = self._transfer
        return a + b * n_bytes


def _curve(points):
    """[[n, ms], ...] -> sorted (ns, ms), one median for each n.

    ms never falls: more rows never take less time, whatever the noise says.
    """
    ns = sorted({n for n, _ in points})
    ms = [np.median([t for m, t in points if m == n]) for n in ns]
    return ns, np.maximum.accumulate(ms).tolist()


def _interpolate(curve, n):
    """Linear between measured points, constant below the first. Beyond the last point n and ms grow
    in proportion, so that a gain which nobody measured is not promised."""
    ns, ms = curve
    i = bisect_left(ns, n)
    if i == 0:
        return ms[0]
    if i == len(ns):
        return ms[-1] * n / ns[-1]
    return ms[i - 1] + (ms[i] - ms[i - 1]) * (n - ns[i - 1]) / (ns[i] - ns[i - 1])


def _fit(columns, points):
    """Least squares on relative errors, with no negative coefficient.

    columns  [points][terms];  points  [[..., ms], ...]. Without points (no CPU tier): None.
    """
    if not points:
        return None
    y = np.array([p[-1] for p in points])
    X = np.array(columns, float) / y[:, None]
    used, coefficients = list(range(X.shape[1])), np.zeros(X.shape[1])
    while used:
        solution = np.linalg.lstsq(X[:, used], np.ones(len(y)), rcond=None)[0]
        if (solution >= 0).all():
            coefficients[used] = solution
            break
        used.pop(int(solution.argmin()))
    return coefficients.tolist()


# ---------------------------------------------------------------------------------- testbeds

@dataclass(frozen=True)
class Testbed:
    """A GPU (or `tp` of them that share every layer) and its host.

    Rates are peaks unless they say effective; the share of a peak that kernels reach stands apart,
    in the *_eff fields. Each number can be changed: --testbed NUMBER=X.
    """
    name: str
    gpu: str
    tflops: float                  # TFLOP/s of one GPU, dense fp16
    gpu_gb: float                  # GiB of memory of one GPU
    gpu_bw: float                  # GB/s of its memory
    pcie_bw: float                 # GB/s either way, effective
    cores: int                     # of the host
    host_gb: float                 # GiB of host memory
    cpu_bw: float                  # GB/s at which CPU attention reads the KV cache, effective
    tp: int = 1                    # tensor parallelism: GPUs that share every layer (ranks.py)
    compute_eff: float = 0.6       # of tflops, in matrix products of many rows
    memory_eff: float = 0.8        # of gpu_bw, in reading weights and KV
    launch_us: float = 10.0        # per layer and sub-batch, on the GPU
    cpu_launch_us: float = 40.0    # per layer and sub-batch with CPU rows: copies, events, threads
    host_ms: float = 2.0           # per iteration: scheduling, sampling
    # of tp > 1 alone:
    link_gb: float = 100.0         # GB/s of all-reduce between the GPUs, effective
    reduce_us: float = 10.0        # latency of an all-reduce: two per layer and sub-batch
    plan_ms: float = 1.0           # per iteration: rank 0 tells the others, and they bind
    slowest: float = 1.05          # CPU attention: the slowest rank's time over the mean (guess)
    softness: float = 0.0          # of the roofline's ridge. 0: max(compute, memory); s: their
    #                                norm (compute^(1/s) + memory^(1/s))^s

    def __post_init__(self):
        if self.slowest < 1:
            raise ValueError(f"testbed {self.name}: slowest = {self.slowest:g} must be 1 or more")
        for f in fields(self)[2:]:
            value, share = getattr(self, f.name), f.name.endswith("_eff")
            may_be_zero = f.name.endswith(("_us", "_ms", "softness"))
            if value < 0 or (value == 0 and not may_be_zero) or (share and value > 1):
                limits = "above 0, at most 1" if share else "positive"
                raise ValueError(f"testbed {self.name}: {f.name} = {value:g} must be {limits}")

    def describe(self):
        """Its main numbers in one line, and that they are no measurement."""
        return (f"simulated {self.name}: {self.tp} x {self.gpu}, {self.tflops:g} TFLOP/s x "
                f"{self.compute_eff:g}, {self.gpu_bw:g} GB/s x {self.memory_eff:g}; PCIe "
                f"{self.pcie_bw:g} GB/s; host {self.cores} cores, {self.host_gb:g} GiB, "
                f"{self.cpu_bw:g} GB/s. Not a measurement")


# TFLOP/s, GiB and GB/s are those of NVIDIA's data sheets. PCIe: about 12, 25 and 50 GB/s were
# measured by others for generations 3, 4 and 5.
GPUS = {"T4": (65, 16, 320, 12), "A10G": (70, 24, 600, 25), "L4": (121, 24, 300, 25),
        "RTX 4090": (165, 24, 1008, 25), "A100-80G": (312, 80, 2039, 25),
        "H100": (989, 80, 3350, 50), "H200": (989, 141, 4800, 50)}
# Hosts: cores, GiB, effective CPU GB/s. The paper prints no CPU bandwidth. Those of the T4 and the
# A10G lie in the ranges that inverting its Figure 10a gives (31-35; 20-23, 21-24, 31-40, 70-90).
TESTBEDS = {bed.name: bed for bed in (
    Testbed("t4", "T4", *GPUS["T4"], 8, 64, 33,
            compute_eff=0.45, memory_eff=0.7),                      # g4dn; a card of 70 W throttles
    Testbed("g5.2xlarge", "A10G", *GPUS["A10G"], 4, 32, 21.5),      # EPYC 7R32
    Testbed("g5.4xlarge", "A10G", *GPUS["A10G"], 8, 64, 23),
    Testbed("g5.8xlarge", "A10G", *GPUS["A10G"], 16, 128, 36),
    Testbed("g5.16xlarge", "A10G", *GPUS["A10G"], 32, 256, 80),
    Testbed("l4", "L4", *GPUS["L4"], 8, 64, 40),                    # guess: half a socket, DDR5
    Testbed("4090", "RTX 4090", *GPUS["RTX 4090"], 16, 64, 60),     # guess: two channels of DDR5
    Testbed("a100", "A100-80G", *GPUS["A100-80G"], 12, 128, 40),    # guess: 1/8 of a DDR4 server
    Testbed("h100", "H100", *GPUS["H100"], 24, 256, 70),            # guess: 1/8 of a DDR5 server
    Testbed("2xh100", "H100", *GPUS["H100"], 48, 512, 140, tp=2),   # guess: 1/4 of a DDR5 server
    Testbed("h200", "H200", *GPUS["H200"], 24, 256, 70))}           # guess: 1/8 of a DDR5 server


def find_testbed(name, **numbers):
    """The preset of this name, with some of its numbers replaced (they may be text).

    Raises ValueError on an unknown name or number, and on an impossible value.
    """
    if name not in TESTBEDS:
        raise ValueError(f"unknown testbed {name!r}: choose one of {', '.join(TESTBEDS)}")
    kinds = {f.name: f.type for f in fields(Testbed)[2:]}
    for number, value in numbers.items():
        if number not in kinds:
            raise ValueError(f"a testbed has no number {number!r}: choose one of "
                             f"{', '.join(kinds)}")
        try:
            numbers[number] = kinds[number](value)
        except ValueError:
            raise ValueError(f"testbed {name}: {number} = {value!r} is not a number") from None
    return replace(TESTBEDS[name], **numbers)


class Roofline(PerfModel):
    """Times of a testbed: operations over rate or bytes over bandwidth, whichever takes longer.

    cfg       the model's geometry (checkpoint.Config)
    itemsize  bytes of a weight and of an element of k or v
    token_bytes  {tier: bytes of one token's K and V in one layer}; default: of unrounded ones
    """

    def __init__(self, bed, cfg, itemsize=2, token_bytes=None):
        sent_bytes = 2 * cfg.n_kv_head * cfg.head_dim * itemsize
        super().__init__(cfg.n_layer, token_bytes or {"gpu": sent_bytes, "cpu": sent_bytes})
        self.sent_bytes = sent_bytes
        E, width = cfg.n_embd, cfg.n_head * cfg.head_dim
        self.bed, self.itemsize, self.width = bed, itemsize, width
        self.vocab_params = cfg.vocab_size * E
        vocab_matrices = 1 if cfg.tie_embeddings else 2
        self.layer_params = (cfg.num_params - self.vocab_params * vocab_matrices) / cfg.n_layer
        self.row_bytes = 8 * width + sent_bytes                     # q and output fp32; k and v
        self.flops = bed.tflops * bed.tp * bed.compute_eff * 1e9    # per ms
        self.bandwidth = bed.gpu_bw * bed.tp * bed.memory_eff * 1e6     # bytes per ms
        # What the ranks cost: ms a row and a layer, ms a layer, ms an iteration; a factor
        self.row_ms = self.reduce_ms = self.plan_ms = 0.0
        self.slowest = 1.0
        if bed.tp > 1:
            self.row_ms = 2 * E * itemsize / (bed.link_gb * 1e6)
            self.reduce_ms, self.plan_ms, self.slowest = (
                2 * bed.reduce_us / 1e3, bed.plan_ms, bed.slowest)

    def _matrix(self, params, n_tokens):
        compute = 2 * params * n_tokens / self.flops
        memory = params * self.itemsize / self.bandwidth
        if not self.bed.softness:
            return max(compute, memory)
        power = 1 / self.bed.softness
        return (compute ** power + memory ** power) ** self.bed.softness

    def linear(self, n_tokens):
        return (self._matrix(self.layer_params, n_tokens) + self.row_ms * n_tokens
                + self.reduce_ms + self.bed.launch_us / 1e3)

    def lm_head(self, n_rows):
        return self._matrix(self.vocab_params, n_rows) + self.bed.host_ms + self.plan_ms

    def prefill(self, lengths):
        # 4 n^2 H D operations, half of them: attention is causal
        return sum(2 * n * n * self.width for n in lengths) / self.flops

    def gpu_decode(self, n_kv_tokens):
        return n_kv_tokens * self.token_bytes["gpu"] / self.bandwidth

    def cpu_decode(self, n_requests, n_kv_tokens):
        return (n_kv_tokens * self.token_bytes["cpu"] / (self.bed.cpu_bw * 1e6) * self.slowest
                + self.transfer(n_requests * self.row_bytes) + self.bed.cpu_launch_us / 1e3)

    def transfer(self, n_bytes):
        return n_bytes / (self.bed.pcie_bw * self.bed.tp * 1e6)     # each GPU has its own link


class SimulatedModel:
    """Takes model.Model's place: it computes nothing, and advances a virtual clock by what `perf`
    predicts. Every sampled token is 0."""
    captured = False

    def __init__(self, perf):
        self.perf, self.now, self.spans, self.num_swapped = perf, 0.0, [], 0
        self.layout = None      # of the last run: the arguments of layer_spans

    def clock(self):
        """Virtual seconds."""
        return self.now

    def wait(self, seconds):
        self.now += seconds

    def describe_attention(self):
        return "none: a simulation"

    def padded_rows(self, num_gpu, num_cpu, num_prefill=0):
        return num_gpu, num_cpu

    @staticmethod
    def work_of(b):
        """What a kvcache.SubBatch does in a layer."""
        prompts = [(past, past + rows)
                   for rows, (past, _) in zip(b.prefill_lens, b.prefill_past, strict=True)]
        return Work(len(b.tokens), prompts, b.num_stored, sum(past for past, _ in b.stored_past),
                    int(b.gpu_lens.sum()), b.num_cpu, int(b.cpu_lens.sum()))

    def settle(self, kv):
        """Nothing runs on."""

    def run(self, sub_batches, kv):
        """One iteration: first the swaps that precede it, one block after the other, then the
        layers. Returns a Result with logits [rows that get a token, 1] of zeros."""
        perf, start = self.perf, self.now
        num_blocks, self.num_swapped = kv.swapped_blocks - self.num_swapped, kv.swapped_blocks
        if num_blocks:
            swap_bytes = num_blocks * kv.block_size * perf.token_bytes["cpu"]
            start += perf.n_layer * perf.transfer(swap_bytes) / 1e3
        loads = [perf.load(self.work_of(b)) for b in sub_batches]
        num_sampled = sum(len(b.sampled_rows) for b in sub_batches)
        predicted = perf.iteration(loads, num_sampled)
        self.now = start + predicted.total_ms / 1e3
        self.layout = (loads, perf.n_layer, perf.once_ms(num_sampled), start)
        self.spans = [Span(lane, "iteration", 0, 0, start, start + ms / 1e3)
                      for lane, ms in (("gpu", predicted.gpu_ms), ("cpu", predicted.cpu_ms))]
        logits = sub_batches[0].sampled_rows.new_zeros((num_sampled, 1))
        return Result(logits, logits[:, 0], logits[:, 0].tolist)
