"""The `dot` path of CPU attention: tiles in LLVM vector code, for processors with AVX512-BF16.

One `vdpbf16ps` instruction computes 32 products: it adds the products of two bf16 pairs to each
of 16 float32 lanes. A tile takes T = 1, 2, 4 or 8 heads of one group together, so that K and V
are read once for all of them. NAME_reference says in NumPy what the tile NAME computes:

    narrow -> score -> softmax -> weigh       for a work item, see `dot_item`
    finish                                    when the work items of a sequence are merged

Each tile is an LLVM function of its own. Inlined into one function, all of them together would
need more registers for addresses than there are. Every cache line of K and V is prefetched AHEAD
bytes before it is read. With T = 1 (no GQA) a block is one run of 128 KB and the processor's own
prefetcher keeps up: there, prefetching every second line is faster.

Addresses and strides are int64 numbers of bytes. Where HAS_DOT is False the tiles are empty and
must not be called. Numba's cache of cpu_attn.py does not notice changes here: touch cpu_attn.py
after an edit. Knows nothing of threads, or of how work items are chosen.

    python -m pytest kernels/test_kernels.py -k tile
"""
import operator

import numpy as np
from llvmlite import binding
from numba import njit, types
from numba.extending import intrinsic

from kernels.llvm_code import (
    I16,
    I32,
    I64,
    F32x16,
    I16x16,
    I16x32,
    I32x16,
    address,
    call,
    call_function,
    equal,
    fold,
    lane_sums,
    larger,
    load,
    loop,
    prefetch,
    shuffle,
    splat,
    store,
    variable,
)

HAS_DOT = bool(binding.get_host_cpu_features().get("avx512bf16"))
TILE_HEADS = 1, 2, 4, 8      # the possible T
AHEAD = 16384                # bytes between what is prefetched and what is read
LOG2E = np.float32(1.4426950408889634)


def dot(acc, x, y):
    """acc [16] float32 + the products of the bf16 pairs in x and y [16] int32."""
    return call("llvm.x86.avx512bf16.dpbf16ps.512", acc, x, y)


def round_bf16(x):
    """float32 lanes -> their bf16 bits in the lower halves of int32 lanes, ties to even."""
    x = x.emit("bitcast", I32x16)
    return (x + ((x >> 16) & 1) + 0x7FFF) >> 16


# ---- the tiles: what each computes in NumPy, and the writer of its LLVM code

def bf16(x):
    """float32 -> the nearest bf16, ties to even; as float32, of which bf16 is the upper half."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def narrow_reference(src, scale):
    return bf16(scale * src)


def write_narrow(dst, src, scale, count):
    """src [count] float32 -> dst [count] bf16; count: a multiple of 16."""
    with loop(count, 16) as i:
        x = load(F32x16, src + i * 4) * splat(scale)
        store(round_bf16(x).emit("trunc", I16x16), dst + i * 2)


def score_reference(k, q):
    return k @ q.T


def write_score(T, scores, k, row_bytes, q, tokens, ahead):
    """k [tokens, D], q [T, D] bf16 -> scores [tokens, T] float32; tokens: a multiple of 16.

    row_bytes = 2 D. As many rows are prefetched from `ahead`. R = 16 / T tokens at a time:

                   q of head 0  head 1  ...  head T-1
        token 0        acc[0]   acc[1]       acc[T-1]     To 16 lanes of acc[i],
        ...                                               one instruction adds 32 dims.
        token R-1      acc[16-T]  ...        acc[15]

    Then 15 additions reduce the 16 x 16 lanes to one vector, the scores [R, T].
    """
    R, together = 16 // T, min(T, 2)                     # rows of K that share a load of q
    with loop(tokens * (4 * T), 64) as offset:
        first = (offset >> 6) * R * row_bytes
        totals = []
        for r in range(0, R, together):
            rows = [first + row_bytes * (r + i) for i in range(together)]
            zero = k.constant(0.0)
            acc = [variable(zero) for _ in range(together * T)]
            with loop(row_bytes, 128 if T == 1 else 64) as col:
                for row in rows:
                    prefetch(ahead + row + col)
            with loop(row_bytes, 64) as col:
                x = [load(I32x16, k + row + col) for row in rows]
                for h in range(T):
                    y = load(I32x16, q + row_bytes * h + col)
                    for i in range(together):
                        place = acc[i * T + h]
                        dot(place.emit("load"), x[i], y).emit("store", place)
            totals += [place.emit("load") for place in acc]
        store(lane_sums(totals), scores + offset)


def softmax_reference(scores):
    top = scores.max(0)
    weights = bf16(np.exp2(scores - top))
    return weights, top, weights.sum(0)


# 2^f = sum_n EXP2[n] f^n for 0 <= f < 1, fitted on Chebyshev points. The relative error is below
# 8e-5, where rounding to bf16 errs by 2e-3.
EXP2 = 0.99992783, 0.6957771, 0.22623319, 0.07790716


def write_softmax(T, scores, weights, tokens, maxima, sums):
    """scores [tokens, T] float32 -> weights [tokens / 2, T, 2] bf16, maxima and sums [T] float32.

    Fills scores and weights up to a multiple of 16 tokens, with weight 0. Writes up to 15 numbers
    past the end of scores, and 16 numbers to maxima and to sums.
    """
    low = scores.constant(-3e38)
    start, end = tokens * (4 * T), ((tokens + 15) & -16) * (4 * T)
    with loop(end, 64, start) as offset:                 # the scores there may be anything
        store(low, scores + offset)
    top = variable(low)
    with loop(end, 64) as offset:
        larger(top.emit("load"), load(F32x16, scores + offset)).emit("store", top)
    top = fold(larger, top.emit("load"), T)
    total = variable(scores.constant(0.0))
    pairs = [(2 * j + i) * T + h for j in range(8 // T) for h in range(T) for i in range(2)]
    with loop(end, 64) as offset:
        x = load(F32x16, scores + offset) - top
        f = call("llvm.x86.avx512.mask.reduce.ps.512", x, I32(1), x, I16(-1), I32(4))
        y = scores.constant(EXP2[-1])                    # f = x - floor(x)
        for coefficient in EXP2[-2::-1]:
            y = call("llvm.fma.v16f32", y, f, scores.constant(coefficient))
        y = call("llvm.x86.avx512.mask.scalef.ps.512", y, x, y, I16(-1), I32(4))
        bits = round_bf16(y)                             # of y * 2^floor(x)
        half = bits.emit("trunc", I16x16)
        store(shuffle(half, half, pairs), weights + (offset >> 1))
        (total.emit("load") + (bits << 16).emit("bitcast", F32x16)).emit("store", total)
    store(top, maxima)
    store(fold(operator.add, total.emit("load"), T), sums)


def weigh_reference(o, v, weights):
    return o + weights.T @ v


def write_weigh(T, o, v, row_bytes, weights, tokens, ahead):
    """o [T, D] float32 += weights [tokens / 2, T, 2] . v [tokens, D], both bf16.

    row_bytes = 2 D. As many rows are prefetched from `ahead`. The rows of two tokens are
    interleaved: then one instruction adds a pair of tokens to 16 dims of o. Interleaving works
    within 128-bit lanes, so each 32 dims of o are stored in this lane order: 0-3, 8-11, 16-19,
    24-27, then 4-7, 12-15, 20-23, 28-31. `finish` undoes it.
    """
    order = [lane for k in range(0, 32, 8) for i in range(4) for lane in (k + i, 32 + k + i)]
    pairs, final = (tokens + 1) >> 1, tokens - 1
    wide = {1: 4, 2: 4, 4: 2, 8: 1}[T]       # groups of 32 dims at once: at most 16 accumulators
    whole = row_bytes & (-64 * wide)
    spans = [(wide, None, whole), (1, whole, row_bytes)]
    for groups, start, end in spans[:1 if wide == 1 else 2]:
        with loop(end, 64 * groups, start) as col:
            places = [address(o, row_bytes * (2 * h), col * 2, 64 * i)
                      for h in range(T) for i in range(2 * groups)]
            acc = [variable(load(F32x16, place)) for place in places]
            with loop(pairs) as t:
                row = t * 2 * row_bytes
                # The partner of an odd final token has weight 0, but its row may hold NaN.
                # Then the token's own row is read twice.
                partner = equal(t * 2, final).emit("select", row, row + row_bytes)
                line = address(ahead, col * tokens, t * (128 * groups))
                for i in range(0, 2 * groups, 2 if T == 1 else 1):
                    prefetch(line + 64 * i)
                w = [splat(load(I32, weights + t * (4 * T) + 4 * h)) for h in range(T)]
                for i in range(groups):
                    x, y = (load(I16x32, v + r + col + 64 * i) for r in (row, partner))
                    for half in range(2):
                        mixed = shuffle(x, y, [lane + 4 * half for lane in order])
                        mixed = mixed.emit("bitcast", I32x16)
                        for h in range(T):
                            a = acc[h * 2 * groups + 2 * i + half]
                            dot(a.emit("load"), mixed, w[h]).emit("store", a)
            for a, place in zip(acc, places, strict=True):
                store(a.emit("load"), place)


def finish_reference(out, o, weight, add):
    return weight * o + (out if add else 0)


def write_finish(out, o, weight, count, add):
    """out [count] = weight * o [count] in lane order, plus out if add; count: a multiple of 32."""
    first = [lane for k in (0, 4) for lane in (*range(k, k + 4), *range(16 + k, 20 + k))]
    with loop(count * 4, 128) as col:
        x, y = (load(F32x16, o + col + 64 * i) for i in range(2))
        for i in range(2):
            place = out + col + 64 * i
            zero = o.constant(0.0)
            old = equal(add, I64(0)).emit("select", zero, load(F32x16, place))
            z = shuffle(x, y, [lane + 8 * i for lane in first])
            store(call("llvm.fma.v16f32", z, splat(weight), old), place)


# ---- the tiles, for Numba

def tile(write, *kinds, widths=()):
    """What a Numba intrinsic returns: its signature, and how its call is compiled.

    With widths there is a function for each T; the first argument of the call picks one.
    """
    def compiled(context, builder, signature, args):
        if HAS_DOT and not widths:
            call_function(builder, write, args)
        elif HAS_DOT:
            for T in widths:
                with builder.if_then(builder.icmp_signed("==", args[0], I64(T))):
                    call_function(builder, write, args[1:], T)
        return context.get_dummy_value()
    return types.void(*kinds), compiled


INT, FLOAT = types.int64, types.float32


@intrinsic
def narrow(_, dst, src, scale, count):
    return tile(write_narrow, INT, INT, FLOAT, INT)


@intrinsic
def score(_, T, scores, k, row_bytes, q, tokens, ahead):
    return tile(write_score, *[INT] * 7, widths=TILE_HEADS)


@intrinsic
def softmax(_, T, scores, weights, tokens, maxima, sums):
    return tile(write_softmax, *[INT] * 6, widths=TILE_HEADS)


@intrinsic
def weigh(_, T, o, v, row_bytes, weights, tokens, ahead):
    return tile(write_weigh, *[INT] * 7, widths=TILE_HEADS)


@intrinsic
def finish(_, out, o, weight, count, add):
    return tile(write_finish, INT, INT, FLOAT, INT, INT)


# ---- a work item

@njit(inline="always")
def _ahead(here, after, h, lag, Hkv, head_bytes):
    """What to prefetch with head h of the block at `here`: the head that is read `lag` heads
    later, maybe in the block at `after`."""
    if h + lag < Hkv:
        return here + (h + lag) * head_bytes
    return after + min(h + lag - Hkv, Hkv - 1) * head_bytes


@njit
def dot_item(q, k_cache, v_cache, blocks, n, scale, T, q_bf16, scores, weights, o, maxima, sums):
    """One work item of cpu_attn._decode, T heads in a tile: q [H, D] over n tokens of a sequence.

    blocks is their part of the block table. Groups of G heads are padded to a multiple of T, P.
    Scratch: q_bf16 [Hkv P, D], weights [Hkv P, width] uint16, scores [Hkv P + 1, width] float32,
    width at least n + 16. Writes o [Hkv P, D] in lane order, maxima and sums [Hkv P + 16].
    """
    H, D = q.shape
    Hkv, bs = k_cache.shape[1], k_cache.shape[2]
    G, P, width = H // Hkv, o.shape[0] // Hkv, scores.shape[1]
    row_bytes = 2 * D
    head_bytes, block_bytes = bs * row_bytes, Hkv * bs * row_bytes
    lag = max(1, AHEAD // head_bytes)
    k_data, v_data = k_cache.ctypes.data, v_cache.ctypes.data
    q_data, s_data, w_data = q_bf16.ctypes.data, scores.ctypes.data, weights.ctypes.data
    o_data, m_data, l_data = o.ctypes.data, maxima.ctypes.data, sums.ctypes.data
    for h in range(H):
        row = q_data + (h // G * P + h % G) * row_bytes
        narrow(row, q.ctypes.data + h * D * 4, scale * LOG2E, D)
    for j in range(0, n, bs):
        here = k_data + np.int64(blocks[j // bs]) * block_bytes
        if j + bs < n:
            after = k_data + np.int64(blocks[j // bs + 1]) * block_bytes
        else:
            after = v_data + np.int64(blocks[0]) * block_bytes
        tokens = (min(bs, n - j) + 15) // 16 * 16
        for h in range(Hkv):
            ahead = _ahead(here, after, h, lag, Hkv, head_bytes)
            for g in range(h * P, h * P + P, T):
                score(T, s_data + (g * width + j * T) * 4, here + h * head_bytes, row_bytes,
                      q_data + g * row_bytes, tokens, ahead)
    for g in range(0, Hkv * P, T):
        softmax(T, s_data + g * width * 4, w_data + g * width * 2, n, m_data + g * 4,
                l_data + g * 4)
    o[:] = 0
    for j in range(0, n, bs):
        here = v_data + np.int64(blocks[j // bs]) * block_bytes
        after = v_data + np.int64(blocks[j // bs + 1]) * block_bytes if j + bs < n else here
        for h in range(Hkv):
            ahead = _ahead(here, after, h, lag, Hkv, head_bytes)
            for g in range(h * P, h * P + P, T):
                weigh(T, o_data + g * D * 4, here + h * head_bytes, row_bytes,
                      w_data + (g * width + j * T) * 2, min(bs, n - j), ahead)
