"""Attention on the GPU tier. One signature, several back ends:

    torch     plain torch: right on any device and in any dtype
    numba     on a GPU that is played by CPU cores: the paged kernel of cpu_attn.py, on the GPU's own threads
    triton    on CUDA: our paged decode kernel (gpu_kernels.py); prompts through the FlashAttention inside torch where GPU,
              dtype and torch allow it, else as `torch` does

    store(k, v, k_cache, v_cache, slots)                              new rows into the paged cache
    prefill(q, k, v, lens, kv_lens, scale, out)                       causal, a ragged batch of prompts
    decode(q, k_cache, v_cache, block_table, seq_lens, scale, out)    one new row per sequence over its blocks

A back end is a class with these three methods; model.py calls nothing else, so a faster one plugs in by its name in
BACKENDS. Knows one layer and the GPU tier, nothing of schedulers or of the CPU tier. Glossary of symbols: model.py.
"""
import importlib.util
import inspect
import os
import warnings
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import cpu_attn
from kvcache import FORMATS, to_numpy


class TorchAttention:
    """Indexing and scaled_dot_product_attention. Decode gathers the paged KV into a padded copy: three times the
    memory traffic of a paged kernel."""
    padded = False      # takes rows of padding (slot -1, length 0), as a captured launch has them?
    ops = None          # a module with RoPE and SwiGLU in one kernel each, where there is one

    def __init__(self, device, dtype):
        pass

    def describe(self):
        return "torch"

    def store(self, k, v, k_cache, v_cache, slots):
        """k, v [n, Hkv, D] into k_cache, v_cache [num_blocks, Hkv, bs, D] at slots [n] int (block * bs + offset)."""
        bs = k_cache.shape[2]
        block, offset = slots // bs, slots % bs
        k_cache[block, :, offset] = k
        v_cache[block, :, offset] = v

    def prefill(self, q, k, v, lens, kv_lens, scale, out):
        """q, out [sum lens, H, D]; k, v [sum kv_lens, Hkv, D]; sequences end to end. Rows of q are the last of their
        sequence's kv_lens positions, and each sees those up to its own."""
        G = q.shape[1] // k.shape[1]
        at, kv_at = 0, 0
        for n, m in zip(lens, kv_lens):
            qi = q[at:at + n].transpose(0, 1)[None]                                             # [1, H, n, D]
            ki, vi = (t[kv_at:kv_at + m].transpose(0, 1)[None] for t in (k, v))                 # [1, Hkv, m, D]
            if qi.is_cuda and G > 1:                # its kernels that need no [n, m] scores in memory want equal heads
                ki, vi = (t.repeat_interleave(G, 1) for t in (ki, vi))
            mask = dict(is_causal=True) if n == m else dict(attn_mask=causal_lower_right(n, m))
            o = F.scaled_dot_product_attention(qi, ki, vi, scale=scale, enable_gqa=ki.shape[1] != qi.shape[1], **mask)
            out[at:at + n] = o[0].transpose(0, 1)
            at, kv_at = at + n, kv_at + m

    def decode(self, q, k_cache, v_cache, block_table, seq_lens, scale, out):
        """q, out [B, H, D]; caches [num_blocks, Hkv, bs, D]; block_table [B, blocks], seq_lens [B] int32."""
        B, width = block_table.shape
        _, Hkv, bs, D = k_cache.shape

        def gather(cache):                                                                  # [B, Hkv, width * bs, D]
            return cache[block_table].transpose(1, 2).reshape(B, Hkv, width * bs, D)
        mask = torch.arange(width * bs, device=q.device) < seq_lens[:, None]                # [B, width * bs]
        o = F.scaled_dot_product_attention(q[:, :, None], gather(k_cache), gather(v_cache), mask[:, None, None],
                                           scale=scale, enable_gqa=True)                    # [B, H, 1, D]
        out.copy_(o[:, :, 0])


class NumbaAttention(TorchAttention):
    """Decode through cpu_attn's paged kernel, which reads the KV once, where it lies."""

    def __init__(self, device, dtype):
        if device.type != "cpu":
            raise ValueError("gpu_attn 'numba' runs on CPU cores: on CUDA take triton or torch")

    def describe(self):
        return "Numba decode, torch prefill"

    def decode(self, q, k_cache, v_cache, block_table, seq_lens, scale, out):
        result = torch.empty(q.shape, dtype=torch.float32)
        cpu_attn.paged_decode(q.float().contiguous().numpy(), to_numpy(k_cache), to_numpy(v_cache), block_table.numpy(),
                              seq_lens.numpy(), result.numpy(), scale, FORMATS[q.dtype])
        out.copy_(result)


class TritonAttention(TorchAttention):
    """Paged decode and store by our Triton kernels, prompts by FlashAttention. On a CPU only under Triton's interpreter."""
    padded = True

    def __init__(self, device, dtype):
        if not importlib.util.find_spec("triton"):
            raise ValueError("gpu_attn 'triton' needs the package triton, which torch's CUDA builds bring: pip install triton")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("gpu_attn 'triton' needs a CUDA GPU (or TRITON_INTERPRET=1, for tests): take numba or torch")
        import gpu_kernels
        self.ops, self.store, self.decode = gpu_kernels, gpu_kernels.store, gpu_kernels.paged_decode
        self.flash, self.why = find_varlen(device, dtype)

    def describe(self):
        return f"Triton decode, {'FlashAttention' if self.flash else f'torch ({self.why})'} prefill"

    def prefill(self, q, k, v, lens, kv_lens, scale, out):
        if not self.flash or q.shape[2] % 8 or q.shape[2] > 256:              # heads that FlashAttention takes
            return super().prefill(q, k, v, lens, kv_lens, scale, out)
        ends = row_ends(tuple(lens), tuple(kv_lens), q.device)
        out.copy_(self.flash(q, k, v, ends[0], ends[1], max(lens), max(kv_lens), scale))


@lru_cache(4)                                       # every layer of a sub-batch asks for the same
def row_ends(lens, kv_lens, device):
    """Cumulated lengths, [2, len(lens) + 1] int32 on the device."""
    ends = torch.tensor([[0, *accumulate(x)] for x in (lens, kv_lens)], dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def find_varlen(device, dtype):
    """(torch's FlashAttention on ragged batches, "") or (None, the reason why not).

    It is called as f(q, k, v, ends of q, ends of k, longest q, longest k, scale); its signature differs between torch
    versions: causality was a flag before it was a window, scale (ours is its default) and grouped heads came later."""
    if device.type != "cuda":
        return None, "no CUDA"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return None, "FlashAttention needs compute capability 8.0"
    if dtype == torch.float32:
        return None, "FlashAttention knows no float32"
    if not importlib.util.find_spec("torch.nn.attention.varlen"):
        return None, f"torch {torch.__version__} has no varlen_attn"
    from torch.nn.attention.varlen import varlen_attn
    return bind_varlen(varlen_attn), ""


def bind_varlen(varlen_attn):
    """varlen_attn of any torch version -> the call that find_varlen promises."""
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def attend(q, k, v, q_ends, k_ends, q_most, k_most, scale):
        options = causal | ({"scale": scale} if "scale" in known else {})
        G = q.shape[1] // k.shape[1]
        if G > 1 and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif G > 1:
            k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
        return varlen_attn(q, k, v, q_ends, k_ends, q_most, k_most, **options)
    return attend


BACKENDS = {"torch": TorchAttention, "numba": NumbaAttention, "triton": TritonAttention}


def choose(name, device, dtype):
    """A back end by name, or for "auto" the fastest one here. Raises ValueError on an unknown or unusable one."""
    if name == "auto":
        name = "numba" if device.type == "cpu" else "triton" if importlib.util.find_spec("triton") else "torch"
        if name == "torch":
            warnings.warn("no package triton: GPU attention through plain torch, which is several times slower")
    if name not in BACKENDS:
        raise ValueError(f"gpu_attn {name!r}: must be auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](device, dtype)
