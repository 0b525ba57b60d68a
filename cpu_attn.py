"""Decode attention and KV store on the CPU tier: Numba, multithreaded, GIL released (NEO, section 4).

    q [B, H, D]  x  K, V [num_blocks, Hkv, bs, D] through a block table  ->  out [B, H, D]

One work item is (sequence, a range of about CHUNK tokens, all heads): a block is read as one contiguous run, each K and V
row is widened to float32 once and serves the G = H / Hkv query heads of its group, and a long sequence is spread over
threads. Items leave (unnormalised out, max, sum); a second pass merges them by log-sum-exp:

    sequence 0  |item 0: tokens 0..255|item 1: 256..511|item 2: 512..600|        any thread, any order
    merge       out = sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i

Caches are uint16 (bf16 or fp16) or float32; arithmetic is float32. Knows nothing of torch, requests or policy.
Glossary of symbols: model.py. Tested against `paged_decode_reference` in test_neo.py.
"""
import numpy as np
import numba
from numba import njit, prange, types
from numba.extending import intrinsic
from llvmlite import ir

numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # workqueue: 130 us a launch, and not reentrant

CHUNK = 256                                   # tokens per work item: K and V of 2 MB at 32 heads x 128, scores in L2
BF16, FP16, FP32 = 0, 1, 2                    # how the bits of a cache element are read
FORMATS = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
FAST = {"reassoc", "contract", "nsz", "arcp"}  # vectorise reductions, but keep inf and NaN honest: -inf is a real score


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


@njit(parallel=True, nogil=True, cache=True, fastmath=FAST)
def _decode(q, k_cache, v_cache, table, lens, out, scale, fmt):
    B, H, D = q.shape
    Hkv, bs = k_cache.shape[1], k_cache.shape[2]
    G = H // Hkv
    chunk = max(CHUNK // bs, 1) * bs           # whole blocks
    first = np.zeros(B + 1, np.int64)          # items of sequence b: first[b] .. first[b + 1]
    for b in range(B):
        first[b + 1] = first[b] + (lens[b] + chunk - 1) // chunk
    part_o = np.empty((first[B], H, D), np.float32)
    part_m = np.empty((first[B], H), np.float32)
    part_l = np.empty((first[B], H), np.float32)

    for item in prange(first[B]):
        b = np.searchsorted(first, item, side="right") - 1
        t0 = (item - first[b]) * chunk
        n = min(lens[b] - t0, chunk)
        row = np.empty(D, np.float32)
        p = np.empty((H, chunk), np.float32)
        for j in range(0, n, bs):              # scores, block by block
            blk = table[b, (t0 + j) // bs]
            for h in range(Hkv):
                for t in range(min(bs, n - j)):
                    _widen(row, k_cache[blk, h, t], fmt)
                    for g in range(G):
                        s = np.float32(0)
                        for d in range(D):
                            s += q[b, h * G + g, d] * row[d]
                        p[h * G + g, j + t] = s * scale
        for h in range(H):                     # softmax of the range, shifted by its own maximum
            m = p[h, 0]
            for t in range(1, n):
                m = max(m, p[h, t])
            l = np.float32(0)
            for t in range(n):
                p[h, t] = np.exp(p[h, t] - m)
                l += p[h, t]
            part_m[item, h], part_l[item, h] = m, l
            for d in range(D):
                part_o[item, h, d] = 0
        for j in range(0, n, bs):
            blk = table[b, (t0 + j) // bs]
            for h in range(Hkv):
                for t in range(min(bs, n - j)):
                    _widen(row, v_cache[blk, h, t], fmt)
                    for g in range(G):
                        w = p[h * G + g, j + t]
                        for d in range(D):
                            part_o[item, h * G + g, d] += w * row[d]

    for b in prange(B):
        for h in range(H):
            m = part_m[first[b], h]
            for i in range(first[b] + 1, first[b + 1]):
                m = max(m, part_m[i, h])
            l = np.float32(0)
            for d in range(D):
                out[b, h, d] = 0
            for i in range(first[b], first[b + 1]):
                w = np.exp(part_m[i, h] - m)
                l += w * part_l[i, h]
                for d in range(D):
                    out[b, h, d] += w * part_o[i, h, d]
            for d in range(D):
                out[b, h, d] /= l


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


def _bits(x):
    return x.view(np.uint32) if x.dtype == np.float32 else x


def _check(name, x, dtypes, shape):
    """shape: a size per dimension, None where any will do."""
    if x.dtype not in dtypes or x.ndim != len(shape) or any(s not in (None, n) for n, s in zip(x.shape, shape)):
        raise ValueError(f"{name}: expected {' or '.join(np.dtype(t).name for t in dtypes)} {list(shape)} "
                         f"(None: any size), got {x.dtype} {list(x.shape)}")


def paged_decode(q, k_cache, v_cache, block_table, seq_lens, out, scale, dtype="bf16"):
    """Attention of one new token per sequence over its paged KV cache, in place into `out`.

    q            [B, H, D] float32
    k_cache,
    v_cache      [num_blocks, Hkv, bs, D] uint16 (read as `dtype`: "bf16" or "fp16") or float32
    block_table  [B, max_blocks] int32: block j of sequence b holds its tokens j*bs .. (j+1)*bs - 1
    seq_lens     [B] int32, 1 or more, the new token included (store it first)
    out          [B, H, D] float32
    scale        1 / sqrt(D), as a rule

    Slots past a sequence's length may hold anything. Uses the calling thread's Numba thread count.
    Raises ValueError, before any work, on shapes, dtypes or lengths that do not fit.
    """
    _check("q", q, (np.float32,), (None, None, None))
    B, H, D = q.shape
    _check("k_cache", k_cache, (np.uint16, np.float32), (None, None, None, D))
    _check("v_cache", v_cache, (k_cache.dtype,), k_cache.shape)
    _check("block_table", block_table, (np.int32,), (B, None))
    _check("seq_lens", seq_lens, (np.int32,), (B,))
    _check("out", out, (np.float32,), (B, H, D))
    Hkv, bs = k_cache.shape[1:3]
    if H % Hkv:
        raise ValueError(f"q has {H} heads: not a multiple of the cache's {Hkv}")
    if B and not 1 <= seq_lens.min() <= seq_lens.max() <= block_table.shape[1] * bs:
        raise ValueError(f"seq_lens must lie in 1..{block_table.shape[1] * bs} (table width x block size), "
                         f"got {seq_lens.min()}..{seq_lens.max()}")
    if k_cache.dtype == np.uint16 and dtype not in ("bf16", "fp16"):
        raise ValueError(f"a uint16 cache is read as 'bf16' or 'fp16', got {dtype!r}")
    fmt = FP32 if k_cache.dtype == np.float32 else FORMATS[dtype]
    _decode(q, _bits(k_cache), _bits(v_cache), block_table, seq_lens, out, np.float32(scale), fmt)


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
