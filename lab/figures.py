"""The paper's experiments on simulated testbeds, and how far `neo` stays from the fluid limit.

    python -m lab.figures 6c        load-latency on a T4
    python -m lab.figures 8         full offload on an A10G
    python -m lab.figures 9         peaks on three GPUs
    python -m lab.figures 10a       four hosts of an A10G; --plot F.png draws it
    python -m lab.figures grid      8 testbeds, 8 workloads, 4 KV budgets

A point is one run of bench.py's loop on the virtual clock; points run in parallel on all cores.
The paper's points were read from its plots (a few percent off). They are printed beside ours;
nothing is fitted to them. Knows nothing of the engine but LLM. Test: pytest lab -k figures
"""
import math
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, product
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

from bench import run_workload, write_json
from checkpoint import load_config
from neo import LLM
from options import Parser
from perfmodel import find_testbed
from report import Panel, plot
from startup import BLOCK_SIZE, GIB
from workload import Workload, draw_arrivals, draw_requests, fit_requests

# Figure 6c: seconds per token at request rates; T4, Llama-2-7B, OSC. vLLM hits a wall near 0.5
PAPER_6C = {
    "neo": {0.5: 0.11, 1.5: 0.18, 2.5: 0.28, 3.1: 0.42, 3.3: 0.54, 3.5: 1.03, 3.7: 1.53},
    "gpu-only": {0.2: 0.08, 0.4: 0.13}}
# Figure 10a: throughput / gpu-only at output lengths; A10G, Llama-3-8B, 1000 tokens in
OUTPUTS = 50, 100, 200, 300, 400
PAPER_10A = {
    "g5.2xlarge": (1.04, 1.12, 1.065, 1.035, 1.015),
    "g5.4xlarge": (1.03, 1.133, 1.08, 1.04, 1.015),
    "g5.8xlarge": (1.035, 1.297, 1.225, 1.155, 1.10),
    "g5.16xlarge": (1.035, 1.30, 1.735, 1.793, 1.465)}
PAPER_9 = {"t4": 7.5, "g5.4xlarge": 1.26, "2xh100": 1.14}    # peaks over output lengths
# LLM's options
T4 = dict(model="llama-7b", simulate="t4", gpu_blocks=54, cpu_mem=20e9 / GIB,
          max_batch_tokens=832)
A10G = dict(model="llama-8b", gpu_blocks=1650,
            max_batch_tokens=20480)
H100 = dict(model="llama-70b", simulate="2xh100",
            max_batch_tokens=20480)
GRID_BEDS = {
    "t4": "llama-7b",
    "g5.4xlarge": "llama-8b", "g5.16xlarge": "llama-8b",
    "l4": "llama-8b", "4090": "llama-8b",
    "a100": "llama-13b",
    "2xh100": "llama-70b", "h200": "llama-70b"}
GRID_WORK = ((1000, 20), (1000, 50), (1000, 100), (1000, 200), (1000, 400),
             "osc", "azure-code", "azure-conv")
GRID_BUDGETS = 0.01, 0.05, 0.2, 0.5     # share of the KV that GRID_RESIDENT requests need
GRID_RESIDENT = 256
SAVED = ("output_throughput", "request_throughput", "per_token_latency_ms",
         "fluid_request_rate", "fluid_share")


def point(spec):
    """Simulate one point and return its result.

    spec: strategy, workload ((tokens in, tokens out) or a data set's name), n, rate, seed and
    LLM's other options; perhaps dataset_path. kv_share, in place of gpu_blocks, sizes the GPU
    tier for the workload, on a testbed with memory for anything.
    """
    options = dict(spec)
    n, rate, strategy = (options.pop(key) for key in ("n", "rate", "strategy"))
    workload, path = options.pop("workload"), options.pop("dataset_path", None)
    share = options.pop("kv_share", None)
    rng = np.random.default_rng(options["seed"])
    name, mean_lens = workload, (None, None)
    if not isinstance(workload, str):
        name, mean_lens = "random", workload
    prompts, output_lens, source = draw_requests(name, path, n, *mean_lens, rng)
    limit = min(8000, load_config(options["model"]).max_position)
    prompts, output_lens, clipped = fit_requests(prompts, output_lens, limit)
    lengths = list(zip(prompts, output_lens, strict=True))
    longest = max(map(sum, lengths))
    if share:
        mean = statistics.fmean(i + o / 2 for i, o in lengths)
        kv_tokens = max(share * GRID_RESIDENT * mean, longest)
        options["gpu_blocks"] = math.ceil(kv_tokens / BLOCK_SIZE)
        options["simulate"] = find_testbed(
            options["simulate"], gpu_gb=2048, host_gb=2048)
    llm = LLM(options.pop("model"), strategy, max_model_len=longest, **options)
    arrivals, prompts = draw_arrivals(rate, n, rng), [[0] * i for i in prompts]
    work = Workload(prompts, output_lens, arrivals, source, clipped)
    return run_workload(llm, strategy, work, quiet=True).result


def run(specs, label):
    """Simulate {key: spec} on all cores: {key: result}, of those done before a Ctrl-C."""
    results = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        done = pool.map(point, specs.values())
        done = tqdm(done, label, len(specs), disable=None)
        try:
            for key, result in zip(specs, done, strict=True):
                results[key] = result
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print("interrupted: only what was done is shown", file=sys.stderr)
    return results


def rate_at(curve, latency):
    """The rate at which a {rate: latency} curve of straight lines first reaches `latency`.

    Its highest rate if the curve stays below, its lowest rate if it starts above.
    """
    points = sorted(curve.items())
    for (r0, t0), (r1, t1) in pairwise(points):
        if t0 <= latency <= t1:
            return r0 + (r1 - r0) * (latency - t0) / (t1 - t0)
    return points[-1][0] if points[-1][1] < latency else points[0][0]


def figure_6c(args):
    """Seconds per token over the request rate. All figures return (results, lines, Panel)."""
    rates = {"neo": (*PAPER_6C["neo"], 4.0),
             "gpu-only": (*PAPER_6C["gpu-only"], 0.5, 0.6, 0.7)}
    spec = T4 | dict(workload="osc", n=args.num_prompts or 2000, seed=args.seed,
                     dataset_path=args.dataset_path)
    specs = {(s, r): spec | dict(strategy=s, rate=r)
             for s in rates for r in rates[s]}
    results = run(specs, "figure 6c")
    lines = [f"{'strategy':10s}{'req/s':>7s}{'ours, s/token':>15s}"
             f"{'paper':>8s}{'ratio':>8s}"]
    curves = {}
    for (s, r), result in results.items():
        ours = result["per_token_latency_ms"] / 1e3
        paper = PAPER_6C[s].get(r)
        curves.setdefault(s, {})[r] = ours
        beside = f"{'-':>8s}{'-':>8s}"
        if paper:
            beside = f"{paper:8.2f}{ours / paper:8.2f}"
        lines.append(f"{s:10s}{r:7.1f}{ours:15.2f}{beside}")
    for latency in (0.3, 1.0) if len(curves) == 2 else ():
        neo, base = (rate_at(curves[s], latency) for s in ("neo", "gpu-only"))
        lines.append(f"at {latency} s per token: neo {neo:.2f}, gpu-only {base:.2f} "
                     f"requests/s: {neo / base:.1f}x")
    return results, lines, Panel("s per token", curves, "requests / s", PAPER_6C, top=2)


def ratios(args, name, beds, strategies=("neo",), paper=None):
    """Throughput over gpu-only at output lengths, and its fluid limit.

    beds: {label: (LLM's options, tokens in)}. paper: {label: ratios of neo}
    """
    spec = dict(n=args.num_prompts or 1000, rate=math.inf, seed=args.seed)
    specs = {(bed, s, n): options | spec | dict(strategy=s, workload=(input_len, n))
             for bed, (options, input_len) in beds.items()
             for n in OUTPUTS
             for s in ("gpu-only", *strategies)}
    results = run(specs, f"figure {name}")

    def line(label, values, form="8.3f"):
        return f"{label:34s}" + "".join(f"{x:{form}}" for x in values)

    lines, curves, papers = [line("", OUTPUTS, "8d") + "  tokens out"], {}, {}
    for bed, s in product(beds, strategies):
        label, ours, limits = f"{bed} {s}", {}, []
        for n in OUTPUTS:
            if (bed, s, n) in results and (bed, "gpu-only", n) in results:
                it, base = results[bed, s, n], results[bed, "gpu-only", n]
                ours[n] = it["output_throughput"] / base["output_throughput"]
                limits.append(it["fluid_request_rate"] / base["request_throughput"])
        curves[label] = ours
        lines.append(line(label, ours.values()))
        if paper and s == "neo":
            papers[label] = dict(zip(OUTPUTS, paper[bed], strict=True))
            lines.append(line("  paper", paper[bed]))
            over = [ours[n] / papers[label][n] for n in ours]
            lines.append(line("  ours / paper", over, "8.2f"))
        lines.append(line("  fluid limit", limits, "8.2f"))
    return results, lines, Panel("throughput / gpu-only", curves, "tokens out", papers)


def figure_8(args):
    """Strategies beside gpu-only; symmetric has all KV offloaded."""
    beds = {"g5.4xlarge": (A10G | {"simulate": "g5.4xlarge"}, 1000)}
    return ratios(args, "8", beds, ("symmetric", "serial", "neo"))


def figure_10a(args):
    """neo over gpu-only on hosts with more and more CPU bandwidth."""
    beds = {bed: (A10G | {"simulate": bed}, 1000) for bed in PAPER_10A}
    return ratios(args, "10a", beds, paper=PAPER_10A)


def figure_9(args):
    """neo over gpu-only on three GPUs, at several input lengths."""
    inputs = ((T4, (100, 300)),
              (A10G | {"simulate": "g5.4xlarge"}, (500, 1000, 2000)),
              (H100, (1000, 2000)))
    beds = {f"{options['simulate']}, {n} in": (options, n)
            for options, lengths in inputs for n in lengths}
    results, lines, panel = ratios(args, "9", beds)
    for bed, peak in PAPER_9.items():
        ours = [y for label, curve in panel.series.items()
                if label.startswith(f"{bed},")
                for y in curve.values()]
        if ours:
            lines.append(f"peak on {bed}: ours {max(ours):.2f}, paper {peak}, "
                         f"ratio {max(ours) / peak:.2f}; least {min(ours):.2f}")
    return results, lines, panel


def figure_grid(args):
    """neo over gpu-only and over the fluid limit: testbeds x workloads x KV budgets."""
    spec = dict(n=args.num_prompts or 500, rate=math.inf, seed=args.seed,
                max_batch_tokens=8192)
    keys = list(product(GRID_BEDS, GRID_WORK, GRID_BUDGETS))
    specs = {}
    for bed, work, budget in keys:
        for s in ("gpu-only", "neo"):
            specs[bed, work, budget, s] = spec | dict(
                model=GRID_BEDS[bed], simulate=bed, workload=work,
                kv_share=budget, strategy=s)
    results = run(specs, "grid")
    base = {key: results.get((*key, "gpu-only")) for key in keys}
    neo = {key: results[(*key, "neo")]
           for key in keys if (*key, "neo") in results}
    over = {key: neo[key]["output_throughput"] / base[key]["output_throughput"]
            for key in neo}
    share = {key: neo[key]["fluid_share"] for key in neo}
    lines = [f"{'':14s}{'neo / gpu-only':>30s}{'neo / fluid limit':>30s}",
             f"{'':14s}" + 2 * f"{'mean':>10s}{'worst':>10s}{'best':>10s}"]
    for value in (*GRID_BEDS, *GRID_WORK, *GRID_BUDGETS, "all"):
        group = [key for key in neo if value in (*key, "all")]
        if not group:
            continue
        label = f"{100 * value:g} % KV" if isinstance(value, float) else str(value)
        line = f"{label:14s}"
        for ratio in (over, share):
            values = [ratio[key] for key in group]
            mean = statistics.geometric_mean(values)
            line += f"{mean:10.3f}{min(values):10.3f}{max(values):10.3f}"
        lines.append(line)
    worst = [f"{' '.join(map(str, key))}: {over[key]:.3f}"
             for key in sorted(over, key=over.get)[:5]]
    lines.append("least over gpu-only: " + "; ".join(worst))
    curves = {}
    for bed, budget in product(GRID_BEDS, GRID_BUDGETS) if len(neo) == len(keys) else ():
        mean = statistics.geometric_mean(over[bed, work, budget] for work in GRID_WORK)
        curves.setdefault(bed, {})[100 * budget] = mean
    return results, lines, Panel("throughput / gpu-only", curves, "GPU KV budget, %")


FIGURES = {"6c": figure_6c, "8": figure_8, "9": figure_9, "10a": figure_10a,
           "grid": figure_grid}


def main(argv=None):
    parser = Parser("The paper's experiments, simulated.")
    add = parser.add_argument
    add("figure", choices=FIGURES)
    add("--num-prompts", type=int, metavar="N", help="requests of each point")
    add("--dataset-path", metavar="FILE", help="OSC's own lengths, for 6c")
    add("--seed", type=int, default=0)
    add("--save-result", action="store_true")
    add("--result-filename", metavar="F.json")
    add("--plot", metavar="F.png")
    args = parser.parse_args(argv)
    results, lines, panel = FIGURES[args.figure](args)
    print("\n".join(lines))
    if args.save_result or args.result_filename:
        config = {"figure": args.figure, "seed": args.seed,
                  "num_prompts": args.num_prompts}
        points = {}
        for key, result in results.items():
            label = ", ".join(map(str, key))
            points[label] = {metric: result[metric] for metric in SAVED}
        write_json(args.result_filename or f"figure-{args.figure}.json",
                   {"config": config, "table": lines, "results": points})
    if args.plot:
        name = "Grid" if args.figure == "grid" else f"Figure {args.figure}"
        plot(args.plot, f"{name}, simulated", [panel])


if __name__ == "__main__":
    main()
