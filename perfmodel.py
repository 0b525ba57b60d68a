"""How long things take: predicted milliseconds per layer, from a measured profile (corrected online) or from a testbed's
roofline; a virtual clock that runs on either; and the fluid limit, which no schedule can pass.

    linear(n_tokens)  prefill(lengths)  gpu_decode(n_kv_tokens)  cpu_decode(n_requests, n_kv_tokens)  transfer(n_bytes)
    head(n_rows)      embedding, output matrix and what else an iteration does once

With l, g, c = one layer's linear, GPU-attention and CPU-attention time of sub-batches A and B, a layer takes

    max(lA + gA + lB + gB,  cA + cB,  lA + cA,  lB + cB)            (NEO, section 3.2)
        the GPU's work      the CPU's  A's own chain  B's own chain

and one sub-batch alone is the case B = 0: l + max(g, c). Knows nothing of torch or queues: plain numbers, but for the
logits that the simulated model hands back.
"""
import json
from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np


class Load(NamedTuple):
    """One sub-batch's work per layer, in ms."""
    linear: float
    gpu: float      # attention of prefill and GPU-decode rows
    cpu: float      # attention and KV store of CPU rows


class Prediction(NamedTuple):
    """One iteration, in ms."""
    total: float
    gpu: float      # busy time of the GPU
    cpu: float      # busy time of CPU attention


IDLE = Load(0.0, 0.0, 0.0)


def layer_ms(a, b=IDLE):
    """One layer of two sub-batches taking turns, or of one alone: the formula above."""
    return max(a.linear + a.gpu + b.linear + b.gpu, a.cpu + b.cpu, a.linear + a.cpu, b.linear + b.cpu)


class PerfModel:
    """What the scheduler asks. Subclasses give the six times of the module's docstring.

    n_layer    layers of the model;  token_bytes  one token's K and V in one layer
    """
    gpu_scale = cpu_scale = 1.0     # measured / predicted, moving averages
    overhead = 0.0                  # ms an iteration spends outside the layers and the head

    def __init__(self, n_layer, token_bytes):
        self.n_layer, self.token_bytes = n_layer, token_bytes

    def load(self, n_tokens, prompts=(), n_stored=0, n_fetched=0, gpu_kv=0, n_cpu=0, cpu_kv=0):
        """Work of a sub-batch of n_tokens rows: prompts, each (tokens cached before, tokens cached after), n_stored of their
        rows bound for the CPU tier and n_fetched of their earlier tokens there; GPU decodes over gpu_kv cached tokens; n_cpu
        CPU decodes over cpu_kv."""
        gpu = (self.prefill([end for _, end in prompts]) if prompts else 0.0) + (self.gpu_decode(gpu_kv) if gpu_kv else 0.0)
        if began := [start for start, _ in prompts if start]:            # attention over n + m tokens less that over n
            gpu -= self.prefill(began)
        if n_fetched:
            gpu += self.transfer(n_fetched * self.token_bytes)
        cpu = self.cpu_time(n_cpu, cpu_kv) + (self.transfer(n_stored * self.token_bytes) * self.cpu_scale if n_stored
                                              else 0.0)
        return Load(self.linear(n_tokens) * self.gpu_scale if n_tokens else 0.0, gpu * self.gpu_scale, cpu)

    def cpu_time(self, n_cpu, cpu_kv):
        """CPU attention of n_cpu decodes over cpu_kv tokens, corrected; 0 for none."""
        return self.cpu_decode(n_cpu, cpu_kv) * self.cpu_scale if n_cpu else 0.0

    def iteration(self, loads, samples):
        """Loads and sampled rows of one or two sub-batches -> Prediction."""
        head = sum(self.head(s) for s in samples if s) * self.gpu_scale
        return Prediction(self.n_layer * layer_ms(*loads) + head + self.overhead,
                          self.n_layer * sum(x.linear + x.gpu for x in loads) + head,
                          self.n_layer * sum(x.cpu for x in loads))

    def observe(self, predicted, measured):
        """Correct later predictions by one iteration's measured times (both Prediction). A single odd measurement
        moves them little: one part in ten, of a ratio within 2."""
        def drift(scale, want, got):
            return scale * min(max(got / want, 0.5), 2.0) ** 0.1 if want > 0 and got > 0 else scale
        self.gpu_scale = drift(self.gpu_scale, predicted.gpu, measured.gpu)
        self.cpu_scale = drift(self.cpu_scale, predicted.cpu, measured.cpu)
        self.overhead += 0.1 * (max(0.0, measured.total - predicted.total + self.overhead) - self.overhead)


class Profile(PerfModel):
    """Times interpolated from `samples`, measured on the real model (see neo.measure_profile):

    {"linear": [[n_tokens, ms], ...], "head": [[n_rows, ms], ...], "prefill": [[n_tokens, ms], ...],
     "gpu_decode": [[n_kv_tokens, ms], ...], "cpu_decode": [[n_requests, n_kv_tokens, ms], ...],
     "transfer": [[n_bytes, ms], ...]}
    """

    def __init__(self, samples, n_layer, token_bytes):
        super().__init__(n_layer, token_bytes)
        self._linear, self._head = _curve(samples["linear"]), _curve(samples["head"])
        self._prefill = _fit([[1, n, n * n] for n, _ in samples["prefill"]], samples["prefill"])
        self._gpu_decode = _fit([[1, kv] for kv, _ in samples["gpu_decode"]], samples["gpu_decode"])
        self._cpu_decode = _fit([[1, n, kv] for n, kv, _ in samples["cpu_decode"]], samples["cpu_decode"])
        self._transfer = _fit([[1, size] for size, _ in samples["transfer"]], samples["transfer"])

    def linear(self, n_tokens):
        return _interpolate(self._linear, n_tokens)

    def head(self, n_rows):
        return _interpolate(self._head, n_rows)

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


def load_profile(path, key):
    """Samples saved under exactly this key (a dict), or None."""
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    return saved["samples"] if saved["key"] == key else None


def save_profile(path, key, samples):
    """Write samples and the key that tells when they hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": key, "samples": samples}))


def _curve(points):
    """[[n, ms], ...] -> sorted (ns, ms), one median each, ms never falling: more rows never take less time, whatever
    noise says."""
    ns = sorted({n for n, _ in points})
    ms = [np.median([t for m, t in points if m == n]) for n in ns]
    return ns, np.maximum.accumulate(ms).tolist()


def _interpolate(curve, n):
    """Linear between measured points, constant below the first, the last slope beyond the last."""
    ns, ms = curve
    i = bisect_left(ns, n)
    if i == 0 or len(ns) == 1:
        return ms[0]
    i = min(i, len(ns) - 1)
    return ms[i - 1] + (ms[i] - ms[i - 1]) * (n - ns[i - 1]) / (ns[i] - ns[i - 1])


def _fit(columns, samples):
    """Least squares on relative errors with no negative coefficient: columns [points][terms], samples [..., ms]."""
    y = np.array([s[-1] for s in samples])
    X = np.array(columns, float) / y[:, None]
    live, coef = list(range(X.shape[1])), np.zeros(X.shape[1])
    while live:
        solution = np.linalg.lstsq(X[:, live], np.ones(len(y)), rcond=None)[0]
        if (solution >= 0).all():
            coef[live] = solution
            break
        live.pop(int(solution.argmin()))
    return coef.tolist()


# ---------------------------------------------------------------------------------------------------------- testbeds

@dataclass(frozen=True)
class Testbed:
    """A GPU (or `tp` of them that share every layer) and its host. Rates are peaks unless they say effective; what
    kernels reach of a peak is kept apart, in the *_eff fields. Each number is a flag of the command line."""
    name: str
    gpu: str
    tflops: float                  # TFLOP/s of one GPU, dense fp16
    gpu_gb: float                  # GiB of memory of one GPU
    gpu_bw: float                  # GB/s of its memory
    pcie_bw: float                 # GB/s either way, effective
    cores: int                     # of the host
    host_gb: float                 # GiB of host memory
    cpu_bw: float                  # GB/s at which CPU attention reads the KV cache, effective
    tp: int = 1                    # tensor parallelism
    compute_eff: float = 0.6       # of tflops, in matrix products of many rows
    memory_eff: float = 0.8        # of gpu_bw, in reading weights and KV
    launch_us: float = 10.0        # per layer and sub-batch, on the GPU
    cpu_launch_us: float = 40.0    # per layer and sub-batch with CPU rows: copies, events, starting the threads
    host_ms: float = 2.0           # per iteration: scheduling, sampling
    link_gb: float = 100.0         # GB/s of all-reduce between the GPUs, effective

    def __post_init__(self):
        for f in fields(self)[2:]:
            value, top = getattr(self, f.name), 1 if f.name.endswith("_eff") else float("inf")
            least_ok = value >= 0 if f.name.endswith(("_us", "_ms")) else value > 0
            if not (least_ok and value <= top):
                raise ValueError(f"testbed {self.name}: {f.name} = {value} must be "
                                 f"{'above 0, at most 1' if top == 1 else 'positive'}")


# TFLOP/s, GiB, GB/s: NVIDIA's data sheets. PCIe: about 12, 25, 50 GB/s measured for generations 3, 4, 5
GPUS = {"T4": (65, 16, 320, 12), "A10G": (70, 24, 600, 25), "L4": (121, 24, 300, 25), "RTX 4090": (165, 24, 1008, 25),
        "A100-80G": (312, 80, 2039, 25), "H100": (989, 80, 3350, 50), "H200": (989, 141, 4800, 50)}
# Hosts: cores, GiB, effective CPU GB/s. The paper prints no CPU bandwidth: those of the T4 and the A10G lie in the ranges
# that inverting its Figure 10a gives (31-35; 20-23, 21-24, 31-40, 70-90); the others are guesses, marked so.
TESTBEDS = {t.name: t for t in (
    Testbed("t4", "T4", *GPUS["T4"], 8, 64, 33, compute_eff=0.45, memory_eff=0.7),  # g4dn.4xlarge; a card of 70 W throttles
    Testbed("g5.2xlarge", "A10G", *GPUS["A10G"], 4, 32, 21.5),      # EPYC 7R32
    Testbed("g5.4xlarge", "A10G", *GPUS["A10G"], 8, 64, 23),
    Testbed("g5.8xlarge", "A10G", *GPUS["A10G"], 16, 128, 36),
    Testbed("g5.16xlarge", "A10G", *GPUS["A10G"], 32, 256, 80),
    Testbed("l4", "L4", *GPUS["L4"], 8, 64, 40),                    # guess: half a socket's DDR5, cloud instance
    Testbed("4090", "RTX 4090", *GPUS["RTX 4090"], 16, 64, 60),     # guess: a desktop's two channels of DDR5
    Testbed("a100", "A100-80G", *GPUS["A100-80G"], 12, 128, 40),    # guess: an eighth of a two-socket DDR4 server
    Testbed("h100", "H100", *GPUS["H100"], 24, 256, 70),            # guess: an eighth of a two-socket DDR5 server
    Testbed("2xh100", "H100", *GPUS["H100"], 48, 512, 140, tp=2),   # guess: a quarter of one
    Testbed("h200", "H200", *GPUS["H200"], 24, 256, 70))}           # guess: an eighth of one


def find_testbed(name, **overrides):
    """The preset of this name, some of its numbers replaced. Raises ValueError on an unknown name or impossible number."""
    if name not in TESTBEDS:
        raise ValueError(f"unknown testbed {name!r}: choose one of {', '.join(TESTBEDS)}")
    return replace(TESTBEDS[name], **overrides)


class Roofline(PerfModel):
    """Times of a testbed: operations over rate or bytes over bandwidth, whichever is longer, plus launches.

    cfg  the model's geometry (checkpoint.Config);  itemsize  bytes of a weight and of a KV element
    """

    def __init__(self, bed, cfg, itemsize=2):
        super().__init__(cfg.n_layer, 2 * cfg.n_kv_head * cfg.head_dim * itemsize)
        H, D, E = cfg.n_head, cfg.head_dim, cfg.n_embd
        self.bed, self.embed = bed, cfg.vocab_size * E
        self.params = (cfg.num_params - self.embed * (1 if cfg.tie_embeddings else 2)) / cfg.n_layer   # of a layer
        self.itemsize, self.width, self.row_bytes = itemsize, H * D, 8 * H * D + self.token_bytes      # q, out fp32; k, v
        self.flops = bed.tflops * bed.tp * bed.compute_eff * 1e9           # per ms
        self.bandwidth = bed.gpu_bw * bed.tp * bed.memory_eff * 1e6        # bytes per ms
        self.all_reduce = 2 * E * itemsize / (bed.link_gb * 1e6) if bed.tp > 1 else 0.0                # ms per row

    def _matrix(self, params, n_tokens):
        return max(2 * params * n_tokens / self.flops, params * self.itemsize / self.bandwidth)

    def linear(self, n_tokens):
        return self._matrix(self.params, n_tokens) + self.all_reduce * n_tokens + self.bed.launch_us / 1e3

    def head(self, n_rows):
        return self._matrix(self.embed, n_rows) + self.bed.host_ms

    def prefill(self, lengths):
        return sum(2 * n * n * self.width for n in lengths) / self.flops   # half of 4 n^2 H D: causal

    def gpu_decode(self, n_kv_tokens):
        return n_kv_tokens * self.token_bytes / self.bandwidth

    def cpu_decode(self, n_requests, n_kv_tokens):
        return (n_kv_tokens * self.token_bytes / (self.bed.cpu_bw * 1e6) + self.transfer(n_requests * self.row_bytes)
                + self.bed.cpu_launch_us / 1e3)

    def transfer(self, n_bytes):
        return n_bytes / (self.bed.pcie_bw * 1e6)


class SimulatedModel:
    """Takes model.Model's place: runs nothing, advances a virtual clock by what `perf` says, samples token 0."""
    def __init__(self, perf):
        self.perf, self.now, self.records, self.swapped, self.captured = perf, 0.0, [], 0, False

    def clock(self):
        """Virtual seconds."""
        return self.now

    def wait(self, seconds):
        self.now += seconds

    def attention(self, block_size):
        return "none: a simulation"

    def bucket(self, num_gpu, num_cpu):
        return num_gpu, num_cpu

    def run(self, batches, kv):
        """One iteration of kvcache.Inputs: the swaps that preceded it, one block after the other, then the layers."""
        perf, start = self.perf, self.now
        blocks, self.swapped = kv.swapped_blocks - self.swapped, kv.swapped_blocks
        start += perf.n_layer * perf.transfer(blocks * kv.block_size * perf.token_bytes) / 1e3 if blocks else 0.0
        loads = []
        for b in batches:
            past = [n for n, _ in b.prefill_past]
            fetched = sum(n for n, end in zip(past, accumulate(b.prefill_lens)) if end <= b.num_stored)
            loads.append(perf.load(len(b.tokens), [(n, n + rows) for n, rows in zip(past, b.prefill_lens)], b.num_stored,
                                   fetched, int(b.gpu_lens.sum()), b.num_cpu, int(b.cpu_lens.sum())))
        t = perf.iteration(loads, [len(b.last) for b in batches])
        self.now = start + t.total / 1e3
        self.records = [(lane, "iteration", 0, 0, start, start + ms / 1e3) for lane, ms in (("gpu", t.gpu), ("cpu", t.cpu))]
        for b in batches:
            b.logits = b.last.new_zeros((len(b.last), 1))


# -------------------------------------------------------------------------------------------------------- fluid limit

def fluid_limit(perf, lengths, gpu_tokens, cpu_tokens):
    """The best request rate any schedule could sustain, and what binds it: (requests per s, [resources]).

    perf  a Roofline;  lengths  [(tokens in, tokens out)];  gpu_tokens, cpu_tokens  KV budget of each tier

    Requests flow like water: g per second decode in the GPU tier, c in the CPU tier, at f iterations per second. With means
    over the workload, per request: R rows pass the linear layers, K = sum of cached tokens over its decode steps, which is
    also its memory in tokens times its stay in iterations. Then the rates of all use are linear in (g, c, f):

        GPU compute     (g + c) C       <= 1     C: seconds of matrix products and prompt attention
        GPU bandwidth   f W + g K t/bw  <= 1     W: seconds to read the weights once; t: bytes of a token's KV
        CPU bandwidth   c K t/cpu       <= 1
        PCIe            c X/pcie        <= 1     X: the prompt's KV down, q k v and the output of every step
        GPU memory      g K <= gpu_tokens f      Little's law: residents times their size
        CPU memory      c K <= cpu_tokens f

    For a given f the largest g + c is plain to see; it is concave and piecewise linear in f, so some corner is best.
    Launches, block rounding and everything discrete are left out: each only lowers what is possible.
    """
    n = len(lengths)
    t = perf.token_bytes * perf.n_layer
    rows = sum(i + o - 1 for i, o in lengths) / n
    K = sum((o - 1) * (i + o / 2) for i, o in lengths) / n
    head = 2 * perf.embed * sum(o for _, o in lengths) / n / perf.flops
    attention = perf.prefill([i for i, _ in lengths]) / n
    C = (perf.n_layer * (2 * perf.params * rows / perf.flops + attention) + head) / 1e3
    W = (perf.n_layer * perf.params + perf.embed) * perf.itemsize / perf.bandwidth / 1e3
    kv_gpu, kv_cpu = perf.n_layer * perf.gpu_decode(K) / 1e3, K * t / (perf.bed.cpu_bw * 1e9)
    X = perf.transfer(sum(i * t + (o - 1) * perf.row_bytes * perf.n_layer for i, o in lengths) / n) / 1e3
    if not K:                                  # one token each: nothing is ever decoded
        return 1 / C, ["GPU compute"]

    def rates(f):
        return (min(gpu_tokens * f / K, max(0.0, 1 - f * W) / kv_gpu), min(cpu_tokens * f / K, 1 / kv_cpu, 1 / X))
    corners = [1 / W, 1 / (W + gpu_tokens * kv_gpu / K)]                   # GPU bandwidth all weights; GPU memory meets it
    if cpu_tokens:
        corners.append(min(1 / W, min(1 / kv_cpu, 1 / X) * K / cpu_tokens))
    f = max(corners, key=lambda f: sum(rates(f)))
    g, c = rates(f)
    if (g + c) * C >= 1:
        return 1 / C, ["GPU compute"]
    use = {"GPU bandwidth": f * W + g * kv_gpu, "GPU memory": g * K / gpu_tokens / f if gpu_tokens else 0.0,
           "CPU bandwidth": c * kv_cpu, "CPU memory": c * K / cpu_tokens / f if cpu_tokens else 0.0, "PCIe": c * X}
    return g + c, [name for name, share in use.items() if share > 1 - 1e-9]
