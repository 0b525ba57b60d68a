"""Tiles of CPU attention: its inner loops in LLVM vector code, for whatever vectors there are.

A tile takes T = 1, 2, 4 or 8 heads of one group together, so that K and V are read, and widened,
once for all of them; 8 only with vectors of 16 lanes, as narrower ones gain nothing from it. The
tiles are written once; what differs between processors and dtypes is in two classes of
kernels/cpu_vectors.py:

    Dot     AVX512-BF16. One `vdpbf16ps` adds the products of two bf16 pairs to each of 16 float32
            lanes: 32 products. It rounds q and the weights to bf16
    Fma     any processor with float32 multiply-add: AVX2 (8 lanes, 16 registers), AVX-512F
            (16, 32), NEON (4, 32). Elements of bf16, fp16 or float32 are widened to float32 first

NAME_reference says in NumPy what the tile NAME computes:

    narrow -> score -> softmax -> weigh       for a work item, see `make_item`
    finish                                    when the work items of a sequence are merged

Each tile is an LLVM function of its own. Inlined into one function, all of them together would
need more registers for addresses than there are. Every cache line of K and V is prefetched AHEAD
bytes before it is read. With T = 1 (no GQA) a block is one run of 128 KB and the processor's own
prefetcher keeps up: there, Dot is faster with every second line.

Addresses and strides are int64 numbers of bytes. Numba's cache of cpu_attn.py does not notice
changes here: touch cpu_attn.py after an edit. Knows nothing of threads, or of how work items are
chosen.

    python -m pytest kernels/test_kernels.py -k tile
"""
import functools
import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from kernels.cpu_vectors import HERE, Dot, Fma, round_bf16
from kernels.llvm_code import (
    F32,
    I64,
    F32x16,
    I16x16,
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

AHEAD = 16384                # bytes between what is prefetched and what is read
LOG2E = np.float32(1.4426950408889634)


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


def write_score(a, T, scores, k, row_bytes, q, tokens, ahead):
    """k [tokens, D], q [T, D] -> scores [tokens, T] float32; tokens: a multiple of 16.

    a: the arithmetic. row_bytes: of K. As many rows are prefetched from `ahead`. R = sums / T
    tokens at a time, here with 16 sums:

                   q of head 0  head 1  ...  head T-1
        token 0        acc[0]   acc[1]       acc[T-1]     To every lane of acc[i],
        ...                                               one instruction adds 1 dim (Fma) or 2.
        token R-1      acc[16-T]  ...        acc[15]

    Then additions reduce them to vectors, the scores [R, T].
    """
    R, every = a.sums // T, a.every if T == 1 else 64
    together = a.rows_together(T)                       # rows of K that share a load of q
    with loop(tokens * (4 * T), 4 * a.sums) as offset:
        first = (offset >> (4 * T).bit_length() - 1) * row_bytes
        totals = []
        for r in range(0, R, together):
            rows = [first + row_bytes * (r + i) for i in range(together)]
            acc = [variable(k.constant(0.0, ir.VectorType(F32, a.lanes)))
                   for _ in range(together * T)]
            with loop(row_bytes, every) as col:
                for row in rows:
                    prefetch(ahead + row + col)
            with loop(row_bytes, a.nbytes) as col:
                x = [a.load(k + row + col) for row in rows]
                for h in range(T):
                    y = a.load_q(q + ((row_bytes * h + col) << a.q_shift))
                    for i in range(together):
                        place = acc[i * T + h]
                        a.add_product(place.emit("load"), x[i], y).emit("store", place)
            totals += [place.emit("load") for place in acc]
        for i in range(0, a.sums, a.lanes):
            store(lane_sums(totals[i:i + a.lanes]), scores + offset + 4 * i)


def softmax_reference(scores):
    top = scores.max(0)
    weights = np.exp2(scores - top)
    return weights, top, weights.sum(0)


def write_softmax(a, T, scores, weights, tokens, maxima, sums):
    """scores [tokens, T] float32 -> weights, maxima and sums [T] float32.

    weights: [tokens, T] float32, which may take the place of scores, or, by Dot, [tokens / 2, T, 2]
    bf16. Fills scores and weights up to a multiple of 16 tokens, with weight 0. Writes up to 15
    numbers past the end of scores, and up to 16 numbers to maxima and to sums.
    """
    low = scores.constant(-3e38, ir.VectorType(F32, a.lanes))
    start, end = tokens * (4 * T), ((tokens + 15) & -16) * (4 * T)
    size = 4 * a.lanes                                   # T divides lanes
    with loop(end, size, start) as offset:               # the scores there may be anything
        store(low, scores + offset)
    top = variable(low)
    with loop(end, size) as offset:
        larger(top.emit("load"), load(low.type, scores + offset)).emit("store", top)
    top = fold(larger, top.emit("load"), T)
    total = variable(scores.constant(0.0, low.type))
    with loop(end, size) as offset:
        x = load(low.type, scores + offset) - top
        y = a.exp2(x, weights + (offset >> a.weight_shift), T)
        (total.emit("load") + y).emit("store", total)
    store(top, maxima)
    store(fold(operator.add, total.emit("load"), T), sums)


def weigh_reference(o, v, weights):
    return o + weights.T @ v


def write_weigh(a, T, o, v, row_bytes, weights, tokens, ahead):
    """o [T, D] float32 += weights . v [tokens, D]; weights: see write_softmax.

    a: the arithmetic. row_bytes: of V. As many rows are prefetched from `ahead`. Some columns of o
    stay in registers while all tokens are added. By Dot, o is in another order, see Dot.step.
    """
    wide, n = a.wide[T], a.per_vector
    whole = row_bytes & (-a.nbytes * wide)               # nbytes and wide are powers of 2
    spans = [(wide, None, whole), (1, whole, row_bytes)]
    for groups, start, end in spans[:1 if wide == 1 else 2]:
        step_bytes = a.step_tokens * a.nbytes * groups
        every = a.every if T == 1 else 64
        lines = range(0, step_bytes, every) if step_bytes >= 64 else ()
        with loop(end, a.nbytes * groups, start) as col:
            places = [address(o, row_bytes * h << a.shift, col << a.shift, 4 * a.lanes * i)
                      for h in range(T) for i in range(n * groups)]
            acc = [variable(load(ir.VectorType(F32, a.lanes), place)) for place in places]
            if not lines:
                with loop(tokens * step_bytes, 64) as line:
                    prefetch(address(ahead, col * tokens, line))
            with loop(a.num_steps(tokens)) as t:
                for i in lines:
                    prefetch(address(ahead, col * tokens, t * step_bytes, i))
                w, vectors = a.step(v, t, tokens, row_bytes, col, groups, weights, T)
                for i, x in enumerate(vectors):
                    for h in range(T):
                        place = acc[h * n * groups + i]
                        a.add_product(place.emit("load"), x, w[h]).emit("store", place)
            for x, place in zip(acc, places, strict=True):
                store(x.emit("load"), place)


def finish_reference(out, o, weight, add):
    return weight * o + (out if add else 0)


def write_finish(out, o, weight, count, add):
    """out [count] = weight * o [count] in Dot's order, plus out if add; count: a multiple of 32."""
    first = [lane for k in (0, 4) for lane in (*range(k, k + 4), *range(16 + k, 20 + k))]
    with loop(count * 4, 128) as col:
        x, y = (load(F32x16, o + col + 64 * i) for i in range(2))
        for i in range(2):
            place = out + col + 64 * i
            zero = o.constant(0.0, F32x16)
            old = equal(add, I64(0)).emit("select", zero, load(F32x16, place))
            z = shuffle(x, y, [lane + 8 * i for lane in first])
            store(call("llvm.fma.v16f32", z, splat(weight), old), place)


# ---- the tiles, for Numba

INT, FLOAT = types.int64, types.float32


def tile(write, *kinds, arithmetic=None):
    """What a Numba intrinsic returns: its signature, and how its call is compiled. With an
    arithmetic there is a function for each T, the first argument of the call."""
    def compiled(context, builder, signature, args):
        if arithmetic is None:
            call_function(builder, write, args)
        else:
            for T in arithmetic.heads:
                with builder.if_then(builder.icmp_signed("==", args[0], I64(T))):
                    call_function(builder, write, args[1:], arithmetic, T)
        return context.get_dummy_value()
    return types.void(*kinds), compiled


@intrinsic
def narrow(_, dst, src, scale, count):
    return tile(write_narrow, INT, INT, FLOAT, INT)


@intrinsic
def finish(_, out, o, weight, count, add):
    return tile(write_finish, INT, INT, FLOAT, INT, INT)


def make_tiles(a):
    """(score, softmax, weigh) in an arithmetic."""
    @intrinsic
    def score(_, T, scores, k, row_bytes, q, tokens, ahead):
        return tile(write_score, *[INT] * 7, arithmetic=a)

    @intrinsic
    def softmax(_, T, scores, weights, tokens, maxima, sums):
        return tile(write_softmax, *[INT] * 6, arithmetic=a)

    @intrinsic
    def weigh(_, T, o, v, row_bytes, weights, tokens, ahead):
        return tile(write_weigh, *[INT] * 7, arithmetic=a)
    return score, softmax, weigh


# ---- a work item

@njit(inline="always")
def _ahead(here, after, h, lag, Hkv, head_bytes):
    """What to prefetch with head h of the block at `here`: the head that is read `lag` heads
    later, maybe in the block at `after`."""
    if h + lag < Hkv:
        return here + (h + lag) * head_bytes
    return after + min(h + lag - Hkv, Hkv - 1) * head_bytes


def make_item(a):
    """The function of a work item in an arithmetic."""
    score, softmax, weigh = make_tiles(a)
    is_dot, dim_bytes, q_shift = isinstance(a, Dot), a.nbytes // a.dims, a.q_shift

    @njit
    def item(q, k_cache, v_cache, blocks, n, scale, T, q_rows, scores, weights, o, maxima, sums):
        """One work item of cpu_attn._decode, T heads in a tile: q [H, D] over n tokens of a
        sequence.

        blocks is their part of the block table. Groups of G heads are padded to a multiple of T, P.
        Scratch: q_rows [Hkv P, D] and scores [Hkv P + 1, width] float32, for Dot also weights
        [Hkv P, width] uint16; width at least n + 16. Writes o [Hkv P, D], by Dot in its own order,
        maxima and sums [Hkv P + 16].
        """
        H, D = q.shape
        Hkv, bs = k_cache.shape[1], k_cache.shape[2]
        G, P, width = H // Hkv, o.shape[0] // Hkv, scores.shape[1]
        row_bytes = dim_bytes * D
        head_bytes, block_bytes = bs * row_bytes, Hkv * bs * row_bytes
        lag = max(1, AHEAD // head_bytes)
        k_data, v_data = k_cache.ctypes.data, v_cache.ctypes.data
        q_data, s_data, o_data = q_rows.ctypes.data, scores.ctypes.data, o.ctypes.data
        m_data, l_data = maxima.ctypes.data, sums.ctypes.data
        w_data, w_bytes = (weights.ctypes.data, 2) if is_dot else (s_data, 4)
        q_bytes = row_bytes << q_shift
        for h in range(H):
            row = h // G * P + h % G
            if is_dot:
                narrow(q_data + row * q_bytes, q.ctypes.data + h * D * 4, scale * LOG2E, D)
            else:
                for d in range(D):
                    q_rows[row, d] = q[h, d] * (scale * LOG2E)
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
                          q_data + g * q_bytes, tokens, ahead)
        for g in range(0, Hkv * P, T):
            softmax(T, s_data + g * width * 4, w_data + g * width * w_bytes, n, m_data + g * 4,
                    l_data + g * 4)
        o[:] = 0
        for j in range(0, n, bs):
            here = v_data + np.int64(blocks[j // bs]) * block_bytes
            after = v_data + np.int64(blocks[j // bs + 1]) * block_bytes if j + bs < n else here
            for h in range(Hkv):
                ahead = _ahead(here, after, h, lag, Hkv, head_bytes)
                for g in range(h * P, h * P + P, T):
                    weigh(T, o_data + g * D * 4, here + h * head_bytes, row_bytes,
                          w_data + (g * width + j * T) * w_bytes, min(bs, n - j), ahead)
    return item


@functools.cache                # every call of paged_decode asks
def heads_of_tile(path, G):
    """T for groups of G heads on a path, "dot" or "fma"."""
    a = Dot() if path == "dot" else Fma("fp32", HERE.lanes, HERE.registers)
    return next((T for T in a.heads if T >= G), a.heads[-1])


def item_of(arithmetics):
    """A function for Numba code that calls the work item of {type of a cache's bits: arithmetic},
    or nothing for a type that is not there."""
    items = {kind: make_item(a) for kind, a in arithmetics.items()}

    def item(*args):
        raise NotImplementedError("for Numba code alone")

    @overload(item)
    def choose(*args):
        chosen = items.get(args[1].dtype)           # of k_cache
        if chosen is None:
            return lambda *args: None
        return lambda *args: chosen(*args)
    return item


dot_item = item_of({types.uint16: Dot()} if HERE.has_dot else {})
fma_item = item_of({
    bits: Fma(kind, HERE.lanes, HERE.registers)
    for kind, bits in (("bf16", types.uint16), ("fp16", types.int16), ("fp32", types.uint32))
    if kind in HERE.kinds})
