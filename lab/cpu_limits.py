"""How fast CPU attention reads the KV cache, as a share of the machine's read bandwidth.

    python -m lab.cpu_limits [--threads 2] [--rounds 15] [--dtypes fp16,int8] [--peers]

K and V take 256 MB or more, which no cache holds. Their blocks lie in a random order that changes
each round. Machines drift: so the candidates take turns, the bandwidth is measured right before
and after each run, and a run counts only if the two agree within 12 %. With several dtypes the
tokens per second are compared, too. Then follows how fast one thread is when K and V lie in its
cache, beside the peak of its units. The last line is JSON.
Knows nothing of the engine but cpu_attn. Test: pytest lab -k limits
"""
import json
import statistics
import sys
import time
from functools import partial

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic
from tqdm import tqdm

import cpu_attn
from kernels.cpu_bandwidth import DATA_BYTES, make_cache, read_bandwidth
from kernels.cpu_vectors import HERE
from kernels.llvm_code import F32, I32, Value, call, loop, variable
from options import Parser

MAX_DRIFT = 0.12            # of the bandwidth during a run that counts
MIN_KV_BYTES = 256 << 20
D, BLOCK = 128, 16
HEADS = {"MHA 32": (32, 32), "GQA 32/8": (32, 8), "GQA 64/8": (64, 8)}      # (H, Hkv)
LENGTHS = {"B=32 L=1024": [1024] * 32, "B=64 L=256": [256] * 64, "B=16 L=1024": [1024] * 16,
           "B=4 L=4096": [4096] * 4, "B=1 L=4096": [4096],
           "B=16 uneven": [97 + 211 * i for i in range(16)]}


def int8_cache(shape):
    """A new int8 cache of this shape [num_blocks, Hkv, bs, D]: random rows, equal scales."""
    *outer, bs, D = shape
    flat = np.empty((*outer, bs * (D + cpu_attn.SCALE_BYTES)), np.int8)
    flat[:] = make_cache((bs * flat.shape[-1],)).view(np.int8)[:flat.shape[-1]]
    flat[..., bs * D:].view(np.float32)[:] = 0.02
    return flat.reshape(*outer, bs, -1)


def ours(q, k, v, lens, path, dtype):
    """Candidate: cpu_attn.paged_decode on one of its code paths. k, v: bits of 16-bit numbers."""
    if dtype == "int8":
        k, v = int8_cache(k.shape), int8_cache(v.shape)
    out, seq_lens = np.empty_like(q), np.array(lens, np.int32)

    def run(table):
        start = time.perf_counter()
        cpu_attn.paged_decode(q, k, v, table, seq_lens, out, D ** -0.5, dtype, path)
        return time.perf_counter() - start
    return run


def torch_peer(q, k, v, lens):
    """Candidate: scaled_dot_product_attention, one sequence after the other.

    Its K and V are gathered from the blocks beforehand; that time does not count.
    """
    q = torch.from_numpy(q).bfloat16()

    def gather(cache, blocks, n):           # -> [1, Hkv, n, D]
        kv = cache[blocks].transpose(1, 0, 2, 3).reshape(1, cache.shape[1], -1, D)
        return torch.from_numpy(kv).view(torch.bfloat16)[:, :, :n]

    def run(table):
        kv = [[gather(cache, blocks[:-(-n // BLOCK)], n) for cache in (k, v)]
              for blocks, n in zip(table, lens, strict=True)]
        start = time.perf_counter()
        for i, (k_i, v_i) in enumerate(kv):
            torch.nn.functional.scaled_dot_product_attention(
                q[i:i + 1, :, None], k_i, v_i, enable_gqa=True)
        return time.perf_counter() - start
    return run


def compare(heads, lens, threads, rounds, candidates, data):
    """Time the candidates on one case.

    heads: (H, Hkv). lens: tokens of each sequence. data: uint8, for measuring the bandwidth.
    candidates: {name: f(q, k, v, lens)}; f returns run(block table) -> seconds.
    Returns {name: {"share", "share_min", "share_max", "gb_s", "ms", "rounds"}, "bandwidth_gb_s"}.
    """
    (H, Hkv), B = heads, len(lens)
    rng = np.random.default_rng(1)
    width = -(-max(lens) // BLOCK)
    num_blocks = max(MIN_KV_BYTES // (2 * Hkv * BLOCK * D * 2), B * width)
    k, v = (make_cache((num_blocks, Hkv, BLOCK, D)) for _ in "kv")
    q = rng.standard_normal((B, H, D), dtype=np.float32)
    runs = {name: prepare(q, k, v, lens) for name, prepare in candidates.items()}
    elements = 2 * sum(lens) * Hkv * D
    kv_gb = {name: elements * bytes_of(name) / 1e9 for name in runs}
    speeds, bandwidths = {name: [] for name in runs}, []
    for i in range(rounds + 1):
        for name, run in runs.items():
            table = rng.permutation(num_blocks)[:B * width].astype(np.int32).reshape(B, width)
            before = read_bandwidth(data, threads)
            seconds = run(table)
            after = read_bandwidth(data, threads)
            if i and abs(before / after - 1) < MAX_DRIFT:   # the first round is warm-up
                bandwidths.append((before + after) / 2)
                gb_s = kv_gb[name] / seconds
                speeds[name].append((gb_s, gb_s / bandwidths[-1], 1e3 * seconds))
    found = {}
    for name, measured in speeds.items():
        if measured:
            gb_s, shares, ms = zip(*measured, strict=True)
            found[name] = {"share": statistics.median(shares),
                           "share_min": min(shares), "share_max": max(shares),
                           "gb_s": statistics.median(gb_s), "ms": statistics.median(ms),
                           "rounds": len(measured)}
    bandwidth = statistics.median(bandwidths) if bandwidths else float("nan")
    return found | {"bandwidth_gb_s": bandwidth}


def bytes_of(name):
    """Bytes that an element of K or V takes with a candidate."""
    return 1 + cpu_attn.SCALE_BYTES / D if name.endswith("int8") else 2


def hot_speed(heads, path, dtype, rounds=50):
    """10^9 multiply-adds a second of one thread where K and V lie in its cache: 8 sequences of 512
    tokens in the same 4 blocks. Only the arithmetic sets this limit. The best of some rounds."""
    (H, Hkv), B, n = heads, 8, 512
    rng = np.random.default_rng(1)
    k, v = (make_cache((4, Hkv, BLOCK, D)) for _ in "kv")
    q = rng.standard_normal((B, H, D), dtype=np.float32)
    table = np.tile(np.arange(4, dtype=np.int32), (B, n // BLOCK // 4))
    run, threads = ours(q, k, v, [n] * B, path, dtype), numba.get_num_threads()
    cpu_attn.set_threads(1)
    seconds = min(run(table) for _ in range(rounds + 1))
    cpu_attn.set_threads(threads)
    return 2 * B * n * H * D / seconds / 1e9


CHAINS = 12             # of multiply-adds that wait for each other: enough to keep all units busy


@intrinsic
def _multiply_adds(_, n):
    """n multiply-adds of float32 vectors in each chain. Returns one of the numbers."""
    def code(context, builder, signature, args):
        n, kind = Value(builder, args[0]), ir.VectorType(F32, HERE.lanes)
        chains = [variable(n.constant(1.0 + i, kind)) for i in range(CHAINS)]
        with loop(n):
            for x in chains:
                call(f"llvm.fma.v{HERE.lanes}f32", x.emit("load"), n.constant(0.5, kind),
                     n.constant(0.25, kind)).emit("store", x)
        total = sum((x.emit("load") for x in chains[1:]), chains[0].emit("load"))
        return total.emit("extract_element", I32(0)).value
    return types.float32(types.int64), code


@njit
def _run_multiply_adds(n):
    return _multiply_adds(n)


def multiply_add_peak(n=300_000, rounds=20):
    """10^9 float32 multiply-adds a second of one thread: the best of some rounds. NaN where there
    are no vectors of them."""
    if not HERE.lanes:
        return float("nan")
    _run_multiply_adds(1)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        _run_multiply_adds(n)
        seconds.append(time.perf_counter() - start)
    return CHAINS * HERE.lanes * n / min(seconds) / 1e9


def measure_hot(names):
    """The arithmetic limits, printed: {case: {candidate: multiply-adds}} and the units' peak."""
    peak = multiply_add_peak()
    print(f"\none thread, K and V in its cache; peak {peak:.0f} G multiply-adds/s in float32")
    found = {}
    for kind, (H, Hkv) in HEADS.items():
        found[kind] = {name: hot_speed((H, Hkv), *name.split()) for name in names}
        cells = "".join(
            f"{name:>16s} {rate * Hkv / H * bytes_of(name):5.1f} GB/s, {rate / peak:4.0%} of peak"
            for name, rate in found[kind].items())
        print(f"{kind:24s}{cells}")
    return {"multiply_add_peak_g": peak, "multiply_adds_g": found}


def describe(found):
    """A candidate's outcome as a cell of the table; None if no run of it counts."""
    if found is None:
        return "-"
    share, low, high = (100 * found[key] for key in ("share", "share_min", "share_max"))
    return (f"{found['gb_s']:5.1f} GB/s {share:3.0f} % [{low:2.0f}-{high:3.0f}] "
            f"{found['rounds']:2d}x")


def main(argv=None):
    parser = Parser("CPU decode attention against read bandwidth.")
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case")
    parser.add_argument("--dtypes", default="bf16", metavar="D,D",
                        help="of the cache: bf16, fp16, int8")
    parser.add_argument("--peers", action="store_true", help="add torch's attention, in bf16")
    args = parser.parse_args(argv)
    try:
        cpu_attn.set_threads(args.threads)
    except ValueError as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(args.threads)
    dtypes = args.dtypes.split(",")
    if unknown := {*dtypes} - {"bf16", "fp16", "int8"}:
        sys.exit(f"error: --dtypes {unknown.pop()}: must be bf16, fp16 or int8")
    paths = cpu_attn.PATHS if len(dtypes) == 1 else cpu_attn.PATHS[:-1]     # else no plain loops
    candidates = {f"{path} {dtype}": partial(ours, path=path, dtype=dtype)
                  for dtype in dtypes for path in paths
                  if cpu_attn.serves(path, dtype, D, BLOCK)}
    if args.peers:
        candidates["torch"] = torch_peer
    data = make_cache(DATA_BYTES // 2).view(np.uint8)
    read_bandwidth(data, args.threads)      # compiles
    cpu = binding.get_host_cpu_name()
    features = [name for name, there in binding.get_host_cpu_features().items()
                if there and name.startswith(("avx512", "avx2", "neon", "bf16"))]
    print(f"threads    {args.threads}\nCPU        {cpu}: {', '.join(sorted(features))}\n"
          f"paths      {', '.join(candidates)}\n"
          f"bandwidth  {read_bandwidth(data, args.threads):.1f} GB/s now; measured again "
          "around every run\n")
    names = "".join(f"{name:>30s}" for name in candidates)
    print(f"{'':24s}{'bandwidth':>10s}  {names}")
    results = {}
    bar = tqdm(total=len(HEADS) * len(LENGTHS), disable=None, leave=False)
    try:
        for kind, heads in HEADS.items():
            for case, lens in LENGTHS.items():
                name = f"{kind} {case}"
                found = results[name] = compare(
                    heads, lens, args.threads, args.rounds, candidates, data)
                cells = "".join(f"{describe(found.get(c)):>30s}" for c in candidates)
                first = found.get(next(iter(candidates)))
                for c in candidates if len(dtypes) > 1 else ():
                    if c.endswith("int8") and first and c in found:
                        cells += f"  {first['ms'] / found[c]['ms']:.2f}x tokens/s"
                tqdm.write(f"{name:24s}{found['bandwidth_gb_s']:5.1f} GB/s  {cells}")
                bar.update()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    bar.close()
    hot = measure_hot([name for name in candidates if name != "torch"])
    print(json.dumps({"threads": args.threads, "cpu": cpu, "dtypes": dtypes,
                      "block_size": BLOCK, "head_dim": D, "results": results, "hot": hot}))


if __name__ == "__main__":
    main()
