"""Llama: weights, the linear parts, and one forward pass that either runs alone or takes turns with a second one.

The pass is a generator; pipelining is two generators taking turns (NEO, section 3.1):

    GPU   lin0A att0A lin0B att0B | lin1A att1A lin1B att1B | lin2A ...
    CPU               [ cpu A,0  ] [ cpu B,0   ][ cpu A,1  ] [ cpu B,1 ] ...

lin = linear parts, att = attention of prefill and GPU-decode rows, cpu = attention of CPU-decode rows. With no GPU a
worker thread plays it (ThreadQueue) and everything else is the same code. Knows nothing of requests, clocks or policy.

Glossary of symbols, for every file:
    N rows (tokens) of a sub-batch     B sequences        S rows that get sampled
    L layers    E hidden size          F feed-forward size                V vocabulary
    H query heads     Hkv key/value heads     G = H / Hkv heads per group     D head size
    bs tokens per block     q, k, v, o query, key, value, attention output     x hidden state
"""
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cpu_attn
from checkpoint import PRESETS, read_tensors
from gpu_attn import BACKENDS, choose
from kvcache import FORMATS, to_numpy, zeros

# ------------------------------------------------------------------------------------------------------- the queues

class ThreadQueue:
    """A worker thread that plays the GPU: runs what is submitted, in order, on `threads` cores."""

    def __init__(self, threads):
        self.pool = ThreadPoolExecutor(1, "gpu", initializer=self._start, initargs=(threads,))
        self.pending, self.records, self.failed = [], [], False

    @staticmethod
    def _start(threads):
        cpu_attn.set_threads(threads)           # thread-local: CPU attention on the main thread has its own number
        torch.set_num_threads(threads)

    def submit(self, fn, i, batch, *args):
        """Queue fn(i, batch, *args) and return at once with a handle for `wait`."""
        job = self.pool.submit(self._work, fn, i, batch, *args)
        self.pending.append(job)
        return job

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
        self.records.append(("gpu", fn.__name__, i, batch.index, start, time.perf_counter()))

    def wait(self, job):
        """Block until a submitted job is done; raises what it raised."""
        job.result()

    def drain(self):
        """Wait for everything. Returns records (lane, stage, layer, sub-batch, start s, end s); raises the first error."""
        pending, records, self.pending = self.pending, self.records, []
        errors = [e for e in (job.exception() for job in pending) if e]
        self.records, self.failed = [], False
        if errors:
            raise errors[0]
        return records


class CudaQueue:
    """The current CUDA stream: work is launched at once, `wait` is an event."""

    def __init__(self):
        self.pending = []

    def submit(self, fn, i, batch, *args):
        if not self.pending:                    # ties the GPU's clock to the host's, once an iteration
            torch.cuda.current_stream().synchronize()
            self.base, self.base_time = torch.cuda.Event(enable_timing=True), time.perf_counter()
            self.base.record()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn(i, batch, *args)
        end.record()
        self.pending.append((fn.__name__, i, batch.index, start, end))
        return end

    def wait(self, event):
        event.synchronize()

    def drain(self):
        torch.cuda.current_stream().synchronize()
        pending, self.pending = self.pending, []
        at = lambda event: self.base_time + self.base.elapsed_time(event) / 1e3
        return [("gpu", name, i, index, at(start), at(end)) for name, i, index, start, end in pending]


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
        self.cfg, self.dtype, self.pin, self.rows = cfg, dtype, pin, 0

    def fit(self, rows):
        if rows > self.rows:
            self.rows = max(2 * self.rows, rows)
            H, Hkv, D = self.cfg.n_head, self.cfg.n_kv_head, self.cfg.head_dim
            new = lambda heads, dtype: torch.empty(self.rows, heads, D, dtype=dtype, pin_memory=self.pin)
            self.q, self.o = new(H, torch.float32), new(H, torch.float32)
            self.k, self.v = new(Hkv, self.dtype), new(Hkv, self.dtype)
            self.np = {"q": self.q.numpy(), "o": self.o.numpy(), "k": to_numpy(self.k), "v": to_numpy(self.v)}


class Model:
    """Weights on the device and the forward pass.

    model        a preset's name (random weights, drawn from `seed`) or a checkpoint folder
    dtype        torch dtype of weights, activations and KV
    max_len      longest sequence RoPE is tabulated for
    gpu_threads  cores of the emulated GPU (CPU device only);  cpu_threads  cores for CPU attention

    Raises ValueError on a checkpoint with missing, extra or misshapen tensors, or unreadable files.
    """

    def __init__(self, model, cfg, dtype, device, max_len, gpu_threads, cpu_threads, gpu_attn="auto", seed=0):
        self.cfg, self.dtype, self.device, self.cpu_threads = cfg, dtype, device, cpu_threads
        self.gpu = CudaQueue() if device.type == "cuda" else ThreadQueue(gpu_threads)
        self.attn = BACKENDS[choose(device) if gpu_attn == "auto" else gpu_attn]()
        self.format = FORMATS[dtype]
        self.random_weights = model in PRESETS
        self.host = [HostBuffers(cfg, dtype, device.type == "cuda") for _ in range(2)]
        self.records = []                                      # of the last run: who worked on what, when
        self._allocate()
        if self.random_weights:
            self._randomise(seed)
        else:
            self._load(Path(model))
        self.cos, self.sin = (t.to(device)[:, None] for t in rope_table(cfg, max_len))  # [max_len, 1, D/2] float32

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
        """Finish layer i - 1 and start layer i of sub-batch b: sets b.q, b.k, b.v (and the host's copy for CPU rows),
        or b.logits after the last layer."""
        c, host = self.cfg, self.host[b.index]
        N, n_cpu = len(b.tokens), b.num_cpu
        if i == 0:
            b.x = F.embedding(b.tokens, self.embed)                                    # [N, E]
            b.rope = self.cos[b.positions], self.sin[b.positions]                      # [N, 1, D/2]
        else:
            w, x, o = self.layers[i - 1], b.x, b.o
            if n_cpu:
                o[N - n_cpu:].copy_(host.o[:n_cpu], non_blocking=True)
            if i == c.n_layer:
                x, o = x[b.last], o[b.last]                                            # [S, .]: only these go on
            x = x + F.linear(o.flatten(1), w.wo)
            gate, up = F.linear(self._norm(x, w.ffn_norm), w.w_gate_up).chunk(2, -1)   # [N, F] each
            b.x = x + F.linear(F.silu(gate).mul_(up), w.w_down)
        if i == c.n_layer:
            b.logits = F.linear(self._norm(b.x, self.norm), self.head).float()         # [S, V]
            return
        w, H, Hkv = self.layers[i], c.n_head, c.n_kv_head
        qkv = F.linear(self._norm(b.x, w.attn_norm), w.wqkv).view(N, H + 2 * Hkv, c.head_dim)
        b.q, b.k = rotate(qkv[:, :H + Hkv], *b.rope).split((H, Hkv), 1)
        b.v = qkv[:, H + Hkv:]
        b.o = torch.empty_like(b.q)
        if b.host_rows:
            host.fit(b.host_rows)
            stored = b.num_stored
            for dst, src in ((host.k, b.k), (host.v, b.v)):
                dst[:stored].copy_(src[:stored], non_blocking=True)
                dst[stored:b.host_rows].copy_(src[N - n_cpu:], non_blocking=True)
            host.q[:n_cpu].copy_(b.q[N - n_cpu:], non_blocking=True)

    def attend(self, i, b, kv):
        """Layer i's attention of prefill and GPU-decode rows, into b.o; new k and v into the GPU tier."""
        scale, k, v = self.cfg.head_dim ** -0.5, kv.gpu.k[i], kv.gpu.v[i]
        p, end = b.num_prefill, b.num_prefill + b.num_gpu
        if end > b.num_stored:
            self.attn.store(b.k[b.num_stored:end], b.v[b.num_stored:end], k, v, b.gpu_slots)
        if p:
            self.attn.prefill(b.q[:p], b.k[:p], b.v[:p], b.prefill_lens, scale, b.o[:p])
        if b.num_gpu:
            self.attn.decode(b.q[p:end], k, v, b.gpu_table, b.gpu_lens, scale, b.o[p:end])

    def cpu_attend(self, i, b, kv):
        """Layer i's CPU rows, on this thread and Numba's: k and v into the CPU tier, attention of the decode rows."""
        start, host, n = time.perf_counter(), self.host[b.index].np, b.num_cpu
        k, v = kv.cpu_k[i], kv.cpu_v[i]
        cpu_attn.store_kv(host["k"][:b.host_rows], host["v"][:b.host_rows], k, v, b.cpu_slots)
        if n:
            cpu_attn.paged_decode(host["q"][:n], k, v, b.cpu_table, b.cpu_lens, host["o"][:n],
                                  self.cfg.head_dim ** -0.5, self.format)
        self.records.append(("cpu", "cpu_attend", i, b.index, start, time.perf_counter()))

    def forward(self, b, kv, depth):
        """One sub-batch through `depth` layers and the head; yields whenever the other sub-batch may take its turn."""
        for i in range(depth + 1):
            ready = self.gpu.submit(self.linear, i if i < depth else self.cfg.n_layer, b)
            if i < depth:
                self.gpu.submit(self.attend, i, b, kv)
            yield
            if i < depth and b.host_rows:
                self.gpu.wait(ready)
                self.cpu_attend(i, b, kv)

    @torch.inference_mode()
    def run(self, batches, kv, depth=None):
        """Run one sub-batch (sequential) or two (pipelined): sets `logits` of each, and self.records.

        depth  stop after so many layers, for profiling; default all
        """
        self.records = []
        cpu_attn.set_threads(self.cpu_threads)
        turns = deque(self.forward(b, kv, depth or self.cfg.n_layer) for b in batches)
        try:
            while turns:
                if next(turns[0], self) is self:                # this one has finished
                    turns.popleft()
                else:
                    turns.rotate(-1)
        finally:
            self.records += self.gpu.drain()                    # also when a stage failed: nothing may run on

    def attention(self, block_size):
        """Which attention runs in either tier, in words."""
        path = cpu_attn.fastest_path(self.format, self.cfg.head_dim, block_size)
        return f"GPU tier: {type(self.attn).__name__}, CPU tier: Numba, {path} path"

    def _norm(self, x, weight):
        return F.rms_norm(x, (self.cfg.n_embd,), weight, self.cfg.norm_eps)


def rotate(x, cos, sin):
    """RoPE on x [N, heads, D], the halves of a head as pairs (Hugging Face's layout); cos, sin [N, 1, D/2] float32."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(x.dtype)


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
