"""Tests of attention: every back end and every fast path against its slow reference.

    python -m pytest kernels/test_kernels.py

With a GPU, Triton's kernels run on it. Without one they run under Triton's interpreter, and are
compiled for GPUs that are not here. The tiles of CPU attention run everywhere, of every width:
where a processor has no AVX512-BF16, its three instructions are replaced by several plain ones.
"""
import ast
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"    # read when Triton is imported

import cpu_attn
import gpu_attn
import kv_format
from checkpoint import PRESETS
from gpu_attn import TorchOps
from kernels import cpu_bandwidth, cpu_tiles, cpu_vectors, llvm_code
from model import rope_table

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THREADS = range(1, min(2, cpu_attn.numba.config.NUMBA_NUM_THREADS) + 1)
DTYPES = {name: dtype for dtype, name in kv_format.NAMES.items()}


def paged_case(rng, B, H, Hkv, D, bs, lens, dtype):
    """Random caches with permuted tables; unused slots hold NaN. Returns arguments of
    paged_decode_reference."""
    width = -(-max(lens) // bs) + 1
    k, v = (rng.standard_normal((B * width, Hkv, bs, D), dtype=np.float32) for _ in "kv")
    table = rng.permutation(B * width).astype(np.int32).reshape(B, width)
    for b, n in enumerate(lens):
        for j in range(width):
            used = min(max(n - j * bs, 0), bs)
            k[table[b, j], :, used:] = v[table[b, j], :, used:] = np.nan
    if dtype == "bf16":
        k, v = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (k, v))
    elif dtype == "fp16":
        k, v = (x.astype(np.float16).view(np.uint16) for x in (k, v))
    elif dtype == "int8":
        k, v = (kv_format.convert(torch.from_numpy(x), torch.int8).numpy() for x in (k, v))
    q = rng.standard_normal((B, H, D), dtype=np.float32)
    return q, k, v, table, np.array(lens, np.int32)


def without_nan(x, dtype):
    """The engine's GPU tier holds no NaN."""
    return np.where(np.isnan(cpu_attn.to_float64(x, dtype)), 0, x).astype(x.dtype)


def torch_cache(x, dtype, device="cpu"):
    tensor = torch.from_numpy(x)
    return (tensor if dtype == "fp32" else tensor.view(DTYPES[dtype])).to(device)


def relative(got, want):
    got = got.float().cpu().numpy() if isinstance(got, torch.Tensor) else got
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# ---- compiling for GPUs, beside all other tests

CAPABILITIES = 75, 80, 90

COMPILE = """
import pathlib, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import triton_kernels as kernels

tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
INTS = {"block_table", "seq_lens", "slots", "positions"}            # pointers to int32
FLOATS = {"k_scales", "v_scales", "lse", "part", "part_lse", "scales", "cos", "sin"}
ROWS = {"q", "k_cache", "v_cache", "o", "k", "v", "rows", "cache", "x", "y"}
SHARED = {75: 64 << 10, 80: 164 << 10, 90: 228 << 10}               # bytes of a processor

def compile(capability, fn, const, dtype, warps=4, **kinds):
    '''-> (PTX, ttgir, programs that fit on a processor). Nothing may be spilled.'''
    def kind(name):
        if name in const:
            return "constexpr"
        if name in kinds:
            return kinds[name]
        if name in INTS | FLOATS | ROWS:
            return "*i32" if name in INTS else "*fp32" if name in FLOATS else "*" + dtype
        return "fp32" if name == "scale" else "i32"
    signature = {name: kind(name) for name in fn.arg_names}
    free = {fn.arg_names[p.num] for p in fn.params if p.do_not_specialize}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
               if kind[0] in "*i" and name not in free | {"H", "heads", "bs", "chunks"}}
    made = triton.compile(ASTSource(fn, signature, const, aligned),
                          target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile() as file:
        file.write(made.asm["cubin"])
        file.flush()
        used = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                              text=True).stdout
    assert "STACK:0 " in used, (fn.__name__, const, used)
    registers, shared = int(re.search("REG:([0-9]+)", used)[1]), made.metadata.shared
    programs = min(65536 // (32 * warps * registers), SHARED[capability] // (shared + 1024))
    print(capability, fn.__name__, dtype, const, kinds.get("k_cache", ""), registers, "registers,",
          shared, "bytes shared,", programs, "programs on a processor")
    return made.asm["ptx"], made.asm["ttgir"], programs

def decode(capability, dtype, D, G, int8=False):
    itemsize = 4 if dtype == "fp32" else 2
    fn, GP, DP, N = kernels.kernel_of(G, D, itemsize, capability >= 80)
    const = dict(G=G, GP=GP, D=D, DP=DP, BS=16, N=N, LSE_UNIT=1.0, INT8=int8, WIDE=False)
    kv = {"k_cache": "*i8", "v_cache": "*i8"} if int8 else {}
    ptx, ttgir, programs = compile(capability, fn, const, dtype, o="*fp32", **kv)
    case = capability, dtype, D, G, int8
    assert programs >= (3 if fn is kernels._decode else 2), case
    assert ".v4." in ptx or ".v2.b64" in ptx, case                  # reads of 16 bytes
    has_dot = capability >= 80 and dtype != "fp32"
    assert ("mma.sync" in ptx) == ("tt.dot" in ttgir) == has_dot, case
    # The next two steps of K and V are copied while this one is computed. sm_75 cannot do that:
    # there other programs run while one waits.
    buffers = re.findall(rf"local_alloc : .*memdesc<2x{N}x{DP}x", ttgir)
    assert len(buffers) == (2 if capability >= 80 else 0), case
    assert ("cp.async.cg" in ptx) == (capability >= 80), case       # of 16 bytes

for capability in map(int, sys.argv[1:]):
    half = "fp16" if capability < 80 else "bf16"
    for D, G in ((128, 1), (128, 8), (80, 7), (64, 4), (256, 2)):
        decode(capability, half, D, G)
    for G in (1, 8):
        decode(capability, "fp32", 128, G)
        decode(capability, half, 128, G, int8=True)
    N, C = kernels.kernel_of(8, 128, 2, capability >= 80)[3], kernels.MAX_CHUNKS
    int8 = {"cache": "*i8", "warps": 1}
    for dtype in (half, "fp32"):
        for fn, const, options in (
                (kernels._merge, dict(D=128, DP=128, N=N, C=C, LSE_UNIT=1.0), {}),
                (kernels._merge, dict(D=256, DP=256, N=N, C=C, LSE_UNIT=0.0), {}),
                (kernels._store, dict(D=128, WP=4096), {}),
                (kernels._store_int8, dict(D=128, DP=128), int8),
                (kernels._rotate, dict(HALF=64, HP=8, DP=64), {"warps": 2}),
                (kernels._swiglu, dict(BLOCK=1024), {})):
            ptx, _, programs = compile(capability, fn, const, dtype, **options)
            assert programs >= 4 and re.search(r"[.]v[24][.]", ptx), (fn.__name__, const)
    print("compiled for", capability, flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def compilation(request, tmp_path_factory):
    """A process that compiles, started before the first test, and the file that it prints to."""
    if not any("compiles_for_gpus" in item.name for item in request.session.items):
        yield
        return
    path = tmp_path_factory.mktemp("compile") / "printed"
    with open(path, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COMPILE, *map(str, CAPABILITIES)], stdout=file,
            stderr=file, cwd=Path(__file__).parents[1], env=os.environ | {"TRITON_INTERPRET": "0"})
    yield process, path
    process.kill()
    process.wait()


# ---- the CPU tier

@pytest.mark.parametrize("dtype, path", [
    ("bf16", "dot"), ("bf16", "fma"), ("fp16", "fma"), ("fp32", "fma"),
    ("int8", "int"), ("bf16", "portable"), ("fp16", "portable"), ("fp32", "portable"),
    ("int8", "portable")])
@pytest.mark.parametrize("H, Hkv, D, bs", [
    (4, 4, 64, 16), (3, 3, 96, 32), (6, 3, 80, 16), (4, 2, 128, 16), (9, 3, 96, 48),
    (8, 2, 128, 32), (8, 2, 96, 16), (7, 1, 64, 16), (8, 1, 256, 16), (16, 1, 128, 16),
    (16, 2, 32, 48), (16, 1, 20, 8)])
def test_cpu_attention_equals_reference(H, Hkv, D, bs, dtype, path):
    """Lengths around block and item edges, permuted and shared tables, NaN in unused slots and in
    the output; on one thread and on two."""
    if path not in cpu_attn.PATHS:
        pytest.skip("not on this processor")
    rng = np.random.default_rng([H, D])
    lens = [1, 2, bs - 1, bs, bs + 1, 255, 256, 257]
    lens += [int(rng.integers(600, 1300)), int(rng.integers(1300, 5000))]
    q, k, v, table, seq_lens = paged_case(rng, len(lens), H, Hkv, D, bs, lens, dtype)
    table[5], seq_lens[5] = table[7], 200           # two sequences may share blocks
    want_lse = np.empty(q.shape[:2])
    want = cpu_attn.paged_decode_reference(
        q, k, v, table, seq_lens, D ** -0.5, dtype, want_lse)
    dot = path == "dot" and D % 32 == 0
    for threads in THREADS:
        out, again, lse = (np.full(shape, np.nan, np.float32)
                           for shape in (q.shape, q.shape, q.shape[:2]))
        cpu_attn.set_threads(threads)
        cpu_attn.paged_decode(q, k, v, table, seq_lens, out, D ** -0.5, dtype, path)
        rounds = path == "int" and cpu_attn.serves(path, dtype, D, bs)  # q and weights to int16
        assert relative(out, want) < (3e-3 if dot else 1e-4 if rounds else 2e-6)
        cpu_attn.paged_decode(q, k, v, table, seq_lens, again, D ** -0.5, dtype, path, lse)
        assert np.array_equal(out, again)           # scratch kept between calls leaves no trace
        assert np.abs(lse - want_lse).max() < (3e-2 if dot else 1e-3 if rounds else 1e-5)


@pytest.mark.parametrize("path", cpu_attn.PATHS)
def test_cpu_attention_with_large_scores(path):
    """Scores of plus and minus 1e4: weights of 0 and 1, nothing overflows."""
    rng = np.random.default_rng(0)
    kind = "int8" if path == "int" else "bf16"
    q, k, v, table, lens = paged_case(rng, 3, 4, 2, 64, 16, [1, 300, 700], kind)
    q = np.rint(q).astype(np.float32)       # exact in bf16, so that both paths see the same scores
    q[q == 0] = 1
    out, lse, want_lse = np.empty_like(q), np.empty((3, 4), np.float32), np.empty((3, 4))
    cpu_attn.paged_decode(q, k, v, table, lens, out, 1e4 / 16, "bf16", path, lse)
    want = cpu_attn.paged_decode_reference(q, k, v, table, lens, 1e4 / 16, kind, want_lse)
    assert np.isfinite(out).all() and relative(out, want) < 3e-3
    assert relative(lse, want_lse) < {"dot": 5e-3, "int": 1e-4}.get(path, 1e-5)  # q is rounded


def test_cpu_attention_refuses_what_does_not_fit():
    q, k, v, table, lens = paged_case(np.random.default_rng(0), 2, 4, 2, 64, 16, [5, 9], "bf16")
    good = dict(q=q, k_cache=k, v_cache=v, block_table=table, seq_lens=lens, out=np.empty_like(q),
                scale=1.0)
    three_heads = dict(q=q[:, :3].copy(), out=np.empty((2, 3, 64), np.float32))
    for change, message in (
            (dict(q=q.astype(np.float64)), "q: expected float32"),
            (three_heads, "3 heads"),
            (dict(v_cache=v[:-1]), "v_cache"),
            (dict(block_table=table.astype(np.int64)), "block_table"),
            (dict(out=q[:1]), "out"),
            (dict(lse=np.empty((2, 3), np.float32)), "lse: expected float32"),
            (dict(seq_lens=np.array([0, 9], np.int32)), "seq_lens.*0..9"),
            (dict(dtype="int8"), "int8"),
            (dict(k_cache=k.view(np.int8), v_cache=v.view(np.int8)), "q: expected .*124"),
            (dict(seq_lens=np.array([5, 99], np.int32)), "seq_lens must lie in 1..32"),
            (dict(path="gpu"), "path 'gpu'"),
            (dict(q=np.asfortranarray(q)), "q: expected a C-contiguous")):
        with pytest.raises(ValueError, match=message):
            cpu_attn.paged_decode(**(good | change))
    with pytest.raises(ValueError, match="CPU threads"):
        cpu_attn.set_threads(10 ** 6)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_store_kv(dtype):
    rng = np.random.default_rng(0)
    _, k, v, _, _ = paged_case(rng, 2, 2, 2, 32, 16, [40, 40], dtype)
    new_k, new_v = (rng.integers(0, 60000, (20, 2, 32)).astype(k.dtype) for _ in "kv")
    slots = rng.permutation(k.shape[0] * 16)[:20].astype(np.int64)
    want_k, want_v = k.copy(), v.copy()
    want_k[slots // 16, :, slots % 16], want_v[slots // 16, :, slots % 16] = new_k, new_v
    cpu_attn.store_kv(new_k, new_v, k, v, slots)
    assert k.tobytes() == want_k.tobytes() and v.tobytes() == want_v.tobytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_store_kv_rounds_to_int8(dtype):
    """As kv_format does, to the bit, beside rows that stay; a row of zeros, and one with a large
    element."""
    rng = np.random.default_rng(0)
    _, k, v, _, _ = paged_case(rng, 2, 2, 2, 32, 16, [40, 40], "int8")
    rows = [torch.from_numpy(rng.standard_normal((20, 2, 32), dtype=np.float32)) for _ in "kv"]
    rows[0][3], rows[0][4, 1, 5] = 0, 1e4
    rows = [x.to(DTYPES[dtype]) for x in rows]
    slots = rng.permutation(k.shape[0] * 16)[:20].astype(np.int64)
    want = [torch.from_numpy(x.copy()) for x in (k, v)]
    for x, tier in zip(rows, want, strict=True):
        kv_format.write_rows(x, tier, torch.from_numpy(slots))
    cpu_attn.store_kv(*[gpu_attn.as_numpy(x) for x in rows], k, v, slots, dtype)
    assert [k.tobytes(), v.tobytes()] == [x.numpy().tobytes() for x in want]
    block, offset = slots // 16, slots % 16
    stored = cpu_attn.to_float64(k, "int8")[block, :, offset]
    x = rows[0].double().numpy()
    assert np.abs(stored - x).max(-1).max() <= np.abs(x).max() / 254 * 1.001
    assert not stored[3].any() and relative(stored, x) < 1e-2


# ---- the tiles

def plain_call(name, *args, result=None):
    """llvm_code.call, but AVX-512's own instructions become several that any processor has."""
    def number(x):
        return x.emit("bitcast", llvm_code.F32x16)
    if "pmadd" in name:             # int16 pairs -> int32 lanes
        wide = llvm_code.ir.VectorType(llvm_code.I32, args[0].type.count)
        x = args[0].emit("sext", wide) * args[1].emit("sext", wide)
        return (llvm_code.shuffle(x, x, range(0, wide.count, 2))
                + llvm_code.shuffle(x, x, range(1, wide.count, 2)))
    if "dpbf16ps" in name:          # bf16 pairs: lower and upper halves of int32 lanes
        acc, x, y = args
        return (acc + number(x << 16) * number(y << 16)
                + number(x & -65536) * number(y & -65536))
    if "mask.reduce" in name:
        return args[0] - llvm_code.call("llvm.floor.v16f32", args[0])
    if "mask.scalef" in name:       # 2^n has the bits (n + 127) << 23; below 2^-126 it is 0 here
        y, x = args[:2]
        power = llvm_code.larger(llvm_code.call("llvm.floor.v16f32", x), x.constant(-127.0, x.type))
        return y * number((power.emit("fptosi", llvm_code.I32x16) + 127) << 23)
    return llvm_code.call(name, *args, result=result)


ARITHMETICS = {
    "dot": cpu_vectors.Dot(), "AVX2": cpu_vectors.Fma("fp16", 8, 16),
    "AVX2, bf16": cpu_vectors.Fma("bf16", 8, 16), "AVX-512F": cpu_vectors.Fma("bf16", 16, 32),
    "NEON": cpu_vectors.Fma("fp32", 4, 32), "AVX2, int8": cpu_vectors.Int8(8, 16),
    "AVX-512, int8": cpu_vectors.Int8(16, 32), "NEON, int8": cpu_vectors.Int8(4, 32)}
ARGUMENTS = {"narrow": "iifi", "score": "iiiiiii", "unround": "iiifi", "softmax": "iiiiii",
             "round": "iiiii", "weigh": "iiiiiii", "finish": "iifii"}


@cache
def compiled_tiles(name):
    """{name: function} of the tiles in an arithmetic, and its work item. LLVM makes vectors of any
    width run anywhere, of several narrower ones. Nothing here enters Numba's cache on disk."""
    a = ARITHMETICS[name]
    made, functions = cpu_tiles.make_tiles(a), {"item": cpu_tiles.make_item(a)}
    for tile, kinds in ARGUMENTS.items():
        if tile not in ("round", "unround") or isinstance(a, cpu_vectors.Int8):
            names = ", ".join(f"x{i}" for i in range(len(kinds)))
            scope = {"tile": made[tile]}
            exec(f"def function({names}): tile({names})", scope)
            functions[tile] = njit(scope["function"])
    bits = {np.uint16: "u2", np.int16: "i2", np.uint32: "u4", np.int8: "i1"}[a.kv]
    rows = {np.uint16: "u2", np.float32: "f4", np.int16: "i2"}[a.q]
    with pytest.MonkeyPatch.context() as patch:
        if not cpu_vectors.HERE.has_dot:
            patch.setattr(cpu_vectors, "call", plain_call)
        for tile, function in functions.items():
            kinds = (f"{rows}[:,::1], {bits}[:,:,:,::1], {bits}[:,:,:,::1], f4[:,::1], i4[::1], "
                     "i8, f4, i8, f4[:,::1], u2[:,::1], f4[:,::1], f4[::1], f4[::1]")
            if tile != "item":
                kinds = ", ".join({"i": "i8", "f": "f4"}[kind] for kind in ARGUMENTS[tile])
            function.compile(f"void({kinds})")
            function.disable_compile()      # for other types it would be without the patches

    def caller(function):
        def run(*args):                     # of arrays, a tile takes the addresses
            function(*(x.ctypes.data if isinstance(x, np.ndarray) else x for x in args))
        return run
    return {tile: function if tile == "item" else caller(function)
            for tile, function in functions.items()}


def element_bits(x, kind):
    """float32 numbers that `kind` can hold -> its bits"""
    if kind == "bf16":
        return np.ascontiguousarray(x.view(np.uint32) >> 16, np.uint16)
    return x.astype({"fp16": np.float16, "fp32": np.float32, "int8": np.int8}[kind])


@pytest.mark.parametrize("T, name", [(T, name) for name, a in ARITHMETICS.items() for T in a.heads])
def test_tiles_equal_their_references(T, name):
    """An odd number of tokens, D that fills no wide group, and NaN where nothing may be read."""
    tiles, a = compiled_tiles(name), ARITHMETICS[name]
    dot, kind = name == "dot", getattr(a, "kind", "bf16")
    int8 = kind == "int8"
    rng, D, n, room = np.random.default_rng(T), 3 * 64 if int8 else 96, 37, 48
    order = np.arange(D).reshape(-1, a.dims)[:, a.order].ravel()
    q_order = np.arange(D) if dot else order
    if int8:
        q_order = np.arange(D).reshape(-1, a.dims // 2, 2).transpose(0, 2, 1).ravel()
    src = rng.standard_normal((T, D), dtype=np.float32)
    scale = np.float32(5e3 if int8 else 0.3)
    q, want = np.zeros((T, D), a.q), cpu_tiles.narrow_reference(src, scale)
    tiles["narrow"](q, src, scale, T * D)
    if int8:
        want = np.rint(want)
    elif dot:
        want = cpu_tiles.bf16(want)
    got = q if int8 or not dot else cpu_attn.to_float64(q, "bf16")
    assert np.array_equal(got, want[:, q_order])

    k, v = (rng.standard_normal((room, D), dtype=np.float32) for _ in "kv")
    if int8:
        k, v = (np.rint(30 * x).clip(-127, 127) for x in (k, v))
    elif kind != "fp32":    # numbers that bf16 and fp16 have
        k, v = (cpu_tiles.bf16(x).astype(np.float16).astype(np.float32) for x in (k, v))
        k, v = (cpu_tiles.bf16(x) for x in (k, v))
    k_bits, v_bits = element_bits(k, kind), element_bits(v, kind)
    row_bytes = D * k_bits.itemsize
    scores = np.full((room + 16, T), np.nan, np.float32)[:room]      # softmax writes past the end
    tiles["score"](T, scores, k_bits, row_bytes, q, room, k)
    want = cpu_tiles.score_reference(k, want)
    k_scales, v_scales = (rng.uniform(0.01, 0.02, room).astype(np.float32) for _ in "kv")
    k_scales[n:] = v_scales[n:] = np.nan
    if int8:
        assert np.array_equal(scores.view(np.int32), want)
        tiles["unround"](T, scores, k_scales, np.float32(1e-6), room)
        want = cpu_tiles.unround_reference(want, k_scales, 1e-6)
    assert relative(scores[:n], want[:n]) < 1e-6

    scores[n:] = np.nan
    maxima, sums = np.zeros(T + 16, np.float32), np.zeros(T + 16, np.float32)
    want, top, total = cpu_tiles.softmax_reference(scores[:n])
    weights = np.full((room // 2, T, 2), 0xFFFF, np.uint16) if dot else scores
    tiles["softmax"](T, scores, weights, n, maxima, sums)
    got = weights.copy()
    if dot:
        got = cpu_attn.to_float64(weights, "bf16").transpose(0, 2, 1).reshape(room, T)
    error = np.abs(got[:n] - want) / np.maximum(want, 1e-37)    # smaller ones may be flushed to 0
    assert error.max() < (2 ** -7 if dot else 1e-6) and not got[n:].any()   # one bf16 step
    assert np.array_equal(maxima[:T], top)
    assert np.allclose(sums[:T], got.sum(0), rtol=1e-6)
    assert np.allclose(sums[:T], total, rtol=1e-3 if dot else 1e-6)

    if int8:
        want, unit = cpu_tiles.round_reference(got, v_scales)
        buffer = np.zeros(64 + 2 * room * T, np.int8)
        weights, units = buffer[64:], buffer[:64].view(np.float32)[:T]
        tiles["round"](T, weights, scores, v_scales, room)
        got = weights.view(np.int16).reshape(room // 2, T, 2).transpose(0, 2, 1).reshape(room, T)
        assert np.allclose(units, unit, rtol=1e-6) and np.abs(got - want).max() <= 1
        assert not got[n:].any()
        got = got * units
    else:
        v_bits[n:] = 0x7FFF if kind != "fp32" else np.nan                      # NaN
    o = rng.standard_normal((T, D), dtype=np.float32)
    acc = np.ascontiguousarray(o[:, order])
    tiles["weigh"](T, acc, v_bits, row_bytes, weights, n, v)
    o = cpu_tiles.weigh_reference(o, v[:n], got[:n].astype(np.float32))
    assert relative(acc, o[:, order]) < 1e-6

    out = np.full((T, D), np.nan, np.float32)
    tiles["finish"](out, acc, np.float32(0.25), T * D, 0)
    want = cpu_tiles.finish_reference(out, o, 0.25, False)
    assert relative(out, want) < 1e-6
    tiles["finish"](out, acc, np.float32(3), T * D, 1)
    assert relative(out, cpu_tiles.finish_reference(want, o, 3.0, True)) < 1e-6


@pytest.mark.parametrize("name", ARITHMETICS)
@pytest.mark.parametrize("H, Hkv", [(2, 2), (6, 3), (9, 3), (14, 2), (20, 2)])
@pytest.mark.parametrize("D, bs, n", [(64, 16, 33), (192, 48, 100), (128, 16, 16)])
def test_a_work_item_of_tiles_equals_reference(H, Hkv, D, bs, n, name):
    """Every T, groups that fill their tiles or do not, and blocks in any order."""
    tiles, a = compiled_tiles(name), ARITHMETICS[name]
    dot, kind = name == "dot", getattr(a, "kind", "bf16")
    q, k, v, table, seq_lens = paged_case(np.random.default_rng(n), 1, H, Hkv, D, bs, [n], kind)
    G = H // Hkv
    T = cpu_tiles.heads_of_tile(a, G)
    P = -(-G // T) * T
    width = max(n, D) + 16
    q_rows, weights = np.empty((Hkv * P, D), a.q), np.empty((Hkv * P + 1, width), np.uint16)
    scores = np.full((Hkv * P + 1, width), np.nan, np.float32)
    o, out = np.empty((Hkv * P, D), np.float32), np.empty((H, D), np.float32)
    maxima, sums = (np.empty(Hkv * P + 16, np.float32) for _ in "ml")
    tiles["item"](q_rows, k.view(a.kv), v.view(a.kv), q[0], table[0], n, np.float32(D ** -0.5), T,
                  scores, weights, o, maxima, sums)
    lse = np.empty(H)
    want_lse = np.empty((1, H))
    want = cpu_attn.paged_decode_reference(q, k, v, table, seq_lens, D ** -0.5, kind, want_lse)[0]
    for h in range(H):
        g = h // G * P + h % G
        tiles["finish"](out[h], o[g], 1 / sums[g], D, 0)
        lse[h] = (maxima[g] + np.log2(sums[g])) * np.log(2)
    assert relative(out, want) < {"dot": 5e-3, "int8": 1e-4}.get(name if dot else kind, 2e-6)
    assert np.abs(lse - want_lse).max() < {"dot": 3e-2, "int8": 1e-3}.get(
        name if dot else kind, 1e-5)


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


@pytest.mark.parametrize("triple, cpu, lanes, conversions, product, int8_product", [
    (X86, "znver2", 8, {"fp16": "vcvtph2ps.*ymm", "bf16": "vpslld.*ymm", "fp32": "ymm"},
     r"vfmadd\d+ps.*ymm", "vpmaddwd.*ymm"),
    (X86, "cascadelake", 16, {"fp16": "vcvtph2ps.*zmm", "bf16": "vpmovzxwd.*zmm", "fp32": "zmm"},
     r"vfmadd\d+ps.*zmm", "vpdpwssd.*zmm"),
    (ARM, "neoverse-n1", 4, {"fp16": r"fcvtl\s+v", "bf16": r"shl\s+v", "fp32": r"ld[rp]\s+q"},
     r"fmla\s+v", r"smull2?\s+v"),
    (X86, "nehalem", 0, {}, None, None)])
def test_what_llvm_makes_of_the_tiles_for_other_processors(
        triple, cpu, lanes, conversions, product, int8_product):
    """Whole vectors are loaded, widened and multiplied, and no accumulator is spilled. No Arm
    machine has run them."""
    machine = llvm_code.target_machine(triple, cpu)
    vectors = cpu_vectors.find_vectors(machine)
    assert vectors.lanes == lanes and not vectors.has_dot
    found = {kind: a for (path, kind), a in vectors.arithmetics().items()}
    assert found.keys() == ({*conversions, "int8"} if lanes else set())
    for kind, a in found.items():
        expected = (int8_product,) if kind == "int8" else (conversions[kind], product)
        for write in (cpu_tiles.write_score, cpu_tiles.write_weigh):
            for T in (1, a.heads[-1]):
                code = llvm_code.assembly(machine, write, [llvm_code.I64] * 6, a, T)
                case = str(a), write.__name__, T
                assert all(re.search(pattern, code) for pattern in expected), (case, code)
                spills = re.findall(
                    r"v?mov(?:[au]ps|dq[au]\w*)\s+%[xyz]mm\d+, -?\d*\(%rsp|st[rp]\s+q.*\[sp",
                    code)
                assert len(spills) <= (8 if triple == ARM else 0), (case, spills)


def test_narrower_processors_get_the_tiles_that_they_have():
    """Numba compiles for the processor that NUMBA_CPU_NAME names: the path follows it."""
    if llvm_code.target_machine().triple.split("-")[0] != "x86_64" or not cpu_vectors.HERE.lanes:
        pytest.skip("needs an x86 processor with AVX2")
    path = "import cpu_attn; print(cpu_attn.fastest_path('fp16', 64, 16))"
    decode = """
import numpy as np
from kernels.test_kernels import paged_case, relative
q, k, v, table, lens = paged_case(np.random.default_rng(0), 2, 4, 2, 64, 16, [5, 700], "fp16")
out = np.empty_like(q)
cpu_attn.paged_decode(q, k, v, table, lens, out, 0.1, "fp16")
print(relative(out, cpu_attn.paged_decode_reference(q, k, v, table, lens, 0.1, "fp16")))
"""
    for cpu, code, want in (("nehalem", path, "portable"), ("znver2", path + decode, "fma")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True,
            text=True, env=os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""})
        assert done.returncode == 0, done.stderr
        found, *error = done.stdout.split()
        assert found == want and float((*error, 0)[0]) < 2e-6


def test_a_path_is_chosen_or_refused_before_any_work():
    assert cpu_attn.choose_path("auto", "fp16", 64, 16) == cpu_attn.fastest_path("fp16", 64, 16)
    assert cpu_attn.choose_path("portable", "fp16", 20, 8) == "portable"
    with pytest.raises(ValueError, match="cpu_attn 'avx': must be auto, .*portable"):
        cpu_attn.choose_path("avx", "fp16", 64, 16)
    if cpu_vectors.TILES:
        with pytest.raises(ValueError, match="does not serve fp32, heads of 20 and blocks of 8"):
            cpu_attn.choose_path("fma", "fp32", 20, 8)
        with pytest.warns(UserWarning, match="no tile.*heads of 20"):
            cpu_attn.choose_path("auto", "fp32", 20, 8)


def test_read_bandwidth(monkeypatch):
    """Nothing is left out of the readings: the sums say so."""
    data = np.random.default_rng(0).integers(0, 256, 512 * 37 + 100).astype(np.uint8)
    part = 512 * 18
    want = [data[i:i + part].view(np.uint32).sum() % 2 ** 32 for i in (0, part)]
    assert cpu_bandwidth._read(data, 2).tolist() == want
    monkeypatch.setattr(cpu_bandwidth, "DATA_BYTES", 1 << 20)
    assert cpu_bandwidth.host_read_bandwidth(rounds=1) > 0


# ---- the GPU tier

def backend(name, dtype, device=torch.device("cpu")):
    """A back end on the device it is tested on, or a skip."""
    if name == "triton":
        pytest.importorskip("triton")
        device = GPU
    return gpu_attn.choose(name, device, DTYPES[dtype]), device


@pytest.mark.parametrize("name", sorted(gpu_attn.BACKENDS))
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-6), ("bf16", 8e-3), ("fp16", 1e-3)])
def test_gpu_attention_equals_reference(name, dtype, tolerance):
    """store + prefill of a ragged batch, whole and after earlier positions, and paged decode,
    against float64."""
    rng, (attn, dev) = np.random.default_rng(5), backend(name, dtype)
    H, Hkv, D, bs, lens = 6, 2, 48, 16, [1, 37, 16]
    q, k, v, table, seq_lens = paged_case(rng, 3, H, Hkv, D, bs, lens, dtype)
    k, v = without_nan(k, dtype), without_nan(v, dtype)
    tk, tv = torch_cache(k, dtype, dev), torch_cache(v, dtype, dev)
    tq = torch.from_numpy(q).to(dev, tk.dtype)
    out, again = torch.full_like(tq, float("nan")), torch.full_like(tq, float("nan"))
    lse = torch.full((3, H), float("nan"), device=dev)
    tq = torch.cat((tq, tq), 1)[:, :H]              # a view, as q is one of the merged projection
    ints = torch.from_numpy(table[:, :3].copy()).to(dev), torch.from_numpy(seq_lens).to(dev)
    attn.decode(tq, tk, tv, *ints, out, D ** -0.5)
    want_lse = np.empty((3, H))
    want = cpu_attn.paged_decode_reference(
        tq.float().cpu().contiguous().numpy(), k, v, table, seq_lens, D ** -0.5, dtype, want_lse)
    assert relative(out, want) < tolerance
    attn.decode(tq, tk, tv, *ints, again, D ** -0.5, lse)
    dot = name == "numba" and cpu_attn.fastest_path(dtype, D, bs) == "dot"
    assert torch.equal(out, again)
    assert np.abs(lse.cpu().numpy() - want_lse).max() < (3e-2 if dot else 1e-5)

    n = sum(lens)
    qkv = rng.standard_normal((n, H + 2 * Hkv, D), dtype=np.float32)
    rows = torch.from_numpy(qkv).to(dev, tk.dtype).split((H, Hkv, Hkv), 1)
    out = torch.full_like(rows[0], float("nan"))
    attn.prefill(*rows, lens, lens, out, D ** -0.5)
    late = [1, 5, 16]       # the last rows of each prompt alone, as a later chunk of it has them
    ends = np.cumsum(lens)
    late_q = torch.cat([rows[0][end - m:end] for end, m in zip(ends, late, strict=True)])
    late_out = torch.full_like(late_q, float("nan"))
    attn.prefill(late_q, *rows[1:], late, lens, late_out, D ** -0.5)
    whole = torch.cat([out[end - m:end] for end, m in zip(ends, late, strict=True)])
    assert relative(late_out, whole.float().cpu().numpy()) < tolerance

    slots = np.concatenate([table[b, np.arange(m) // bs] * bs + np.arange(m) % bs
                            for b, m in enumerate(lens)])
    attn.store(rows[1], rows[2], tk, tv, torch.from_numpy(slots).to(dev))
    for array, stored in ((k, tk), (v, tv)):
        array[:] = gpu_attn.as_numpy(stored.cpu())
    start = 0
    for b, m in enumerate(lens):        # causal prefill = a decode of every row over those up to it
        every = np.arange(1, m + 1, dtype=np.int32)
        want = cpu_attn.paged_decode_reference(
            rows[0][start:start + m].float().cpu().numpy(), k, v, np.repeat(table[b:b + 1], m, 0),
            every, D ** -0.5, dtype)
        assert relative(out[start:start + m], want) < tolerance
        start += m


@pytest.mark.parametrize("name", sorted(gpu_attn.BACKENDS))
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-6), ("bf16", 8e-3), ("fp16", 1e-3)])
def test_two_halves_of_a_sequence_merge_by_their_log_sum_exps(name, dtype, tolerance):
    """out = sum_i e^(lse_i - lse) out_i with lse = log sum_i e^lse_i."""
    rng, (attn, dev) = np.random.default_rng(6), backend(name, dtype)
    H, Hkv, D, bs, lens, cut = 6, 2, 64, 16, [50, 130, 33], 2
    q, k, v, table, seq_lens = paged_case(rng, 3, H, Hkv, D, bs, lens, dtype)
    tk, tv = (torch_cache(without_nan(x, dtype), dtype, dev) for x in (k, v))
    tq = torch.from_numpy(q).to(dev, tk.dtype)

    def decode(blocks, lens):
        out, lse = torch.empty_like(tq), torch.empty(3, H, device=dev)
        attn.decode(tq, tk, tv, torch.from_numpy(table[:, blocks].copy()).to(dev),
                    torch.from_numpy(lens).to(dev), out, D ** -0.5, lse)
        return out.float(), lse
    first, first_lse = decode(slice(cut), np.full(3, cut * bs, np.int32))
    second, second_lse = decode(slice(cut, None), seq_lens - cut * bs)
    whole, whole_lse = decode(slice(None), seq_lens)
    lse = torch.logaddexp(first_lse, second_lse)
    merged = sum((part_lse - lse).exp()[:, :, None] * part
                 for part, part_lse in ((first, first_lse), (second, second_lse)))
    dot = name == "numba" and cpu_attn.fastest_path(dtype, D, bs) == "dot"
    assert (lse - whole_lse).abs().max() < (3e-3 if dot else 1e-5)
    assert relative(merged, whole.cpu().numpy()) < tolerance


@pytest.mark.parametrize("name", sorted(gpu_attn.BACKENDS))
@pytest.mark.parametrize("H, Hkv, D", [(6, 2, 48), (3, 3, 64), (8, 1, 20)])
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 8e-3), ("fp16", 1e-3)])
def test_a_gpu_tier_of_int8(H, Hkv, D, dtype, tolerance, name):
    """Rows are rounded as kv_format rounds them, and decode reads what is stored."""
    rng, (attn, dev), bs = np.random.default_rng(D), backend(name, dtype), 16
    lens = [1, 37, 16, 200]
    q, k, v, table, seq_lens = paged_case(rng, len(lens), H, Hkv, D, bs, lens, "int8")
    k, v = (torch.from_numpy(x).to(dev) for x in (k, v))
    for x in (k, v):
        kv_format.parts(x)[1].nan_to_num_()             # the engine's GPU tier holds no NaN
    rows = [torch.from_numpy(rng.standard_normal((9, Hkv, D), dtype=np.float32)) for _ in "kv"]
    rows = [x.to(dev, DTYPES[dtype]) for x in rows]
    slots = torch.from_numpy(np.r_[table[3, :8] * bs + 3, table[0, 0] * bs]).to(dev)
    want = [x.clone() for x in (k, v)]
    for x, tier in zip(rows, want, strict=True):
        kv_format.write_rows(x, tier, slots)
    attn.store(*rows, k, v, slots)
    for got, expected in zip((k, v), want, strict=True):
        (ints, scales), (want_ints, want_scales) = kv_format.parts(got), kv_format.parts(expected)
        assert (ints.int() - want_ints.int()).abs().max() <= (1 if name == "triton" else 0)
        assert torch.allclose(scales, want_scales, rtol=1e-6)
    tq = torch.from_numpy(q).to(dev, DTYPES[dtype])
    out = torch.full_like(tq, float("nan"))
    ints = torch.from_numpy(table).to(dev), torch.from_numpy(seq_lens).to(dev)
    attn.decode(tq, k, v, *ints, out, D ** -0.5)
    expected = cpu_attn.paged_decode_reference(
        tq.float().cpu().numpy(), k.cpu().numpy(), v.cpu().numpy(), table, seq_lens, D ** -0.5)
    assert relative(out, expected) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-6), ("bf16", 5e-3), ("fp16", 1e-3)])
@pytest.mark.parametrize("H, Hkv, D, bs", [
    (4, 4, 64, 16), (8, 2, 128, 16), (8, 1, 80, 24), (20, 1, 20, 8), (2, 2, 256, 16),
    (5, 1, 256, 32)])
def test_triton_decode_splits_and_merges(H, Hkv, D, bs, dtype, tolerance):
    """Lengths around chunk and block edges, in one chunk and in many, NaN in unused slots; padding
    stays untouched, in the log-sum-exps too."""
    kernels = pytest.importorskip("kernels.triton_kernels")
    rng = np.random.default_rng([H, D])
    lens = [1, bs, 128, 129, 300]
    q, k, v, table, seq_lens = paged_case(rng, len(lens) + 1, H, Hkv, D, bs, [*lens, 1], dtype)
    seq_lens[-1] = 0
    tk, tv = torch_cache(k, dtype, GPU), torch_cache(v, dtype, GPU)
    tq = torch.from_numpy(q).to(GPU, tk.dtype)
    ints = torch.from_numpy(table).to(GPU), torch.from_numpy(seq_lens).to(GPU)
    want_lse = np.empty((len(lens), H))
    want = cpu_attn.paged_decode_reference(
        tq[:-1].float().cpu().numpy(), k, v, table[:-1], seq_lens[:-1], D ** -0.5, dtype, want_lse)
    for chunks in (1, 3):
        out = torch.full_like(tq, float("nan"))
        lse = None if dtype == "fp16" else torch.full(q.shape[:2], float("nan"), device=GPU)
        kernels.paged_decode(tq, tk, tv, *ints, out, D ** -0.5, chunks, lse)
        assert relative(out[:-1], want) < tolerance and out[-1].isnan().all()
        if lse is not None:
            assert np.abs(lse[:-1].cpu().numpy() - want_lse).max() < 1e-5
            assert lse[-1].isnan().all()


def test_triton_store_rope_and_swiglu_equal_torch():
    """Bits of a store, its rows of padding dropped; RoPE in place and SwiGLU, on widths that fill
    no block."""
    kernels = pytest.importorskip("kernels.triton_kernels")
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g).bfloat16().to(GPU)
    qkv, k_cache, v_cache = draw(7, 5 + 6, 20), draw(4, 3, 8, 20), draw(4, 3, 8, 20)
    slots = torch.tensor([3, 31, -1, 8, 0, -1, 17], dtype=torch.int32, device=GPU)
    k, v = qkv[:, 5:8], qkv[:, 8:]
    want_k, want_v, live = k_cache.clone(), v_cache.clone(), slots >= 0
    gpu_attn.TorchAttention.store(None, k[live], v[live], want_k, want_v, slots[live])
    kernels.store(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, want_k) and torch.equal(v_cache, want_v)

    cos, sin = (t.to(GPU) for t in rope_table(PRESETS["tiny"], 30))
    x = draw(6, 11, 16).float()             # the interpreter cuts float32 to bf16; a GPU rounds
    y, positions = x.clone(), torch.tensor([0, 29, 5, 5, 1, 17], dtype=torch.int32, device=GPU)
    TorchOps.rotate_(x, cos, sin, positions, 9)
    kernels.rotate_(y, cos, sin, positions, 9)
    assert torch.equal(x[:, 9:], y[:, 9:]) and relative(y, x.cpu().numpy()) < 1e-6
    x = draw(5, 2 * 1100).float()
    assert relative(kernels.swiglu(x), TorchOps.swiglu(x.clone()).cpu().numpy()) < 1e-6


class Guards:
    """Tensors between regions of poison, which a kernel must neither read nor write: NaN where it
    reads, as that shows in its results, and 7 where it writes, as it might write NaN."""
    SIZE = 256

    def __init__(self):
        self.wholes = []

    def put(self, x, poison=float("nan")):
        """A copy of x, poison on both sides."""
        whole = torch.full((x.numel() + 2 * self.SIZE,), poison, dtype=x.dtype, device=GPU)
        self.wholes.append((whole, whole.clone()))
        return whole[self.SIZE:-self.SIZE].view(x.shape).copy_(x)

    def empty(self, *shape, dtype, device):
        """In place of torch.empty: what a kernel has not written is NaN."""
        return self.put(torch.full(shape, float("nan"), dtype=dtype, device=device), 7)

    def check(self):
        for whole, before in self.wholes:
            for side in (slice(self.SIZE), slice(-self.SIZE, None)):
                assert torch.equal(whole[side].view(torch.uint8), before[side].view(torch.uint8))


class Recorder:
    """A kernel that keeps its launches, to replay them with the same arguments and grids, as a
    CUDA graph does."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(partial(self.kernel[grid], *args, **kwargs))
            self.launches[-1]()
        return launch


@pytest.mark.parametrize("H, Hkv, dtype, kv, has_mma, tolerance", [
    (5, 1, "fp16", "fp16", True, 1e-3), (5, 1, "fp16", "fp16", False, 1e-3),
    (2, 2, "fp16", "int8", True, 1e-3), (5, 1, "fp16", "int8", False, 1e-3),
    (2, 2, "fp32", "fp32", True, 2e-6)])
def test_triton_decode_of_ragged_lengths(H, Hkv, dtype, kv, has_mma, tolerance, monkeypatch):
    """One long sequence among short ones and padding, under a wide table; then the same launches
    with other lengths. Poison around all tensors, in unused blocks and in unused table columns."""
    kernels = pytest.importorskip("kernels.triton_kernels")
    rng, guards, launches, D, bs = np.random.default_rng(H), Guards(), [], 40, 16
    first, second = [600, 3, 0, 130], [1, 0, 257, 600]
    q, k, v, table, _ = paged_case(rng, 4, H, Hkv, D, bs, np.maximum(first, second), kv)
    bad_block = int(table[0, -1])                       # of NaN alone, as it is not used
    wide = np.full((4, 4096 // bs), bad_block, np.int32)
    wide[:, :table.shape[1]] = table
    tk, tv = (guards.put(torch_cache(x, kv, GPU), -1 if kv == "int8" else float("nan"))
              for x in (k, v))                          # four bytes of int8 -1: NaN, as a scale
    tq = guards.put(torch.from_numpy(q).to(GPU, DTYPES[dtype]).repeat(1, 2, 1))
    tq[:, H:] = float("nan")                            # k and v of the merged projection
    out, lse = (guards.put(torch.full(shape, 7, dtype=dtype, device=GPU), 7)
                for shape, dtype in ((q.shape, tq.dtype), (q.shape[:2], torch.float32)))
    block_table = guards.put(torch.from_numpy(wide).to(GPU), bad_block)
    seq_lens = guards.put(torch.tensor(first, dtype=torch.int32, device=GPU), 4096)

    monkeypatch.setattr(kernels, "_gpu", lambda device: (4, has_mma))
    monkeypatch.setattr(torch, "empty", guards.empty)
    for name in ("_decode", "_decode_fma", "_merge"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    kernels.paged_decode(tq[:, :H], tk, tv, block_table, seq_lens, out, D ** -0.5, lse=lse)
    assert len(launches) == 2                           # a part for each chunk, and their sum
    for lens in (first, second):
        if lens is second:
            seq_lens.copy_(torch.tensor(lens))
            out.fill_(7)
            lse.fill_(7)
            for launch in tuple(launches):
                launch()
        live, want_lse = np.flatnonzero(lens), np.empty((3, H))
        want = cpu_attn.paged_decode_reference(
            tq[live, :H].float().cpu().numpy(), k, v, table[live],
            np.array(lens, np.int32)[live], D ** -0.5, kv, want_lse)
        assert relative(out[live], want) < tolerance
        assert np.abs(lse[live].cpu().numpy() - want_lse).max() < 1e-5
        padding = lens.index(0)
        assert (out[padding] == 7).all() and (lse[padding] == 7).all()
        guards.check()


def test_triton_split_follows_shapes():
    """Few programs: four for each of 132 processors, however wide the table is. Many: one chunk,
    unless it could be long."""
    kernels = pytest.importorskip("kernels.triton_kernels")
    assert kernels.split(8192, 8 * 8, 132) == kernels.split(2048, 8 * 8, 132) == 9
    assert kernels.split(4096, 64 * 32, 132) == 1 and kernels.split(32768, 64 * 32, 132) == 4
    assert kernels.split(200, 8, 132) == 2 and kernels.split(100000, 8, 132) == 32


def test_triton_store_rope_and_swiglu_keep_within_their_tensors():
    """Poison around all tensors, in the other columns of qkv, in the heads that are not rotated,
    and in rows of padding."""
    kernels = pytest.importorskip("kernels.triton_kernels")
    guards, nan = Guards(), float("nan")
    ints = partial(torch.tensor, dtype=torch.int32, device=GPU)
    for dtype in (torch.float16, torch.int8):
        qkv = guards.put(torch.randn(4, 5, 20).half().to(GPU))
        qkv[:, 0], qkv[2] = nan, nan
        blocks = torch.full((3, 2, 8, kv_format.row_width(20, dtype)), 1, dtype=dtype, device=GPU)
        caches = [guards.put(blocks, nan if dtype.is_floating_point else -1) for _ in "kv"]
        slots = ints([0, 23, -1, 9])
        kernels.store(qkv[:, 1:3], qkv[:, 3:], *caches, guards.put(slots, 5))
        live = slots >= 0
        for tier, rows in zip(caches, (qkv[:, 1:3], qkv[:, 3:])):
            want = blocks.clone()
            kv_format.write_rows(rows[live], want, slots[live])
            got, want = (kv_format.convert(x, torch.float32) for x in (tier, want))
            assert relative(got, want.cpu().numpy()) < 1e-2

    cos, sin = (guards.put(t.to(GPU)) for t in rope_table(PRESETS["tiny"], 30))
    x = guards.put(torch.randn(3, 11, 16, device=GPU), 7)
    x[:, 9:] = 7
    want, positions = x.clone(), ints([0, 29, 5])
    TorchOps.rotate_(want, cos, sin, positions, 9)
    kernels.rotate_(x, cos, sin, guards.put(positions, 1000), 9)
    assert relative(x[:, :9], want[:, :9].cpu().numpy()) < 1e-6 and (x[:, 9:] == 7).all()

    x = guards.put(torch.randn(3, 2 * 1100, device=GPU))
    got = guards.empty(3, 1100, dtype=x.dtype, device=GPU)
    kernels._swiglu[(3, 2)](x, got, 1100, BLOCK=1024)
    assert relative(got, TorchOps.swiglu(x.clone()).cpu().numpy()) < 1e-6
    guards.check()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_triton_compiles_for_gpus_that_are_not_here(capability, compilation):
    """Every kernel, to machine code: nothing spilled, reads of 16 bytes, several programs on a
    processor. Decode has matrix instructions on an A100 and an H100, and copies its next steps
    while it computes; on a T4 it has neither, and no product that is padded for them."""
    pytest.importorskip("triton")
    process, path = compilation
    process.wait(timeout=300)
    printed = path.read_text()
    assert f"compiled for {capability}" in printed.splitlines(), printed[-2000:]


def test_flash_attention_of_torch_2_11_and_later():
    """Causality, scale and grouped heads are asked for as a version's varlen_attn knows them."""
    kernels = pytest.importorskip("kernels.triton_kernels")
    q, k, out = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.empty(3, 4, 8)

    def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                   scale=None, window_size=(-1, -1)):
        assert key.shape == value.shape == query.shape and torch.equal(key[:, 0], key[:, 1])
        assert window_size == (-1, 0) and scale == 0.5 and return_aux is None
        assert cu_seq_q.tolist() == [0, 2, 3] and cu_seq_k.tolist() == [0, 2, 3]
        assert (max_q, max_k) == (2, 2)
        return query + 1

    def torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                   scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None):
        assert window_size == (-1, 0) and enable_gqa and scale == 0.5 and key.shape[1] == 2
        return query + 2
    attn, _ = backend("triton", "fp32")
    assert attn.ops is kernels and attn.padded
    for i, fake in enumerate((torch_2_11, torch_2_12), 1):
        attn.use_flash(fake)
        assert attn.describe() == "Triton decode, FlashAttention prefill"
        attn.prefill(q, k, k, [2, 1], [2, 1], out, 0.5)
        assert torch.equal(out, q + i)

    source = importlib.util.find_spec("torch.nn.attention.varlen").origin   # seconds to import
    here = next(f for f in ast.parse(Path(source).read_text()).body
                if isinstance(f, ast.FunctionDef) and f.name == "varlen_attn")
    assert [a.arg for a in here.args.args[5:]] == ["max_q", "max_k"]
    assert {"scale", "window_size"} <= {a.arg for a in here.args.kwonlyargs}


def test_flash_attention_is_refused_with_a_reason(monkeypatch):
    capability = itertools.cycle([(7, 5), (9, 0), (9, 0)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: next(capability))
    cuda = torch.device("cuda")
    assert gpu_attn.why_no_flash(torch.device("cpu"), torch.bfloat16) == "no CUDA"
    assert "compute capability 8.0" in gpu_attn.why_no_flash(cuda, torch.bfloat16)
    assert "float32" in gpu_attn.why_no_flash(cuda, torch.float32)
    assert gpu_attn.why_no_flash(cuda, torch.bfloat16) == ""


def test_back_ends_are_chosen_by_name_or_refused():
    cpu = torch.device("cpu")
    auto = gpu_attn.choose("auto", cpu, torch.float32)
    assert auto.describe().startswith("Numba decode, torch prefill")
    with pytest.raises(ValueError, match="gpu_attn 'flash': must be auto, torch, numba, triton"):
        gpu_attn.choose("flash", cpu, torch.float32)
    with pytest.raises(ValueError, match="on CUDA take triton"):
        gpu_attn.choose("numba", torch.device("cuda"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        if importlib.util.find_spec("triton"):
            with pytest.raises(ValueError, match="needs a CUDA GPU"):
                gpu_attn.choose("triton", cpu, torch.float32)


def test_a_back_end_has_all_members():
    """What model.py may use of any back end is what Backend lists."""
    members = {name for name in vars(gpu_attn.Backend) if not name.startswith("_")}
    assert members == {"padded", "ops", "products", "describe", "store", "prefill", "decode"}
    for back_end in gpu_attn.BACKENDS.values():
        assert issubclass(back_end, gpu_attn.Backend)
        assert all(getattr(back_end, name) is not getattr(gpu_attn.Backend, name)
                   for name in members - {"padded", "ops", "products"})
