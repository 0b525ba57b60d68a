"""What the numbers of a KV cache look like in memory: 16 or 32 bits each, or int8 with scales.

A cache is [..., bs, D] of bf16, fp16 or fp32. In int8 it takes about half of 16 bits: every token
and head has its own scale, x = scale * row with scale = max |x| / 127, and the block of a head,

    [..., bs, D + 4] int8   =   rows [bs, D] int8, then scales [bs] float32

is one run of memory. This is not exact: --cpu-kv int8 and --gpu-kv int8 ask for it. K and V are
rounded when they enter such a tier and widened when they leave it. Knows no tiers and computes no
attention; cpu_attn.py has the same layout for its kernels, and the size of a scale.
"""
import torch

from cpu_attn import SCALE_BYTES

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8"}


def row_width(head_dim, dtype):
    """Elements that one token of one head takes in a cache of this dtype."""
    return head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)


def kv_bytes(num_heads, head_dim, dtype):
    """Bytes of one token's K and V in one layer."""
    return 2 * num_heads * row_width(head_dim, dtype) * dtype.itemsize


def parts(cache):
    """Views of an int8 cache [..., bs, D + 4]: its rows [..., bs, D] and scales [..., bs]."""
    *outer, bs, width = cache.shape
    D = width - SCALE_BYTES
    flat = cache.view(*outer, bs * width)
    return flat[..., :bs * D].view(*outer, bs, D), flat[..., bs * D:].view(torch.float32)


def rounded(x):
    """x [..., D] -> rows [..., D] int8, scales [...] float32."""
    x = x.float()
    top = x.abs().amax(-1)
    per_unit = torch.tensor(127.0) / top.clamp_min(1e-30)       # `127 / x` is 127 * (1 / x)
    return (x * per_unit[..., None]).round().to(torch.int8), top / 127


def convert(cache, dtype):
    """A cache, or blocks of one, in another dtype; the same tensor if it has it already."""
    if cache.dtype == dtype:
        return cache
    if cache.dtype == torch.int8:
        rows, scales = parts(cache)
        return (rows.float() * scales[..., None]).to(dtype)
    if dtype == torch.int8:
        *outer, D = cache.shape
        new = cache.new_empty((*outer, row_width(D, dtype)), dtype=dtype)
        for part, values in zip(parts(new), rounded(cache), strict=True):
            part.copy_(values)
        return new
    return cache.to(dtype)


def write_rows(rows, cache, slots):
    """rows [n, Hkv, D] -> cache [num_blocks, Hkv, bs, .] at slots [n]: block * bs + offset."""
    block, offset = slots // cache.shape[2], slots % cache.shape[2]
    if cache.dtype != torch.int8:
        cache[block, :, offset] = rows
        return
    for part, values in zip(parts(cache), rounded(rows), strict=True):
        part[block, :, offset] = values
