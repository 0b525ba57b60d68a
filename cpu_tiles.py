"""The dot path of CPU attention, for processors with AVX512-BF16: tiles in LLVM vector code behind Numba calls.

`vdpbf16ps` adds to each of 16 float32 lanes the product of two bf16 pairs: 32 multiplications an instruction. A tile takes
T = 1, 2, 4 or 8 heads of one group at once, and K and V as they lie in the cache:

    scores   s[token, head] = k[token] . q[head] in 16 accumulators of 16 lanes, R = 16 / T tokens by T heads:

                        q of head 0   head 1   ...  head T-1         32 dims a step, one instruction each;
             token 0      acc[0]      acc[1]         acc[T-1]        then the 16 x 16 lanes are summed to one
             ...                                                     vector s[R tokens, T heads] by 15 additions
             token R-1   acc[16-T]    ...            acc[15]
    softmax  over a work item's scores, T heads in the lanes; leaves p[pair of tokens, head, 2] in bf16
    weigh    V rows of two tokens are interleaved: [16 dims, pair of tokens], one instruction a head:
             o[head, 16 dims] += V[16 dims, pair] . p[pair, head]. Interleaving works within 128-bit lanes, so a group
             of 32 dims lies as 0-3, 8-11, 16-19, 24-27 | 4-7, 12-15, ...; `finish` undoes that at the merge.

Each tile is an LLVM function of its own: inlined, the compiler keeps the addresses of all tiles in registers it has not
got. Every line of K and V is prefetched AHEAD bytes before it is read, in reading order; only where a block is a run of
128 KB (no GQA) the processor's own prefetcher keeps up, and every second line does better.

Addresses and strides are bytes, int64. On other processors the functions are empty and must not be called (HAS_DOT).
Numba's cache of cpu_attn.py does not see changes here: touch that file after an edit.
"""
import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

HAS_DOT = bool(binding.get_host_cpu_features().get("avx512bf16"))
HEADS = 1, 2, 4, 8                             # of a tile
AHEAD = 16384                                  # bytes between reading and prefetching
LOG2E = np.float32(1.4426950408889634)

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32x16, I32x16, I16x32, I16x16 = (ir.VectorType(t, n) for t, n in ((F32, 16), (I32, 16), (I16, 32), (I16, 16)))


def tile(signature, variants=None):
    """Decorator: codegen(builder, *args) -> a Numba function. signature: a letter per argument, i int64, f float32.
    With variants, codegen(builder, T, *args) is compiled for each, and the Numba function takes T first."""
    kinds = {"i": (types.int64, I64), "f": (types.float32, F32)}
    numba_types, llvm_types = zip(*[kinds[k] for k in signature])

    def wrap(codegen):
        def function(module, *variant):
            name = "_".join(map(str, ("neo", codegen.__name__, *variant)))
            fn = cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), llvm_types), name)
            if not fn.blocks:
                fn.linkage = "internal"
                fn.attributes.add("noinline")
                b = ir.IRBuilder(fn.append_basic_block())
                codegen(b, *variant, *fn.args)
                b.ret_void()
            return fn

        def body(ctx, b, sig, args):
            if not HAS_DOT:
                pass
            elif variants is None:
                b.call(function(b.module), args)
            else:
                for T in variants:
                    with b.if_then(b.icmp_signed("==", args[0], I64(T))):
                        b.call(function(b.module, T), args[1:])
            return ctx.get_dummy_value()
        result = types.void(*(() if variants is None else (types.int64,)), *numba_types), body
        names = ", ".join(f"a{i}" for i in range(len(result[0].args)))  # Numba counts a function's named parameters
        scope = {"result": result}
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


def call(b, name, *args):
    """An LLVM intrinsic whose result has the type of its first argument."""
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(args[0].type, [x.type for x in args]), name)
    return b.call(fn, args)


def dot(b, acc, x, y):
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", acc, x, y)


def prefetch(b, at):
    """Into L2: so far ahead, in L1 the lines would push out what is being worked on (measured: a third slower)."""
    byte = ir.IntType(8).as_pointer()
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]),
                                        "llvm.prefetch.p0")
    b.call(fn, [b.inttoptr(at, byte), I32(0), I32(2), I32(1)])


def larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def fold(b, op, x, T=1):
    """Lane i = op over the lanes i, i + T, i + 2T, ... (mod 16) of x."""
    for k in (8, 4, 2, 1):
        if k >= T:
            x = op(x, shuffle(b, x, x, [(i + k) % 16 for i in range(16)]))
    return x


def loop(b, stop, step=1, start=0):
    return cgutils.for_range_slice(b, start if isinstance(start, ir.Value) else I64(start), stop, I64(step), I64)


def variable(b, value):
    """A stack slot, which LLVM turns into a register."""
    slot = cgutils.alloca_once(b, value.type)
    b.store(value, slot)
    return slot


def sums(b, rows):
    """16 vectors -> one, lane i the sum over the lanes of rows[i]: the vectors are halved four times."""
    for k in (8, 4, 2, 1):
        own = [lane + 16 * bool(lane & k) for lane in range(16)]
        other = [lane ^ k for lane in own]
        rows = [b.fadd(shuffle(b, x, y, own), shuffle(b, x, y, other)) for x, y in zip(rows[:k], rows[k:])]
    return rows[0]


def round_bf16(b, x):
    """float32 lanes -> their bf16 in the lower halves of int32 lanes, ties to even."""
    x = b.bitcast(x, I32x16)
    odd = b.and_(b.lshr(x, constant(16, I32x16)), constant(1, I32x16))
    return b.lshr(b.add(b.add(x, odd), constant(0x7FFF, I32x16)), constant(16, I32x16))


# ---- the tiles

@tile("iifi")
def narrow(b, dst, src, scale, count):
    """dst[count] bf16 = scale * src[count] float32."""
    with loop(b, count, 16) as (i, _):
        x = b.fmul(load(b, F32x16, address(b, src, b.mul(i, I64(4)))), splat(b, scale))
        store(b, b.trunc(round_bf16(b, x), I16x16), address(b, dst, b.mul(i, I64(2))))


@tile("iiiiii", HEADS)
def scores(b, T, s, k, row_bytes, q, tokens, ahead):
    """s[tokens, T] = k[tokens, D] . q[T, D]; as many rows at `ahead` are prefetched. tokens: a multiple of 16."""
    R, together = 16 // T, min(T, 2)                     # rows of K that share a load of q
    with loop(b, b.mul(tokens, I64(4 * T)), 64) as (at, _):
        first = b.mul(b.mul(b.lshr(at, I64(6)), I64(R)), row_bytes)
        acc = []
        for r in range(0, R, together):
            rows = [b.add(first, b.mul(row_bytes, I64(r + i))) for i in range(together)]
            block = [variable(b, constant(0.0)) for _ in range(together * T)]
            with loop(b, row_bytes, 128 if T == 1 else 64) as (c, _):
                for row in rows:
                    prefetch(b, address(b, ahead, row, c))
            with loop(b, row_bytes, 64) as (c, _):       # 32 dims
                x = [load(b, I32x16, address(b, k, row, c)) for row in rows]
                for h in range(T):
                    y = load(b, I32x16, address(b, q, b.mul(row_bytes, I64(h)), c))
                    for i in range(together):
                        slot = block[i * T + h]
                        b.store(dot(b, b.load(slot), x[i], y), slot)
            acc += [b.load(slot) for slot in block]
        store(b, sums(b, acc), address(b, s, at))


# 2^f = sum_n EXP2[n] f^n for 0 <= f < 1, relative error within 8e-5 (bf16 rounds to 2e-3): fitted on Chebyshev points
EXP2 = 0.99992783, 0.6957771, 0.22623319, 0.07790716


@tile("iiiii", HEADS)
def softmax(b, T, s, p, tokens, m, l):
    """p[tokens / 2, T, 2] bf16 = 2^(s - m) of s[tokens, T]; m[T] the maxima, l[T] the sums of p. Fills s and p up to a
    multiple of 16 tokens with weight 0; m and l take 16 floats each."""
    low, all_lanes, current = constant(-3e38), ir.Constant(I16, -1), I32(4)
    start, stop = b.mul(tokens, I64(4 * T)), b.mul(b.and_(b.add(tokens, I64(15)), I64(-16)), I64(4 * T))
    with loop(b, stop, 64, start) as (at, _):            # slots past the end may hold anything
        store(b, low, address(b, s, at))
    top = variable(b, low)
    with loop(b, stop, 64) as (at, _):
        b.store(larger(b, b.load(top), load(b, F32x16, address(b, s, at))), top)
    top = fold(b, lambda x, y: larger(b, x, y), b.load(top), T)
    total = variable(b, constant(0.0))
    pairs = [(2 * j + i) * T + h for j in range(8 // T) for h in range(T) for i in range(2)]
    with loop(b, stop, 64) as (at, _):
        x = b.fsub(load(b, F32x16, address(b, s, at)), top)
        f = call(b, "llvm.x86.avx512.mask.reduce.ps.512", x, I32(1), x, all_lanes, current)      # x - floor(x)
        y = constant(EXP2[-1])
        for coefficient in EXP2[-2::-1]:
            y = call(b, "llvm.fma.v16f32", y, f, constant(coefficient))
        y = call(b, "llvm.x86.avx512.mask.scalef.ps.512", y, x, y, all_lanes, current)           # y * 2^floor(x)
        bits = round_bf16(b, y)
        half = b.trunc(bits, I16x16)
        store(b, shuffle(b, half, half, pairs), address(b, p, b.lshr(at, I64(1))))
        b.store(b.fadd(b.load(total), b.bitcast(b.shl(bits, constant(16, I32x16)), F32x16)), total)
    store(b, top, m)
    store(b, fold(b, b.fadd, b.load(total), T), l)


@tile("iiiiii", HEADS)
def weigh(b, T, o, v, row_bytes, p, tokens, ahead):
    """o[T, D] float32 += p[tokens, T] . v[tokens, D], in lane order; as many rows at `ahead` are prefetched."""
    order = [x for k in range(0, 32, 8) for i in range(4) for x in (k + i, 32 + k + i)]
    pairs, last = b.lshr(b.add(tokens, I64(1)), I64(1)), b.sub(tokens, I64(1))
    wide = {1: 4, 2: 4, 4: 2, 8: 1}[T]                   # vectors of 32 dims at once: at most 16 accumulators
    whole = b.and_(row_bytes, I64(-64 * wide))
    for vecs, start, stop in ((wide, I64(0), whole), (1, whole, row_bytes))[:1 if wide == 1 else 2]:
        with loop(b, stop, 64 * vecs, start) as (c, _):
            at = [address(b, o, b.mul(row_bytes, I64(2 * h)), b.mul(c, I64(2)), 64 * i)
                  for h in range(T) for i in range(2 * vecs)]
            acc = [variable(b, load(b, F32x16, where)) for where in at]
            with loop(b, pairs) as (t, _):
                row = b.mul(b.mul(t, I64(2)), row_bytes)
                # the partner of an odd last token has weight 0, but may be NaN: read that token's row twice
                partner = b.select(b.icmp_signed("==", b.mul(t, I64(2)), last), row, b.add(row, row_bytes))
                line = address(b, ahead, b.mul(c, tokens), b.mul(t, I64(128 * vecs)))
                for i in range(0, 2 * vecs, 2 if T == 1 else 1):
                    prefetch(b, address(b, line, 64 * i))
                w = [splat(b, load(b, I32, address(b, p, b.mul(t, I64(4 * T)), 4 * h))) for h in range(T)]
                for i in range(vecs):
                    x, y = (load(b, I16x32, address(b, v, r, c, 64 * i)) for r in (row, partner))
                    for half in range(2):
                        mixed = b.bitcast(shuffle(b, x, y, [lane + 4 * half for lane in order]), I32x16)
                        for h in range(T):
                            slot = acc[h * 2 * vecs + 2 * i + half]
                            b.store(dot(b, b.load(slot), mixed, w[h]), slot)
            for slot, where in zip(acc, at):
                store(b, b.load(slot), where)


@tile("iifii")
def finish(b, out, o, w, count, add):
    """out[count] = w * o[count], plus out if add; from lane order back to dims."""
    first = [x for k in (0, 4) for x in (*range(k, k + 4), *range(16 + k, 20 + k))]
    with loop(b, b.mul(count, I64(4)), 128) as (c, _):
        x, y = (load(b, F32x16, address(b, o, c, 64 * i)) for i in range(2))
        for i in range(2):
            at = address(b, out, c, 64 * i)
            old = b.select(b.icmp_signed("==", add, I64(0)), constant(0.0), load(b, F32x16, at))
            z = shuffle(b, x, y, [lane + 8 * i for lane in first])
            store(b, call(b, "llvm.fma.v16f32", z, splat(b, w), old), at)


# ---- a work item

@njit(inline="always")
def _ahead(here, after, h, lag, Hkv, head):
    """The tile to prefetch with head h of the block at `here`: `lag` heads on, maybe in the block at `after`."""
    return here + (h + lag) * head if h + lag < Hkv else after + min(h + lag - Hkv, Hkv - 1) * head


@njit
def dot_item(q, k_cache, v_cache, blocks, n, scale, T, qb, s, p, o, m, l):
    """One work item of cpu_attn._decode, T heads a tile: q [H, D]; blocks: its n tokens' part of the block table. Groups of
    G heads are padded to G', a multiple of T. Scratch: qb [Hkv G', D], p [Hkv G', width] uint16, s [Hkv G' + 1, width]
    float32, width 16 more than the tokens. Writes o [Hkv G', D] in lane order, m, l [Hkv G' + 16]."""
    H, D = q.shape
    Hkv, bs = k_cache.shape[1], k_cache.shape[2]
    G, Gp, width = H // Hkv, o.shape[0] // Hkv, s.shape[1]
    row = 2 * D                                # bytes
    head, block = bs * row, Hkv * bs * row
    lag = max(1, AHEAD // head)
    K, V = k_cache.ctypes.data, v_cache.ctypes.data
    Q, S, P, O, M, L = qb.ctypes.data, s.ctypes.data, p.ctypes.data, o.ctypes.data, m.ctypes.data, l.ctypes.data
    for h in range(H):
        narrow(Q + (h // G * Gp + h % G) * row, q.ctypes.data + h * D * 4, scale * LOG2E, D)
    for j in range(0, n, bs):
        here = K + np.int64(blocks[j // bs]) * block
        after = K + np.int64(blocks[j // bs + 1]) * block if j + bs < n else V + np.int64(blocks[0]) * block
        tokens = (min(bs, n - j) + 15) // 16 * 16
        for h in range(Hkv):
            ahead = _ahead(here, after, h, lag, Hkv, head)
            for g in range(h * Gp, h * Gp + Gp, T):
                scores(T, S + (g * width + j * T) * 4, here + h * head, row, Q + g * row, tokens, ahead)
    for g in range(0, Hkv * Gp, T):
        softmax(T, S + g * width * 4, P + g * width * 2, n, M + g * 4, L + g * 4)
    o[:] = 0
    for j in range(0, n, bs):
        here = V + np.int64(blocks[j // bs]) * block
        after = V + np.int64(blocks[j // bs + 1]) * block if j + bs < n else here
        for h in range(Hkv):
            ahead = _ahead(here, after, h, lag, Hkv, head)
            for g in range(h * Gp, h * Gp + Gp, T):
                weigh(T, O + g * D * 4, here + h * head, row, P + (g * width + j * T) * 2, min(bs, n - j), ahead)


@intrinsic
def read_all(typingctx, at, nbytes):
    """Read nbytes (a multiple of 512) from an address at full speed; returns a sum, so that nothing is left out."""
    def body(ctx, b, sig, args):
        acc = [variable(b, constant(0, I32x16)) for _ in range(8)]
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
