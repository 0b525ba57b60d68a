"""The paper's experiments, redrawn on simulated testbeds, and how far the strategies stay from the fluid limit.

    python bench.py --figure 6c        load-latency, T4             python bench.py --figure 8     full offload, A10G
    python bench.py --figure 10a       four hosts of an A10G        python bench.py --figure 9     peaks on three GPUs
    python bench.py --figure grid      eight testbeds, eight workloads, four KV budgets

Every point is one run of bench.py's own loop on the virtual clock; points run side by side on all cores. The paper's
points are read off its plots (a few percent either way) and printed beside ours; nothing is fitted to them here.
"""
import json
import math
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

import bench
from checkpoint import load_config
from neo import LLM
from perfmodel import find_testbed
from startup import BLOCK_SIZE, GIB
from workload import Workload, draw_arrivals, draw_requests, fit_requests

# Figure 6c: seconds per token at request rates; T4, Llama-2-7B, OSC
PAPER_6C = {"neo": {0.5: 0.11, 1.5: 0.18, 2.5: 0.28, 3.1: 0.42, 3.3: 0.54, 3.5: 1.03, 3.7: 1.53},
            "gpu-only": {0.2: 0.08, 0.4: 0.13, 0.5: None}}                  # vLLM; a wall at about 0.5
# Figure 10a: throughput over GPU-only at output lengths; A10G, Llama-3-8B, 1000 tokens in
OUTPUTS = 50, 100, 200, 300, 400
PAPER_10A = {"g5.2xlarge": (1.04, 1.12, 1.065, 1.035, 1.015), "g5.4xlarge": (1.03, 1.133, 1.08, 1.04, 1.015),
             "g5.8xlarge": (1.035, 1.297, 1.225, 1.155, 1.10), "g5.16xlarge": (1.035, 1.30, 1.735, 1.793, 1.465)}
PAPER_9 = {"t4": 7.5, "g5.4xlarge": 1.26, "2xh100": 1.14}                    # peaks over output lengths
T4 = dict(model="llama-7b", simulate="t4", gpu_blocks=54, cpu_mem=20e9 / GIB, max_batch_tokens=832)
A10G = dict(model="llama-8b", gpu_blocks=1650, max_batch_tokens=20480)
H100 = dict(model="llama-70b", simulate="2xh100", max_batch_tokens=20480)
GRID_BEDS = {"t4": "llama-7b", "g5.4xlarge": "llama-8b", "g5.16xlarge": "llama-8b", "l4": "llama-8b", "4090": "llama-8b",
             "a100": "llama-13b", "2xh100": "llama-70b", "h200": "llama-70b"}
GRID_WORK = (*((1000, o) for o in (20, 50, 100, 200, 400)), "osc", "azure-code", "azure-conv")
GRID_BUDGETS = 0.01, 0.05, 0.2, 0.5     # of the KV that GRID_RESIDENT mean requests need
GRID_RESIDENT = 256


def point(spec):
    """One simulated run -> its result. spec: strategy, workload ((tokens in, tokens out) or a data set's name), n, rate,
    seed, dataset_path, and LLM's arguments; kv_share, in place of gpu_blocks, sizes the GPU tier for the workload."""
    spec = dict(spec)
    workload, n, rate, strategy = (spec.pop(k) for k in ("workload", "n", "rate", "strategy"))
    seed, path, share = spec["seed"], spec.pop("dataset_path", None), spec.pop("kv_share", None)
    named = isinstance(workload, str)
    rng = np.random.default_rng(seed)
    ins, outs, source = draw_requests(SimpleNamespace(dataset_name=workload if named else "random", dataset_path=path),
                                            n, *((0, 0) if named else workload), rng)
    ins, outs, clipped = fit_requests(ins, outs, min(8000, load_config(spec["model"]).max_position))
    longest = max(map(sum, zip(ins, outs)))
    if share:
        mean = statistics.fmean(i + o / 2 for i, o in zip(ins, outs))
        spec["gpu_blocks"] = math.ceil(max(share * GRID_RESIDENT * mean, longest) / BLOCK_SIZE)
        spec["simulate"] = find_testbed(spec["simulate"], gpu_gb=2048, host_gb=2048)    # the subject is not what fits
    llm = LLM(spec.pop("model"), strategy, max_model_len=longest, **spec)
    work = Workload([[0] * i for i in ins], outs, draw_arrivals(rate, n, rng), source, clipped)
    return bench.serve(llm, strategy, work, quiet=True)[0]


def run(specs, label):
    """Simulate every spec of {key: spec}, on all cores; {key: result} of those done, should Ctrl-C come."""
    results = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        try:
            for key, result in tqdm(zip(specs, pool.map(point, specs.values())), label, len(specs), disable=None):
                results[key] = result
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("interrupted: only what was done is shown", file=sys.stderr)
    return results


def rate_at(curve, latency):
    """The request rate at which a {rate: latency} curve first reaches `latency`, straight lines between its points."""
    points = sorted((r, t) for r, t in curve.items() if t is not None)
    for (r0, t0), (r1, t1) in zip(points, points[1:]):
        if t0 <= latency <= t1:
            return r0 + (r1 - r0) * (latency - t0) / (t1 - t0)
    return points[-1][0] if points and points[-1][1] < latency else points[0][0]


def figure_6c(args):
    rates = {"neo": (*PAPER_6C["neo"], 4.0), "gpu-only": (*PAPER_6C["gpu-only"], 0.6, 0.7)}
    results = run({(s, r): T4 | dict(strategy=s, workload="osc", n=args.num_prompts or 2000, rate=r, seed=args.seed,
                                     dataset_path=args.dataset_path) for s in rates for r in rates[s]}, "figure 6c")
    lines, curves = [f"{'strategy':10s}{'req/s':>7s}{'ours, s/token':>15s}{'paper':>8s}{'ratio':>8s}"], {}
    for (s, r), result in results.items():
        ours, paper = result["per_token_latency_ms"] / 1e3, PAPER_6C[s].get(r)
        curves.setdefault(s, {})[r] = ours
        lines.append(f"{s:10s}{r:7.1f}{ours:15.2f}" + (f"{paper:8.2f}{ours / paper:8.2f}" if paper else f"{'-':>8s}{'-':>8s}"))
    if len(curves) == 2:
        for at in (0.3, 1.0):
            neo, base = rate_at(curves["neo"], at), rate_at(curves["gpu-only"], at)
            lines.append(f"at {at} s per token: neo {neo:.2f}, gpu-only {base:.2f} requests/s: {neo / base:.1f}x")
    return results, lines, {s: (list(c), list(c.values())) for s, c in curves.items()}, ("requests / s", "s per token")


def ratios(args, name, beds, strategies, length, paper=None):
    """Throughput over gpu-only at output lengths: beds {label: LLM arguments}, strategies beside gpu-only, tokens in."""
    n = args.num_prompts or 1000
    results = run({(bed, s, o): spec | dict(strategy=s, workload=(length[bed], o), n=n, rate=math.inf, seed=args.seed)
                   for bed, spec in beds.items() for o in OUTPUTS for s in ("gpu-only", *strategies)}, f"figure {name}")
    lines, curves = [f"{'':34s}" + "".join(f"{o:>8d}" for o in OUTPUTS) + "  tokens out"], {}
    for bed in beds:
        for s in strategies:
            ours = [results[bed, s, o]["output_throughput"] / results[bed, "gpu-only", o]["output_throughput"]
                    for o in OUTPUTS if (bed, s, o) in results and (bed, "gpu-only", o) in results]
            curves[f"{bed} {s}"] = OUTPUTS[:len(ours)], ours
            lines.append(f"{bed + ' ' + s:34s}" + "".join(f"{x:8.3f}" for x in ours))
            if paper and bed in paper and s == "neo":
                lines.append(f"{'  paper':34s}" + "".join(f"{x:8.3f}" for x in paper[bed]))
                lines.append(f"{'  ours / paper':34s}" + "".join(f"{x / y:8.2f}" for x, y in zip(ours, paper[bed])))
            limit = [results[bed, s, o]["fluid_request_rate"] / results[bed, "gpu-only", o]["request_throughput"]
                     for o in OUTPUTS[:len(ours)]]
            lines.append(f"{'  fluid limit':34s}" + "".join(f"{x:8.2f}" for x in limit))
    return results, lines, curves, ("tokens out", "throughput / gpu-only")


def figure_8(args):
    bed = {"g5.4xlarge": A10G | {"simulate": "g5.4xlarge"}}
    return ratios(args, "8", bed, ("symmetric", "serial", "neo"), {"g5.4xlarge": 1000})


def figure_10a(args):
    beds = {bed: A10G | {"simulate": bed} for bed in PAPER_10A}
    return ratios(args, "10a", beds, ("neo",), dict.fromkeys(beds, 1000), PAPER_10A)


def figure_9(args):
    beds = {f"{spec['simulate']}, {i} in": spec for spec, ins in (
        (T4, (100, 300)), (A10G | {"simulate": "g5.4xlarge"}, (500, 1000, 2000)), (H100, (1000, 2000))) for i in ins}
    results, lines, curves, axes = ratios(args, "9", beds, ("neo",), {b: int(b.split()[1]) for b in beds})
    for bed, peak in PAPER_9.items():
        ours = [y for label, (_, ys) in curves.items() if label.startswith(bed + ",") for y in ys]
        if ours:
            lines.append(f"peak on {bed}: ours {max(ours):.2f}, paper {peak}, ratio {max(ours) / peak:.2f}; least {min(ours):.2f}")
    return results, lines, curves, axes


def figure_grid(args):
    n = args.num_prompts or 500
    keys = [(bed, work, share) for bed in GRID_BEDS for work in GRID_WORK for share in GRID_BUDGETS]
    results = run({(*k, s): dict(model=GRID_BEDS[k[0]], simulate=k[0], workload=k[1], kv_share=k[2], n=n, rate=math.inf,
                                 seed=args.seed, strategy=s, max_batch_tokens=8192) for k in keys for s in ("gpu-only", "neo")},
                  "grid")
    done = [k for k in keys if (*k, "neo") in results]
    over = {k: results[(*k, "neo")]["output_throughput"] / results[(*k, "gpu-only")]["output_throughput"] for k in done}
    share = {k: results[(*k, "neo")]["fluid_share"] for k in done}
    mean = lambda values: math.exp(statistics.fmean(map(math.log, values)))
    lines = [f"{'':14s}{'neo / gpu-only':>30s}{'neo / fluid limit':>30s}",
             f"{'':14s}" + 2 * f"{'mean':>10s}{'worst':>10s}{'best':>10s}"]
    for label, of in [(b, lambda k, b=b: k[0] == b) for b in GRID_BEDS] + [
            (str(w), lambda k, w=w: k[1] == w) for w in GRID_WORK] + [
            (f"{100 * x:g} % KV", lambda k, x=x: k[2] == x) for x in GRID_BUDGETS] + [("all", lambda k: True)]:
        some = [k for k in done if of(k)]
        if some:
            lines.append(f"{label:14s}" + "".join(f"{mean([v[k] for k in some]):10.3f}{min(v[k] for k in some):10.3f}"
                                                  f"{max(v[k] for k in some):10.3f}" for v in (over, share)))
    worst = sorted(done, key=over.get)[:5]
    lines += ["least over gpu-only: " + "; ".join(f"{' '.join(map(str, k))}: {over[k]:.3f}" for k in worst)]
    return results, lines, {b: ([100 * x for x in GRID_BUDGETS], [mean([over[k] for k in done if k[0] == b and k[2] == x])
                                for x in GRID_BUDGETS]) for b in GRID_BEDS if len(done) == len(keys)}, (
        "GPU KV budget, %", "throughput / gpu-only")


FIGURES = {"6c": figure_6c, "8": figure_8, "9": figure_9, "10a": figure_10a, "grid": figure_grid}


def plot(path, name, curves, axes):
    """Lines of {label: (xs, ys)}; Figure 6c with the paper's points."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(7, 4.2))
    paper = {"6c": {s: ([r for r, t in c.items() if t], [t for t in c.values() if t]) for s, c in PAPER_6C.items()},
             "10a": {f"{b} neo": (OUTPUTS, ys) for b, ys in PAPER_10A.items()}}.get(name, {})
    for i, (label, (xs, ys)) in enumerate(curves.items()):
        ax.plot(xs, ys, f"C{i}o-", label=label)
        if label in paper:
            ax.plot(*paper[label], f"C{i}x--", alpha=0.6, label=f"{label}, paper")
    if name == "6c":
        ax.set_ylim(0, 2)
    ax.set(xlabel=axes[0], ylabel=axes[1], title=f"Figure {name}, simulated" if name != "grid" else "Grid, simulated")
    ax.legend(fontsize=7)
    ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args):
    """Run one figure: print the table, write JSON and plot as asked. Returns the exit status."""
    if args.figure not in FIGURES:
        print(f"error: unknown figure {args.figure!r}: choose one of {', '.join(FIGURES)}", file=sys.stderr)
        return 1
    results, lines, curves, axes = FIGURES[args.figure](args)
    print("\n".join(lines))
    if args.save_result or args.result_filename:
        path = args.result_filename or f"figure-{args.figure}.json"
        keep = "output_throughput", "request_throughput", "per_token_latency_ms", "fluid_request_rate", "fluid_share"
        Path(path).write_text(json.dumps({
            "config": {"figure": args.figure, "seed": args.seed, "num_prompts": args.num_prompts}, "table": lines,
            "results": {", ".join(map(str, k)): {x: r[x] for x in keep} for k, r in results.items()}}, indent=1) + "\n")
        print(f"result: {path}")
    if args.plot:
        bench.try_plot(plot, args.plot, args.figure, curves, axes)
    return 0
