"""Llama and its kin: weights, linear parts, and one forward pass that may take turns with others.

The pass is a generator; pipelining is two generators taking turns (NEO, section 3.1). From the
start of an iteration:

    GPU   lin0A att0A lin0B att0B | lin1A att1A lin1B att1B | lin2A ...
    CPU               [ cpu A,0  ] [ cpu B,0   ][ cpu A,1  ] [ cpu B,1 ] ...

lin = linear parts, att = attention of prefill and GPU-decode rows, cpu = attention of CPU-decode
rows. With no GPU, a worker thread plays it (queues.py); everything else is the same code. Knows no
requests, no policy, and not how work is launched.

Glossary of symbols, for every file:
    N rows (tokens) of a sub-batch     B sequences        S rows that get sampled
    L layers    E hidden size          F feed-forward size                V vocabulary
    H query heads     Hkv key/value heads     G = H / Hkv heads per group     D head size
    bs tokens per block     q, k, v, o query, key, value, attention output     x hidden state
"""
import math
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cpu_attn
from captures import Captures
from checkpoint import PRESETS, read_tensors
from gpu_attn import as_numpy
from kv_format import NAMES
from kvcache import zeros
from perfmodel import Result, Span
from queues import CudaQueue, ThreadQueue, host_tensor, on_cuda

TABLE_SIZE = 4_194_301  # random weights that are drawn; prime, so that no two rows are alike


@dataclass
class Layer:
    """Weights of one layer; projections that share an input are one matrix.

    H, Hkv and F are those of this process: a shard of a model has fewer than its config says.
    """
    attn_norm: torch.Tensor     # [E]
    wqkv: torch.Tensor          # [(H + 2 Hkv) D, E]
    wo: torch.Tensor            # [E, H D]
    ffn_norm: torch.Tensor      # [E]
    w_gate_up: torch.Tensor     # [2 F, E]
    w_down: torch.Tensor        # [E, F]
    bqkv: torch.Tensor = None   # [(H + 2 Hkv) D], of Qwen2
    q_norm: torch.Tensor = None     # [D], with k_norm of Qwen3: of each head, before RoPE
    k_norm: torch.Tensor = None     # [D]


@dataclass
class Activations:
    """The tensors that one sub-batch is computed in, for one pass."""
    x: torch.Tensor                 # [N, E] hidden state
    qkv: torch.Tensor               # [N, H + 2 Hkv, D] of the present layer
    o: torch.Tensor                 # [N, H, D] attention output
    last: torch.Tensor = None       # [S, E] hidden state of the sampled rows, after the last layer

    def first(self, N):
        return Activations(self.x[:N], self.qkv[:N], self.o[:N])


class HostBuffers:
    """Host memory of one sub-batch, pinned on CUDA: q, k, v of CPU decodes arrive here, and their
    attention output o leaves from here. k and v of prompts bound for the CPU tier have two places,
    so that one layer's can be stored while the next layer's arrive.

    most_decodes  0, or the most rows of decodes: captured kernels know where these buffers lie, so
                  with captures they never move
    """

    def __init__(self, num_heads, num_kv_heads, head_dim, kv_dtype, pinned, most_decodes):
        q, k = (num_heads, head_dim, torch.float32), (num_kv_heads, head_dim, kv_dtype)
        self.shapes = {"q": q, "o": q, "k": k, "v": k, "prompt_k": k, "prompt_v": k}
        self.pinned, self.buffers = pinned, {}      # name -> (tensor, the same as NumPy's array)
        self.most_decodes = most_decodes
        self.fit(most_decodes, 0)

    def fit(self, num_cpu, num_stored):
        """Make room for num_cpu decode rows, and twice for num_stored prompt rows."""
        assert num_cpu <= self.most_decodes or not self.most_decodes
        for name, (heads, D, dtype) in self.shapes.items():
            rows = 2 * num_stored if name.startswith("prompt") else num_cpu
            if name not in self.buffers or len(self.tensor(name)) < rows:
                room = 0 if name not in self.buffers else rows      # so that it seldom grows
                t = host_tensor((rows + room, heads, D), dtype, self.pinned)
                self.buffers[name] = t, as_numpy(t)

    def tensor(self, name):
        return self.buffers[name][0]

    def numpy(self, name):
        return self.buffers[name][1]

    @staticmethod
    def place(num_stored, layer):
        """The rows of prompt_k and prompt_v that a layer uses."""
        first = num_stored * (layer % 2)
        return slice(first, first + num_stored)


class Model:
    """Weights on the device, and the forward pass.

    name         a preset's name (random weights, drawn from `seed`) or a checkpoint folder
    dtype        torch dtype of weights and activations
    row_dtype    torch dtype of the k and v rows that go to the CPU tier
    max_len      longest sequence for which RoPE is tabulated
    gpu_threads  cores of the emulated GPU (CPU device only)
    cpu_threads  cores for CPU attention
    gpu_attn     a back end of gpu_attn.py
    cpu_path     a path of cpu_attn.paged_decode
    ranks        ranks.Ranks: this process holds its share of the heads, and of the rest
    eager        launch every kernel by itself: no CUDA graphs

    Raises ValueError on a checkpoint with missing, extra or misshapen tensors, or unreadable files.
    """

    def __init__(self, name, cfg, dtype, row_dtype, device, max_len, gpu_threads, cpu_threads,
                 gpu_attn, cpu_path, ranks, eager=False, seed=0):
        self.cfg, self.dtype, self.device, self.cpu_threads = cfg, dtype, device, cpu_threads
        self.queue = CudaQueue() if on_cuda(device) else ThreadQueue(gpu_threads)
        self.attn, self.ops, self.products = gpu_attn, gpu_attn.ops, gpu_attn.products
        self.max_len, self.ranks = max_len, ranks
        self.cpu_path = cpu_path
        self.captures, self.most_decodes = None, 0  # set by allow_captures
        self.may_capture = gpu_attn.padded and not eager
        self.row_dtype, self.row_format = row_dtype, NAMES[row_dtype]
        self.host = {}                              # sub-batch index -> HostBuffers
        self.timed = True                           # does a run record its spans?
        self.cpu_spans, self.move_spans = [], []    # of the last run
        self.random_weights = name in PRESETS
        self._allocate()
        if self.random_weights:
            self._randomise(seed)
        else:
            self._load(Path(name))
        self._pack()
        self.cos, self.sin = (t.to(device) for t in rope_table(cfg, max_len))   # [max_len, D/2]

    # ---- weights

    def _allocate(self):
        num_ranks = self.ranks.size
        c = self.cfg.shard(num_ranks)
        H, Hkv, D, E, F_ = c.n_head, c.n_kv_head, c.head_dim, c.n_embd, c.n_ffn

        def new(*shape):
            return zeros(shape, self.dtype, self.device)
        self.embed = new(c.vocab_size, E)
        self.lm_head = None if c.tie_embeddings else new(c.vocab_rows(num_ranks), E)
        self.norm = new(E)
        self.layers = [Layer(attn_norm=new(E), wqkv=new((H + 2 * Hkv) * D, E), wo=new(E, H * D),
                             ffn_norm=new(E), w_gate_up=new(2 * F_, E), w_down=new(E, F_))
                       for _ in range(c.n_layer)]
        for w in self.layers:
            if c.qkv_bias:
                w.bqkv = new((H + 2 * Hkv) * D)
            if c.qk_norm:
                w.q_norm, w.k_norm = new(D), new(D)

    @property
    def num_heads(self):
        """(H, Hkv) of the weights in this process."""
        w, D = self.layers[0], self.cfg.head_dim
        H = w.wo.shape[1] // D
        return H, (w.wqkv.shape[0] // D - H) // 2

    @property
    def kv_geometry(self):
        """(L, Hkv, D) of the KV that this process holds."""
        return len(self.layers), self.num_heads[1], self.cfg.head_dim

    def _pack(self):
        """Weights -> what the products take, a matrix at a time. weight_views ends here."""
        if self.cfg.tie_embeddings:         # the last rank may have fewer rows of the vocabulary
            part = self._cut("lm_head.weight", self.embed)
            missing = self.cfg.vocab_rows(self.ranks.size) - len(part)
            self.lm_head = F.pad(part, (0, 0, 0, missing)) if missing else part
        for w in self.layers:
            for name in ("wqkv", "wo", "w_gate_up", "w_down"):
                setattr(w, name, self.products.pack(getattr(w, name)))
        self.lm_head = self.products.pack(self.lm_head)     # of tied weights: a copy, if packed

    def weight_views(self):
        """Hugging Face tensor name -> the view of the (merged) weights that it belongs in, while
        they are not packed (of --gpu-attn torch and triton: always)."""
        out = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        if not self.cfg.tie_embeddings:
            out["lm_head.weight"] = self.lm_head
        for i, w in enumerate(self.layers):
            widths = [n * self.cfg.head_dim for n in self._qkv_heads()]
            q, k, v = w.wqkv.split(widths)
            gate, up = w.w_gate_up.chunk(2)
            views = {"input_layernorm": w.attn_norm, "self_attn.q_proj": q, "self_attn.k_proj": k,
                     "self_attn.v_proj": v, "self_attn.o_proj": w.wo,
                     "post_attention_layernorm": w.ffn_norm, "mlp.gate_proj": gate,
                     "mlp.up_proj": up, "mlp.down_proj": w.w_down}
            if w.q_norm is not None:
                views |= {"self_attn.q_norm": w.q_norm, "self_attn.k_norm": w.k_norm}
            out |= {f"model.layers.{i}.{name}.weight": view for name, view in views.items()}
            if w.bqkv is not None:
                for name, bias in zip("qkv", w.bqkv.split(widths), strict=True):
                    out[f"model.layers.{i}.self_attn.{name}_proj.bias"] = bias
        return out

    def _cut(self, name, whole):
        """This rank's part of a whole tensor."""
        return self.cfg.cut(name, whole, self.ranks.rank, self.ranks.size)

    def _randomise(self, seed):
        """Fill from one table of normal deviates, each tensor from its own offset. This runs at the
        speed of a copy. Ranks draw whole tensors, so the model is the same for any number."""
        table = torch.randn(TABLE_SIZE, generator=torch.Generator().manual_seed(seed))
        # 0.02: Llama's initializer_range
        table = (0.02 * table).to(device=self.device, dtype=self.dtype)
        offset, n = 0, len(table)
        views = tqdm(self.weight_views().items(), "random weights", disable=None, leave=False)
        for name, w in views:
            if "norm" in name:
                w.fill_(1)
                continue
            whole = w if self.ranks.size == 1 else w.new_empty(self.cfg.whole_shape(name))
            flat = whole.view(-1)
            for i in range(0, flat.numel(), n):
                part = flat[i:i + n]
                cut = min(n - offset, len(part))
                part[:cut] = table[offset:offset + cut]
                part[cut:] = table[:len(part) - cut]
            offset = (offset + flat.numel() + 12_345) % n
            part = self._cut(name, whole)
            if part is not w:
                w[:len(part)] = part

    def _load(self, path):
        views, unknown = self.weight_views(), []
        total = len(views)
        tensors = tqdm(read_tensors(path, self.cfg), f"loading {path.name}", total, disable=None,
                       leave=False)
        for name, tensor in tensors:
            tied = self.cfg.tie_embeddings and name == "lm_head.weight"
            if tied or name.endswith("rotary_emb.inv_freq"):
                continue                    # older checkpoints carry what follows from the config
            view = views.pop(name, None)
            if view is None:
                unknown.append(name)
                continue
            shape = self.cfg.whole_shape(name)
            if tensor.shape != shape:
                raise ValueError(
                    f"{path}: {name} has shape {list(tensor.shape)}, the config asks for "
                    f"{list(shape)}: config and weights do not belong together")
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: {name} has dtype {tensor.dtype}: weights must be "
                                 "floating point (quantised checkpoints are not supported)")
            part = self._cut(name, tensor)
            view[:len(part)] = part
            if not view.sum(dtype=torch.float32).isfinite() and not view.isfinite().all():
                raise ValueError(f"{path}: {name} has NaN or infinite weights in {self.dtype}: "
                                 "download it again, or take a wider --dtype")
        for what, names in (("lacks", list(views)), ("has unexpected", unknown)):
            if names:
                raise ValueError(
                    f"{path}: the checkpoint {what} {len(names)} tensor(s) of {total}, first "
                    f"{names[0]}: is it complete, and is config.json its own?")

    # ---- stages. One layer = the second half of `linear` of this layer and the first half of
    # `linear` of the next one, with attention in between

    def linear(self, b, act, i):
        """Finish layer i - 1 and start layer i of SubBatch b: updates act.x, sets act.qkv; after
        the last layer sets act.last. CPU decodes: their o comes from the host before, and their q,
        k and v are on the host after it."""
        L, ops, products = len(self.layers), self.ops, self.products
        host = self.host[b.index].tensor if b.num_cpu else None
        if i == 0:
            torch.index_select(self.embed, 0, b.tokens, out=act.x)                  # [N, E]
        else:
            if host:
                ops.unpack(host("o"), b.host_slots, act.o)
            w, x, o = self.layers[i - 1], act.x, act.o.flatten(1)
            if i == L:
                act.last = x = x[b.sampled_rows]                                    # [S, E]
                o = o[b.sampled_rows]
                if not len(x):                          # only chunks of prompts: nothing to sample
                    return
            # The residual is added within the products, by rank 0 alone: the sum has it once.
            adds_residual = self.ranks.rank == 0
            products.add_linear_(x, o, w.wo, keep=adds_residual)
            self.ranks.add_up(x)
            gate_up = products.linear(self._norm(x, w.ffn_norm), w.w_gate_up)       # [N, 2 F]
            products.add_linear_(x, ops.swiglu(gate_up), w.w_down, keep=adds_residual)
            self.ranks.add_up(x)
            if i == L:
                return
        w, (H, Hkv) = self.layers[i], self.num_heads
        out = act.qkv.view(len(act.qkv), -1)                                # [N, (H + 2 Hkv) D]
        products.linear(self._norm(act.x, w.attn_norm), w.wqkv, w.bqkv, out)
        if w.q_norm is not None:
            for x, norm in ((act.qkv[:, :H], w.q_norm), (act.qkv[:, H:H + Hkv], w.k_norm)):
                x.copy_(self._norm(x, norm))
        ops.rotate_(act.qkv, self.cos, self.sin, b.positions, H + Hkv)
        if host:
            # The host has read these buffers: this was launched after CPU attention of layer i - 1.
            ops.pack(act.qkv, b.host_slots, host("q"), host("k"), host("v"))

    def head(self, activations, logits, best):
        """Of the sampled rows of all sub-batches: logits [S, V] float32, and best [S] int64, the
        tokens of the largest ones."""
        h = self._norm(torch.cat([act.last for act in activations]), self.norm)
        if h.dtype == logits.dtype and self.ranks.size == 1:
            self.products.linear(h, self.lm_head, out=logits)
        else:                               # a part of the vocabulary from each rank
            whole = self.ranks.gather(self.products.linear(h, self.lm_head))
            logits.copy_(whole[:, :logits.shape[1]])
        if logits.is_cuda:
            torch.argmax(logits, -1, out=best)
        else:               # NumPy's argmax is ten times faster than torch's on a CPU
            best.copy_(torch.from_numpy(logits.numpy().argmax(-1)))

    def head_rows(self, S):
        """Room for what `head` writes for S rows: logits, best."""
        return (torch.empty(S, self.cfg.vocab_size, dtype=torch.float32, device=self.device),
                torch.empty(S, dtype=torch.int64, device=self.device))

    def _norm(self, x, weight):
        return F.rms_norm(x, weight.shape, weight, self.cfg.norm_eps)

    def attend(self, b, act, kv, i):
        """Layer i's attention of prefill and GPU-decode rows, into act.o; new k and v into the GPU
        tier."""
        scale, tier = self.cfg.head_dim ** -0.5, kv.tiers["gpu"]
        k_cache, v_cache = tier.k[i], tier.v[i]
        (q, k, v), o = self._split(act.qkv), act.o
        stored, p, end = b.num_stored, b.num_prefill, b.num_prefill + b.num_gpu_rows
        if end > stored:
            self.attn.store(k[stored:end], v[stored:end], k_cache, v_cache, b.gpu_slots)
        if p:
            kv_lens, k_all, v_all = kv.with_past(i, b, k[:p], v[:p])
            self.attn.prefill(q[:p], k_all, v_all, b.prefill_lens, kv_lens, o[:p], scale)
        if b.num_gpu_rows:
            self.attn.decode(q[p:end], k_cache, v_cache, b.gpu_table, b.gpu_lens, o[p:end], scale)

    def _qkv_heads(self):
        H, Hkv = self.num_heads
        return H, Hkv, Hkv

    def _split(self, qkv):
        """Views q [N, H, D] and k, v [N, Hkv, D]."""
        return qkv.split(self._qkv_heads(), 1)

    def send(self, b, act, i):
        """k and v of layer i's prompts bound for the CPU tier -> host memory."""
        host, (_, k, v) = self.host[b.index], self._split(act.qkv)
        place = host.place(b.num_stored, i)
        for name, src in (("prompt_k", k), ("prompt_v", v)):
            host.tensor(name)[place].copy_(src[:b.num_stored], non_blocking=True)

    def cpu_attend(self, b, kv, i):
        """Layer i's CPU decodes, on this thread and Numba's: k and v into the CPU tier, then
        attention."""
        start, host, n = time.perf_counter(), self.host[b.index].numpy, b.num_cpu
        k_cache, v_cache = kv.cpu_k[i], kv.cpu_v[i]
        cpu_attn.store_kv(host("k")[:n], host("v")[:n], k_cache, v_cache, b.cpu_slots,
                          self.row_format)
        cpu_attn.paged_decode(host("q")[:n], k_cache, v_cache, b.cpu_table, b.cpu_lens,
                              host("o")[:n], self.cfg.head_dim ** -0.5, self.row_format,
                              self.cpu_path)
        end = time.perf_counter()
        self.cpu_spans.append(Span("cpu", "cpu_attend", i, b.index, start, end))

    # ---- the pass

    def forward(self, b, kv, depth, activations):
        """One sub-batch through `depth` layers and the last half of the last one. Yields whenever
        another sub-batch may take its turn; leaves its Activations in `activations`."""
        queue, index = self.queue, b.index
        act, linear, attend = self._place(b, kv)
        activations[index] = act
        kv.fetch_past(b, 0)
        for i in range(depth):
            queue.submit("linear", i, index, linear)        # finish layer i - 1, start layer i
            if b.num_stored:
                kv.wait_stored(b, i - 2)                    # its place is used again
                on_host = queue.send("send", i, index, partial(self.send, b, act))
            elif b.num_cpu:
                on_host = queue.mark()
            kv.wait_swaps(i)
            if i + 1 < depth:
                kv.fetch_past(b, i + 1)                     # a layer ahead of its attention
            queue.submit("attend", i, index, attend)
            yield                                           # another sub-batch takes its turn
            if b.num_host_rows:
                queue.wait(on_host)                         # else the host would read old rows
            if b.num_stored:
                host, place = self.host[index].numpy, HostBuffers.place(b.num_stored, i)
                kv.store_prompts(b, i, host("prompt_k")[place], host("prompt_v")[place])
            if b.num_cpu:
                self.cpu_attend(b, kv, i)
        queue.submit("linear", len(self.layers), index, partial(self.linear, b, act))

    @torch.inference_mode()
    def run(self, sub_batches, kv, depth=None):
        """Run one SubBatch (sequential) or several (pipelined) -> Result of all their sampled rows.

        On CUDA it returns while the GPU still works; whatever reads the Result waits for it.
        depth  stop after this number of layers, for profiling; default all
        """
        self.cpu_spans, queue, L = [], self.queue, len(self.layers)
        if self.captures:
            self.captures.captured_now = False
        queue.begin(self.timed)
        cpu_attn.set_threads(self.cpu_threads)
        S, whole, activations = sum(len(b.sampled_rows) for b in sub_batches), None, {}
        if self.captures and not depth and len(sub_batches) == 1:
            whole = self.captures.whole_pass(sub_batches[0], kv)
        logits, best = whole[1:] if whole else self.head_rows(S)
        depth = depth or L
        turns = deque(self.forward(b, kv, depth, activations) for b in sub_batches)
        done = object()
        try:
            if whole:
                queue.submit("pass", L, 0, lambda layer: whole[0]())
                turns.clear()
            while turns:
                if next(turns[0], done) is done:
                    turns.popleft()
                else:
                    turns.rotate(-1)
            if not whole:
                queue.submit("head", L, 0,
                             lambda layer: self.head(activations.values(), logits, best))
            for b in sub_batches:
                for i in (depth - 2, depth - 1):
                    kv.wait_stored(b, i)    # raises what went wrong; earlier layers were waited for
        finally:                            # also when a stage failed: nothing may run on
            try:
                queue.drain()
            finally:
                self.move_spans = kv.settle()   # after the stages that wait for its copies
        best = best[:S]                         # behind them: padding
        return Result(logits[:S], best, queue.bring(best))

    def settle(self, kv):
        """After a run that failed: wait until nothing of it works on."""
        self.queue.settle()
        kv.settle()

    @property
    def spans(self):
        """perfmodel.Spans of the last run, of all ranks. Waits for the GPU."""
        return self.ranks.all_spans(self.own_spans) if self.timed else []

    @property
    def own_spans(self):
        """Those of this rank."""
        spans = self.queue.spans()
        return spans + self.cpu_spans + self.move_spans if spans else []

    # ---- where a sub-batch is computed

    def allow_captures(self, width, most_rows):
        """Make the static memory of captured decodes, for block tables of `width` blocks and up to
        `most_rows` decodes of a tier, if this back end and the options allow captures."""
        if self.may_capture:
            self.captures = Captures(self, width, most_rows)
            self.most_decodes = self.captures.most_rows

    def capture_passes(self, kv):
        """Capture whole passes for as many decodes as the GPU tier can hold, before anybody waits
        for them."""
        if self.captures and on_cuda(self.device):
            self.captures.capture_passes(kv)

    def drop_captures(self):
        """Free all CUDA graphs; the model does not run any more."""
        if self.captures:
            self.captures.passes.clear()
            self.captures.stages.clear()

    @property
    def captured(self):
        """Did the last run stop to capture something?"""
        return bool(self.captures and self.captures.captured_now)

    def padded_rows(self, num_gpu, num_cpu, num_prefill=0):
        """(GPU decodes, CPU decodes, prompt rows) -> rows that the decodes are padded to."""
        if not self.captures:
            return num_gpu, num_cpu
        return self.captures.padded_rows(num_gpu, num_cpu, num_prefill)

    def activations(self, N):
        (H, Hkv), D = self.num_heads, self.cfg.head_dim

        def new(*shape):
            return torch.empty(N, *shape, dtype=self.dtype, device=self.device)
        return Activations(new(self.embed.shape[1]), new(H + 2 * Hkv, D), new(H, D))

    def _place(self, b, kv):
        """-> (Activations, linear(layer), attend(layer)) of a SubBatch."""
        if b.index not in self.host:
            self.host[b.index] = HostBuffers(
                *self.num_heads, self.cfg.head_dim, self.row_dtype, on_cuda(self.device),
                self.most_decodes)
        self.host[b.index].fit(b.num_cpu, b.num_stored)
        placed = self.captures.stages_of(b, kv) if self.captures else None
        if placed:
            return placed
        act = self.activations(len(b.tokens))
        return act, partial(self.linear, b, act), partial(self.attend, b, act, kv)

    def describe_attention(self):
        """Which attention runs in either tier, in words."""
        launches = ", in CUDA graphs" if self.may_capture else ", launched one by one"
        launches = launches if self.device.type == "cuda" else ""
        return (f"GPU tier: {self.attn.describe()}{launches}; CPU tier: "
                f"{cpu_attn.describe(self.cpu_path)}")


def rope_table(cfg, max_len):
    """cos, sin [max_len, D/2] float32, with the config's scaling applied to the frequencies."""
    exponent = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim
    freq = 1.0 / cfg.rope_theta ** exponent
    scaling = cfg.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind == "linear":
        freq /= scaling["factor"]
    elif kind == "llama3":          # long wavelengths / factor, short ones kept, a blend in between
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)   # 0: fewer than `low` turns
        freq = freq * (keep + (1 - keep) / scaling["factor"])
    angle = torch.arange(max_len, dtype=torch.float32)[:, None] * freq
    return angle.cos(), angle.sin()
