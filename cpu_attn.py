"""Decode attention and KV store on the CPU tier: Numba, multithreaded, GIL released (NEO, section 4).

    q [B, H, D]  x  K, V [num_blocks, Hkv, bs, D] through a block table  ->  out [B, H, D]

One work item is (sequence, a range of about CHUNK tokens, all heads), so that a block is read as one contiguous run; the
items are dealt out by tokens, one share a thread. An item leaves (unnormalised out, max, sum), and a second pass merges
them by log-sum-exp:

    sequence 0  |item 0: tokens 0..255|item 1: 256..511|item 2: 512..600|        any thread, any order
    merge       out = sum_i 2^(m_i - m) o_i / sum_i 2^(m_i - m) l_i              m: maxima, base 2

Inside an item: scores of all its tokens, softmax, weighted sum of V. Two paths: `dot`, bf16 on AVX512-BF16 (cpu_tiles.py;
q and the weights p are rounded to bf16), and `portable`, plain loops that LLVM vectorises, any dtype, float32 throughout.

    python cpu_attn.py            a card: path, measured read bandwidth, share of it reached, one JSON line

Knows nothing of torch, requests or policy. Glossary of symbols: model.py. Tested against `paged_decode_reference`.
"""
import threading

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from cpu_tiles import HAS_DOT, LANES, scores1, scores4, scores8, softmax, weigh1, weigh1_wide, weigh4, weigh4_wide, weigh8

numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # workqueue: 130 us a launch, and not reentrant

CHUNK = 256                                   # most tokens of a work item: its scores stay in L2
AHEAD = 16384                                 # bytes between reading and prefetching
BF16, FP16, FP32 = 0, 1, 2                    # how the bits of a cache element are read
FORMATS = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
FAST = {"reassoc", "contract", "nsz", "arcp"}  # vectorise reductions, but keep inf and NaN honest
PATHS = ("dot", "portable") if HAS_DOT else ("portable",)
LOG2E = np.float32(1.4426950408889634)
_LANES = np.array(LANES)


@intrinsic
def _as_f32(typingctx, x):
    """Reinterpret the bits of a uint32 as float32."""
    return types.float32(types.uint32), lambda ctx, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _as_u32(typingctx, x):
    """Reinterpret the bits of a float32 as uint32."""
    return types.uint32(types.float32), lambda ctx, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@njit(inline="always")
def _to_bf16(x):
    u = _as_u32(x)
    return np.uint16(np.uint32(u + np.uint32(0x7FFF) + np.uint32(np.uint32(u >> np.uint32(16)) & np.uint32(1))) >>
                     np.uint32(16))


@njit(inline="always")
def _widen(dst, src, fmt):
    """src [D] uint16 or uint32 bits -> dst [D] float32."""
    if fmt == BF16:                            # bf16 is the upper half of a float32
        for d in range(dst.size):
            dst[d] = _as_f32(np.uint32(np.uint32(src[d]) << np.uint32(16)))
    elif fmt == FP16:                          # move exponent and mantissa into place, then mend the exponent's bias:
        for d in range(dst.size):              # 2^(127-15) = 2^112, exact for subnormals too
            x = np.uint32(src[d])
            f = _as_f32(np.uint32((x & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0 ** 112)
            dst[d] = -f if x & np.uint32(0x8000) else f
    else:
        for d in range(dst.size):
            dst[d] = _as_f32(np.uint32(src[d]))


@njit(fastmath=FAST)
def _item_portable(q, k_cache, v_cache, blocks, n, scale, fmt, p, row, o, m, l):
    """One item: q [H, D]; blocks: the n tokens' part of the block table; p [H, chunk] and row [D] are scratch.
    Writes o [H, D], m [H], l [H]."""
    H, D = q.shape
    Hkv, bs = k_cache.shape[1], k_cache.shape[2]
    G = H // Hkv
    for j in range(0, n, bs):
        for h in range(Hkv):
            for t in range(min(bs, n - j)):
                _widen(row, k_cache[blocks[j // bs], h, t], fmt)
                for g in range(h * G, h * G + G):
                    s = np.float32(0)
                    for d in range(D):
                        s += q[g, d] * row[d]
                    p[g, j + t] = s * scale
    for h in range(H):                         # softmax of the range, shifted by its own maximum
        top = p[h, 0]
        for t in range(1, n):
            top = max(top, p[h, t])
        total = np.float32(0)
        for t in range(n):
            p[h, t] = np.exp(p[h, t] - top)
            total += p[h, t]
        m[h], l[h] = top * LOG2E, total
        for d in range(D):
            o[h, d] = 0
    for j in range(0, n, bs):
        for h in range(Hkv):
            for t in range(min(bs, n - j)):
                _widen(row, v_cache[blocks[j // bs], h, t], fmt)
                for g in range(h * G, h * G + G):
                    w = p[g, j + t]
                    for d in range(D):
                        o[g, d] += w * row[d]


@njit                                          # no fastmath: it would cancel the rounding trick of the softmax tile
def _item_dot(q, k_cache, v_cache, blocks, n, scale, T, qb, s, p, ml, o, m, l):
    """The same by the tiles of cpu_tiles.py, T heads a tile; a group of G heads is padded to G' = a multiple of T.
    Scratch: qb [Hkv G', D] uint16, s [Hkv G', width] float32, p [Hkv G', width] uint16, ml [2]. o [Hkv G', D]."""
    H, D = q.shape
    Hkv, bs = k_cache.shape[1], k_cache.shape[2]
    G, Gp, width = H // Hkv, o.shape[0] // Hkv, s.shape[1]
    row = 2 * D                                # bytes
    head, block = bs * row, Hkv * bs * row
    lag = max(1, AHEAD // head)                # heads between reading and prefetching
    K, V = k_cache.ctypes.data, v_cache.ctypes.data
    wide = D % 128 == 0 if T == 1 else D % 64 == 0 and T == 4
    span = 64 if not wide else 256 if T == 1 else 128      # bytes of a V row that a tile takes
    for h in range(H):
        for d in range(D):
            qb[h // G * Gp + h % G, d] = _to_bf16(q[h, d])
    for j in range(0, n, bs):
        here = K + np.int64(blocks[j // bs]) * block
        after = K + np.int64(blocks[j // bs + 1]) * block if j + bs < n else V + np.int64(blocks[0]) * block
        for h in range(Hkv):
            ahead = here + (h + lag) * head if h + lag < Hkv else after + min(h + lag - Hkv, Hkv - 1) * head
            for t in range(0, min(bs, n - j), 16):
                for g in range(h * Gp, h * Gp + Gp, T):
                    at = s.ctypes.data + (g * width + j + t) * 4
                    k, qa, pre = here + h * head + t * row, qb.ctypes.data + g * row, ahead + t * row
                    if T == 1:
                        scores1(at, k, row, qa, pre)
                    elif T == 4:
                        scores4(at, 4 * width, k, row, qa, row, pre)
                    else:
                        scores8(at, 4 * width, k, row, qa, row, pre)
    for h in range(H):
        g = h // G * Gp + h % G
        for t in range(n, (n + 15) // 16 * 16):
            s[g, t] = -3e38                    # slots past the end may hold anything
        softmax(s.ctypes.data + g * width * 4, p.ctypes.data + g * width * 2, (n + 15) // 16 * 16, scale * LOG2E,
                ml.ctypes.data)
        m[h], l[h] = ml[0], ml[1]
        p[g, n] = 0                            # the partner of a last, odd token
    for g in range(Hkv * Gp):
        for d in range(D):
            o[g, d] = 0
    for j in range(0, n, bs):
        here = V + np.int64(blocks[j // bs]) * block
        after = V + np.int64(blocks[j // bs + 1]) * block if j + bs < n else here
        tokens = min(bs, n - j)
        for h in range(Hkv):
            ahead = here + (h + lag) * head if h + lag < Hkv else after + min(h + lag - Hkv, Hkv - 1) * head
            for t in range(0, tokens, tokens - 1 if tokens & 1 and tokens > 1 else tokens):
                odd = t + 1 == tokens          # V of its partner may be NaN: read the same row twice, weight 0
                step, pairs = (0, 1) if odd else (row, tokens // 2)
                for g in range(h * Gp, h * Gp + Gp, T):
                    pa = p.ctypes.data + (g * width + j + t) * 2
                    c = 0
                    while c < row:
                        at, v, pre = o.ctypes.data + g * D * 4 + 2 * c, here + h * head + t * row + c, ahead + c * bs
                        if T == 8:
                            weigh8(at, 4 * D, v, step, pa, 2 * width, pairs, pre)
                        elif T == 4 and wide:
                            weigh4_wide(at, 4 * D, v, step, pa, 2 * width, pairs, pre)
                        elif T == 4:
                            weigh4(at, 4 * D, v, step, pa, 2 * width, pairs, pre)
                        elif wide:
                            weigh1_wide(at, 4 * D, v, step, pa, 2 * width, pairs, pre)
                        else:
                            weigh1(at, 4 * D, v, step, pa, 2 * width, pairs, pre)
                        c += span


@njit
def _merge(r, first, part_o, part_m, part_l, out, G, Gp, dot):
    """Row r = (sequence, head) of out from the items of its sequence, whose groups of G heads are padded to Gp."""
    b, h = r // out.shape[1], r % out.shape[1]
    g, D = h // G * Gp + h % G, out.shape[2]
    i0, i1 = first[b], first[b + 1]
    m, l = part_m[i0, h], part_l[i0, h]
    if i1 > i0 + 1:
        for i in range(i0 + 1, i1):
            m = max(m, part_m[i, h])
        l = np.float32(0)
        for i in range(i0, i1):
            l += np.exp2(part_m[i, h] - m) * part_l[i, h]
    out[b, h] = 0
    for i in range(i0, i1):
        w = (np.float32(1) if i1 == i0 + 1 else np.exp2(part_m[i, h] - m)) / l
        if dot:
            for c in range(0, D, 32):
                for d in range(0, 32, 4):      # in LANES order four neighbours stay together
                    at = c + _LANES[d]
                    for e in range(4):
                        out[b, h, c + d + e] += w * part_o[i, g, at + e]
        else:
            for d in range(D):
                out[b, h, d] += w * part_o[i, g, d]


@njit(parallel=True, nogil=True, cache=True)
def _decode(q, k_cache, v_cache, table, lens, out, scale, fmt, T, threads, chunk, first, qb, s, p, part_o, part_m, part_l):
    """Deal out items, then merge. T: heads of a tile, 0 for the portable path. first [B + 1]: items of sequence b are first[b] .. first[b + 1]. qb, s, p are scratch
    with a row per thread; part_o, part_m, part_l have one per item."""
    B, H, D = q.shape
    bs, Hkv, dot = k_cache.shape[2], k_cache.shape[1], T > 0
    G, Gp = H // Hkv, part_o.shape[1] // Hkv
    total = 0
    for b in range(B):
        total += lens[b]
    for w in prange(threads):
        done = 0
        for b in range(B):
            for t in range(0, lens[b], chunk):
                n, item = min(chunk, lens[b] - t), first[b] + t // chunk
                if done * threads // total == w:
                    blocks = table[b, t // bs:]
                    if dot:
                        _item_dot(q[b], k_cache, v_cache, blocks, n, scale, T, qb[w], s[w], p[w], part_l[item, H:],
                                  part_o[item], part_m[item], part_l[item])
                    else:
                        _item_portable(q[b], k_cache, v_cache, blocks, n, scale, fmt, s[w], s[w, H, :D], part_o[item],
                                       part_m[item], part_l[item])
                done += n
    if B * H * D < 1 << 16 and first[B] == B:  # little to merge: not worth a second launch
        for r in range(B * H):
            _merge(r, first, part_o, part_m, part_l, out, G, Gp, dot)
    else:
        for r in prange(B * H):
            _merge(r, first, part_o, part_m, part_l, out, G, Gp, dot)


@njit(parallel=True, nogil=True, cache=True)
def _store(k, v, k_cache, v_cache, slots):
    Hkv, bs, D = k_cache.shape[1], k_cache.shape[2], k_cache.shape[3]
    for r in prange(slots.size):
        blk, off = slots[r] // bs, slots[r] % bs
        for h in range(Hkv):
            for d in range(D):
                k_cache[blk, h, off, d] = k[r, h, d]
                v_cache[blk, h, off, d] = v[r, h, d]


def set_threads(n):
    """Threads this thread's later calls use, itself included. Raises ValueError if Numba was started with fewer."""
    if not 1 <= n <= numba.config.NUMBA_NUM_THREADS:
        raise ValueError(f"{n} CPU threads asked for, Numba has {numba.config.NUMBA_NUM_THREADS}: "
                         "set --cpu-threads within it, or NUMBA_NUM_THREADS")
    numba.set_num_threads(n)


@njit(nogil=True, cache=True)
def _cut(lens, limit, bs, threads, first):
    """Tokens of an item: about CHUNK, less where that leaves threads idle, whole blocks. Fills first; -1: bad lengths."""
    total = 0
    for b in range(lens.size):
        if not 1 <= lens[b] <= limit:
            return -1
        total += lens[b]
    chunk = max(1, min(CHUNK, max(64, total // (4 * threads))) // bs) * bs
    first[0] = 0
    for b in range(lens.size):
        first[b + 1] = first[b] + (lens[b] + chunk - 1) // chunk
    return chunk


class _Workspace(threading.local):
    """Scratch of each calling thread, kept between calls, and the argument shapes it has already checked."""

    def __init__(self):
        self.seen, self.first = set(), np.zeros(1, np.int64)
        self.scratch = self.parts = None

    def fit(self, shape, items):
        """shape (threads, padded heads, heads, D, tokens of an item); items: how many there are."""
        threads, Hp, H, D, chunk = shape
        width = max(chunk, D) + 16
        if self.scratch is None or self.scratch[0] != shape:
            self.scratch = shape, np.empty((threads, Hp, D), np.uint16), \
                np.empty((threads, Hp + 1, width), np.float32), np.empty((threads, Hp, width), np.uint16)
            self.parts = None
        if self.parts is None or len(self.parts[0]) < items:
            n = 2 * items
            self.parts = np.empty((n, Hp, D), np.float32), np.empty((n, H), np.float32), np.empty((n, H + 2), np.float32)
        return *self.scratch[1:], *self.parts


_workspace = _Workspace()


def _bits(x):
    return x.view(np.uint32) if x.dtype == np.float32 else x


def _check(name, x, dtypes, shape):
    """shape: a size per dimension, None where any will do."""
    if x.dtype not in dtypes or x.ndim != len(shape) or any(s not in (None, n) for n, s in zip(x.shape, shape)):
        raise ValueError(f"{name}: expected {' or '.join(np.dtype(t).name for t in dtypes)} {list(shape)} "
                         f"(None: any size), got {x.dtype} {list(x.shape)}")
    if not x.flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous array, got strides {x.strides}")


def _check_decode(q, k_cache, v_cache, block_table, seq_lens, out, dtype, path):
    _check("k_cache", k_cache, (np.uint16, np.float32), (None,) * 4)
    _check("q", q, (np.float32, k_cache.dtype), (None, None, k_cache.shape[3]))
    _check("v_cache", v_cache, (k_cache.dtype,), k_cache.shape)
    _check("block_table", block_table, (np.int32,), (q.shape[0], None))
    _check("seq_lens", seq_lens, (np.int32,), (q.shape[0],))
    _check("out", out, (np.float32,), q.shape)
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads: not a multiple of the cache's {k_cache.shape[1]}")
    if k_cache.dtype == np.uint16 and dtype not in ("bf16", "fp16"):
        raise ValueError(f"a uint16 cache is read as 'bf16' or 'fp16', got {dtype!r}")
    if path not in (None, *PATHS):
        raise ValueError(f"path {path!r}: this processor has {', '.join(PATHS)}")


def fastest_path(dtype, head_dim, block_size):
    """The path that `paged_decode` takes unless told: dtype "bf16", "fp16" or "fp32"."""
    return "dot" if HAS_DOT and dtype == "bf16" and head_dim % 32 == 0 and block_size % 16 == 0 else "portable"


def paged_decode(q, k_cache, v_cache, block_table, seq_lens, out, scale, dtype="bf16", path=None):
    """Attention of one new token per sequence over its paged KV cache, in place into `out`.

    q            [B, H, D] float32, or the cache's dtype
    k_cache,
    v_cache      [num_blocks, Hkv, bs, D] uint16 (read as `dtype`: "bf16" or "fp16") or float32
    block_table  [B, max_blocks] int32: block j of sequence b holds its tokens j*bs .. (j+1)*bs - 1
    seq_lens     [B] int32, 1 or more, the new token included (store it first)
    out          [B, H, D] float32
    scale        1 / sqrt(D), as a rule
    path         "portable"; "dot" (where dtype, D and bs allow it, else portable) or None, the fastest

    Slots past a sequence's length may hold anything. Uses the calling thread's Numba thread count, and no other thread.
    Raises ValueError, before any work, on shapes, dtypes or lengths that do not fit.
    """
    ws = _workspace
    arrays = q, k_cache, v_cache, block_table, seq_lens, out
    key = (*[x.strides for x in arrays], *[x.shape for x in arrays], *[x.dtype.char for x in arrays], dtype, path)
    if key not in ws.seen:
        _check_decode(*arrays, dtype, path)
        ws.seen.add(key)
    B, H, D = q.shape
    _, Hkv, bs, _ = k_cache.shape
    if not B:
        return
    if len(ws.first) <= B:
        ws.first = np.zeros(2 * B + 1, np.int64)
    threads = numba.get_num_threads()
    chunk = _cut(seq_lens, block_table.shape[1] * bs, bs, threads, ws.first)
    if chunk < 0:
        raise ValueError(f"seq_lens must lie in 1..{block_table.shape[1] * bs} (table width x block size), "
                         f"got {seq_lens.min()}..{seq_lens.max()}")
    dtype = "fp32" if k_cache.dtype == np.float32 else dtype
    dot = path != "portable" and fastest_path(dtype, D, bs) == "dot"
    G = H // Hkv
    tile = (1 if G <= 2 else 4 if G <= 4 else 8) if dot else 0              # heads of a tile
    padded = -(-G // tile) * tile if dot else G
    if q.dtype != np.float32:
        q = to_float64(q, dtype).astype(np.float32)
    buffers = ws.fit((threads, Hkv * padded, H, D, chunk), int(ws.first[B]))
    _decode(q, _bits(k_cache), _bits(v_cache), block_table, seq_lens, out, np.float32(scale), FORMATS[dtype], tile, threads, chunk,
            ws.first, *buffers)


def store_kv(k, v, k_cache, v_cache, slots):
    """Write rows k, v [n, Hkv, D] to slots [n] int64 (block * bs + offset) of one layer's caches."""
    _check("slots", slots, (np.int64,), (k.shape[0],))
    _check("k", k, (k_cache.dtype,), (None, k_cache.shape[1], k_cache.shape[3]))
    _check("v", v, (k_cache.dtype,), k.shape)
    _store(_bits(k), _bits(v), _bits(k_cache), _bits(v_cache), slots)


def to_float64(x, dtype):
    """Bits of a cache (uint16 read as `dtype`, or float32) -> float64, by NumPy alone."""
    if x.dtype == np.float32:
        return x.astype(np.float64)
    if dtype == "fp16":
        return x.view(np.float16).astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def paged_decode_reference(q, k_cache, v_cache, block_table, seq_lens, scale, dtype="bf16"):
    """The same in float64 NumPy, one head at a time. Slow; what the tests believe. Returns [B, H, D] float64."""
    B, H, D = q.shape
    G = H // k_cache.shape[1]
    out = np.empty((B, H, D))
    for b in range(B):
        n = seq_lens[b]
        for h in range(H):
            k = to_float64(k_cache[block_table[b], h // G].reshape(-1, D)[:n], dtype)     # [n, D]
            v = to_float64(v_cache[block_table[b], h // G].reshape(-1, D)[:n], dtype)
            s = k @ q[b, h].astype(np.float64) * scale
            p = np.exp(s - s.max())
            out[b, h] = p @ v / p.sum()
    return out


if __name__ == "__main__":
    import cpu_card                            # imports this file again, as a module
    cpu_card.main()
