"""Decode attention and KV store on the CPU tier: Numba, multithreaded, GIL released (NEO, section 4).

    q [B, H, D]  x  K, V [num_blocks, Hkv, bs, D] through a block table  ->  out [B, H, D]

One work item is (sequence, a range of about CHUNK tokens, all heads), so that a block is read as one contiguous run; the
items are dealt out by tokens, one share a thread. An item leaves (unnormalised out, max, sum), and a second pass merges
them by log-sum-exp:

    sequence 0  |item 0: tokens 0..511|item 1: 512..1023|item 2: 1024..1100|      any thread, any order
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

from cpu_tiles import HAS_DOT, HEADS, LOG2E, dot_item, finish

numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # workqueue: 130 us a launch, and not reentrant

CHUNK = 512                                   # most tokens of a work item: its scores stay in L2
BF16, FP16, FP32 = 0, 1, 2                    # how the bits of a cache element are read
FORMATS = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
FAST = {"reassoc", "contract", "nsz", "arcp"}  # vectorise reductions, but keep inf and NaN honest
PATHS = ("dot", "portable") if HAS_DOT else ("portable",)


@intrinsic
def _as_f32(typingctx, x):
    """Reinterpret the bits of a uint32 as float32."""
    return types.float32(types.uint32), lambda ctx, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


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


@njit
def _merge(r, first, part_o, part_m, part_l, out, G, Gp, dot):
    """Row r = (sequence, head) of out from the items of its sequence, whose groups of G heads are padded to Gp."""
    b, h = r // out.shape[1], r % out.shape[1]
    g, D = h // G * Gp + h % G, out.shape[2]
    m, l = part_m[first[b], g], np.float32(0)
    for i in range(first[b], first[b + 1]):
        m = max(m, part_m[i, g])
    for i in range(first[b], first[b + 1]):
        l += np.exp2(part_m[i, g] - m) * part_l[i, g]
    if not dot:
        out[b, h] = 0
    for i in range(first[b], first[b + 1]):
        w = np.exp2(part_m[i, g] - m) / l
        if dot:
            finish(out.ctypes.data + r * D * 4, part_o.ctypes.data + (i * part_o.shape[1] + g) * D * 4, w, D, i - first[b])
        else:
            for d in range(D):
                out[b, h, d] += w * part_o[i, g, d]


@njit(parallel=True, nogil=True, cache=True)
def _decode(q, k_cache, v_cache, table, lens, out, scale, fmt, T, threads, chunk, first, qb, s, p, part_o, part_m, part_l):
    """Deal out items, then merge. T: heads of a tile, 0 for the portable path. first [B + 1]: the items of sequence b are
    first[b] .. first[b + 1]. qb, s, p are scratch with a row per thread; part_o, part_m, part_l have one per item."""
    B, H, D = q.shape
    bs, G = k_cache.shape[2], H // k_cache.shape[1]
    Gp = part_o.shape[1] // k_cache.shape[1]
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
                    if T:
                        dot_item(q[b], k_cache, v_cache, blocks, n, scale, T, qb[w], s[w], p[w], part_o[item], part_m[item],
                                 part_l[item])
                    else:
                        _item_portable(q[b], k_cache, v_cache, blocks, n, scale, fmt, s[w], s[w, H, :D], part_o[item],
                                       part_m[item], part_l[item])
                done += n
    if B * H * D < 1 << 16 and first[B] == B:  # little to merge: not worth a second launch
        for r in range(B * H):
            _merge(r, first, part_o, part_m, part_l, out, G, Gp, T > 0)
    else:
        for r in prange(B * H):
            _merge(r, first, part_o, part_m, part_l, out, G, Gp, T > 0)


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
        """shape (threads, padded heads, D, tokens of an item); items: how many there are."""
        threads, Hp, D, chunk = shape
        width = max(chunk, D) + 16
        if self.scratch is None or self.scratch[0] != shape:
            self.scratch = shape, _empty((threads, Hp, D), np.uint16), \
                _empty((threads, Hp + 1, width), np.float32), _empty((threads, Hp, width), np.uint16)
            self.parts = None
        if self.parts is None or len(self.parts[0]) < items:
            n = 2 * items
            self.parts = [_empty(s, np.float32) for s in ((n, Hp, D), (n, Hp + 16), (n, Hp + 16))]
        return *self.scratch[1:], *self.parts


def _empty(shape, dtype):
    """On a cache line: NumPy grants 16 bytes, and a vector across two lines costs two loads."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size].view(dtype).reshape(shape)


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
    T = next((t for t in HEADS if t >= G), HEADS[-1]) if dot else 0         # heads of a tile
    padded = -(-G // T) * T if dot else G
    if q.dtype != np.float32:
        q = to_float64(q, dtype).astype(np.float32)
    buffers = ws.fit((threads, Hkv * padded, D, chunk), int(ws.first[B]))
    _decode(q, _bits(k_cache), _bits(v_cache), block_table, seq_lens, out, np.float32(scale), FORMATS[dtype], T, threads, chunk,
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
