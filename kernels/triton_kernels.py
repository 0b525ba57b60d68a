"""Triton kernels of the GPU: paged decode attention split over blocks, KV store, RoPE, SwiGLU.

The plain torch that they are tested against is in gpu_attn.py and model.py. Imported only where
the package triton is: torch's CUDA builds bring it. Knows nothing of layers, requests or policy.

Decode attention is bound by reading K and V, so each is read once. A program takes one KV head of
one sequence, the G query heads of its group as rows of a matrix product, and one chunk of tokens:

    sequence b   [ block 7 | block 2 | block 9 | block 0 | block 4 ]   block table: 7 2 9 0 4
                 [     chunk 0       |      chunk 1      | chunk 2 ]   one program each
    _decode      softmax(q K) V of each chunk, and its log-sum-exp
    _merge       the sum of the chunks, weighted by their log-sum-exps; not run for one chunk

Within a program, copies into shared memory run two steps ahead of the product:

    copy      K, V of step 0 | step 1 | step 2 | step 3 | ...
    compute                           | step 0 | step 1 | ...

_decode_fma takes the place of _decode where Triton has no matrix instructions: in float32, and
on a GPU before Ampere. That one has no such copies either: other programs run while one waits.

The grid follows from shapes, never from lengths: a captured launch is right for any lengths. How
long a chunk is follows from the length of its sequence, inside the kernel.
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
MIN_CHUNK = tl.constexpr(128)   # tokens: shorter chunks cost more to merge than they save
LONG_CHUNK = 8192               # tokens: with longer ones, a long sequence would finish last, alone
MAX_CHUNKS = 32                 # of a sequence: _merge holds all of them at once
LOWEST = tl.constexpr(-1e38)    # no score is as low, and LOWEST - LOWEST is a number
LN2 = 0.6931471805599453


@triton.jit
def _chunk(length, chunks, N: tl.constexpr):
    """Tokens of a chunk of a sequence: an equal share for `chunks` of them, in whole steps of N."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, chunks), N) * N, MIN_CHUNK)


@triton.jit
def _span(seq_lens, b, N: tl.constexpr):
    """This program's tokens of sequence b, from start up to end; none where end <= start."""
    length = tl.load(seq_lens + b)
    chunk = _chunk(length, tl.num_programs(2), N)
    start = tl.program_id(2) * chunk
    return start, tl.minimum(start + chunk, length)


@triton.jit
def _blocks(table, token, end, BS: tl.constexpr):
    """Blocks [N] in which `token` [N] lie, by a sequence's row of the block table."""
    return tl.load(table + token // BS, mask=token < end, other=0)


@triton.jit
def _read(k_cache, v_cache, k_scales, v_scales, block, token, end, h, c_b, c_h,
          D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, INT8: tl.constexpr):
    """K and V [N, DP] of `token` [N] in `block` [N], and the scales [N] of their rows: 1, if not
    INT8. Nothing is read from `end` on: zeros."""
    d = tl.arange(0, DP)
    live = token < end
    head = block.to(tl.int64) * c_b + h * c_h
    offset = (head + token % BS * D)[:, None] + d[None, :]
    inside = live[:, None] & (d < D)[None, :]
    k = tl.load(k_cache + offset, mask=inside, other=0)
    v = tl.load(v_cache + offset, mask=inside, other=0)
    if INT8:
        at = (head + BS * D) // 4 + token % BS
        k_scale = tl.load(k_scales + at, mask=live, other=0.0)
        v_scale = tl.load(v_scales + at, mask=live, other=0.0)
        k, v = k.to(tl.float32), v.to(tl.float32)
    else:
        k_scale = tl.full(token.shape, 1.0, tl.float32)
        v_scale = k_scale
    return k, v, k_scale, v_scale


@triton.jit
def _dot(x, y, WIDE: tl.constexpr):
    """x @ y. WIDE: multiply in float32, as the interpreter has no product of bf16."""
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y)


@triton.jit(do_not_specialize=["t_b", "o_s"])
def _decode(q, k_cache, v_cache, k_scales, v_scales, block_table, seq_lens, o, lse, scale,
            q_b, q_h, c_b, c_h, t_b, o_b, o_h, o_s, H,
            G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            BS: tl.constexpr, N: tl.constexpr, LSE_UNIT: tl.constexpr, INT8: tl.constexpr,
            WIDE: tl.constexpr):
    """By matrix instructions: the G heads of a group are rows of one product, padded to GP.

    The padding is 15 of 16 rows where G is 1, and costs no time: reading K and V takes longer.
    q [B, H, D]; caches [num_blocks, Hkv, BS, D]; block_table [B, blocks]; seq_lens [B].
    INT8: k_scales and v_scales are the caches read as float32 numbers: see kv_format.py.
    Writes o [B, H, chunks, D] and, in units of LSE_UNIT, lse [B, H, chunks] float32: of 1 for
    log2, of LN2 for ln, of 0 for none. DP: D padded to a power of two. N: tokens of a step.
    """
    h, b, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = _span(seq_lens, b, N)
    if start < end:
        g, d, t = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, N)
        heads = h * G + g
        inside = (g < G)[:, None] & (d < D)[None, :]
        qi = tl.load(q + b * q_b + heads[:, None] * q_h + d[None, :],           # [GP, DP]
                     mask=inside, other=0.0)
        top = tl.full([GP], float("-inf"), tl.float32)
        mass = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)

        table = block_table + b * t_b
        block = _blocks(table, start + t, end, BS)
        for i in tl.range(start, end, N, num_stages=3):
            token = i + t
            k, v, k_scale, v_scale = _read(k_cache, v_cache, k_scales, v_scales, block, token,
                                           end, h, c_b, c_h, D, DP, BS, INT8)
            block = _blocks(table, token + N, end, BS)      # of the next step: it is here in time
            k, v = k.to(qi.dtype), v.to(qi.dtype)                               # int8 is exact
            x = _dot(qi, tl.trans(k), WIDE) * k_scale[None, :]                  # [GP, N]
            x = x * (scale * 1.4426950408889634)                    # exp(x) = exp2(x log2 e)
            x = tl.where((token < end)[None, :], x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, 1))
            p = tl.exp2(x - higher[:, None])
            fade = tl.exp2(top - higher)
            mass = mass * fade + tl.sum(p, 1)
            pv = _dot((p * v_scale[None, :]).to(v.dtype), v, WIDE)              # [GP, DP]
            acc = acc * fade[:, None] + pv
            top = higher

        to = o + b * o_b + heads[:, None] * o_h + s * o_s + d[None, :]
        tl.store(to, (acc / mass[:, None]).to(o.dtype.element_ty), mask=inside)
        if LSE_UNIT > 0:
            to = lse + (b * H + heads) * tl.num_programs(2) + s
            tl.store(to, (top + tl.log2(mass)) * LSE_UNIT, mask=g < G)


@triton.jit(do_not_specialize=["t_b", "o_s"])
def _decode_fma(q, k_cache, v_cache, k_scales, v_scales, block_table, seq_lens, o, lse, scale,
                q_b, q_h, c_b, c_h, t_b, o_b, o_h, o_s, H,
                G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                BS: tl.constexpr, N: tl.constexpr, LSE_UNIT: tl.constexpr, INT8: tl.constexpr,
                WIDE: tl.constexpr):
    """Without matrix instructions: float32, or a GPU before Ampere. Parameters: see _decode.

    A program takes GP of the G heads, one after another, with K and V in registers; past the last
    head it repeats the last. Each of the N places of a step has a softmax of its own, so that no
    thread waits for another before the end.
    """
    TILES: tl.constexpr = (G + GP - 1) // GP
    h, b, s = tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2)
    start, end = _span(seq_lens, b, N)
    if start < end:
        d, t = tl.arange(0, DP), tl.arange(0, N)
        g = tl.program_id(0) % TILES * GP
        qs, tops, masses, accs = (), (), (), ()         # of each head
        for j in tl.static_range(GP):
            head = h * G + tl.minimum(g + j, G - 1)
            qi = tl.load(q + b * q_b + head * q_h + d, mask=d < D, other=0.0)   # [DP]
            qs += (qi.to(tl.float32),)
            tops += (tl.full([N], LOWEST, tl.float32),)
            masses += (tl.zeros([N], tl.float32),)
            accs += (tl.zeros([N, DP], tl.float32),)

        table = block_table + b * t_b
        block = _blocks(table, start + t, end, BS)
        for i in tl.range(start, end, N, num_stages=3):
            token = i + t
            k, v, k_scale, v_scale = _read(k_cache, v_cache, k_scales, v_scales, block, token,
                                           end, h, c_b, c_h, D, DP, BS, INT8)
            block = _blocks(table, token + N, end, BS)      # of the next step: it is here in time
            k, v = k.to(tl.float32), v.to(tl.float32)
            old_tops, old_masses, old_accs = tops, masses, accs
            tops, masses, accs = (), (), ()
            for j in tl.static_range(GP):
                x = tl.sum(qs[j][None, :] * k, 1) * k_scale                     # [N]
                x = x * (scale * 1.4426950408889634)
                x = tl.where(token < end, x, float("-inf"))
                higher = tl.maximum(old_tops[j], x)
                p = tl.exp2(x - higher)
                fade = tl.exp2(old_tops[j] - higher)
                tops += (higher,)
                masses += (old_masses[j] * fade + p,)
                accs += (old_accs[j] * fade[:, None] + (p * v_scale)[:, None] * v,)

        for j in tl.static_range(GP):
            top = tl.max(tops[j], 0)
            w = tl.exp2(tops[j] - top)
            mass = tl.sum(masses[j] * w, 0)
            acc = tl.sum(accs[j] * w[:, None], 0)                               # [DP]
            head = h * G + tl.minimum(g + j, G - 1)
            to = o + b * o_b + head * o_h + s * o_s + d
            tl.store(to, (acc / mass).to(o.dtype.element_ty), mask=d < D)
            if LSE_UNIT > 0:
                to = lse + (b * H + head) * tl.num_programs(2) + s
                tl.store(to, (top + tl.log2(mass)) * LSE_UNIT)


@triton.jit(do_not_specialize=["chunks"])
def _merge(part, part_lse, seq_lens, o, lse, o_b, chunks, H,
           D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
           LSE_UNIT: tl.constexpr):
    """part [B, H, chunks, DP], part_lse [B, H, chunks] float32 -> o [B, H, D], lse [B, H].

    Only those chunks are read that the sequence has. C: the most that there are.
    """
    h, b = tl.program_id(0), tl.program_id(1)
    length = tl.load(seq_lens + b)
    if length > 0:
        d, s = tl.arange(0, DP), tl.arange(0, C)
        live = s < tl.cdiv(length, _chunk(length, chunks, N))
        s += (b * H + h) * chunks
        x = tl.load(part_lse + s, mask=live, other=float("-inf"))               # [C]
        y = tl.load(part + s[:, None] * DP + d[None, :],                        # [C, DP]
                    mask=live[:, None] & (d < D)[None, :], other=0.0)
        top = tl.max(x, 0)
        w = tl.exp2(x - top)
        mass = tl.sum(w, 0)
        acc = tl.sum(w[:, None] * y, 0) / mass
        tl.store(o + b * o_b + h * D + d, acc.to(o.dtype.element_ty), mask=d < D)
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


def kernel_of(G, D, itemsize, has_mma):
    """-> kernel, its GP (heads of a program), DP (D padded) and N (tokens of a step).

    itemsize: bytes of a number of q. With matrix instructions a step is up to 8 KB of K: two
    steps of K and V under way take 32 KB, so that six programs fit on a processor of an H100 and
    two on one of an A10G. Without, N * DP sums of each head lie in the registers of 128 threads:
    32 each for one head, 16 each for up to four. A group of more heads reads K and V once for
    every four of them, mostly from the GPU's cache.
    """
    DP = max(16, triton.next_power_of_2(D))
    N = min(64, 4096 // DP)
    if has_mma and itemsize == 2:
        return _decode, max(16, triton.next_power_of_2(G)), DP, N
    GP = triton.cdiv(G, triton.cdiv(G, 4))
    return _decode_fma, GP, DP, N if GP == 1 else min(64, 2048 // DP)


def split(width, programs, processors):
    """Chunks that a sequence may have, for block tables of `width` tokens and `programs` without
    a split. It takes four programs for each processor to keep enough reads in flight."""
    chunks = max(triton.cdiv(4 * processors, programs), triton.cdiv(width, LONG_CHUNK))
    return min(chunks, triton.cdiv(width, MIN_CHUNK.value), MAX_CHUNKS)


def paged_decode(q, k_cache, v_cache, block_table, seq_lens, out, scale, chunks=None, lse=None):
    """Attention of one new token per sequence over its paged cache, in place into `out`.

    q, out       [B, H, D], D <= 256; caches [num_blocks, Hkv, bs, D]: bf16, fp16 or fp32, or
                 [num_blocks, Hkv, bs, D + 4] int8 with scales (kv_format.py)
    block_table  [B, blocks] int32; seq_lens [B] int32; 0: a row of padding, out and lse stay
    chunks       that a sequence may have, at most MAX_CHUNKS; None: by size
    lse          None, or [B, H] float32, contiguous: log(sum over tokens of exp(scale q . k))
    """
    B, H, D = q.shape
    _, Hkv, bs, _ = k_cache.shape
    assert D <= 256 and H % Hkv == 0 and q.stride(2) == out.stride(2) == 1
    assert k_cache.is_contiguous() and (lse is None or lse.is_contiguous())

    processors, has_mma = _gpu(q.device)
    G, int8 = H // Hkv, k_cache.dtype == torch.int8
    kernel, GP, DP, N = kernel_of(G, D, q.element_size(), has_mma)
    tiles = Hkv * triton.cdiv(G, GP)
    chunks = chunks or split(block_table.shape[1] * bs, B * tiles, processors)
    unit = 0.0 if lse is None else LN2
    lse = seq_lens if lse is None else lse          # some pointer, which is not followed
    if chunks == 1:
        part, part_lse = out[:, :, None], lse
    else:
        part = torch.empty(B, H, chunks, DP, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(B, H, chunks, dtype=torch.float32, device=q.device)

    kernel[(tiles, B, chunks)](
        q, k_cache, v_cache, _as_float32(k_cache), _as_float32(v_cache), block_table, seq_lens,
        part, part_lse, scale,
        *q.stride()[:2], *k_cache.stride()[:2], block_table.stride(0), *part.stride()[:3], H,
        G, GP, D, DP, bs, N, LSE_UNIT=1.0 if chunks > 1 else unit, INT8=int8,
        WIDE=INTERPRETED and q.dtype == torch.bfloat16, num_warps=4)
    if chunks > 1:
        _merge[(H, B)](part, part_lse, seq_lens, out, lse, out.stride(0), chunks, H, D, DP, N,
                       MAX_CHUNKS, LSE_UNIT=unit, num_warps=4)


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
