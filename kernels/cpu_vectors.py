"""Vector arithmetic of the CPU attention tiles: how K and V become float32, and what a product is.

Two classes, Dot and Fma, have the same members; the tiles in cpu_tiles.py are written once, over
either. `HERE` says which vectors the processor has that Numba compiles for. Knows no attention.

    python -m pytest kernels/test_kernels.py -k "tile or llvm"
"""
from typing import NamedTuple

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
    address,
    assembly,
    call,
    equal,
    larger,
    load,
    shuffle,
    splat,
    store,
    target_features,
    target_machine,
)

# The members of both classes:
#
# lanes       of a float32 vector
# sums        accumulators of a tile: what the registers hold beside its operands
# dims        of a row of K or V in one vector, which takes `nbytes`
# per_vector  accumulators that weighing one vector of V needs
# wide        with T heads, vectors of V that are weighed at once
# every       with T = 1, bytes from one prefetched line to the next
# heads       the possible T
# step_tokens tokens that one step of `weigh` adds
# shift       a row of o has 2^shift times the bytes of the row of V that it belongs to
# q_shift     a row of q has 2^q_shift times the bytes of a row of K
# weight_shift    scores have 2^weight_shift times the bytes of weights


class Dot:
    """Arithmetic on pairs of bf16, of two dims in `score` and of two tokens in `weigh`."""
    lanes, sums, dims, nbytes, per_vector = 16, 16, 32, 64, 2
    wide, every, heads = {1: 4, 2: 4, 4: 2, 8: 1}, 128, (1, 2, 4, 8)
    step_tokens, shift, q_shift, weight_shift = 2, 1, 0, 1

    def __repr__(self):
        return "dot"

    def rows_together(self, T):
        return min(T, 2)

    def load(self, place):
        return load(I32x16, place)

    load_q = load

    def add_product(self, acc, x, y):
        """acc [16] float32 + the products of the bf16 pairs in x and y [16] int32."""
        return call("llvm.x86.avx512bf16.dpbf16ps.512", acc, x, y)

    def exp2(self, x, weights, T):
        """Store the weights 2^x, x <= 0: [8 / T, T, 2] bf16. Returns them as float32 lanes."""
        f = call("llvm.x86.avx512.mask.reduce.ps.512", x, I32(1), x, I16(-1), I32(4))
        y = polynomial(EXP2_BF16, f)                     # f = x - floor(x)
        y = call("llvm.x86.avx512.mask.scalef.ps.512", y, x, y, I16(-1), I32(4))
        bits = round_bf16(y)                             # of y * 2^floor(x)
        half = bits.emit("trunc", I16x16)
        pairs = [(2 * j + i) * T + h for j in range(8 // T) for h in range(T) for i in range(2)]
        store(shuffle(half, half, pairs), weights)
        return (bits << 16).emit("bitcast", F32x16)

    def num_steps(self, tokens):
        return (tokens + 1) >> 1

    def step(self, v, t, tokens, row_bytes, col, groups, weights, T):
        """Step t of `weigh`, two tokens: the weights of each head, the vectors of V.

        The rows of two tokens are interleaved: then one instruction adds a pair of tokens to 16
        dims of o. Interleaving works within 128-bit lanes, so each 32 dims of o are in this lane
        order: 0-3, 8-11, 16-19, 24-27, then 4-7, 12-15, 20-23, 28-31. `finish` undoes it.
        """
        order = [lane for k in range(0, 32, 8) for i in range(4) for lane in (k + i, 32 + k + i)]
        row = t * 2 * row_bytes
        # The partner of an odd final token has weight 0, but its row may hold NaN.
        # Then the token's own row is read twice.
        partner = equal(t * 2, tokens - 1).emit("select", row, row + row_bytes)

        def vectors():
            for i in range(groups):
                x, y = (load(I16x32, v + r + col + 64 * i) for r in (row, partner))
                for half in range(2):
                    mixed = shuffle(x, y, [lane + 4 * half for lane in order])
                    yield mixed.emit("bitcast", I32x16)
        return [splat(load(I32, weights + t * (4 * T) + 4 * h)) for h in range(T)], vectors()


class Fma:
    """Arithmetic in float32. kind: "bf16", "fp16" or "fp32", the dtype of the cache."""
    per_vector, every, step_tokens, weight_shift = 1, 64, 1, 0

    def __init__(self, kind, lanes, registers):
        self.kind, self.lanes, self.dims, self.sums = kind, lanes, lanes, registers // 2
        self.nbytes = lanes * (4 if kind == "fp32" else 2)
        self.shift = self.q_shift = 0 if kind == "fp32" else 1
        self.heads = (1, 2, 4, 8) if lanes == 16 else (1, 2, 4)
        self.wide = {T: min(8, self.sums // T) for T in self.heads}
        self.floats, self.ints = (ir.VectorType(kind, lanes) for kind in (F32, I32))

    def __repr__(self):
        return f"{self.kind}x{self.lanes}"

    def rows_together(self, T):
        return min(4, self.sums // T)

    def load(self, place):
        if self.kind == "fp32":
            return load(self.floats, place)
        if self.kind == "fp16":
            return load(ir.VectorType(F16, self.lanes), place).emit("fpext", self.floats)
        x = load(ir.VectorType(I16, self.lanes), place).emit("zext", self.ints)
        return (x << 16).emit("bitcast", self.floats)    # bf16 is the upper half of a float32

    def load_q(self, place):
        return load(self.floats, place)

    def add_product(self, acc, x, y):
        return call(f"llvm.fma.v{self.lanes}f32", x, y, acc)

    def exp2(self, x, weights, T):
        """Store the weights 2^x, x <= 0, as float32, and return them."""
        low = call(f"llvm.floor.v{self.lanes}f32", x)
        exponent = larger(low, x.constant(-127.0, x.type)).emit("fptosi", self.ints)
        power = ((exponent + 127) << 23).emit("bitcast", self.floats)       # below 2^-126 it is 0
        y = polynomial(EXP2_F32, x - low) * power
        store(y, weights)
        return y

    def num_steps(self, tokens):
        return tokens

    def step(self, v, t, tokens, row_bytes, col, groups, weights, T):
        """Step t of `weigh`, one token: the weights of each head, the vectors of V."""
        row = address(v, t * row_bytes, col)
        return ([splat(load(F32, weights + t * (4 * T) + 4 * h), self.lanes) for h in range(T)],
                (self.load(row + self.nbytes * i) for i in range(groups)))


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

    @property
    def kinds(self):
        """dtypes of caches that Fma serves."""
        return (("bf16", "fp32") + ("fp16",) * self.has_fp16) if self.lanes else ()


def find_vectors(machine, features=""):
    """Look at the code that LLVM makes for a machine (llvm_code.target_machine) -> Vectors. Numba
    can be told to compile for another processor than this one, and only this shows what it has."""
    def write(kind, lanes, place):
        arithmetic = Fma(kind, lanes, 16)
        x, y = (arithmetic.load(place + 64 * i) for i in range(2))
        store(arithmetic.add_product(x, x, y), place)
    wide = assembly(machine, write, [I64], "fp32", 16)
    half = assembly(machine, write, [I64], "fp16", 4)
    has_fp16 = any(name in half for name in ("vcvtph2ps", "fcvtl"))
    for sign, lanes, registers in (("zmm", 16, 32), ("ymm", 8, 16), ("fmla", 4, 32)):
        if sign in wide and ("vfm" in wide or "fmla" in wide):
            return Vectors(lanes, registers, has_fp16, "+avx512bf16" in features)
    return Vectors(0, 0, False, False)


HERE = find_vectors(target_machine(), target_features())     # what Numba compiles for
