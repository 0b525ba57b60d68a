"""Triton kernels of the GPU: paged decode attention split over blocks, KV store, RoPE, SwiGLU.

The plain torch that they are tested against is in gpu_attn.py and model.py. Imported only where
the package triton is: torch's CUDA builds bring it. Knows nothing of layers, requests or policy.

Decode attention is bound by reading K and V, so each is read once. A program takes one KV head of
one sequence, the G query heads of its group as rows of a matrix product, and one chunk of tokens:

    sequence b   [ block 7 | block 2 | block 9 | block 0 | block 4 ]   block table: 7 2 9 0 4
                 [     chunk 0       |      chunk 1      | chunk 2 ]   one program each
    _decode      softmax(q K) V of each chunk, and its log-sum-exp
    _merge       the sum of the chunks, weighted by their log-sum-exps; not run for one chunk

The grid follows from shapes, never from lengths: a captured launch is right for any lengths.
A row of length 0 and a slot below 0 are padding: nothing is read or written for them.
Scores, softmax and sums are float32. The stride `x_n` is what one step along n adds to an
address in x. Glossary of symbols: model.py.

    TRITON_INTERPRET=1 python -m pytest kernels/test_kernels.py -k triton      # on a CPU, slowly
"""
import os
from functools import lru_cache

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_CHUNK = 1024    # tokens of a chunk. With longer ones, a long sequence would finish last, alone
LN2 = 0.6931471805599453


@triton.jit
def _dot(x, y, WIDE: tl.constexpr):
    """x @ y. WIDE: multiply in float32, as the interpreter has no product of bf16."""
    if WIDE:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x, y, input_precision="ieee")


@triton.jit(do_not_specialize=["t_b", "o_s", "chunk"])
def _decode(q, k_cache, v_cache, k_scales, v_scales, block_table, seq_lens, o, lse, scale,
            q_b, q_h, c_b, c_h, t_b, o_b, o_h, o_s, bs, chunk, H,
            G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
            N: tl.constexpr, LSE_UNIT: tl.constexpr, WIDE: tl.constexpr, INT8: tl.constexpr):
    """q [B, H, D]; caches [num_blocks, Hkv, bs, D]; block_table [B, blocks]; seq_lens [B].

    INT8: k_scales and v_scales are the caches read as float32 numbers: see kv_format.py.
    Writes o [B, H, chunks, D] and, in units of LSE_UNIT, lse [B, H, chunks] float32: of 1 for
    log2, of LN2 for ln, of 0 for none. G heads of D are padded to GP and DP, powers of two that
    a matrix product takes. N: tokens of a step.
    """
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    start = s * chunk
    end = tl.minimum(start + chunk, tl.load(seq_lens + b))
    if start < end:
        g = tl.arange(0, GP)
        d = tl.arange(0, DP)
        t = tl.arange(0, N)
        heads = h * G + g
        inside = (g < G)[:, None] & (d < D)[None, :]
        qi = tl.load(q + b * q_b + heads[:, None] * q_h + d[None, :],           # [GP, DP]
                     mask=inside, other=0.0)
        top = tl.full([GP], float("-inf"), tl.float32)
        mass = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)

        for i in range(start, end, N):
            token = i + t
            live = token < end
            block = tl.load(block_table + b * t_b + token // bs, mask=live, other=0).to(tl.int64)
            head = block * c_b + h * c_h
            offset = (head + (token % bs) * D)[:, None] + d[None, :]            # [N, DP]
            read = live[:, None] & (d < D)[None, :]
            k = tl.load(k_cache + offset, mask=read, other=0)
            v = tl.load(v_cache + offset, mask=read, other=0)
            if INT8:
                at = (head + bs * D) // 4 + token % bs
                # exact in bf16 and fp16; the interpreter knows no way from int8 to bf16
                k, v = k.to(tl.float32).to(qi.dtype), v.to(tl.float32).to(qi.dtype)
                k_scale = tl.load(k_scales + at, mask=live, other=0.0)
                v_scale = tl.load(v_scales + at, mask=live, other=0.0)
            if G == 1:
                x = tl.sum(qi.to(tl.float32) * k.to(tl.float32), 1)[None, :]
            else:
                x = _dot(qi, tl.trans(k), WIDE)                                 # [GP, N]
            x = x * (scale * 1.4426950408889634)                    # exp(x) = exp2(x log2 e)
            if INT8:
                x = x * k_scale[None, :]
            x = tl.where(live[None, :], x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            p = tl.exp2(x - higher[:, None])
            fade = tl.exp2(top - higher)
            mass = mass * fade + tl.sum(p, 1)
            if INT8:
                p = p * v_scale[None, :]
            if G == 1:
                pv = tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]
            else:
                pv = _dot(p.to(v.dtype), v, WIDE)                               # [GP, DP]
            acc = acc * fade[:, None] + pv
            top = higher

        to = o + b * o_b + heads[:, None] * o_h + s * o_s + d[None, :]
        tl.store(to, (acc / mass[:, None]).to(o.dtype.element_ty), mask=inside)
        if LSE_UNIT > 0:
            to = lse + (b * H + heads) * tl.num_programs(2) + s
            tl.store(to, (top + tl.log2(mass)) * LSE_UNIT, mask=g < G)


@triton.jit
def _merge(part, part_lse, seq_lens, o, lse, o_b, chunk, chunks, H,
           D: tl.constexpr, DP: tl.constexpr, LSE_UNIT: tl.constexpr):
    """part [B, H, chunks, D], part_lse [B, H, chunks] float32 -> o [B, H, D], lse [B, H].

    Only those chunks are read that the sequence has.
    """
    b, h = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, DP)
    first = (b * H + h) * chunks
    top, mass = float("-inf"), 0.0
    acc = tl.zeros([DP], tl.float32)

    for s in range(tl.cdiv(tl.load(seq_lens + b), chunk)):
        x = tl.load(part_lse + first + s)
        higher = tl.maximum(top, x)
        w = tl.exp2(x - higher)
        fade = tl.exp2(top - higher)
        acc = acc * fade + w * tl.load(part + (first + s) * D + d, mask=d < D, other=0.0)
        mass = mass * fade + w
        top = higher
    if mass > 0:
        tl.store(o + b * o_b + h * D + d, (acc / mass).to(o.dtype.element_ty), mask=d < D)
        if LSE_UNIT > 0:
            tl.store(lse + b * H + h, (top + tl.log2(mass)) * LSE_UNIT)


@triton.jit
def _store(k, v, k_cache, v_cache, slots, k_n, v_n, c_b, c_h, bs, W,
           D: tl.constexpr, WP: tl.constexpr):
    """k, v [n, Hkv, D] -> caches [num_blocks, Hkv, bs, D] at slots [n]; W = Hkv D."""
    n = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, WP)
    slot = tl.load(slots + n).to(tl.int64)
    if slot >= 0:
        to = slot // bs * c_b + w // D * c_h + slot % bs * D + w % D
        tl.store(k_cache + to, tl.load(k + n * k_n + w, mask=w < W), mask=w < W)
        tl.store(v_cache + to, tl.load(v + n * v_n + w, mask=w < W), mask=w < W)


@triton.jit
def _store_int8(rows, cache, scales, slots, n_n, c_b, c_h, bs, D: tl.constexpr, DP: tl.constexpr):
    """rows [n, Hkv, D] -> int8 cache [num_blocks, Hkv, bs, D + 4] at slots [n]; scales: the cache
    read as float32 numbers."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DP)
    slot = tl.load(slots + n).to(tl.int64)
    if slot >= 0:
        head = slot // bs * c_b + h * c_h
        x = tl.load(rows + n * n_n + h * D + d, mask=d < D, other=0.0).to(tl.float32)
        top = tl.max(tl.abs(x), 0)
        x = x * (127.0 / tl.maximum(top, 1e-30))
        x = x + 12582912.0 - 12582912.0         # 1.5 * 2^23: what is left is the nearest integer
        tl.store(cache + head + slot % bs * D + d, x.to(tl.int8), mask=d < D)
        tl.store(scales + (head + bs * D) // 4 + slot % bs, top / 127.0)


@triton.jit
def _rotate(x, cos, sin, positions, x_n, heads,
            HALF: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr):
    """RoPE in place on x [N, the first `heads` heads, 2 HALF]; cos, sin [max_len, HALF] float32."""
    n = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * HP + tl.arange(0, HP), tl.arange(0, DP)
    first = x + n * x_n + h[:, None] * (2 * HALF) + d[None, :]
    live = (h < heads)[:, None] & (d < HALF)[None, :]
    row = tl.load(positions + n) * HALF + d
    c = tl.load(cos + row, mask=d < HALF)[None, :]
    s = tl.load(sin + row, mask=d < HALF)[None, :]
    u = tl.load(first, mask=live).to(tl.float32)
    v = tl.load(first + HALF, mask=live).to(tl.float32)
    tl.store(first, (u * c - v * s).to(x.dtype.element_ty), mask=live)
    tl.store(first + HALF, (v * c + u * s).to(x.dtype.element_ty), mask=live)


@triton.jit
def _swiglu(x, y, F, BLOCK: tl.constexpr):
    """x [N, 2 F], gate and up side by side -> y [N, F] = silu(gate) up."""
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + n * 2 * F + f, mask=f < F).to(tl.float32)
    up = tl.load(x + n * 2 * F + F + f, mask=f < F).to(tl.float32)
    tl.store(y + n * F + f,
             (gate / (1 + tl.exp2(-1.4426950408889634 * gate)) * up).to(y.dtype.element_ty),
             mask=f < F)


@triton.jit
def _pack(x, slots, q, k, v, x_n, WQ, WK, BLOCK: tl.constexpr):
    """x [N, WQ + 2 WK] -> rows slots[n] of q [., WQ], k and v [., WK], in pinned host memory."""
    n = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + n).to(tl.int64)
    if slot >= 0:
        y = tl.load(x + n * x_n + w, mask=w < WQ + 2 * WK, other=0.0)
        is_q, is_k = w < WQ, (w >= WQ) & (w < WQ + WK)
        is_v = (w >= WQ + WK) & (w < WQ + 2 * WK)
        tl.store(q + slot * WQ + w, y.to(q.dtype.element_ty), mask=is_q)
        tl.store(k + slot * WK + w - WQ, y.to(k.dtype.element_ty), mask=is_k)
        tl.store(v + slot * WK + w - WQ - WK, y.to(v.dtype.element_ty), mask=is_v)


@triton.jit
def _unpack(o, slots, out, out_n, W, BLOCK: tl.constexpr):
    """Rows slots[n] of o [., W], in pinned host memory -> out [N, W]."""
    n = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + n).to(tl.int64)
    if slot >= 0:
        y = tl.load(o + slot * W + w, mask=w < W, other=0.0)
        tl.store(out + n * out_n + w, y.to(out.dtype.element_ty), mask=w < W)


# ---- the launches

@lru_cache
def _gpu(device):
    """(processors, whether Triton has matrix instructions for them); the interpreter stands for
    a small GPU that has."""
    if device.type != "cuda":
        return 4, True
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major >= 8


def step_tokens(G, DP, itemsize, has_mma):
    """Tokens that a program reads at once: 16 KB of K. Without matrix instructions (float32, or
    before Ampere, where Triton has none) only 16, so that a product's operands stay in registers.
    """
    if G == 1 or (has_mma and itemsize == 2):
        return min(64, 16384 // (DP * itemsize))
    return 16


def chunk_size(width, sequences_x_heads, processors):
    """Tokens of a chunk, a multiple of 64, for block tables of `width` tokens.

    Long chunks are cheap to merge, but it takes four programs for each processor to keep enough
    reads in flight.
    """
    share = width * sequences_x_heads // (4 * processors)
    return min(max(-(-share // 64) * 64, 128), MAX_CHUNK)


def paged_decode(q, k_cache, v_cache, block_table, seq_lens, out, scale, chunk=None, lse=None):
    """Attention of one new token per sequence over its paged cache, in place into `out`.

    q, out       [B, H, D], D <= 256; caches [num_blocks, Hkv, bs, D]: bf16, fp16 or fp32, or
                 [num_blocks, Hkv, bs, D + 4] int8 with scales (kv_format.py)
    block_table  [B, blocks] int32; seq_lens [B] int32; 0: a row of padding, out and lse stay
    chunk        tokens that a program takes, a multiple of 64; None: by size
    lse          None, or [B, H] float32, contiguous: log(sum over tokens of exp(scale q . k))
    """
    B, H, D = q.shape
    _, Hkv, bs, _ = k_cache.shape
    width = block_table.shape[1] * bs
    assert D <= 256 and H % Hkv == 0 and q.stride(2) == out.stride(2) == 1
    assert k_cache.is_contiguous() and (lse is None or lse.is_contiguous())

    processors, has_mma = _gpu(q.device)
    chunk = chunk or chunk_size(width, B * Hkv, processors)
    chunks, DP = -(-width // chunk), max(16, triton.next_power_of_2(D))
    unit = 0.0 if lse is None else LN2
    lse = seq_lens if lse is None else lse          # some pointer, which is not followed
    if chunks == 1:
        part, part_lse = out[:, :, None], lse
    else:
        part = torch.empty(B, H, chunks, D, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(B, H, chunks, dtype=torch.float32, device=q.device)

    G = H // Hkv
    GP = 1 if G == 1 else max(16, triton.next_power_of_2(G))
    N, int8 = step_tokens(G, DP, q.element_size(), has_mma), k_cache.dtype == torch.int8
    _decode[(B, Hkv, chunks)](
        q, k_cache, v_cache, _as_float32(k_cache), _as_float32(v_cache), block_table, seq_lens,
        part, part_lse, scale,
        *q.stride()[:2], *k_cache.stride()[:2], block_table.stride(0), *part.stride()[:3],
        bs, chunk, H, G, D, GP, DP, N, LSE_UNIT=1.0 if chunks > 1 else unit,
        WIDE=INTERPRETED and q.dtype == torch.bfloat16, INT8=int8, num_warps=4, num_stages=2)
    if chunks > 1:
        _merge[(B, H)](part, part_lse, seq_lens, out, lse, out.stride(0), chunk, chunks, H, D, DP,
                       LSE_UNIT=unit, num_warps=1)


def _as_float32(cache):
    """An int8 cache read as float32 numbers: its scales are among them. Others are not read so."""
    return cache.view(-1).view(torch.float32) if cache.dtype == torch.int8 else cache


def store(k, v, k_cache, v_cache, slots):
    """k, v [n, Hkv, D] into caches [num_blocks, Hkv, bs, D] at slots [n]: block * bs + offset.

    Rows with a slot below 0 are not stored. Rounds to int8 where the caches are.
    """
    n, Hkv, D = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (D, 1)
    if k_cache.dtype == torch.int8:
        for rows, cache in ((k, k_cache), (v, v_cache)):
            _store_int8[(n, Hkv)](rows, cache, _as_float32(cache), slots, rows.stride(0),
                                  *cache.stride()[:2], cache.shape[2], D,
                                  triton.next_power_of_2(D), num_warps=1)
        return
    _store[(n,)](k, v, k_cache, v_cache, slots, k.stride(0), v.stride(0), *k_cache.stride()[:2],
                 k_cache.shape[2], Hkv * D, D, triton.next_power_of_2(Hkv * D))


def rotate_(qkv, cos, sin, positions, heads):
    """RoPE in place on the first `heads` heads of qkv [N, ., D], the halves of a head as pairs;
    cos, sin [max_len, D/2] float32, positions [N]."""
    N, _, D = qkv.shape
    HP = min(8, triton.next_power_of_2(heads))
    _rotate[(N, triton.cdiv(heads, HP))](
        qkv, cos, sin, positions, qkv.stride(0), heads, D // 2, HP,
        triton.next_power_of_2(D // 2), num_warps=2)


def swiglu(gate_up):
    """[N, 2 F], gate and up side by side -> [N, F] = silu(gate) up."""
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(N, F)
    _swiglu[(N, triton.cdiv(F, 1024))](gate_up, out, F, BLOCK=1024)
    return out


def pack(qkv, slots, q, k, v):
    """Rows of qkv [N, H + 2 Hkv, D] with a slot >= 0 of slots [N] -> those rows of q [., H, D],
    k and v [., Hkv, D], in pinned host memory: the GPU writes over PCIe, no copy engine waits."""
    N, width = len(qkv), qkv.stride(0)
    _pack[(N, triton.cdiv(width, 1024))](qkv, slots, q, k, v, width, q.stride(0), k.stride(0),
                                         BLOCK=1024)


def unpack(o, slots, out):
    """The way back: rows of o [., H, D] in pinned host memory -> rows of out [N, H, D]."""
    N, width = len(out), out.stride(0)
    _unpack[(N, triton.cdiv(width, 1024))](o, slots, out, width, width, BLOCK=1024)
