"""Vector arithmetic of the CPU attention tiles: how K and V are read, and what a product is.

The classes Dot, Fma and Int8 have the same members; the tiles in cpu_tiles.py are written once,
over any of them. `HERE` says which vectors the processor has that Numba compiles for. Knows no
attention.

    python -m pytest kernels/test_kernels.py -k "tile or llvm"
"""
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from kernels.llvm_code import (
    F16,
    F32,
    I16,
    I32,
    I64,
    F32x16,
    I16x16,
    I16x32,
    I32x16,
    assembly,
    call,
    larger,
    load,
    shuffle,
    splat,
    store,
    target_features,
    target_machine,
)

# The members of all classes:
#
# kv, q       NumPy dtypes of K and V, and of q's rows: compiled code tells the classes by them
# lanes       of a float32 vector
# heads       the possible T, the number of heads in a tile
# sums, wide  accumulators of a tile, and chunks in `weigh`: as many as the registers hold
# dims        of a chunk: a part of a row of K or V. It has `nbytes` there, `q_nbytes` in a row of
#             q, and n vectors in a row of o
# line        with T = 1, bytes from one prefetched line to the next
# order       which dim of a chunk comes first, second, ... in o, and in q's rows but for Dot
#
# vectors, q_vectors      what `multiply_add` takes of a chunk
# start, end              an accumulator of `weigh` from, and to, its place in o
# parts, products         the vectors of a chunk that `weigh` adds together; what two tokens add


class Dot:
    """Products of bf16 pairs by AVX512-BF16: two dims in `score`, two tokens in `weigh`."""
    kv = q = np.uint16
    lanes, sums, wide, heads = 16, 16, 4, (1, 2, 4, 8)
    dims, n, nbytes, q_nbytes, line = 32, 2, 64, 64, 128
    # `products` interleaves the rows of two tokens, within 128-bit lanes: o keeps that order.
    order = [dim for half in (0, 4) for k in range(half, 32, 8) for dim in range(k, k + 4)]

    def __repr__(self):
        return "dot"

    def rows_together(self, T):
        return min(T, 2)

    def vectors(self, place):
        return [load(I32x16, place)]

    q_vectors = vectors

    def multiply_add(self, x, y, acc):
        """acc [16] float32 + the products of the bf16 pairs in x and y [16] int32."""
        return call("llvm.x86.avx512bf16.dpbf16ps.512", acc, x, y)

    def narrow(self, dst, src, scale, chunk):
        for i in range(2):
            x = round_bf16(load(F32x16, src + chunk * 128 + 64 * i) * scale)
            store(x.emit("trunc", I16x16), dst + chunk * 64 + 32 * i)

    def exp2(self, x, weights, offset, T):
        """Store 2^x [16 / T, T], x <= 0, as [8 / T, T, 2] bf16. Returns what is stored."""
        f = call("llvm.x86.avx512.mask.reduce.ps.512", x, I32(1), x, I16(-1), I32(4))
        y = polynomial(EXP2_BF16, f)                     # f = x - floor(x)
        y = call("llvm.x86.avx512.mask.scalef.ps.512", y, x, y, I16(-1), I32(4))
        bits = round_bf16(y)                             # of y * 2^floor(x)
        store(pairs(bits.emit("trunc", I16x16), T), weights + (offset >> 1))
        return (bits << 16).emit("bitcast", F32x16)

    def start(self, place):
        return load(F32x16, place)

    def end(self, acc, place, weights, h):
        store(acc, place)

    def parts(self, T):
        return [slice(None)]

    def products(self, v, rows, chunks, part, weights, t, T):
        """What two tokens add to o: (weights of T heads, vectors of V) of both at once."""
        w = [splat(load(I32, weights + t * (4 * T) + 4 * h)) for h in range(T)]
        mix = [lane for k in range(0, 32, 8) for i in range(4) for lane in (k + i, 32 + k + i)]
        loaded = ([load(I16x32, v + row + 64 * i) for row in rows] for i in range(chunks))
        mixed = (shuffle(x, y, [lane + half for lane in mix]) for x, y in loaded for half in (0, 4))
        yield w, (x.emit("bitcast", I32x16) for x in mixed)


class Fma:
    """Float32 products. kind: the dtype of the cache, "bf16", "fp16" or "fp32"."""
    q, line = np.float32, 64

    def __init__(self, kind, lanes, registers):
        self.kind, self.lanes = kind, lanes
        self.sums, self.wide = registers // 2, registers // 8
        self.kv = {"bf16": np.uint16, "fp16": np.int16, "fp32": np.uint32, "int8": np.int8}[kind]
        self.heads = (1, 2, 4, 8) if lanes == 16 else (1, 2, 4)
        self.dims = min(16, 2 * lanes)
        self.n = self.dims // lanes
        self.nbytes, self.q_nbytes = self.dims * np.dtype(self.kv).itemsize, 4 * self.dims
        self.order = list(range(self.dims))
        if kind == "bf16" and self.n == 2:
            self.order = [*range(0, self.dims, 2), *range(1, self.dims, 2)]
        self.floats, self.ints = (ir.VectorType(kind, lanes) for kind in (F32, I32))

    def __repr__(self):
        return f"{self.kind}x{self.lanes}"

    def rows_together(self, T):
        return min(max(2, T), self.sums // T)

    def vectors(self, place):
        """A chunk of K or V -> n vectors of float32."""
        if self.kind == "bf16":             # bf16 is the upper half of a float32
            if self.n == 1:
                x = [load(ir.VectorType(I16, self.lanes), place).emit("zext", self.ints) << 16]
            else:                           # even dims, then odd dims: cheaper than to move them
                pair = load(self.ints, place)
                x = [pair << 16, pair & -65536]
            return [y.emit("bitcast", self.floats) for y in x]
        kind = ir.VectorType(F16 if self.kind == "fp16" else F32, self.lanes)
        x = [load(kind, place + self.nbytes // self.n * i) for i in range(self.n)]
        return [y.emit("fpext", self.floats) for y in x] if self.kind == "fp16" else x

    def q_vectors(self, place):
        return [load(self.floats, place + 4 * self.lanes * i) for i in range(self.n)]

    def multiply_add(self, x, y, acc):
        return call(f"llvm.fma.v{self.lanes}f32", x, y, acc)

    def narrow(self, dst, src, scale, chunk):
        x = self.q_vectors(src + chunk * self.q_nbytes)
        for i in range(self.n):
            y = shuffle(x[0], x[-1], self.order[self.lanes * i:self.lanes * (i + 1)])
            store(y * scale, dst + chunk * self.q_nbytes + 4 * self.lanes * i)

    def exp2(self, x, weights, offset, T):
        """Store 2^x [lanes / T, T], x <= 0, and return it."""
        low = call(f"llvm.floor.v{self.lanes}f32", x)
        exponent = larger(low, x.constant(-127.0, x.type)).emit("fptosi", self.ints)
        power = ((exponent + 127) << 23).emit("bitcast", self.floats)       # below 2^-126 it is 0
        y = polynomial(EXP2_F32, x - low) * power
        store(y, weights + offset)
        return y

    def start(self, place):
        return load(self.floats, place)

    def end(self, acc, place, weights, h):
        store(acc, place)

    def parts(self, T):
        return [slice(None)]

    def products(self, v, rows, chunks, part, weights, t, T):
        """What two tokens add to o: (weights of T heads, vectors of V) of each."""
        for i, row in enumerate(rows):
            one = [load(F32, weights + t * (8 * T) + 4 * (i * T + h)) for h in range(T)]
            w = [splat(x, self.lanes) for x in one]
            yield w, (x for j in range(chunks) for x in self.vectors(v + row + self.nbytes * j))


class Int8(Fma):
    """Products of int16 pairs, summed in int32: two dims in `score`, two tokens in `weigh`.

    K and V are int8 and become int16, q and the weights are rounded to int16: that is 2^-16 of the
    largest, where int8 rounds K and V to 2^-8. Two tiles of its own, `unround` and `round`, apply
    the scales of K to scores and those of V to weights. On AVX512-VNNI, LLVM makes one instruction
    of a product and its sum.
    """
    q = np.int16

    def __init__(self, lanes, registers):
        super().__init__("int8", lanes, registers)
        self.dims = self.nbytes = 4 * lanes
        self.n, self.q_nbytes, self.wide = 4, 2 * self.dims, 1
        even = [2 * lane for half in (0, 4) for k in range(half, 2 * lanes, 8)
                for lane in range(k, k + 4)]
        self.order = [dim + odd for odd in (0, 1) for dim in even]      # q has 0 2 4 .. 1 3 5 ..
        self.shorts = ir.VectorType(I16, 2 * lanes)

    def vectors(self, place):
        """A chunk of K or V -> its even and its odd dims, int16."""
        x = load(self.shorts, place)
        return [(x << 8).emit("ashr", x.constant(8, x.type)), x.emit("ashr", x.constant(8, x.type))]

    def q_vectors(self, place):
        return [load(self.shorts, place + 4 * self.lanes * i) for i in range(2)]

    def multiply_add(self, x, y, acc):
        """acc [lanes] int32 + the products of the int16 pairs in x and y."""
        name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}.get(self.lanes)
        if name:
            return acc + call(name, x, y, result=self.ints)
        wide = ir.VectorType(I32, 2 * self.lanes)
        product = x.emit("sext", wide) * y.emit("sext", wide)
        halves = [shuffle(product, product, range(i, 2 * self.lanes, 2)) for i in range(2)]
        return acc + halves[0] + halves[1]

    def narrow(self, dst, src, scale, chunk):
        src = src + chunk * (4 * self.dims)
        x = [load(self.floats, src + 4 * self.lanes * i) for i in range(4)]
        x = [self.rounded(y * scale) for y in x]
        whole = [shuffle(x[i], x[i + 1], range(2 * self.lanes)) for i in (0, 2)]
        for odd in range(2):
            y = shuffle(*whole, range(odd, self.dims, 2))
            store(y, dst + chunk * self.q_nbytes + 4 * self.lanes * odd)

    def rounded(self, x):
        """float32 lanes within int16 -> the nearest int16, ties to even."""
        x = call(f"llvm.rint.v{self.lanes}f32", x).emit("fptosi", self.ints)
        return x.emit("trunc", ir.VectorType(I16, self.lanes))

    def start(self, place):
        return Fma.start(self, place).constant(0, self.ints)

    def end(self, acc, place, weights, h):
        """`round` has put the unit of each head's weights in front of them."""
        unit = splat(load(F32, weights + (4 * h - 64)), self.lanes)
        o = load(self.floats, place)
        store(Fma.multiply_add(self, acc.emit("sitofp", self.floats), unit, o), place)

    def parts(self, T):
        """Where the registers do not hold the sums of T heads over a chunk, half a chunk."""
        half = self.n // 2
        return [slice(0, half), slice(half, None)] if self.n * T > self.sums else [slice(None)]

    def products(self, v, rows, chunks, part, weights, t, T):
        """What two tokens add to o: (weights of T heads, vectors of V) of both at once."""
        w = [splat(load(I32, weights + t * (4 * T) + 4 * h), self.lanes) for h in range(T)]
        w = [x.emit("bitcast", self.shorts) for x in w]
        mix = [lane for k in range(0, 2 * self.lanes, 8) for i in range(4)
               for lane in (k + i, 2 * self.lanes + k + i)]
        x, y = (self.vectors(v + row) for row in rows)
        mixed = [shuffle(x[odd], y[odd], [lane + half for lane in mix])
                 for odd in (0, 1) for half in (0, 4)]
        yield w, mixed[part]


# 2^f = sum_n C[n] f^n for 0 <= f < 1, fitted on Chebyshev points. Relative errors: below 8e-5,
# where rounding to bf16 errs by 2e-3, and below 2e-7.
EXP2_BF16 = 0.99992783, 0.6957771, 0.22623319, 0.07790716
EXP2_F32 = 0.99999994, 0.69315296, 0.24015453, 0.05582361, 0.00899258, 0.00187623


def polynomial(coefficients, x):
    """sum_n coefficients[n] x^n"""
    y = x.constant(coefficients[-1], x.type)
    for coefficient in coefficients[-2::-1]:
        y = call(f"llvm.fma.v{x.type.count}f32", y, x, x.constant(coefficient, x.type))
    return y


def pairs(x, T):
    """[tokens, T] lanes -> [tokens / 2, T, 2]"""
    tokens = x.type.count // T
    return shuffle(x, x, [(2 * j + i) * T + h
                          for j in range(tokens // 2) for h in range(T) for i in range(2)])


def round_bf16(x):
    """float32 lanes -> their bf16 bits in the lower halves of int32 lanes, ties to even."""
    x = x.emit("bitcast", I32x16)
    return (x + ((x >> 16) & 1) + 0x7FFF) >> 16


# ---- which of them a processor has

class Vectors(NamedTuple):
    """What LLVM has for a processor. lanes: of float32 vectors; 0: no vector multiply-add."""
    lanes: int
    registers: int
    has_fp16: bool          # instructions that widen fp16
    has_dot: bool           # AVX512-BF16

    def arithmetics(self):
        """{(path of cpu_attn.py, dtype of the cache): arithmetic} of what the processor can run."""
        found = {("dot", "bf16"): Dot()} if self.has_dot else {}
        if self.lanes:
            for kind in ("bf16", "fp32") + ("fp16",) * self.has_fp16:
                found["fma", kind] = Fma(kind, self.lanes, self.registers)
            found["int", "int8"] = Int8(self.lanes, self.registers)
        return found


def find_vectors(machine, features=""):
    """Look at the code that LLVM makes for a machine (llvm_code.target_machine) -> Vectors. Numba
    can be told to compile for another processor than this one, and only this shows what it has."""
    def write(kind, lanes, place):
        arithmetic = Fma(kind, lanes, 16)
        x, y = (arithmetic.vectors(place + 64 * i)[0] for i in range(2))
        store(arithmetic.multiply_add(x, y, x), place)
    wide = assembly(machine, write, [I64], "fp32", 16)
    half = assembly(machine, write, [I64], "fp16", 4)
    has_fp16 = any(name in half for name in ("vcvtph2ps", "fcvtl"))
    for sign, lanes, registers in (("zmm", 16, 32), ("ymm", 8, 16), ("fmla", 4, 32)):
        if sign in wide and ("vfm" in wide or "fmla" in wide):
            return Vectors(lanes, registers, has_fp16, "+avx512bf16" in features)
    return Vectors(0, 0, False, False)


HERE = find_vectors(target_machine(), target_features())     # what Numba compiles for
TILES = HERE.arithmetics()
