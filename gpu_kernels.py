"""Triton kernels of the GPU: paged decode attention split over blocks, KV store, RoPE, SwiGLU. Imported only where
Triton is (torch brings it with CUDA); gpu_attn.py and model.py hold the plain torch they are tested against.

Decode attention is bound by reading K and V, so each is read once: a program takes one KV head of one sequence, all G
query heads of its group as the rows of a matrix product, and one chunk of the sequence.

    sequence b   [ block 7 | block 2 | block 9 | block 0 | block 4 ]     its block table: 7 2 9 0 4
                 [     chunk 0       |      chunk 1      | chunk 2 ]     a program each: (b, KV head, chunk)
    _decode      softmax(q K) V of each chunk, and its log-sum-exp; with one chunk, the answer
    _merge       the chunks, weighted by their log-sum-exps

The grid follows from shapes alone, never from lengths: a captured launch holds for any lengths. A row of length 0 and a
slot below 0 are padding: nothing is read or written for them.

On a CPU under TRITON_INTERPRET=1 (slow; for tests). Arithmetic is float32 and explicit about it. Symbols: model.py; in
strides, `x_n` is what one step along n adds to an address in x.
"""
import os
from functools import lru_cache

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_CHUNK = 1024               # tokens of a chunk: long sequences are split at least so far, or the last one is waited for


@triton.jit(do_not_specialize=["t_b", "o_s", "chunk"])
def _decode(q, k_cache, v_cache, table, lens, o, lse, scale, q_b, q_h, c_b, c_h, t_b, o_b, o_h, o_s, bs, chunk, H,
            G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr,
            WIDE: tl.constexpr):
    """q [B, H, D]; caches [num_blocks, Hkv, bs, D]; table [B, blocks]; o [B, H, chunks, D]; lse [B, H, chunks] in base 2.
    G heads of D are padded to GP and DP, powers of two that a matrix product takes; N tokens a step. WIDE: multiply in float32 (for the interpreter, which has no bf16 product)."""
    b, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = s * chunk
    end = tl.minimum(start + chunk, tl.load(lens + b))
    if start < end:
        g, d, t = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, N)
        heads = h * G + g
        rows = (g < G)[:, None] & (d < D)[None, :]
        qi = tl.load(q + b * q_b + heads[:, None] * q_h + d[None, :], mask=rows, other=0.0)         # [GP, DP]
        top = tl.full([GP], float("-inf"), tl.float32)
        mass = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        for i in range(start, end, N):
            token = i + t
            live = token < end
            block = tl.load(table + b * t_b + token // bs, mask=live, other=0).to(tl.int64)
            at = (block * c_b + h * c_h + (token % bs) * D)[:, None] + d[None, :]                   # [N, DP]
            inside = live[:, None] & (d < D)[None, :]
            k, v = tl.load(k_cache + at, mask=inside, other=0.0), tl.load(v_cache + at, mask=inside, other=0.0)
            if G == 1:
                x = tl.sum(qi.to(tl.float32) * k.to(tl.float32), 1)[None, :]
            elif WIDE:
                x = tl.dot(qi.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
            else:
                x = tl.dot(qi, tl.trans(k), input_precision="ieee")                                 # [GP, N]
            x = x * (scale * 1.4426950408889634)                                                    # exp(x) = exp2(x log2 e)
            x = tl.where(live[None, :], x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            p = tl.exp2(x - higher[:, None])
            fade = tl.exp2(top - higher)
            mass = mass * fade + tl.sum(p, 1)
            if G == 1:
                pv = tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]
            elif WIDE:
                pv = tl.dot(p.to(v.dtype).to(tl.float32), v.to(tl.float32), input_precision="ieee")
            else:
                pv = tl.dot(p.to(v.dtype), v, input_precision="ieee")                            # [GP, DP]
            acc = acc * fade[:, None] + pv
            top = higher
        to = o + b * o_b + heads[:, None] * o_h + s * o_s + d[None, :]
        tl.store(to, (acc / mass[:, None]).to(o.dtype.element_ty), mask=rows)
        if SPLIT:
            tl.store(lse + (b * H + heads) * tl.num_programs(2) + s, top + tl.log2(mass), mask=g < G)


@triton.jit
def _merge(part, lse, lens, o, o_b, chunk, chunks, H, D: tl.constexpr, DP: tl.constexpr):
    """part [B, H, chunks, D], lse [B, H, chunks] float32 -> o [B, H, D]; only chunks that a sequence has are read."""
    b, h = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)
    first = (b * H + h) * chunks
    top, mass = float("-inf"), 0.0
    acc = tl.zeros([DP], tl.float32)
    for s in range(tl.cdiv(tl.load(lens + b), chunk)):
        x = tl.load(lse + first + s)
        higher = tl.maximum(top, x)
        w, fade = tl.exp2(x - higher), tl.exp2(top - higher)
        acc = acc * fade + w * tl.load(part + (first + s) * D + d, mask=d < D, other=0.0)
        mass = mass * fade + w
        top = higher
    if mass > 0:
        tl.store(o + b * o_b + h * D + d, (acc / mass).to(o.dtype.element_ty), mask=d < D)


@triton.jit
def _store(k, v, k_cache, v_cache, slots, k_n, v_n, c_b, c_h, bs, W, D: tl.constexpr, WP: tl.constexpr):
    """k, v [n, Hkv, D], W = Hkv D -> caches [num_blocks, Hkv, bs, D] at slots [n]."""
    n, w = tl.program_id(0).to(tl.int64), tl.arange(0, WP)
    slot = tl.load(slots + n).to(tl.int64)
    if slot >= 0:
        to = slot // bs * c_b + w // D * c_h + slot % bs * D + w % D
        tl.store(k_cache + to, tl.load(k + n * k_n + w, mask=w < W), mask=w < W)
        tl.store(v_cache + to, tl.load(v + n * v_n + w, mask=w < W), mask=w < W)


@triton.jit
def _rotate(x, cos, sin, positions, x_n, heads, HALF: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr):
    """RoPE on the first `heads` heads of x [N, ., 2 HALF], in place; cos, sin [max_len, HALF] float32."""
    n, h, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * HP + tl.arange(0, HP), tl.arange(0, DP)
    at = x + n * x_n + h[:, None] * (2 * HALF) + d[None, :]
    live = (h < heads)[:, None] & (d < HALF)[None, :]
    row = tl.load(positions + n) * HALF + d
    c = tl.load(cos + row, mask=d < HALF)[None, :]
    s = tl.load(sin + row, mask=d < HALF)[None, :]
    a = tl.load(at, mask=live).to(tl.float32)
    b = tl.load(at + HALF, mask=live).to(tl.float32)
    tl.store(at, (a * c - b * s).to(x.dtype.element_ty), mask=live)
    tl.store(at + HALF, (b * c + a * s).to(x.dtype.element_ty), mask=live)


@triton.jit
def _swiglu(x, y, F, BLOCK: tl.constexpr):
    """x [N, 2 F], gate and up side by side -> y [N, F] = silu(gate) up."""
    n, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + n * 2 * F + f, mask=f < F).to(tl.float32)
    up = tl.load(x + n * 2 * F + F + f, mask=f < F).to(tl.float32)
    tl.store(y + n * F + f, (gate / (1 + tl.exp2(-1.4426950408889634 * gate)) * up).to(y.dtype.element_ty), mask=f < F)


# ------------------------------------------------------------------------------------------------------- the launches

@lru_cache
def _gpu(device):
    """(processors, whether Triton has matrix instructions for it); the interpreter stands for a small one that has."""
    if device.type != "cuda":
        return 4, True
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major >= 8


def step_tokens(G, DP, itemsize, has_mma):
    """Tokens a program reads at once: 16 KB of K; where the product runs without matrix instructions (float32, or before
    Ampere, where Triton knows none) few enough that its operands stay in registers."""
    return min(64, 16384 // (DP * itemsize)) if G == 1 or (has_mma and itemsize == 2) else 16


def chunk_size(width, sequences_x_heads, processors):
    """Tokens of a chunk, a multiple of 64, for tables of `width` tokens: long chunks merge cheaply, but four programs
    for each processor keep enough reads in flight."""
    share = width * sequences_x_heads // (4 * processors)
    return min(max(-(-share // 64) * 64, 128), MOST_CHUNK)


def paged_decode(q, k_cache, v_cache, block_table, seq_lens, scale, out, chunk=None):
    """One new token per sequence over its paged cache: q, out [B, H, D]; caches [num_blocks, Hkv, bs, D] bf16, fp16 or
    fp32; block_table [B, blocks], seq_lens [B] int32. chunk: tokens a program takes, a multiple of 64; None: by size."""
    B, H, D = q.shape
    _, Hkv, bs, _ = k_cache.shape
    width = block_table.shape[1] * bs
    assert D <= 256 and H % Hkv == 0 and q.stride(2) == out.stride(2) == 1 and k_cache.stride()[2:] == (D, 1)
    processors, has_mma = _gpu(q.device)
    chunk = chunk or chunk_size(width, B * Hkv, processors)
    chunks, DP = -(-width // chunk), max(16, triton.next_power_of_2(D))
    if chunks > 1:
        part = torch.empty(B, H, chunks, D, dtype=torch.float32, device=q.device)
        lse = torch.empty(B, H, chunks, dtype=torch.float32, device=q.device)
    else:
        part, lse = out[:, :, None], seq_lens                   # lse: not touched
    G = H // Hkv
    GP = 1 if G == 1 else max(16, triton.next_power_of_2(G))
    N = step_tokens(G, DP, k_cache.element_size(), has_mma)
    _decode[(B, Hkv, chunks)](
        q, k_cache, v_cache, block_table, seq_lens, part, lse, scale, q.stride(0), q.stride(1), *k_cache.stride()[:2],
        block_table.stride(0), *part.stride()[:3], bs, chunk, H, G, D, GP, DP, N,
        SPLIT=chunks > 1, WIDE=INTERPRETED and q.dtype == torch.bfloat16, num_warps=4, num_stages=2)
    if chunks > 1:
        _merge[(B, H)](part, lse, seq_lens, out, out.stride(0), chunk, chunks, H, D, DP, num_warps=1)


def store(k, v, k_cache, v_cache, slots):
    """k, v [n, Hkv, D] into caches [num_blocks, Hkv, bs, D] at slots [n] (block * bs + offset; below 0: nowhere)."""
    n, Hkv, D = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (D, 1)
    _store[(n,)](k, v, k_cache, v_cache, slots, k.stride(0), v.stride(0), *k_cache.stride()[:2], k_cache.shape[2], Hkv * D,
                 D, triton.next_power_of_2(Hkv * D))


def rotate_(qkv, cos, sin, positions, heads):
    """RoPE in place on the first `heads` heads of qkv [N, ., D], halves of a head as pairs; tables [max_len, D/2]."""
    N, _, D = qkv.shape
    HP = min(8, triton.next_power_of_2(heads))
    _rotate[(N, triton.cdiv(heads, HP))](qkv, cos, sin, positions, qkv.stride(0), heads, D // 2, HP,
                                         triton.next_power_of_2(D // 2), num_warps=2)


def swiglu(gate_up):
    """[N, 2 F], gate and up side by side -> [N, F] = silu(gate) up."""
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(N, F)
    _swiglu[(N, triton.cdiv(F, 1024))](gate_up, out, F, BLOCK=1024)
    return out
