"""Attention on the GPU tier, by one of several back ends with the same methods:

    torch     plain torch: right on any device, in any dtype, and the reference of the others
    numba     where CPU cores play the GPU: decode by the kernel of cpu_attn.py, on those cores,
              and products with packed weights
    triton    on CUDA: decode and store by kernels/triton_kernels.py; prompts by torch's
              FlashAttention where GPU and dtype allow it, elsewhere as `torch` does

A new one derives from Backend and enters BACKENDS; then --gpu-attn NAME selects it.

Knows one layer's tensors on one device, nothing of requests, policy or the CPU tier. It imports
cpu_attn.py for `numba` alone. Glossary of symbols: model.py.

    python -m pytest kernels/test_kernels.py -k "gpu_attention or back_ends or flash"
"""
import importlib.util
import inspect
import os
import warnings
from abc import ABC, abstractmethod
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F

import cpu_attn
import kv_format
from kernels.products import Packed, Plain, can_pack

OLDEST = "2.10"         # torch on CUDA: its varlen_attn, and an rms_norm of one kernel (2.9)


def as_numpy(tensor):
    """A CPU tensor as NumPy, no copy. NumPy has no bf16: bf16 and fp16 come as uint16 bits."""
    return (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).numpy()


class TorchOps:
    """What lies between the matrix products, in plain torch."""

    @staticmethod
    def rotate_(qkv, cos, sin, positions, heads):
        """RoPE in place on the first `heads` heads of qkv [N, ., D], with the halves of a head as
        pairs (Hugging Face's layout); cos, sin [max_len, D/2] float32, positions [N]."""
        c, s = (table[positions][:, None] for table in (cos, sin))                  # [N, 1, D/2]
        x = qkv[:, :heads]
        first, second = x.chunk(2, -1)
        x.copy_(torch.cat((first * c - second * s, second * c + first * s), -1))

    @staticmethod
    def pack(qkv, slots, q, k, v):
        """Rows of qkv [N, H + 2 Hkv, D] with a slot >= 0 of slots [N] -> those rows of q [., H, D],
        k and v [., Hkv, D], which lie in host memory. Slots are 0, 1, 2, ... in order."""
        rows = (slots >= 0).nonzero()[:, 0]
        parts = qkv.split((q.shape[1], k.shape[1], k.shape[1]), 1)
        for there, part in zip((q, k, v), parts, strict=True):
            there[:len(rows)].copy_(part[rows], non_blocking=True)

    @staticmethod
    def unpack(o, slots, out):
        """The way back: rows of o [., H, D] in host memory -> rows of out [N, H, D]."""
        rows = (slots >= 0).nonzero()[:, 0]
        out[rows] = o[:len(rows)].to(out.device, out.dtype, non_blocking=True)

    @staticmethod
    def swiglu(gate_up):
        """[N, 2 F], gate and up side by side -> [N, F] = silu(gate) up."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)


class Backend(ABC):
    """All that model.py uses of a back end. Its __init__ raises ValueError where it cannot run."""
    padded = False      # does it skip rows of padding (slot -1, length 0)? CUDA graphs need that
    ops = TorchOps      # or a module with the same functions, in one kernel each
    products = Plain    # or Packed, of kernels/products.py

    @abstractmethod
    def __init__(self, device, dtype):
        """device, dtype: torch's, of all tensors below."""

    @abstractmethod
    def describe(self):
        """Which kernels run, in words."""

    @abstractmethod
    def store(self, k, v, k_cache, v_cache, slots):
        """k, v [n, Hkv, D] -> caches [num_blocks, Hkv, bs, D] at slots [n]: block * bs + offset.

        Here and in `decode`, caches may be int8 with scales: see kv_format.py.
        """

    @abstractmethod
    def prefill(self, q, k, v, lens, kv_lens, out, scale):
        """Causal attention of prompts, sequences end to end, in place into out.

        q, out  [sum lens, H, D]; k, v [sum kv_lens, Hkv, D]; lens, kv_lens are lists.
        A sequence's rows of q are the last of its kv_lens positions. Each attends to the positions
        up to its own.
        """

    @abstractmethod
    def decode(self, q, k_cache, v_cache, block_table, seq_lens, out, scale, lse=None):
        """Attention of one new row per sequence over its blocks, in place into out.

        q, out       [B, H, D]; caches [num_blocks, Hkv, bs, D] with the new token in them
        block_table  [B, blocks] int32; seq_lens [B] int32, the new token included
        lse          None, or [B, H] float32, contiguous: log(sum over tokens of exp(scale q . k))
        """


class TorchAttention(Backend):
    """Indexing and scaled_dot_product_attention. Decode first copies the paged KV to a padded
    tensor: three times the memory traffic of a paged kernel."""

    def __init__(self, device, dtype):
        pass

    def describe(self):
        return "torch"

    def store(self, k, v, k_cache, v_cache, slots):
        for rows, cache in ((k, k_cache), (v, v_cache)):
            kv_format.write_rows(rows, cache, slots)

    def prefill(self, q, k, v, lens, kv_lens, out, scale):
        G = q.shape[1] // k.shape[1]
        start, kv_start = 0, 0
        for n, m in zip(lens, kv_lens, strict=True):
            end, kv_end = start + n, kv_start + m
            qi = q[start:end].transpose(0, 1)[None]                         # [1, H, n, D]
            ki, vi = (x[kv_start:kv_end].transpose(0, 1)[None]              # [1, Hkv, m, D]
                      for x in (k, v))
            if qi.is_cuda and G > 1:    # kernels without [n, m] scores in memory need equal heads
                ki, vi = (x.repeat_interleave(G, 1) for x in (ki, vi))
            mask = {"is_causal": True}
            if n < m and qi.is_cuda:    # a chunk, without [n, m] scores. The import takes seconds
                from torch.nn.attention.bias import causal_lower_right
                mask = {"attn_mask": causal_lower_right(n, m)}
            elif n < m:
                mask = {"attn_mask": torch.ones(n, m, dtype=torch.bool).tril(m - n)}
            o = F.scaled_dot_product_attention(
                qi, ki, vi, scale=scale, enable_gqa=ki.shape[1] != qi.shape[1], **mask)
            out[start:end] = o[0].transpose(0, 1)
            start, kv_start = end, kv_end

    def decode(self, q, k_cache, v_cache, block_table, seq_lens, out, scale, lse=None):
        B, H, D = q.shape
        Hkv, tokens = k_cache.shape[1], block_table.shape[1] * k_cache.shape[2]
        k, v = (kv_format.convert(cache[block_table], q.dtype).transpose(1, 2)
                .reshape(B, Hkv, tokens, D) for cache in (k_cache, v_cache))
        mask = torch.arange(tokens, device=q.device) < seq_lens[:, None]    # [B, tokens]
        mask = mask[:, None, None]
        o = F.scaled_dot_product_attention(
            q[:, :, None], k, v, mask, scale=scale, enable_gqa=True)        # [B, H, 1, D]
        out.copy_(o[:, :, 0])

        if lse is not None:
            scores = q.reshape(B, Hkv, -1, D).float() @ k.float().mT        # [B, Hkv, G, tokens]
            scores = (scores * scale).masked_fill(~mask, float("-inf"))
            lse.copy_(scores.logsumexp(-1).view(B, H))


class NumbaAttention(TorchAttention):
    """Decode by cpu_attn's kernel, which reads the KV once, where it lies."""

    def __init__(self, device, dtype):
        if device.type != "cpu":
            raise ValueError("gpu_attn 'numba' runs on CPU cores: on CUDA take triton or torch")
        if can_pack(device, dtype):
            self.products = Packed

    def describe(self):
        packed = ", packed weights" if self.products is Packed else ""
        return f"Numba decode, torch prefill{packed}"

    def decode(self, q, k_cache, v_cache, block_table, seq_lens, out, scale, lse=None):
        result = torch.empty(q.shape, dtype=torch.float32)
        cpu_attn.paged_decode(
            q.float().contiguous().numpy(), as_numpy(k_cache), as_numpy(v_cache),
            block_table.numpy(), seq_lens.numpy(), result.numpy(), scale,
            kv_format.NAMES[q.dtype],
            lse=None if lse is None else lse.numpy())
        out.copy_(result)


class TritonAttention(TorchAttention):
    """Paged decode and store by our Triton kernels, prompts by FlashAttention (torch >= 2.11)."""
    padded = True

    def __init__(self, device, dtype):
        if not importlib.util.find_spec("triton"):
            raise ValueError("gpu_attn 'triton' needs the package triton, which torch's CUDA "
                             "builds bring: pip install triton")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("gpu_attn 'triton' needs a CUDA GPU (or TRITON_INTERPRET=1, for "
                             "tests): take numba or torch")
        if device.type == "cuda" and torch.torch_version.TorchVersion(torch.__version__) < OLDEST:
            raise ValueError(f"torch {torch.__version__} is too old for the GPU kernels: pip "
                             f"install -U 'torch>={OLDEST}', or take --gpu-attn torch")
        from kernels import triton_kernels
        self.ops, self.no_flash = triton_kernels, why_no_flash(device, dtype)
        if not self.no_flash:               # the import takes seconds
            from torch.nn.attention.varlen import varlen_attn
            self.use_flash(varlen_attn)

    def use_flash(self, varlen_attn):
        """It has taken grouped heads, and an option for them, since torch 2.12."""
        self.no_flash, self.varlen_attn = "", varlen_attn
        self.takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def describe(self):
        prompts = f"torch ({self.no_flash})" if self.no_flash else "FlashAttention"
        return f"Triton decode, {prompts} prefill"

    def store(self, k, v, k_cache, v_cache, slots):
        self.ops.store(k, v, k_cache, v_cache, slots)

    def decode(self, q, k_cache, v_cache, block_table, seq_lens, out, scale, lse=None):
        self.ops.paged_decode(q, k_cache, v_cache, block_table, seq_lens, out, scale, lse=lse)

    def prefill(self, q, k, v, lens, kv_lens, out, scale):
        if self.no_flash or q.shape[2] % 8 or q.shape[2] > 256:     # D that FlashAttention takes
            return super().prefill(q, k, v, lens, kv_lens, out, scale)

        ends = row_ends(tuple(lens), tuple(kv_lens), q.device)
        options = {"scale": scale, "window_size": (-1, 0)}          # (-1, 0): causal
        G = q.shape[1] // k.shape[1]
        if G > 1 and self.takes_groups:
            options["enable_gqa"] = True
        elif G > 1:
            k, v = (x.repeat_interleave(G, 1) for x in (k, v))
        out.copy_(self.varlen_attn(q, k, v, ends[0], ends[1], max(lens), max(kv_lens), **options))


@lru_cache(4)                           # every layer of a sub-batch asks for the same
def row_ends(lens, kv_lens, device):
    """Sums of the first 0, 1, 2, ... lengths: [2, len(lens) + 1] int32 on the device."""
    ends = torch.tensor([[0, *accumulate(x)] for x in (lens, kv_lens)], dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def why_no_flash(device, dtype):
    """Why torch's FlashAttention cannot take the prompts here; "" if it can."""
    if device.type != "cuda":
        return "no CUDA"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "FlashAttention needs compute capability 8.0"
    if dtype == torch.float32:
        return "FlashAttention knows no float32"
    return ""


BACKENDS = {"torch": TorchAttention, "numba": NumbaAttention, "triton": TritonAttention}


def choose(name, device, dtype):
    """A back end by name, or for "auto" the fastest one here; device, dtype: torch's.

    Raises ValueError on an unknown or unusable one.
    """
    if name == "auto" and device.type == "cpu":
        name = "numba"
    elif name == "auto" and importlib.util.find_spec("triton"):
        name = "triton"
    elif name == "auto":
        name = "torch"
        warnings.warn("no package triton: GPU attention through plain torch, which is several "
                      "times slower", stacklevel=2)
    if name not in BACKENDS:
        raise ValueError(f"gpu_attn {name!r}: must be auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](device, dtype)
