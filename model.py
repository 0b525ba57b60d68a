"""Llama: geometry and presets, weights, and one forward pass that either runs alone or takes turns with a second one.

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
import json
import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from tqdm import tqdm

import cpu_attn
from gpu_attn import BACKENDS, choose
from kvcache import to_numpy, zeros

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ---------------------------------------------------------------------------------------------------------- geometry

@dataclass(frozen=True)
class Config:
    """Geometry of a Llama model. Raises ValueError on what this engine cannot run."""
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    n_ffn: int
    vocab_size: int
    max_position: int
    rope_theta: float = 10000.0
    rope_scaling: dict = None       # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    eos_ids: tuple = (2,)
    dtype: str = "bf16"             # of the checkpoint

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads are not a multiple of {self.n_kv_head} KV heads")
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} is odd: RoPE needs pairs")
        rope_type = (self.rope_scaling or {}).get("rope_type", "default")
        if rope_type not in ("default", "linear", "llama3"):
            raise ValueError(f"RoPE scaling {rope_type!r} is not supported: use linear, llama3 or none")

    @property
    def num_params(self):
        E, D = self.n_embd, self.head_dim
        layer = E * D * (2 * self.n_head + 2 * self.n_kv_head) + 3 * E * self.n_ffn + 2 * E
        return self.n_layer * layer + self.vocab_size * E * (1 if self.tie_embeddings else 2) + E


LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
PRESETS = {  # L, H, Hkv, D, E, F, V, positions
    "tiny": Config(4, 4, 2, 16, 64, 128, 512, 512),
    "llama-160m": Config(12, 12, 12, 64, 768, 3072, 32000, 2048),
    "llama-1b": Config(16, 32, 8, 64, 2048, 8192, 128256, 131072, 5e5, {**LLAMA3_ROPE, "factor": 32.0},
                       tie_embeddings=True, eos_ids=(128001, 128008, 128009)),
    "llama-7b": Config(32, 32, 32, 128, 4096, 11008, 32000, 4096),
    "llama-8b": Config(32, 32, 8, 128, 4096, 14336, 128256, 131072, 5e5, LLAMA3_ROPE,
                       eos_ids=(128001, 128008, 128009)),
    "llama-13b": Config(40, 40, 40, 128, 5120, 13824, 32000, 4096),
    "llama-70b": Config(80, 64, 8, 128, 8192, 28672, 128256, 131072, 5e5, LLAMA3_ROPE,
                        eos_ids=(128001, 128008, 128009)),
}


def load_config(model):
    """A preset's name or a checkpoint folder (Hugging Face or Meta) -> Config."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if (path / "config.json").is_file():
        return _hf_config(_read_json(path / "config.json"))
    if (path / "params.json").is_file():
        return _meta_config(path)
    if path.is_dir():
        raise ValueError(f"{model}: neither config.json (Hugging Face) nor params.json (Meta) in this folder")
    raise ValueError(f"unknown model {model!r}: neither a preset ({', '.join(PRESETS)}) nor a checkpoint folder")


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the file again") from None


def _hf_config(c):
    if c.get("architectures", ["LlamaForCausalLM"]) != ["LlamaForCausalLM"] or c.get("model_type", "llama") != "llama":
        raise ValueError(f"architecture {c.get('architectures')} (model_type {c.get('model_type')!r}) is not supported: "
                         "this engine runs LlamaForCausalLM")
    for key, want in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if c.get(key, want) != want:
            raise ValueError(f"config.json: {key} = {c[key]!r} is not supported (only {want!r})")
    required = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")
    if missing := [key for key in required if key not in c]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})   # transformers 5 | older
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    eos = c.get("eos_token_id")
    dtype = {"float16": "fp16", "float32": "fp32"}.get(c.get("dtype") or c.get("torch_dtype"), "bf16")
    return Config(
        c["num_hidden_layers"], c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"],
        c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], c["hidden_size"], c["intermediate_size"],
        c["vocab_size"], c.get("max_position_embeddings", 2048), rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        rope, c.get("rms_norm_eps", 1e-6), c.get("tie_word_embeddings", False),
        tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,), dtype)


def _meta_config(path):
    p = _read_json(path / "params.json")
    E, H = p["dim"], p["n_heads"]
    F_ = int(p.get("ffn_dim_multiplier", 1) * int(2 * 4 * E / 3))
    F_ = p["multiple_of"] * -(-F_ // p["multiple_of"])
    theta, scaled = p.get("rope_theta", 10000.0), p.get("use_scaled_rope", False)
    V = p.get("vocab_size", -1)
    if V <= 0:                                  # Llama 1 and 2 leave it to the tokenizer; the output matrix knows
        V = sum(s["output.weight"].shape[0] for s in _meta_shards(path))
    return Config(
        p["n_layers"], H, p.get("n_kv_heads") or H, E // H, E, F_, V,
        p.get("max_seq_len", 131072 if scaled else 8192 if theta > 10000 else 4096), theta,
        {**LLAMA3_ROPE, "factor": p.get("rope_scale_factor", 8.0)} if scaled else None, p.get("norm_eps", 1e-5),
        eos_ids=(128001, 128008, 128009) if theta > 10000 else (2,))


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
        tensors = _hf_tensors(path) if (path / "config.json").is_file() else _meta_tensors(path, self.cfg)
        slots, unknown = self.slots(), []
        total = len(slots)
        for name, tensor in tqdm(tensors, f"loading {path.name}", total, disable=None, leave=False):
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
                                  self.cfg.head_dim ** -0.5, "bf16" if self.dtype == torch.bfloat16 else "fp16")
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


# ------------------------------------------------------------------------------------------------ checkpoint formats

def _hf_tensors(path):
    """(name, tensor) of every tensor in a Hugging Face folder, one at a time."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / f for f in _read_json(index)["weight_map"].values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path}: no *.safetensors here")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is named in {index.name} but missing: download it again")
        try:
            shard = safetensors.safe_open(file, framework="pt")
        except Exception as error:                              # its own error class, and it names no file
            raise ValueError(f"{file} is truncated or not a safetensors file ({error}): download it again") from None
        with shard:
            for name in shard.keys():
                yield name, shard.get_tensor(name)


META_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
              "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
              "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
              "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def _meta_shards(path):
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise ValueError(f"{path}: no consolidated.*.pth here")
    try:
        return [torch.load(f, map_location="cpu", mmap=True, weights_only=True) for f in files]
    except Exception as error:                                  # zip, pickle and torch each raise their own
        raise ValueError(f"{path}: a consolidated.*.pth is truncated or corrupt ({error}): download it again") from None


def _meta_tensors(path, cfg):
    """(Hugging Face name, tensor) of every tensor in a Meta folder, its shards merged one tensor at a time."""
    shards = _meta_shards(path)
    for name in shards[0]:
        if name == "rope.freqs":
            continue
        key = name.removesuffix(".weight")
        prefix, _, rest = key.partition(".") if key.startswith("layers.") else ("", "", key)
        if prefix:
            layer, _, rest = rest.partition(".")
            prefix = f"model.layers.{layer}."
        parts = [s[name] for s in shards]
        if rest.endswith("norm"):
            tensor = parts[0]                                   # the same in every shard
        elif rest in ("attention.wo", "feed_forward.w2") or (rest == "tok_embeddings"
                                                             and parts[0].shape[0] == cfg.vocab_size):
            tensor = torch.cat(parts, 1)                        # split by input (Llama 2 splits embeddings so too)
        else:
            tensor = torch.cat(parts, 0)                        # split by output
        if rest in ("attention.wq", "attention.wk"):            # Meta rotates neighbours, Hugging Face halves
            tensor = tensor.view(-1, cfg.head_dim // 2, 2, cfg.n_embd).transpose(1, 2).reshape(tensor.shape)
        yield prefix + META_NAMES.get(rest, rest) + ".weight", tensor
