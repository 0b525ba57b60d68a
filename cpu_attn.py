"""Decode attention and KV store on the CPU tier: Numba, multithreaded, GIL released.

    q [B, H, D]  x  K, V [num_blocks, Hkv, bs, D] through a block table  ->  out [B, H, D]

One work item is (sequence, a range of about CHUNK tokens, all heads), so that each block is read
as one contiguous run. Every thread gets an equal share of the tokens (NEO, section 4). An item
leaves the maximum m_i of its scores in base 2, l_i = sum of 2^(score - m_i), and o_i, the same sum
of V's rows. A second pass merges the items of each sequence:

    sequence 0  | item 0: tokens 0..511 | item 1: 512..1023 | item 2: 1024..1100 |
    merge       out = sum_i w_i o_i / sum_i w_i l_i      with w_i = 2^(m_i - max_j m_j)

There are four paths. Three are tiles of vector code (kernels/cpu_tiles.py): `dot` for bf16 on
AVX512-BF16, which rounds q and the weights to bf16; `fma`, in float32, for bf16, fp16 and fp32 on
processors with AVX2, AVX-512 or NEON; `int` there for int8. `portable`, plain loops, serves what
no tile does.

A cache of int8 has a scale for each token and head. The block of a head, bs (D + 4) bytes, holds
its rows [bs, D] and then its scales [bs] float32; x = scale * row, scale = max |x| / 127.

Knows nothing of torch, requests or policy. Glossary of symbols: model.py.

    python -m pytest kernels/test_kernels.py -k "cpu_attention or store_kv"
"""
import functools
import threading
import warnings

import numba
import numpy as np
from numba import njit, prange

from kernels.cpu_tiles import LOG2E, finish, heads_of_tile, item
from kernels.cpu_vectors import TILES

# Numba's own "workqueue" takes 130 us for a launch, and two threads must not launch at once.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

CHUNK = 512         # tokens of a work item, at most: its scores stay in L2
BF16, FP16, FP32, INT8 = range(4)
DTYPE_CODES = {"bf16": BF16, "fp16": FP16, "fp32": FP32, "int8": INT8}
SCALE_BYTES = 4     # of the scale of an int8 row
FAST = {"reassoc", "contract", "nsz", "arcp"}  # lets LLVM vectorise sums; inf and NaN stay right
PATHS = (*dict.fromkeys(path for path, _ in TILES), "portable")


# ---- the reference

def to_float64(x, dtype):
    """Bits of a cache (uint16 read as `dtype`, float32, or int8) -> float64, by NumPy alone.

    int8: blocks [..., bs, D + 4] -> [..., bs, D].
    """
    if x.dtype == np.int8:
        *outer, bs, width = x.shape
        flat, size = x.reshape(*outer, bs * width), bs * (width - SCALE_BYTES)
        rows, scales = flat[..., :size], flat[..., size:].copy().view(np.float32)
        return rows.reshape(*outer, bs, -1).astype(np.float64) * scales[..., None]
    if x.dtype == np.float32:
        return x.astype(np.float64)
    if dtype == "fp16":
        return x.view(np.float16).astype(np.float64)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def paged_decode_reference(q, k_cache, v_cache, block_table, seq_lens, scale, dtype="bf16",
                           lse=None):
    """What `paged_decode` computes, in float64 and slowly. Returns [B, H, D] float64."""
    B, H, D = q.shape
    G = H // k_cache.shape[1]
    out = np.empty((B, H, D))
    for b in range(B):
        for h in range(H):
            k, v = (to_float64(cache[block_table[b], h // G], dtype).reshape(-1, D)[:seq_lens[b]]
                    for cache in (k_cache, v_cache))                                # [tokens, D]
            scores = k @ q[b, h].astype(np.float64) * scale
            top = scores.max()
            weights = np.exp(scores - top)
            out[b, h] = weights @ v / weights.sum()
            if lse is not None:
                lse[b, h] = top + np.log(weights.sum())
    return out


# ---- one work item, and the merge

@njit(inline="always")
def _widen(dst, block, t, code):
    """Token t of a head's block [bs, D] bits, of the type in BITS -> dst [D] float32; code: BF16,
    FP16, FP32 or INT8."""
    src = block[t]
    if code == INT8:
        flat, D = block.reshape(-1), dst.size
        scale = flat[block.shape[0] * D:].view(np.float32)[t]
        for d in range(D):
            dst[d] = scale * np.float32(flat[t * D + d])
    elif code == BF16:                         # bf16 is the upper half of a float32
        for d in range(dst.size):
            dst[d] = np.uint32(np.uint32(src[d]) << np.uint32(16)).view(np.float32)
    elif code == FP16:                         # put exponent and mantissa in place, then correct
        for d in range(dst.size):              # the exponent's bias: 2^(127-15) = 2^112, exactly
            x = np.uint32(np.uint16(src[d]))
            f = np.uint32((x & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
            f *= np.float32(2.0 ** 112)
            dst[d] = -f if x & np.uint32(0x8000) else f
    else:
        for d in range(dst.size):
            dst[d] = np.uint32(src[d]).view(np.float32)


@njit(fastmath=FAST)
def _item_portable(q, k_cache, v_cache, blocks, n, scale, code, weights, row, o, maxima, sums):
    """One item: q [H, D] over n tokens; blocks: their part of the block table.

    weights [H, chunk] and row [D] are scratch. Writes o [H, D], maxima [H], sums [H].
    """
    H, D = q.shape
    Hkv, bs = k_cache.shape[1], k_cache.shape[2]
    G = H // Hkv
    for j in range(0, n, bs):
        for h in range(Hkv):
            for t in range(min(bs, n - j)):
                _widen(row, k_cache[blocks[j // bs], h], t, code)
                for g in range(h * G, h * G + G):
                    s = np.float32(0)
                    for d in range(D):
                        s += q[g, d] * row[d]
                    weights[g, j + t] = s * scale
    for h in range(H):                         # softmax of this range
        top = weights[h, 0]
        for t in range(1, n):
            top = max(top, weights[h, t])
        total = np.float32(0)
        for t in range(n):
            weights[h, t] = np.exp(weights[h, t] - top)
            total += weights[h, t]
        maxima[h], sums[h] = top * LOG2E, total
        for d in range(D):
            o[h, d] = 0
    for j in range(0, n, bs):
        for h in range(Hkv):
            for t in range(min(bs, n - j)):
                _widen(row, v_cache[blocks[j // bs], h], t, code)
                for g in range(h * G, h * G + G):
                    w = weights[g, j + t]
                    for d in range(D):
                        o[g, d] += w * row[d]


@njit
def _merge(r, first, q_rows, k_cache, part_o, part_max, part_sum, out, G, P, T):
    """Row r = (sequence, head) of out, from the items of its sequence: groups of G padded to P."""
    b, h = r // out.shape[1], r % out.shape[1]
    g, D = h // G * P + h % G, out.shape[2]
    top, total = part_max[first[b], g], np.float32(0)
    for i in range(first[b], first[b + 1]):
        top = max(top, part_max[i, g])
    for i in range(first[b], first[b + 1]):
        total += np.exp2(part_max[i, g] - top) * part_sum[i, g]
    if not T:
        out[b, h] = 0
    for i in range(first[b], first[b + 1]):
        w = np.exp2(part_max[i, g] - top) / total
        if T:
            finish(q_rows, k_cache, out.ctypes.data + r * D * 4,
                   part_o.ctypes.data + (i * part_o.shape[1] + g) * D * 4, w, D, i - first[b])
        else:
            for d in range(D):
                out[b, h, d] += w * part_o[i, g, d]


@njit(parallel=True, nogil=True, cache=True)
def _decode(q, k_cache, v_cache, block_table, seq_lens, out, scale,      # inputs and the output
            code, T, threads, chunk, first,                              # geometry
            q_rows, scores, weights, part_o, part_max, part_sum):        # scratch
    """Deal out the items, then merge them.

    T       heads of a tile; 0: no tile, plain loops
    chunk   tokens of an item
    first   [B + 1]: sequence b has the items first[b] .. first[b + 1] - 1
    q_rows, scores and weights have a row for each thread, part_o, part_max, part_sum for each item.
    """
    B, H, D = q.shape
    bs, G = k_cache.shape[2], H // k_cache.shape[1]
    P = part_o.shape[1] // k_cache.shape[1]
    total = 0
    for b in range(B):
        total += seq_lens[b]
    for thread in prange(threads):
        done = 0
        for b in range(B):
            for t in range(0, seq_lens[b], chunk):
                n, i = min(chunk, seq_lens[b] - t), first[b] + t // chunk
                if done * threads // total == thread:
                    blocks = block_table[b, t // bs:]
                    o, maxima, sums = part_o[i], part_max[i], part_sum[i]
                    if T:
                        item(q_rows[thread], k_cache, v_cache, q[b], blocks, n, scale, T,
                             scores[thread], weights[thread], o, maxima, sums)
                    else:
                        _item_portable(q[b], k_cache, v_cache, blocks, n, scale, code,
                                       scores[thread], scores[thread, H, :D], o, maxima, sums)
                done += n
    if B * H * D < 1 << 16 and first[B] == B:  # little to merge: not worth a second launch
        for r in range(B * H):
            _merge(r, first, q_rows, k_cache, part_o, part_max, part_sum, out, G, P, T)
    else:
        for r in prange(B * H):
            _merge(r, first, q_rows, k_cache, part_o, part_max, part_sum, out, G, P, T)


@njit(parallel=True, nogil=True, cache=True)
def _store(k, v, k_cache, v_cache, slots):
    Hkv, bs, D = k_cache.shape[1], k_cache.shape[2], k_cache.shape[3]
    for r in prange(slots.size):
        block, offset = slots[r] // bs, slots[r] % bs
        for h in range(Hkv):
            for d in range(D):
                k_cache[block, h, offset, d] = k[r, h, d]
                v_cache[block, h, offset, d] = v[r, h, d]


@njit(parallel=True, nogil=True, cache=True)
def copy_blocks(src, src_ids, dst, dst_ids):
    """Blocks src_ids of src [., bytes] -> blocks dst_ids of dst [., bytes], both uint8."""
    for i in prange(len(src_ids)):
        to, what = dst[dst_ids[i]], src[src_ids[i]]
        for j in range(len(to)):            # three times as fast as an assignment of the row
            to[j] = what[j]


@njit(parallel=True, nogil=True, cache=True)
def _store_rounded(k, v, k_cache, v_cache, slots, code):
    """_store into int8; code: of the rows."""
    Hkv, bs, D = k_cache.shape[1], k_cache.shape[2], k.shape[2]
    for r in prange(slots.size):
        block, offset, row = slots[r] // bs, slots[r] % bs, np.empty(D, np.float32)
        for h in range(Hkv):
            _widen(row, k[r], h, code)
            _round(row, k_cache[block, h].reshape(-1), offset, bs)
            _widen(row, v[r], h, code)
            _round(row, v_cache[block, h].reshape(-1), offset, bs)


@njit
def _round(row, block, t, bs):
    """row [D] float32 -> token t of a head's block of int8, flat."""
    D, top = row.size, np.float32(0)
    for d in range(D):
        top = max(top, abs(row[d]))
    block[bs * D:].view(np.float32)[t] = top / np.float32(127)
    per_unit = np.float32(127) / max(top, np.float32(1e-30))
    for d in range(D):
        block[t * D + d] = np.int8(np.rint(row[d] * per_unit))


# ---- threads and scratch

def set_threads(n):
    """Set how many threads this thread's later calls use, itself included.

    Raises ValueError if Numba was started with fewer.
    """
    if not 1 <= n <= numba.config.NUMBA_NUM_THREADS:
        raise ValueError(
            f"{n} CPU threads asked for, Numba has {numba.config.NUMBA_NUM_THREADS}: "
            "set --cpu-threads within it, or NUMBA_NUM_THREADS")
    numba.set_num_threads(n)


def most_threads():
    """Threads that Numba was started with."""
    return numba.config.NUMBA_NUM_THREADS


@njit(nogil=True, cache=True)
def _cut(seq_lens, limit, bs, threads, first):
    """Fills first (see _decode). Returns the tokens of an item, or -1 if a length is not within
    1..limit. They are whole blocks of at most CHUNK tokens; fewer, if threads would have no work.
    """
    total = 0
    for b in range(seq_lens.size):
        if not 1 <= seq_lens[b] <= limit:
            return -1
        total += seq_lens[b]
    chunk = max(1, min(CHUNK, max(64, total // (4 * threads))) // bs) * bs
    first[0] = 0
    for b in range(seq_lens.size):
        first[b + 1] = first[b] + (seq_lens[b] + chunk - 1) // chunk
    return chunk


class _Workspace(threading.local):
    """Scratch of each calling thread, kept between calls, and the shapes it has accepted."""

    def __init__(self):
        self.seen, self.first = set(), np.zeros(1, np.int64)
        self.shape = self.scratch = self.parts = None

    def fit(self, shape, items):
        """The scratch of _decode; shape: threads, padded heads, D, tokens of an item, dtype of q's
        rows."""
        threads, heads, D, chunk, dtype = shape
        width = max(chunk, D) + 16
        if self.shape != shape:
            self.shape = self.parts = None      # an error leaves no scratch of another shape
            self.scratch = (_empty((threads, heads, D), dtype),
                            _empty((threads, heads + 1, width), np.float32),
                            _empty((threads, heads + 1, width), np.uint16))
            self.shape = shape
        if self.parts is None or len(self.parts[0]) < items:
            shapes = (heads, D), (heads + 16,), (heads + 16,)
            self.parts = [_empty((2 * items, *shape), np.float32) for shape in shapes]
        return *self.scratch, *self.parts


def _empty(shape, dtype):
    """An array that starts a cache line: NumPy aligns to 16 bytes, and a vector that crosses two
    lines costs two loads."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size].view(dtype).reshape(shape)


_workspace = _Workspace()


# ---- the functions

# Numba compiles for the type of the bits, so that each dtype of a cache has its own code.
BITS = {"bf16": np.uint16, "fp16": np.int16, "fp32": np.uint32, "int8": np.int8}


def _format(x, dtype):
    """The dtype of an array: its name, or `dtype` where two have the same type of bits."""
    return {np.float32: "fp32", np.int8: "int8"}.get(x.dtype.type, dtype)


def _bits(x, dtype):
    return x.view(BITS[_format(x, dtype)])


def _require(name, x, dtypes, shape):
    """shape: a size for each dimension; None: any."""
    fits = x.ndim == len(shape) and all(
        want in (None, size) for want, size in zip(shape, x.shape, strict=True))
    if x.dtype not in dtypes or not fits:
        names = " or ".join(np.dtype(t).name for t in dtypes)
        raise ValueError(f"{name}: expected {names} {list(shape)} (None: any size), "
                         f"got {x.dtype} {list(x.shape)}")
    if not x.flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous array, got strides {x.strides}")


def _require_decode(q, k_cache, v_cache, block_table, seq_lens, out, dtype, path):
    _require("k_cache", k_cache, (np.uint16, np.float32, np.int8), (None,) * 4)
    _require("q", q, (np.float32, np.uint16), (None, None, head_dim(k_cache)))
    _require("v_cache", v_cache, (k_cache.dtype,), k_cache.shape)
    _require("block_table", block_table, (np.int32,), (q.shape[0], None))
    _require("seq_lens", seq_lens, (np.int32,), (q.shape[0],))
    _require("out", out, (np.float32,), q.shape)
    H, Hkv = q.shape[1], k_cache.shape[1]
    if H % Hkv:
        raise ValueError(f"q has {H} heads: not a multiple of the cache's {Hkv}")
    if np.uint16 in (k_cache.dtype, q.dtype) and dtype not in ("bf16", "fp16"):
        raise ValueError(f"uint16 is read as 'bf16' or 'fp16', got {dtype!r}")
    if path not in (None, *PATHS):
        raise ValueError(f"path {path!r}: this processor has {', '.join(PATHS)}")


def head_dim(cache):
    """D of a cache of K or V."""
    return cache.shape[3] - SCALE_BYTES * (cache.dtype == np.int8)


def fastest_path(dtype, head_dim, block_size):
    """The default path of `paged_decode`; dtype: "bf16", "fp16", "fp32" or "int8"."""
    return next(path for path in PATHS if serves(path, dtype, head_dim, block_size))


@functools.cache                # every call of paged_decode asks
def serves(path, dtype, head_dim, block_size):
    """Can a path of this processor compute this?"""
    if path == "portable":
        return True
    a = TILES.get((path, dtype))
    return bool(a) and head_dim % a.dims == 0 and block_size % 16 == 0 and block_size <= CHUNK


def choose_path(name, dtype, head_dim, block_size):
    """The path of `paged_decode` for the option cpu_attn = name, "auto" or one of PATHS. Raises
    ValueError on one that this processor does not have, or that does not serve the rest."""
    if name == "auto":
        path = fastest_path(dtype, head_dim, block_size)
        if path == "portable" and TILES:
            warnings.warn(f"no tile of CPU attention serves {dtype}, heads of {head_dim} "
                          f"and blocks of {block_size}: slower plain loops do", stacklevel=2)
        return path
    if name not in PATHS:
        raise ValueError(f"cpu_attn {name!r}: must be auto, {' or '.join(PATHS)} (what this "
                         "processor has)")
    if not serves(name, dtype, head_dim, block_size):
        raise ValueError(f"cpu_attn {name!r} does not serve {dtype}, heads of {head_dim} and "
                         f"blocks of {block_size}: use auto")
    return name


def describe(path):
    """A path in words, with the vectors that it uses here."""
    vectors = {"dot": ", AVX512-BF16"}
    for (name, _), a in TILES.items():
        vectors.setdefault(name, f", {a.lanes} lanes of 32 bits")
    return f"Numba, {path} path{vectors.get(path, '')}"


def paged_decode(q, k_cache, v_cache, block_table, seq_lens, out, scale, dtype="bf16", path=None,
                 lse=None):
    """Attention of one new token per sequence over its paged KV cache, in place into `out`.

    q            [B, H, D] float32, or uint16 (read as `dtype`)
    k_cache,
    v_cache      [num_blocks, Hkv, bs, D] uint16 (read as `dtype`: "bf16" or "fp16") or float32,
                 or [num_blocks, Hkv, bs, D + 4] int8: see the top of this file
    block_table  [B, max_blocks] int32: block j of sequence b holds its tokens j*bs .. (j+1)*bs - 1
    seq_lens     [B] int32, 1 or more. The new token is included: store it first
    out          [B, H, D] float32
    scale        usually 1 / sqrt(D)
    path         "dot", "fma", "int" or "portable" (one of PATHS; "portable" where it does not serve
                 the dtype, D or bs); None: the fastest
    lse          None, or [B, H] float32: receives log(sum over tokens of exp(scale q . k))

    Slots past a sequence's length may hold anything. Uses as many threads as the calling thread
    has set, itself included. Raises ValueError, before any work, on shapes, dtypes or lengths
    that do not fit.
    """
    ws = _workspace
    arrays = q, k_cache, v_cache, block_table, seq_lens, out
    key = (*[(x.shape, x.strides, x.dtype.char) for x in arrays], dtype, path)
    if key not in ws.seen:
        _require_decode(*arrays, dtype, path)
        ws.seen.add(key)
    if lse is not None:
        _require("lse", lse, (np.float32,), q.shape[:2])
    B, H, D = q.shape
    _, Hkv, bs, _ = k_cache.shape
    if not B:
        return
    if len(ws.first) <= B:
        ws.first = np.zeros(2 * B + 1, np.int64)
    threads, limit = numba.get_num_threads(), block_table.shape[1] * bs
    chunk = _cut(seq_lens, limit, bs, threads, ws.first)
    if chunk < 0:
        raise ValueError(f"seq_lens must lie in 1..{limit} (table width x block size), "
                         f"got {seq_lens.min()}..{seq_lens.max()}")
    if q.dtype != np.float32:
        q = to_float64(q, dtype).astype(np.float32)
    dtype, G = _format(k_cache, dtype), H // Hkv
    path = path or fastest_path(dtype, D, bs)
    if not serves(path, dtype, D, bs):
        path = "portable"
    T, P, row_dtype = 0, G, np.float32
    if path != "portable":
        a = TILES[path, dtype]
        T, row_dtype = heads_of_tile(a, G), a.q
        P = -(-G // T) * T
    scratch = ws.fit((threads, Hkv * P, D, chunk, row_dtype), int(ws.first[B]))
    _decode(q, _bits(k_cache, dtype), _bits(v_cache, dtype), block_table, seq_lens, out,
            np.float32(scale), DTYPE_CODES[dtype], T, threads, chunk, ws.first, *scratch)
    if lse is not None:
        _fill_lse(lse, ws.first[:B + 1], *scratch[4:], Hkv, G, P)


def _fill_lse(lse, first, part_max, part_sum, Hkv, G, P):
    """lse [B, H] = log2(sum over a sequence's items i of 2^(m_i + log2 l_i)) / log2(e)"""
    m, l = (x[:first[-1], :Hkv * P].reshape(-1, Hkv, P)[:, :, :G] for x in (part_max, part_sum))
    whole = np.logaddexp2.reduceat(m + np.log2(l), first[:-1])                  # [B, Hkv, G]
    lse[:] = whole.reshape(lse.shape) / LOG2E


def store_kv(k, v, k_cache, v_cache, slots, dtype="bf16"):
    """Write rows k, v [n, Hkv, D] to slots [n] int64 (block * bs + offset) of a layer's caches.

    They have the caches' dtype. Only caches of int8 take rows of others: float32, or uint16, read
    as `dtype`. Raises ValueError on shapes or dtypes that do not fit.
    """
    int8 = k_cache.dtype == np.int8
    dtypes = (np.float32, np.uint16) if int8 else (k_cache.dtype,)
    _require("slots", slots, (np.int64,), (k.shape[0],))
    _require("k", k, dtypes, (None, k_cache.shape[1], head_dim(k_cache)))
    _require("v", v, (k.dtype,), k.shape)
    arrays = [_bits(x, dtype) for x in (k, v, k_cache, v_cache)]
    if int8:
        _store_rounded(*arrays, slots, DTYPE_CODES[_format(k, dtype)])
    else:
        _store(*arrays, slots)
