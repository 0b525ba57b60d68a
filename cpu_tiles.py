"""The inner tiles of CPU attention for processors with AVX512-BF16, as LLVM vector code behind Numba calls.

`vdpbf16ps` adds to each of 16 float32 lanes the product of two bf16 pairs: 32 multiplications an instruction. Both tiles
feed it K and V as they lie in the cache, and one q or p pair broadcast from memory:

    scores   K rows of 16 tokens, 32 dims at a time, are transposed in registers: 16 x [pair of dims, 16 tokens].
             Per pair one instruction a head: s[h, 16 tokens] += K[16 tokens, pair] . q[h, pair]. No sum across lanes.
    weigh    V rows of two tokens are interleaved: [16 dims, pair of tokens], one instruction a head:
             o[h, 16 dims] += V[16 dims, pair] . p[h, pair]. Interleaving works within 128-bit lanes, so a group of
             32 dims comes out as dims 0-3, 8-11, 16-19, 24-27 | 4-7, 12-15, ...: `LANES`, undone at the merge.

Addresses and strides are bytes, int64. On other processors the functions are empty and must not be called (HAS_DOT).
"""
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

HAS_DOT = bool(binding.get_host_cpu_features().get("avx512bf16"))
LANES = [16 * half + 4 * lane + i for lane in range(4) for half in range(2) for i in range(4)]  # where dim d of 32 lies

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32x16, I32x16, I16x32, I16x16 = (ir.VectorType(t, n) for t, n in ((F32, 16), (I32, 16), (I16, 32), (I16, 16)))


def tile(signature):
    """Decorator: codegen(builder, *args) -> a Numba function. signature: a letter per argument, i int64, f float32."""
    kinds = {"i": types.int64, "f": types.float32}

    def wrap(codegen):
        def body(ctx, builder, sig, args):
            if HAS_DOT:
                codegen(builder, *args)
            return ctx.get_dummy_value()
        names = ", ".join(f"a{i}" for i in range(len(signature)))      # Numba counts a function's named parameters
        scope = {"result": (types.void(*[kinds[k] for k in signature]), body)}
        exec(f"def typed(ctx, {names}): return result", scope)
        return intrinsic(scope["typed"])
    return wrap


# ---- one instruction each

def address(b, base, *offsets):
    for offset in offsets:
        base = b.add(base, I64(offset) if isinstance(offset, int) else offset)
    return base


def load(b, kind, at):
    return b.load(b.inttoptr(at, kind.as_pointer()), align=2)


def store(b, value, at):
    b.store(value, b.inttoptr(at, value.type.as_pointer()), align=2)


def shuffle(b, x, y, lanes):
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def splat(b, x):
    v = b.insert_element(ir.Constant(ir.VectorType(x.type, 16), ir.Undefined), x, I32(0))
    return shuffle(b, v, v, [0] * 16)


def constant(value, kind=F32x16):
    return ir.Constant(kind, [value] * kind.count)


def dot(b, acc, x, y):
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(F32x16, [F32x16, I32x16, I32x16]),
                                        "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(fn, [acc, x, y])


def fma(b, x, y, z):
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(F32x16, [F32x16] * 3), "llvm.fma.v16f32")
    return b.call(fn, [x, y, z])


def prefetch(b, at, level=2):
    """Into L2 by default: far ahead, in L1 the lines would push out what is being worked on (measured: a third slower)."""
    byte = ir.IntType(8).as_pointer()
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]),
                                        "llvm.prefetch.p0")
    b.call(fn, [b.inttoptr(at, byte), I32(0), I32(level), I32(1)])


def fold(b, op, x):
    """All 16 lanes = op over the lanes of x."""
    for k in (8, 4, 2, 1):
        x = op(x, shuffle(b, x, x, [(i + k) % 16 for i in range(16)]))
    return x


def loop(b, count, step=1):
    return cgutils.for_range_slice(b, I64(0), count, I64(step), I64)


def transpose(b, rows):
    """16 vectors of 16 int32 -> their transpose: 4x4 inside the 128-bit lanes, then the lanes."""
    low = [x for k in range(0, 16, 4) for x in (k, 16 + k, k + 1, 17 + k)]
    high = [x + 2 for x in low]
    left = [x for k in range(0, 16, 4) for x in (k, k + 1, 16 + k, 17 + k)]
    right = [x + 2 for x in left]
    quads = []                                       # [g][c], lane l: rows 4g .. 4g+3 of column 4l + c
    for g in range(0, 16, 4):
        a, c = (shuffle(b, *rows[g:g + 2], x) for x in (low, high))
        d, e = (shuffle(b, *rows[g + 2:g + 4], x) for x in (low, high))
        quads.append([shuffle(b, a, d, left), shuffle(b, a, d, right), shuffle(b, c, e, left), shuffle(b, c, e, right)])
    even, odd = ([4 * k + i for k in lanes for i in range(4)] for lanes in ((0, 2, 4, 6), (1, 3, 5, 7)))
    columns = [None] * 16
    for c in range(4):
        q = [quads[g][c] for g in range(4)]
        for lanes, first in ((even, 0), (odd, 4)):
            x, y = shuffle(b, q[0], q[1], lanes), shuffle(b, q[2], q[3], lanes)
            columns[first + c], columns[first + 8 + c] = shuffle(b, x, y, even), shuffle(b, x, y, odd)
    return columns


# ---- the tiles

@tile("iiiii")
def scores1(b, s, k, row_bytes, q, ahead):
    """s[16 tokens] = q[D] . k[16 tokens, D], row by row; the same rows at `ahead` are prefetched. One head has too little
    work per K to pay for its transpose: the sums are transposed instead."""
    sums = []
    for r in range(16):
        acc = cgutils.alloca_once_value(b, constant(0.0))
        with loop(b, row_bytes, 256) as (c, _):      # every fourth line: rows are read in order, which the processor's
            prefetch(b, address(b, ahead, c, b.mul(row_bytes, I64(r))))     # own prefetcher sees; more only get in its way
        with loop(b, row_bytes, 64) as (c, _):
            at = address(b, c, b.mul(row_bytes, I64(r)))
            b.store(dot(b, b.load(acc), load(b, I32x16, address(b, k, at)), load(b, I32x16, address(b, q, c))), acc)
        sums.append(b.bitcast(b.load(acc), I32x16))
    columns = [b.bitcast(x, F32x16) for x in transpose(b, sums)]
    while len(columns) > 1:
        columns = [b.fadd(x, y) for x, y in zip(columns[::2], columns[1::2])]
    store(b, columns[0], s)


def make_scores(heads):
    @tile("iiiiiii")
    def scores(b, s, s_bytes, k, row_bytes, q, q_bytes, ahead):
        """s[heads, 16 tokens] = q[heads, D] . k[16 tokens, D]. In their order, the 16 rows at `ahead` are prefetched into
        L2 and the 16 after k into L1."""
        acc = [cgutils.alloca_once_value(b, constant(0.0)) for _ in range(heads)]
        with loop(b, row_bytes, 64) as (c, _):       # 32 dims
            rows = []
            for r in range(16):
                rows.append(load(b, I32x16, address(b, k, c, b.mul(row_bytes, I64(r)))))
                line = address(b, b.mul(c, I64(16)), 64 * r)
                prefetch(b, address(b, ahead, line))
                prefetch(b, address(b, k, b.mul(row_bytes, I64(16)), line), level=3)
            for j, column in enumerate(transpose(b, rows)):
                for h, slot in enumerate(acc):
                    pair = splat(b, load(b, I32, address(b, q, b.mul(q_bytes, I64(h)), c, 4 * j)))
                    b.store(dot(b, b.load(slot), column, pair), slot)
        for h, slot in enumerate(acc):
            store(b, b.load(slot), address(b, s, b.mul(s_bytes, I64(h))))
    return scores


def make_weigh(heads, vecs):
    low = [x for k in range(0, 32, 8) for i in range(4) for x in (k + i, 32 + k + i)]
    high = [x + 4 for x in low]

    @tile("iiiiiiii")
    def weigh(b, o, o_bytes, v, row_bytes, p, p_bytes, pairs, ahead):
        """o[heads, 32 vecs] += p[heads, 2 pairs] . v[2 pairs, 32 vecs], in LANES order."""
        at = {(h, c): address(b, o, b.mul(o_bytes, I64(h)), 64 * c) for h in range(heads) for c in range(2 * vecs)}
        acc = {key: cgutils.alloca_once_value(b, load(b, F32x16, where)) for key, where in at.items()}
        with loop(b, pairs) as (t, _):
            row = address(b, v, b.mul(b.mul(t, I64(2)), row_bytes))
            for c in range(vecs):
                x, y = load(b, I16x32, address(b, row, 64 * c)), load(b, I16x32, address(b, row, row_bytes, 64 * c))
                for i in range(1 if heads == 1 else 2):
                    prefetch(b, address(b, ahead, b.mul(t, I64(128 * vecs)), 64 * (2 * c + i)))
                halves = [b.bitcast(shuffle(b, x, y, lanes), I32x16) for lanes in (low, high)]
                for h in range(heads):
                    pair = splat(b, load(b, I32, address(b, p, b.mul(p_bytes, I64(h)), b.mul(t, I64(4)))))
                    for i, half in enumerate(halves):
                        slot = acc[h, 2 * c + i]
                        b.store(dot(b, b.load(slot), half, pair), slot)
        for key, where in at.items():
            store(b, b.load(acc[key]), where)
    return weigh


scores4, scores8 = make_scores(4), make_scores(8)
weigh1, weigh1_wide = make_weigh(1, 1), make_weigh(1, 4)       # wide: more dims at once, where D allows
weigh4, weigh4_wide, weigh8 = make_weigh(4, 1), make_weigh(4, 2), make_weigh(8, 1)

EXP2 = (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00961813)   # 2^f = sum (f ln 2)^n / n!, |f| <= 1/2: within 4e-5


@tile("iiifi")
def softmax(b, s, p, count, scale, result):
    """p[count] bf16 = 2^(scale s - m) with m = scale max s; result[0], [1] = m and the sum of p. count: of 16."""
    scale = splat(b, scale)
    bytes_ = b.mul(count, I64(4))
    top = cgutils.alloca_once_value(b, constant(-3e38))

    def larger(x, y):
        return b.select(b.fcmp_ordered(">", x, y), x, y)
    with loop(b, bytes_, 64) as (t, _):
        b.store(larger(b.load(top), b.fmul(load(b, F32x16, address(b, s, t)), scale)), top)
    m = fold(b, larger, b.load(top))
    total = cgutils.alloca_once_value(b, constant(0.0))
    with loop(b, bytes_, 64) as (t, _):
        x = b.fsub(b.fmul(load(b, F32x16, address(b, s, t)), scale), m)
        x = larger(x, constant(-126.0))
        shifted = b.fadd(x, constant(1.5 * 2 ** 23))           # rounds x to an integer, in the low bits
        f = b.fsub(x, b.fsub(shifted, constant(1.5 * 2 ** 23)))
        y = constant(EXP2[-1])
        for coefficient in EXP2[-2::-1]:
            y = fma(b, y, f, constant(coefficient))
        bits = b.add(b.bitcast(y, I32x16), b.shl(b.bitcast(shifted, I32x16), constant(23, I32x16)))
        odd = b.and_(b.lshr(bits, constant(16, I32x16)), constant(1, I32x16))       # round to even
        bits = b.lshr(b.add(b.add(bits, constant(0x7FFF, I32x16)), odd), constant(16, I32x16))
        store(b, b.trunc(bits, I16x16), address(b, p, b.lshr(t, I64(1))))
        b.store(b.fadd(b.load(total), b.bitcast(b.shl(bits, constant(16, I32x16)), F32x16)), total)
    total = fold(b, b.fadd, b.load(total))
    for i, value in enumerate((m, total)):
        store(b, b.extract_element(value, I32(0)), address(b, result, 4 * i))


@intrinsic
def read_all(typingctx, at, nbytes):
    """Read nbytes (a multiple of 512) from an address at full speed; returns a sum, so that nothing is left out."""
    def body(ctx, b, sig, args):
        acc = [cgutils.alloca_once_value(b, constant(0, I32x16)) for _ in range(8)]
        with loop(b, args[1], 512) as (i, _):
            for u, slot in enumerate(acc):
                line = address(b, args[0], i, 64 * u)
                prefetch(b, address(b, line, 4096))
                b.store(b.add(b.load(slot), load(b, I32x16, line)), slot)
        total = b.load(acc[0])
        for slot in acc[1:]:
            total = b.add(total, b.load(slot))
        return b.zext(b.extract_element(fold(b, b.add, total), I32(0)), I64)
    return types.int64(types.int64, types.int64), body
