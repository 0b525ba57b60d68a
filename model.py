"""Llama: weights, the linear parts, and one forward pass that either runs alone or takes turns with a second one.

The pass is a generator; pipelining is two generators taking turns (NEO, section 3.1):

    GPU   lin0A att0A lin0B att0B | lin1A att1A lin1B att1B | lin2A ...
    CPU               [ cpu A,0  ] [ cpu B,0   ][ cpu A,1  ] [ cpu B,1 ] ...

lin = linear parts, att = attention of prefill and GPU-decode rows, cpu = attention of CPU-decode rows. With no GPU a
worker thread plays it (queues.py) and everything else is the same code. Knows nothing of requests, clocks or policy.

Glossary of symbols, for every file:
    N rows (tokens) of a sub-batch     B sequences        S rows that get sampled
    L layers    E hidden size          F feed-forward size                V vocabulary
    H query heads     Hkv key/value heads     G = H / Hkv heads per group     D head size
    bs tokens per block     q, k, v, o query, key, value, attention output     x hidden state
"""
import math
import time
import warnings
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cpu_attn
from checkpoint import PRESETS, read_tensors
from kvcache import FORMATS, to_numpy, zeros
from queues import CudaQueue, ThreadQueue

MOST_CAPTURED = 512     # GPU or CPU decode rows of a captured sub-batch; beyond that launches cost little beside the work
MOST_BUCKETS = 64       # sizes that are captured; each holds two graphs a layer, some MB of the driver's own memory

# --------------------------------------------------------------------------------------------------------- the model

@dataclass
class Layer:
    """Weights of one layer; projections that share an input are one matrix."""
    attn_norm: torch.Tensor     # [E]
    wqkv: torch.Tensor          # [(H + 2 Hkv) D, E]
    wo: torch.Tensor            # [E, H D]
    ffn_norm: torch.Tensor      # [E]
    w_gate_up: torch.Tensor     # [2 F, E]
    w_down: torch.Tensor        # [E, F]


class HostBuffers:
    """Where q, k, v of a sub-batch's CPU rows arrive and their attention output leaves; pinned on CUDA."""

    def __init__(self, cfg, dtype, pin):
        H, Hkv, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.kinds = {"q": (H, D, torch.float32), "o": (H, D, torch.float32), "k": (Hkv, D, dtype), "v": (Hkv, D, dtype)}
        self.pin, self.np = pin, {}

    def fit(self, num_cpu, host_rows):
        """Make room for num_cpu decode rows, and for host_rows rows of k and v."""
        for name, (heads, D, dtype) in self.kinds.items():
            rows = num_cpu if name in "qo" else host_rows
            if name not in self.np or len(self.np[name]) < rows:
                t = torch.empty(2 * rows, heads, D, dtype=dtype, pin_memory=self.pin)
                setattr(self, name, t)
                self.np[name] = to_numpy(t)


class Model:
    """Weights on the device and the forward pass.

    model        a preset's name (random weights, drawn from `seed`) or a checkpoint folder
    dtype        torch dtype of weights, activations and KV
    max_len      longest sequence RoPE is tabulated for
    gpu_threads  cores of the emulated GPU (CPU device only);  cpu_threads  cores for CPU attention
    gpu_attn     a back end of gpu_attn.py, chosen (gpu_attn.choose)
    eager        launch every kernel by itself: no CUDA graphs

    Raises ValueError on a checkpoint with missing, extra or misshapen tensors, or unreadable files.
    """

    def __init__(self, model, cfg, dtype, device, max_len, gpu_threads, cpu_threads, gpu_attn, eager=False, seed=0):
        self.cfg, self.dtype, self.device, self.cpu_threads = cfg, dtype, device, cpu_threads
        self.gpu = CudaQueue() if device.type == "cuda" else ThreadQueue(gpu_threads)
        self.attn, self.max_len = gpu_attn, max_len
        self.eager = eager or device.type == "cpu" or not gpu_attn.padded
        self.ops = gpu_attn.ops or TorchOps
        self.static, self.graphs = [], {}                      # memory of captured sub-batches; (index, rows) -> replays
        self.format = FORMATS[dtype]
        self.random_weights = model in PRESETS
        self.host = [HostBuffers(cfg, dtype, device.type == "cuda") for _ in range(2)]
        self.cpu_spans, self.captured = [], False              # of the last run; did it stop to capture something?
        self._allocate()
        if self.random_weights:
            self._randomise(seed)
        else:
            self._load(Path(model))
        self.cos, self.sin = (t.to(device) for t in rope_table(cfg, max_len))          # [max_len, D/2] float32

    def _allocate(self):
        c = self.cfg
        H, Hkv, D, E, F_ = c.n_head, c.n_kv_head, c.head_dim, c.n_embd, c.n_ffn
        new = lambda *shape: zeros(shape, self.dtype, self.device)
        self.embed = new(c.vocab_size, E)
        self.head = self.embed if c.tie_embeddings else new(c.vocab_size, E)
        self.norm = new(E)
        self.layers = [Layer(new(E), new((H + 2 * Hkv) * D, E), new(E, H * D), new(E), new(2 * F_, E), new(E, F_))
                       for _ in range(c.n_layer)]

    def slots(self):
        """Hugging Face tensor name -> the view of the (merged) weights it belongs in."""
        c = self.cfg
        q, kv, F_ = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_ffn
        out = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        if not c.tie_embeddings:
            out["lm_head.weight"] = self.head
        for i, w in enumerate(self.layers):
            at = f"model.layers.{i}."
            out |= {at + "input_layernorm.weight": w.attn_norm, at + "self_attn.q_proj.weight": w.wqkv[:q],
                    at + "self_attn.k_proj.weight": w.wqkv[q:q + kv], at + "self_attn.v_proj.weight": w.wqkv[q + kv:],
                    at + "self_attn.o_proj.weight": w.wo, at + "post_attention_layernorm.weight": w.ffn_norm,
                    at + "mlp.gate_proj.weight": w.w_gate_up[:F_], at + "mlp.up_proj.weight": w.w_gate_up[F_:],
                    at + "mlp.down_proj.weight": w.w_down}
        return out

    def _randomise(self, seed):
        """Fill from one table of normal deviates, each tensor from its own offset: at the speed of a copy. The table's
        length is prime, so no two rows of a weight are alike."""
        table = torch.randn(4_194_301, generator=torch.Generator().manual_seed(seed))
        table = (0.02 * table).to(device=self.device, dtype=self.dtype)   # 0.02: Llama's initializer_range
        offset, n = 0, len(table)
        for name, w in tqdm(self.slots().items(), "random weights", disable=None, leave=False):
            if "norm" in name:
                w.fill_(1)
                continue
            flat = w.view(-1)
            for i in range(0, flat.numel(), n):
                part = flat[i:i + n]
                cut = min(n - offset, len(part))
                part[:cut] = table[offset:offset + cut]
                part[cut:] = table[:len(part) - cut]
            offset = (offset + flat.numel() + 12_345) % n

    def _load(self, path):
        slots, unknown = self.slots(), []
        total = len(slots)
        for name, tensor in tqdm(read_tensors(path, self.cfg), f"loading {path.name}", total, disable=None, leave=False):
            if name.endswith("rotary_emb.inv_freq") or (self.cfg.tie_embeddings and name == "lm_head.weight"):
                continue                                       # older checkpoints carry what follows from the config
            slot = slots.pop(name, None)
            if slot is None:
                unknown.append(name)
                continue
            if slot.shape != tensor.shape:
                raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, the config asks for "
                                 f"{list(slot.shape)}: config and weights do not belong together")
            slot.copy_(tensor)
        for what, names in (("lacks", list(slots)), ("has unexpected", unknown)):
            if names:
                raise ValueError(f"{path}: the checkpoint {what} {len(names)} tensor(s) of {total}, first {names[0]}: "
                                 "is it complete, and a plain Llama?")

    # one layer = the second half of `linear(i)` and the first half of `linear(i + 1)`, with attention in between

    def linear(self, i, b):
        """Finish layer i - 1 and start layer i of sub-batch b: updates b.x, sets b.qkv, or b.logits after the last layer."""
        c, ops = self.cfg, self.ops
        if i == 0:
            torch.index_select(self.embed, 0, b.tokens, out=b.x)                       # [N, E]
        else:
            w, x, o = self.layers[i - 1], b.x, b.o.flatten(1)
            if i == c.n_layer:
                x, o = x[b.last], o[b.last]                                            # [S, .]: only these go on
                if not len(x):                                                         # chunks of prompts alone
                    b.logits = x.new_empty((0, c.vocab_size), dtype=torch.float32)
                    return
            x.addmm_(o, w.wo.t())
            gate_up = F.linear(self._norm(x, w.ffn_norm), w.w_gate_up)                 # [N, 2 F]
            x.addmm_(ops.swiglu(gate_up), w.w_down.t())
            if i == c.n_layer:
                b.logits = F.linear(self._norm(x, self.norm), self.head).float()       # [S, V]
                return
        w = self.layers[i]
        torch.mm(self._norm(b.x, w.attn_norm), w.wqkv.t(), out=b.qkv.flatten(1))       # [N, (H + 2 Hkv) D]
        ops.rotate_(b.qkv, self.cos, self.sin, b.positions, c.n_head + c.n_kv_head)

    def attend(self, i, b, kv):
        """Layer i's attention of prefill and GPU-decode rows, into b.o; new k and v into the GPU tier."""
        scale, k_cache, v_cache = self.cfg.head_dim ** -0.5, kv.gpu.k[i], kv.gpu.v[i]
        (q, k, v), o = self._heads(b), b.o
        p, end = b.num_prefill, b.num_prefill + b.num_gpu
        if end > b.num_stored:
            self.attn.store(k[b.num_stored:end], v[b.num_stored:end], k_cache, v_cache, b.gpu_slots)
        if p:
            kv_lens, k_all, v_all = kv.with_past(i, b, k[:p], v[:p])
            self.attn.prefill(q[:p], k_all, v_all, b.prefill_lens, kv_lens, scale, o[:p])
        if b.num_gpu:
            self.attn.decode(q[p:end], k_cache, v_cache, b.gpu_table, b.gpu_lens, scale, o[p:end])

    def _heads(self, b):
        """Views q [N, H, D] and k, v [N, Hkv, D] of b.qkv."""
        return b.qkv.split((self.cfg.n_head, self.cfg.n_kv_head, self.cfg.n_kv_head), 1)

    # CPU rows: to the host, attention there, and back

    def send(self, i, b):
        """q, k, v of layer i's CPU rows -> host memory."""
        host, stored, (q, k, v) = self.host[b.index], b.num_stored, self._heads(b)
        rows = slice(b.num_prefill + b.num_gpu, b.num_prefill + b.num_gpu + b.num_cpu)
        host.q[:b.num_cpu].copy_(q[rows], non_blocking=True)
        for dst, src in ((host.k, k), (host.v, v)):
            dst[:stored].copy_(src[:stored], non_blocking=True)
            dst[stored:b.host_rows].copy_(src[rows], non_blocking=True)

    def cpu_attend(self, i, b, kv):
        """Layer i's CPU rows, on this thread and Numba's: k and v into the CPU tier, attention of the decode rows."""
        start, host, n = time.perf_counter(), self.host[b.index].np, b.num_cpu
        k, v = kv.cpu_k[i], kv.cpu_v[i]
        cpu_attn.store_kv(host["k"][:b.host_rows], host["v"][:b.host_rows], k, v, b.cpu_slots)
        if n:
            cpu_attn.paged_decode(host["q"][:n], k, v, b.cpu_table, b.cpu_lens, host["o"][:n],
                                  self.cfg.head_dim ** -0.5, self.format)
        self.cpu_spans.append(("cpu", "cpu_attend", i, b.index, start, time.perf_counter()))

    def receive(self, i, b):
        """Layer i's attention output of CPU-decode rows -> b.o."""
        at = b.num_prefill + b.num_gpu
        b.o[at:at + b.num_cpu].copy_(self.host[b.index].o[:b.num_cpu].to(self.device, non_blocking=True))

    # the pass

    def forward(self, b, kv, depth):
        """One sub-batch through `depth` layers and the head; yields whenever the other sub-batch may take its turn."""
        gpu, last = self.gpu, self.cfg.n_layer
        linear, attend = self.place(b, kv)
        for i in range(depth):
            gpu.submit(linear, i, b)
            if b.host_rows:
                ready = gpu.send(self.send, i, b)
            kv.ready(i)
            gpu.submit(attend, i, b, kv)
            yield
            if b.host_rows:
                gpu.wait(ready)
                self.cpu_attend(i, b, kv)
                if b.num_cpu:
                    gpu.fetch(self.receive, i, b)
        gpu.submit(self.linear, last, b)

    @torch.inference_mode()
    def run(self, batches, kv, depth=None):
        """Run one sub-batch (sequential) or two (pipelined): sets `logits` of each. On CUDA it returns while the GPU is
        still at work; whatever reads the logits waits for it.

        depth  stop after so many layers, for profiling; default all
        """
        self.cpu_spans, self.captured = [], False
        self.gpu.begin()
        cpu_attn.set_threads(self.cpu_threads)
        turns = deque(self.forward(b, kv, depth or self.cfg.n_layer) for b in batches)
        try:
            while turns:
                if next(turns[0], self) is self:                # this one has finished
                    turns.popleft()
                else:
                    turns.rotate(-1)
        finally:
            kv.settle()
            self.gpu.drain()                                    # also when a stage failed: nothing may run on

    @property
    def records(self):
        """Who worked on what, when, in the last run: (lane "gpu", "cpu" or "copy", stage, layer, sub-batch, start s, end s).
        Waits for the GPU."""
        return self.gpu.records() + self.cpu_spans

    # ---- where a sub-batch works: tensors of its own, or memory that captured launches know

    def bucket(self, num_gpu, num_cpu):
        """Decode rows -> rows that they are padded to, so that few captures serve all: the same where nothing is captured.
        GPU rows alone go up in steps, eight to a power of two; beside CPU rows both in powers of two."""
        if not self._captures(num_gpu, num_cpu):
            return num_gpu, num_cpu

        def up(n, parts):
            step = max(1, 2 ** (n - 1).bit_length() // parts)
            return -(-n // step) * step if n else 0
        return up(num_gpu, 1 if num_cpu else 8), up(num_cpu, 1)

    def _captures(self, num_gpu, num_cpu):
        return not self.eager and max(num_gpu, num_cpu) <= MOST_CAPTURED

    def place(self, b, kv):
        """Give b its working tensors; returns (linear, attend) to run it with."""
        N, num_gpu = len(b.tokens), b.num_gpu
        self.host[b.index].fit(b.num_cpu, b.host_rows)
        replays = self._replays(b, kv) if not b.num_prefill and self._captures(num_gpu, N - num_gpu) else None
        if replays is None:
            b.x, b.qkv, b.o = self._working(N)
            return self.linear, self.attend
        (*rows, table), (x, qkv, o) = self.static[b.index]
        b.x, b.qkv, b.o = x[:N], qkv[:N], o[:N]
        for static, new in zip(rows, (b.tokens, b.positions, b.gpu_slots, b.gpu_lens)):
            static[:len(new)].copy_(new)
        table[:num_gpu, :b.gpu_table.shape[1]].copy_(b.gpu_table)

        def linear(i, b):
            replays["linear", i]()

        def attend(i, b, kv):
            if num_gpu:
                replays["attend", i]()
        return linear, attend

    def _replays(self, b, kv):
        """The captured stages of b's bucket, {("linear" or "attend", layer): replay}, captured now if they are not yet; None
        if that is not possible. Without GPU rows there is no attention to capture."""
        N = len(b.tokens)
        key = b.index, b.num_gpu, N
        if not self.static:
            self.reserve(kv.table.shape[1])
        if key not in self.graphs and len(self.graphs) < MOST_BUCKETS:
            (tokens, positions, slots, lens, table), (x, qkv, o) = self.static[b.index]
            slots.fill_(-1), lens.zero_()                       # what is captured runs once or twice, on nobody's behalf
            there = replace(b, tokens=tokens[:N], positions=positions[:N], gpu_slots=slots[:b.num_gpu],
                            gpu_lens=lens[:b.num_gpu], gpu_table=table[:b.num_gpu], x=x[:N], qkv=qkv[:N], o=o[:N])
            calls = {("linear", i): partial(self.linear, i, there) for i in range(self.cfg.n_layer)}
            if b.num_gpu:
                calls |= {("attend", i): partial(self.attend, i, there, kv) for i in range(self.cfg.n_layer)}
            self.captured = True
            try:
                self.graphs[key] = dict(zip(calls, self.gpu.capture(list(calls.values()))))
            except torch.OutOfMemoryError as error:
                warnings.warn(f"no memory to capture decodes of {N} rows ({error}): these are launched kernel by kernel")
                self.graphs[key] = None
        return self.graphs.get(key)

    def _working(self, N):
        """x [N, E], qkv [N, H + 2 Hkv, D], o [N, H, D]."""
        c = self.cfg
        shapes = (c.n_embd,), (c.n_head + 2 * c.n_kv_head, c.head_dim), (c.n_head, c.head_dim)
        return [torch.empty(N, *shape, dtype=self.dtype, device=self.device) for shape in shapes]

    def reserve(self, width):
        """Make the memory of captured sub-batches, for block tables of `width`: for each of the two (tokens, positions,
        slots, lengths, block table) and the working tensors, of which a bucket takes the first rows."""
        rows = 2 * MOST_CAPTURED
        new = lambda *shape: torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.static = [([new(rows), new(rows), new(rows), new(rows), new(rows, width)],
                        [t.zero_() for t in self._working(rows)]) for _ in range(2)]

    def attention(self, block_size):
        """Which attention runs in either tier, in words."""
        path = cpu_attn.fastest_path(self.format, self.cfg.head_dim, block_size)
        launches = "" if self.device.type == "cpu" else ", launched one by one" if self.eager else ", decodes in CUDA graphs"
        return f"GPU tier: {self.attn.describe()}{launches}; CPU tier: Numba, {path} path"

    def _norm(self, x, weight):
        return F.rms_norm(x, (self.cfg.n_embd,), weight, self.cfg.norm_eps)


class TorchOps:
    """What lies between the matrix products, in plain torch; gpu_kernels.py has the same in a kernel each."""

    @staticmethod
    def rotate_(qkv, cos, sin, positions, heads):
        """RoPE in place on the first `heads` heads of qkv [N, ., D], the halves of a head as pairs (Hugging Face's layout);
        cos, sin [max_len, D/2] float32, positions [N]."""
        c, s = (table[positions][:, None] for table in (cos, sin))                     # [N, 1, D/2]
        x = qkv[:, :heads]
        a, b = x.chunk(2, -1)
        x.copy_(torch.cat((a * c - b * s, b * c + a * s), -1))

    @staticmethod
    def swiglu(gate_up):
        """[N, 2 F], gate and up side by side -> [N, F] = silu(gate) up."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)


def rope_table(cfg, max_len):
    """cos, sin [max_len, D/2] float32, with the config's scaling applied to the frequencies."""
    freq = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
    s = cfg.rope_scaling or {}
    if s.get("rope_type") == "linear":
        freq /= s["factor"]
    elif s.get("rope_type") == "llama3":                        # long wavelengths / factor, short ones kept, in between
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        lo, hi = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - lo) / (hi - lo)).clamp(0, 1)           # 0: fewer than lo turns in the original context
        freq = freq * (keep + (1 - keep) / s["factor"])
    angle = torch.arange(max_len, dtype=torch.float32)[:, None] * freq
    return angle.cos(), angle.sin()
