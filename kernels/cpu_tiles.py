"""Tiles of CPU attention: its inner loops in LLVM vector code, for whatever vectors there are.

A tile takes T = 1, 2, 4 or 8 heads of one group together, so that K and V are read, and widened,
once for all of them; 8 only with vectors of 16 lanes, as narrower ones gain nothing from it. The
tiles are written once; what differs between processors and dtypes is in the classes of
kernels/cpu_vectors.py:

    Dot     bf16 on AVX512-BF16. One `vdpbf16ps` adds the products of two bf16 pairs to each of 16
            float32 lanes: 32 products. It rounds q and the weights to bf16
    Fma     any processor with float32 multiply-add: AVX2 (8 lanes, 16 registers), AVX-512F
            (16, 32), NEON (4, 32). Elements of bf16, fp16 or float32 are widened to float32 first
    Int8    the same processors, for int8 with a scale for each token and head: integer products

NAME_reference says in NumPy what the tile NAME computes:

    narrow -> score (-> unround) -> softmax (-> round) -> weigh       for a work item
    finish                                                            when items are merged

Each tile is an LLVM function of its own. Inlined into one function, all of them together would
need more registers for addresses than there are. Every cache line of K and V is prefetched AHEAD
bytes before it is read. With T = 1 (no GQA) a block is one run of 128 KB and the processor's own
prefetcher keeps up: there, Dot is faster with every second line.

Addresses and strides are int64 numbers of bytes. Numba's cache of cpu_attn.py does not notice
changes here: touch cpu_attn.py after an edit. Knows nothing of threads, or of how work items are
chosen.

    python -m pytest kernels/test_kernels.py -k tile
"""
import itertools
import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numba.np.numpy_support import as_dtype

from kernels.cpu_vectors import TILES, Dot, Int8, pairs
from kernels.llvm_code import (
    F32,
    I32,
    I64,
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
INT16_MAX = 32767.0


# ---- the tiles: what each computes in NumPy, and the writer of its LLVM code

def bf16(x):
    """float32 -> the nearest bf16, ties to even; as float32, of which bf16 is the upper half."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def narrow_reference(src, scale):
    return scale * src


def write_narrow(a, dst, src, scale, count):
    """dst [count] = scale * src [count] float32, as `a` has q's rows; count: a multiple of a.dims.

    a: the arithmetic, here and below.
    """
    scale = splat(scale, a.lanes)
    with loop(count >> a.dims.bit_length() - 1) as chunk:
        a.narrow(dst, src, scale, chunk)


def score_reference(k, q):
    return k @ q.T


def write_score(a, T, scores, k, row_bytes, q, tokens, ahead):
    """k [tokens, D], q [T, D] -> scores [tokens, T] float32, by Int8 int32; tokens: a multiple
    of 16.

    row_bytes: of K. As many rows are prefetched from `ahead`. R = sums / T tokens at a time, here
    with 16 sums:

                   q of head 0  head 1  ...  head T-1
        token 0        acc[0]   acc[1]       acc[T-1]     To every lane of acc[i],
        ...                                               one instruction adds one dim, or two.
        token R-1      acc[16-T]  ...        acc[15]

    Then additions reduce `lanes` accumulators to one vector of scores.
    """
    R = a.sums // T
    together = a.rows_together(T)                        # rows of K that share a load of q
    q_shift = (a.q_nbytes // a.nbytes).bit_length() - 1  # a row of q is longer than one of K
    with loop(tokens * (4 * T), 4 * a.sums) as offset:
        first = (offset >> (4 * T).bit_length() - 1) * row_bytes
        totals = []
        for r in range(0, R, together):
            rows = [first + row_bytes * (r + i) for i in range(together)]
            zero = k.constant(0, I32 if isinstance(a, Int8) else F32)
            acc = [variable(splat(zero, a.lanes)) for _ in range(together * T)]
            with loop(row_bytes, a.line if T == 1 else 64) as col:
                for row in rows:
                    prefetch(ahead + row + col)
            with loop(row_bytes, a.nbytes) as col:
                x = [a.vectors(k + row + col) for row in rows]
                for h in range(T):
                    y = a.q_vectors(q + ((row_bytes * h + col) << q_shift))
                    for i, part in itertools.product(range(together), range(len(y))):
                        place = acc[i * T + h]
                        total = a.multiply_add(x[i][part], y[part], place.emit("load"))
                        total.emit("store", place)
            totals += [place.emit("load") for place in acc]
        for i in range(0, a.sums, a.lanes):
            store(lane_sums(totals[i:i + a.lanes]), scores + offset + 4 * i)


def unround_reference(scores, scales, unit):
    return scores * scales[:, None] * unit


def write_unround(a, T, scores, scales, unit, tokens):
    """In place: scores [tokens, T] int32 * scales [tokens] * unit -> float32; tokens: a multiple
    of 16. Unused scales may be NaN."""
    with loop(tokens * (4 * T), 4 * a.lanes) as offset:
        x = load(a.ints, scores + offset).emit("sitofp", a.floats)
        store(x * _of_tokens(a, T, scales, offset) * splat(unit, a.lanes), scores + offset)


def _of_tokens(a, T, scales, offset):
    """The scales of the tokens in one vector of [tokens, T], of which `offset` bytes come before:
    each of them T times."""
    x = load(ir.VectorType(F32, a.lanes // T), scales + (offset >> T.bit_length() - 1))
    return shuffle(x, x, [lane // T for lane in range(a.lanes)])


def softmax_reference(scores):
    top = scores.max(0)
    weights = np.exp2(scores - top)
    return weights, top, weights.sum(0)


def write_softmax(a, T, scores, weights, tokens, maxima, sums):
    """scores [tokens, T] float32 -> weights, maxima and sums [T] float32.

    weights: by Dot [tokens / 2, T, 2] bf16; else [tokens, T] float32, in the place of scores.
    Fills scores and weights up to a multiple of 16 tokens, with weight 0. Writes up to 15 numbers
    past the end of scores, and up to 16 numbers to maxima and to sums.
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
        y = a.exp2(load(low.type, scores + offset) - top, weights, offset, T)
        (total.emit("load") + y).emit("store", total)
    store(top, maxima)
    store(fold(operator.add, total.emit("load"), T), sums)


def round_reference(weights, scales):
    x = np.where(weights > 0, weights * scales[:, None], 0)
    unit = np.maximum(x.max(0), 1e-30) / INT16_MAX
    return np.rint(x / unit), unit


def write_round(a, T, rounded, weights, scales, tokens):
    """weights [tokens, T] float32 * scales [tokens] -> rounded [tokens / 2, T, 2] int16, and before
    them, at -64 bytes, the unit [T] float32 of each head; tokens: a multiple of 16.

    weights is overwritten. The scale of a token with weight 0 may be NaN.
    """
    size = 4 * a.lanes
    zero = weights.constant(0.0, a.floats)
    top = variable(weights.constant(1e-30, a.floats))
    with loop(tokens * (4 * T), size) as offset:
        w = load(a.floats, weights + offset)
        is_zero = equal(w.emit("bitcast", a.ints), zero.emit("bitcast", a.ints))
        x = is_zero.emit("select", zero, w * _of_tokens(a, T, scales, offset))
        store(x, weights + offset)
        larger(top.emit("load"), x).emit("store", top)
    top = fold(larger, top.emit("load"), T)
    store(top * (1 / INT16_MAX), rounded - 64)
    per_unit = weights.constant(INT16_MAX, a.floats).emit("fdiv", top)
    num = max(1, 2 * T // a.lanes)                       # vectors with two tokens
    with loop(tokens * (4 * T), size * num) as offset:
        x = [load(a.floats, weights + offset + size * i) * per_unit for i in range(num)]
        x = [a.rounded(y) for y in x]
        x = x[0] if num == 1 else shuffle(*x, range(num * a.lanes))
        store(pairs(x, T), rounded + (offset >> 1))


def weigh_reference(o, v, weights):
    return o + weights.T @ v


def write_weigh(a, T, o, v, row_bytes, weights, tokens, ahead):
    """o [T, D] float32 += weights . v [tokens, D]; weights: see write_softmax and write_round.

    row_bytes: of V. As many rows are prefetched from `ahead`. Some chunks of o stay in registers
    while all tokens are added, two at a time. The dims of a chunk of o are in the order of `a`.
    """
    two, final = (tokens + 1) >> 1, tokens - 1
    o_shift = (4 * a.dims // a.nbytes).bit_length() - 1  # a row of o is longer than one of V
    wide = max(1, min(a.wide, a.sums // (a.n * T)))      # chunks at once
    whole = row_bytes & (-a.nbytes * wide)
    spans = [(wide, None, whole), (1, whole, row_bytes)]
    for chunks, start, end in spans[:1 if wide == 1 else 2]:
        width = a.nbytes * chunks
        with loop(end, width, start) as col:
            for part in a.parts(T):
                vectors = range(a.n * chunks)[part]
                places = [address(o, row_bytes * h << o_shift, col << o_shift, 4 * a.lanes * i)
                          for h in range(T) for i in vectors]
                acc = [variable(a.start(place)) for place in places]
                with loop(two) as t:
                    row = t * 2 * row_bytes
                    # The partner of an odd final token has weight 0, but its row may hold NaN.
                    # Then the token's own row is read twice.
                    partner = equal(t * 2, final).emit("select", row, row + row_bytes)
                    if vectors[0] == 0:
                        line = address(ahead, col * tokens, t * (2 * width))
                        for i in range(0, 2 * width, a.line if T == 1 else 64):
                            prefetch(line + i)
                    rows = row + col, partner + col
                    for w, products in a.products(v, rows, chunks, part, weights, t, T):
                        for i, x in enumerate(products):
                            for h in range(T):
                                place = acc[h * len(vectors) + i]
                                a.multiply_add(x, w[h], place.emit("load")).emit("store", place)
                for i, place in enumerate(places):
                    a.end(acc[i].emit("load"), place, weights, i // len(vectors))


def finish_reference(out, o, weight, add):
    return weight * o + (out if add else 0)


def write_finish(a, out, o, weight, count, add):
    """out [count] = weight * o [count], of which each chunk is in the order of `a`, plus out if
    add; count: a multiple of a.dims."""
    kind, size = ir.VectorType(F32, a.lanes), 4 * a.lanes
    with loop(count * 4, 4 * a.dims) as col:
        x = [load(kind, o + col + size * i) for i in range(a.n)]
        while len(x) > 1:
            whole = range(2 * x[0].type.count)
            x = [shuffle(x[i], x[i + 1], whole) for i in range(0, len(x), 2)]
        for i in range(a.n):
            place = out + col + size * i
            old = equal(add, I64(0)).emit("select", o.constant(0.0, kind), load(kind, place))
            dims = [a.order.index(dim) for dim in range(a.lanes * i, a.lanes * (i + 1))]
            z = shuffle(x[0], x[0], dims)
            store(call(f"llvm.fma.v{a.lanes}f32", z, splat(weight, a.lanes), old), place)


# ---- the tiles, for Numba

INT, FLOAT = types.int64, types.float32


def tile(a, write, *kinds, widths=True):
    """What a Numba intrinsic returns: its signature, and how its call is compiled. With widths
    there is a function for each T, the first argument of the call."""
    def compiled(context, builder, signature, args):
        if not widths:
            call_function(builder, write, args, a)
        for T in a.heads if widths else ():
            with builder.if_then(builder.icmp_signed("==", args[0], I64(T))):
                call_function(builder, write, args[1:], a, T)
        return context.get_dummy_value()
    return types.void(*kinds), compiled


def make_tiles(a):
    """{name: tile} in an arithmetic."""
    @intrinsic
    def narrow(_, dst, src, scale, count):
        return tile(a, write_narrow, INT, INT, FLOAT, INT, widths=False)

    @intrinsic
    def score(_, T, scores, k, row_bytes, q, tokens, ahead):
        return tile(a, write_score, *[INT] * 7)

    @intrinsic
    def unround(_, T, scores, scales, unit, tokens):
        return tile(a, write_unround, INT, INT, INT, FLOAT, INT)

    @intrinsic
    def softmax(_, T, scores, weights, tokens, maxima, sums):
        return tile(a, write_softmax, *[INT] * 6)

    @intrinsic
    def round(_, T, rounded, weights, scales, tokens):
        return tile(a, write_round, *[INT] * 5)

    @intrinsic
    def weigh(_, T, o, v, row_bytes, weights, tokens, ahead):
        return tile(a, write_weigh, *[INT] * 7)

    @intrinsic
    def finish(_, out, o, weight, count, add):
        return tile(a, write_finish, INT, INT, FLOAT, INT, INT, widths=False)
    return {f.__name__: f for f in (narrow, score, unround, softmax, round, weigh, finish)}


# ---- a work item

@njit(inline="always")
def _ahead(here, after, h, lag, Hkv, head_bytes):
    """What to prefetch with head h of the block at `here`: the head that is read `lag` heads
    later, maybe in the block at `after`."""
    if h + lag < Hkv:
        return here + (h + lag) * head_bytes
    return after + min(h + lag - Hkv, Hkv - 1) * head_bytes


@njit
def _largest(x):
    """max |x| of x [H, D], and not 0."""
    top = np.float32(1e-30)
    for row in x:
        for y in row:
            top = max(top, abs(y))
    return top


def make_item(a):
    """The function of a work item in an arithmetic."""
    tiles = make_tiles(a)
    narrow, score, softmax, weigh = (tiles[n] for n in ("narrow", "score", "softmax", "weigh"))
    unround, round = tiles["unround"], tiles["round"]
    is_dot, is_int8 = isinstance(a, Dot), isinstance(a, Int8)

    @njit
    def item(q_rows, k_cache, v_cache, q, blocks, n, scale, T, scores, weights, o, maxima, sums):
        """One work item of cpu_attn._decode, T heads in a tile: q [H, D] over n tokens of a
        sequence.

        blocks is their part of the block table. Groups of G heads are padded to a multiple of T, P.
        Scratch: q_rows [Hkv P, D] of a's dtype, scores [Hkv P + 1, width] float32, weights
        [Hkv P + 1, width] uint16; width at least n + 16. Writes o [Hkv P, D] in a's order, maxima
        and sums [Hkv P + 16].
        """
        H, D = q.shape
        Hkv, bs = k_cache.shape[1], k_cache.shape[2]
        G, P, width = H // Hkv, o.shape[0] // Hkv, scores.shape[1]
        row_bytes, q_bytes = k_cache.itemsize * D, q_rows.itemsize * D
        head_bytes = bs * k_cache.shape[3] * k_cache.itemsize           # by Int8 with bs scales
        block_bytes, scales = Hkv * head_bytes, bs * row_bytes
        lag = max(1, AHEAD // head_bytes)
        k_data, v_data = k_cache.ctypes.data, v_cache.ctypes.data
        q_data, s_data, o_data = q_rows.ctypes.data, scores.ctypes.data, o.ctypes.data
        m_data, l_data = maxima.ctypes.data, sums.ctypes.data
        w_data, w_bytes = (weights.ctypes.data, 2) if is_dot else (s_data, 4)
        rounded = weights.ctypes.data + 64
        unit = _largest(q) / INT16_MAX if is_int8 else np.float32(1)     # of q's rows
        q_scale = 1 / unit if is_int8 else scale * LOG2E
        for h in range(H):
            row = q_data + (h // G * P + h % G) * q_bytes
            narrow(row, q.ctypes.data + h * D * 4, q_scale, D)
        for j in range(0, n, bs):
            here = k_data + np.int64(blocks[j // bs]) * block_bytes
            if j + bs < n:
                after = k_data + np.int64(blocks[j // bs + 1]) * block_bytes
            else:
                after = v_data + np.int64(blocks[0]) * block_bytes
            tokens = (min(bs, n - j) + 15) // 16 * 16
            for h in range(Hkv):
                ahead = _ahead(here, after, h, lag, Hkv, head_bytes)
                k = here + h * head_bytes
                for g in range(h * P, h * P + P, T):
                    s = s_data + (g * width + j * T) * 4
                    score(T, s, k, row_bytes, q_data + g * q_bytes, tokens, ahead)
                    if is_int8:
                        unround(T, s, k + scales, unit * scale * LOG2E, tokens)
        for g in range(0, Hkv * P, T):
            softmax(T, s_data + g * width * 4, w_data + g * width * w_bytes, n, m_data + g * 4,
                    l_data + g * 4)
        o[:] = 0
        for j in range(0, n, bs):
            here = v_data + np.int64(blocks[j // bs]) * block_bytes
            after = v_data + np.int64(blocks[j // bs + 1]) * block_bytes if j + bs < n else here
            tokens = min(bs, n - j)
            for h in range(Hkv):
                ahead = _ahead(here, after, h, lag, Hkv, head_bytes)
                v = here + h * head_bytes
                for g in range(h * P, h * P + P, T):
                    w = w_data + (g * width + j * T) * w_bytes
                    if is_int8:
                        round(T, rounded, w, v + scales, (tokens + 15) // 16 * 16)
                        w = rounded
                    weigh(T, o_data + g * D * 4, v, row_bytes, w, tokens, ahead)
    return item


def heads_of_tile(a, G):
    """T for groups of G heads in an arithmetic."""
    return next((T for T in a.heads if T >= G), a.heads[-1])


def _for_each(make):
    """A function for Numba code. It calls make(a) for the arithmetic `a` that the dtypes of its
    first two arguments name: the rows of q, and a cache."""
    made = {(a.kv, a.q): make(a) for a in TILES.values()}

    def function(*args):
        raise NotImplementedError("for Numba code alone")

    @overload(function)
    def choose(q_rows, k_cache, *args):
        chosen = made.get((as_dtype(k_cache.dtype).type, as_dtype(q_rows.dtype).type))
        if chosen is None:
            return lambda q_rows, k_cache, *args: None
        return lambda q_rows, k_cache, *args: chosen(q_rows, k_cache, *args)
    return function


def _make_finish(a):
    finish = make_tiles(a)["finish"]

    @njit
    def of_cache(q_rows, k_cache, out, o, weight, count, add):
        finish(out, o, weight, count, add)
    return of_cache


item, finish = _for_each(make_item), _for_each(_make_finish)
