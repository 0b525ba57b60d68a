"""How fast this machine's cores read memory, front to back: the limit of CPU attention.

`bench.py` records it beside a result, and lab/ compares kernels with it. Numba alone does not
reach this speed: its loops prefetch nothing. Knows nothing of attention or of the KV cache.

    python -m pytest kernels/test_kernels.py -k bandwidth
"""
import operator
import statistics
import time

import numba
import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from kernels.llvm_code import I32, I64, I32x16, Value, fold, load, loop, prefetch, variable

DATA_BYTES = 256 << 20        # more than the caches of any processor hold


@intrinsic
def read_all(_, address, nbytes):
    """Read nbytes (a multiple of 512) from an address. Returns a sum, so that nothing is left out.

    The sum: all int32 numbers there, modulo 2^32.
    """
    def code(context, builder, signature, args):
        start, size = (Value(builder, x) for x in args)
        zero = start.constant(0, I32x16)
        sums = [variable(zero) for _ in range(8)]
        with loop(size, 512) as i:
            for u, place in enumerate(sums):
                line = start + i + 64 * u
                prefetch(line + 4096)
                (place.emit("load") + load(I32x16, line)).emit("store", place)
        total = sums[0].emit("load")
        for place in sums[1:]:
            total = total + place.emit("load")
        total = fold(operator.add, total).emit("extract_element", I32(0))
        return total.emit("zext", I64).value
    return types.int64(types.int64, types.int64), code


@njit(parallel=True, nogil=True, cache=True)
def _read(data, threads):
    """data [n] uint8: an equal part for each thread, in whole 512 bytes. Returns their sums."""
    sums = np.zeros((threads, 16), np.int64)        # a cache line each
    part = data.size // threads // 512 * 512
    for w in prange(threads):
        sums[w, 0] = read_all(data.ctypes.data + w * part, part)
    return sums[:, 0]


def read_bandwidth(data, threads):
    """GB/s of reading data [n] uint8 once, front to back. Let it be larger than the caches."""
    start = time.perf_counter()
    _read(data, threads)
    return data.nbytes / (time.perf_counter() - start) / 1e9


def make_cache(shape):
    """A new array of random bf16 bits as uint16, of the size that K and V have.

    NumPy asks the system for huge pages where an array takes 4 MB or more.
    """
    cache = np.empty(shape, np.uint16)
    flat = cache.reshape(-1)
    pattern = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)
    pattern = (pattern.view(np.uint32) >> 16).astype(np.uint16)
    for i in range(0, flat.size, pattern.size):
        flat[i:i + pattern.size] = pattern[:flat.size - i]
    return cache


def host_read_bandwidth(threads=None, rounds=5):
    """GB/s, the median of `rounds` readings of DATA_BYTES.

    threads: by default those that this thread's Numba functions use.
    """
    data = make_cache(DATA_BYTES // 2).view(np.uint8)
    threads = threads or numba.get_num_threads()
    read_bandwidth(data, threads)                   # compiles, and wakes the threads
    return statistics.median(read_bandwidth(data, threads) for _ in range(rounds))
