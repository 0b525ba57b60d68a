"""The paper's experiments on simulated testbeds, and how far `neo` stays from the fluid limit.

    python -m lab.figures 6c        load-latency on a T4
    python -m lab.figures 6-a10g    the same on an A10G, and 6-2xh100
    python -m lab.figures 8         full offload on an A10G
    python -m lab.figures 9         peaks on three GPUs
    python -m lab.figures 10a       four hosts of an A10G; --plot F.png draws it
    python -m lab.figures ttft      time to first token against time per token, by --ttft-queue
    python -m lab.figures bound     the steady rate against the bound of pipelining
    python -m lab.figures grid      8 testbeds, 8 workloads, 4 KV budgets
    python -m lab.figures all --output-dir results      all of them, each with JSON and plot

There are two baselines: `gpu-only`, which mixes prompts evenly with decodes, and `gpu-whole`, which
does not: the paper's kind in its Figures 8 to 10. --testbed changes a number of all testbeds:
softness=0.333 rounds the roofline's ridge.
A point is one run of bench.py's loop on the virtual clock; points run in parallel on all cores.
The paper's points were read from its plots (a few percent off). They are printed beside ours;
nothing is fitted to them. Knows nothing of the engine but LLM. Test: pytest lab -k figures
"""
import math
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bench import add_pipelining_bound, errors_in_one_line, run_workload, write_json
from checkpoint import load_config
from neo import LLM
from options import Parser, add_testbed_flag, output_file, testbed_numbers
from perfmodel import find_testbed
from report import Panel, plot
from startup import BLOCK_SIZE, GIB
from workload import Workload, draw_arrivals, draw_requests, fit_requests

# Figure 6c: seconds per token at request rates; T4, Llama-2-7B, OSC. vLLM hits a wall near 0.5
PAPER_6C = {
    "neo": {0.5: 0.11, 1.5: 0.18, 2.5: 0.28, 3.1: 0.42, 3.3: 0.54, 3.5: 1.03, 3.7: 1.53},
    "gpu-only": {0.2: 0.08, 0.4: 0.13}}
BASES = "gpu-whole", "gpu-only"
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
TTFT_QUEUES = -1, 0, 1, 2, 4, 8
SAVED = ("output_throughput", "request_throughput", "per_token_latency_ms", "mean_ttft_ms",
         "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "kv_budget_gpu_tokens",
         "kv_budget_cpu_tokens", "fluid_request_rate", "fluid_share", "steady_output_throughput",
         "pipelining_request_rate", "pipelining_share")


def point(spec):
    """Simulate one point and return its result.

    spec: strategy, workload ((tokens in, tokens out) or a data set's name), n, rate, seed and
    LLM's other options; perhaps dataset_path. kv_share, in place of gpu_blocks, sizes the GPU
    tier for the workload, on a testbed with memory for anything.
    """
    options = dict(spec)
    n, rate, strategy = (options.pop(key) for key in ("n", "rate", "strategy"))
    workload, path = options.pop("workload"), options.pop("dataset_path", None)
    share, numbers = options.pop("kv_share", None), options.pop("testbed")
    add_bound = options.pop("add_bound", False)
    bed = find_testbed(options["simulate"], **numbers)
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
        bed = replace(bed, gpu_gb=2048, host_gb=2048)
    options["simulate"] = bed
    llm = LLM(options.pop("model"), strategy, max_model_len=longest, **options)
    arrivals, prompts = draw_arrivals(rate, n, rng), [[0] * i for i in prompts]
    work = Workload(prompts, output_lens, arrivals, source, clipped)
    result = run_workload(llm, strategy, work, quiet=True).result
    if add_bound:
        add_pipelining_bound(llm, work, {strategy: result})
    return result


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


def common(args, num_prompts):
    """What the points of a figure share."""
    return dict(n=args.num_prompts or num_prompts, seed=args.seed, testbed=testbed_numbers(args))


def load_latency(args, name, options, rates, paper=None, levels=(0.3, 1.0), top=2.0):
    """Seconds per token over the request rate. All figures return (results, lines, [Panel]).

    rates: {strategy: requests/s}. levels: seconds per token at which the rates are compared.
    """
    spec = options | common(args, 2000)
    specs = {(s, r): spec | dict(strategy=s, rate=r) for s in rates for r in rates[s]}
    results = run(specs, f"figure {name}")
    lines = [f"{'strategy':10s}{'req/s':>7s}{'ours, s/token':>15s}"
             f"{'paper':>8s}{'ratio':>8s}"]
    curves, paper = {}, paper or {}
    for (s, r), result in results.items():
        ours = result["per_token_latency_ms"] / 1e3
        there = paper.get(s, {}).get(r)
        curves.setdefault(s, {})[r] = ours
        beside = f"{'-':>8s}{'-':>8s}"
        if there:
            beside = f"{there:8.2f}{ours / there:8.2f}"
        lines.append(f"{s:10s}{r:7.2f}{ours:15.3f}{beside}")
    for latency in levels if len(curves) == len(rates) else ():
        neo, *bases = (rate_at(curves[s], latency) for s in ("neo", *BASES))
        over = ", ".join(f"{s} {base:.2f} ({neo / base:.2f}x)"
                         for s, base in zip(BASES, bases, strict=True))
        lines.append(f"at {latency} s per token: neo {neo:.2f}, {over} requests/s")
    return results, lines, [Panel("s per token", curves, "requests / s", paper, top=top)]


def figure_6c(args):
    """The T4."""
    base = (*PAPER_6C["gpu-only"], 0.5, 0.6, 0.7)
    options = T4 | dict(workload="osc", dataset_path=args.dataset_path)
    rates = {"neo": (*PAPER_6C["neo"], 4.0, 4.3)} | dict.fromkeys(BASES, base)
    return load_latency(args, "6c", options, rates, PAPER_6C)


def figure_6_a10g(args):
    """The paper's machine, and the one with four times the CPU."""
    options = A10G | dict(simulate="g5.4xlarge", workload="azure-code")
    rates = dict.fromkeys(("neo", *BASES), (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4))
    return load_latency(args, "6-a10g", options, rates, levels=(0.1, 0.2), top=0.5)


def figure_6_2xh100(args):
    """Two H100s, tensor parallel."""
    options = H100 | dict(workload="azure-code")
    rates = dict.fromkeys(("neo", *BASES), (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5))
    return load_latency(args, "6-2xh100", options, rates, levels=(0.1, 0.2), top=0.5)


def figure_ttft(args):
    """TTFT and TPOT of neo by --ttft-queue, at about half the rate that it sustains."""
    loads = {"T4, OSC, 1.6/s": T4 | dict(workload="osc", rate=1.6),
             "g5.8xlarge, 200 out, 1.0/s": A10G | dict(simulate="g5.8xlarge",
                                                       workload=(1000, 200), rate=1.0),
             "2xH100, 200 out, 1.4/s": H100 | dict(workload=(1000, 200), rate=1.4)}
    spec = common(args, 1000)
    specs = {(load, w): options | spec | dict(strategy="neo", ttft_queue=w)
             for load, options in loads.items() for w in TTFT_QUEUES}
    specs |= {(load, "gpu-whole"): options | spec | dict(strategy="gpu-whole")
              for load, options in loads.items()}
    results = run(specs, "figure ttft")
    lines = [f"{'':30s}{'queue':>10s}{'TTFT ms':>9s}{'p99':>9s}{'TPOT ms':>9s}{'p99':>9s}"]
    curves = {}
    for (load, w), r in results.items():
        lines.append(f"{load:30s}{w:>10}{r['mean_ttft_ms']:9.0f}{r['p99_ttft_ms']:9.0f}"
                     f"{r['mean_tpot_ms']:9.1f}{r['p99_tpot_ms']:9.1f}")
        if w != "gpu-whole":
            curves.setdefault(load, {})[r["p99_ttft_ms"] / 1e3] = r["p99_tpot_ms"]
    return results, lines, [Panel("TPOT p99, ms", curves, "TTFT p99, s")]


def figure_bound(args):
    """neo between the 30th and the 70th percent of its requests, so without the ramps of a run,
    over what one or two passes over the weights can reach (bounds.pipelining_bound)."""
    cases = {"T4, OSC": T4 | dict(workload="osc", dataset_path=args.dataset_path)}
    cases |= {f"{bed}, {n} out": A10G | dict(simulate=bed, workload=(1000, n))
              for bed in ("g5.8xlarge", "g5.16xlarge") for n in (200, 400)}
    cases["2xh100, 200 out"] = H100 | dict(workload=(1000, 200))
    cases["4090, 200 out"] = dict(model="llama-8b", simulate="4090", workload=(1000, 200),
                                  max_batch_tokens=20480)
    spec = common(args, 2000) | dict(strategy="neo", rate=math.inf, add_bound=True)
    results = run({(case,): options | spec for case, options in cases.items()}, "figure bound")
    lines = [f"{'':24s}{'steady':>9s}{'bound':>9s}{'share':>8s}{'whole run':>11s}"]
    for (case,), r in results.items():
        tokens_out = r["output_throughput"] / r["request_throughput"]   # of a request
        steady, bound = r["steady_output_throughput"] / tokens_out, r["pipelining_request_rate"]
        lines.append(f"{case:24s}{steady:9.3f}{bound:9.3f}{steady / bound:8.3f}"
                     f"{r['pipelining_share']:11.3f}")
    return results, lines, []


def ratios(args, name, beds, strategies=("gpu-only", "neo"), paper=None):
    """Throughput over both baselines at output lengths, and its fluid limit.

    beds: {label: (LLM's options, tokens in)}. paper: {label: ratios of neo}
    """
    spec = common(args, 1000) | dict(rate=math.inf)
    specs = {(bed, s, n): options | spec | dict(strategy=s, workload=(input_len, n))
             for bed, (options, input_len) in beds.items()
             for n in OUTPUTS
             for s in dict.fromkeys((*BASES, *strategies))}
    results = run(specs, f"figure {name}")

    def line(label, values, form="8.3f"):
        return f"{label:34s}" + "".join(f"{x:{form}}" for x in values)

    def over(bed, s, base, key="request_throughput"):
        """{tokens out: ratio} of the points that were simulated."""
        return {n: results[bed, s, n][key] / results[bed, base, n]["request_throughput"]
                for n in OUTPUTS if {(bed, s, n), (bed, base, n)} <= results.keys()}

    lines, papers = [line("", OUTPUTS, "8d") + "  tokens out"], {}
    panels = [Panel(f"throughput / {base}", {}, "tokens out") for base in BASES]
    panels[0].paper = papers
    for bed, s in product(beds, strategies):
        label = f"{bed} {s}"
        for base, panel in zip(BASES, panels, strict=True):
            if s == base:
                continue
            panel.series[label] = ours = over(bed, s, base)
            lines.append(line(f"{label} / {base}", ours.values()))
            if paper and s == "neo" and base == "gpu-whole":
                papers[label] = dict(zip(OUTPUTS, paper[bed], strict=True))
                lines.append(line("  paper", paper[bed]))
                lines.append(line("  ours / paper", [ours[n] / papers[label][n] for n in ours],
                                  "8.2f"))
        if s == "neo":
            limits = over(bed, s, "gpu-only", "fluid_request_rate")
            lines.append(line("  fluid limit / gpu-only", limits.values(), "8.2f"))
    return results, lines, panels


def figure_8(args):
    """Strategies beside the baselines; symmetric has all KV offloaded."""
    beds = {"g5.4xlarge": (A10G | {"simulate": "g5.4xlarge"}, 1000)}
    return ratios(args, "8", beds, ("symmetric", "serial", "gpu-only", "neo"))


def figure_10a(args):
    """neo on hosts with more and more CPU bandwidth."""
    beds = {bed: (A10G | {"simulate": bed}, 1000) for bed in PAPER_10A}
    return ratios(args, "10a", beds, paper=PAPER_10A)


def figure_9(args):
    """neo on three GPUs, at several input lengths."""
    inputs = ((T4, (100, 300)),
              (A10G | {"simulate": "g5.4xlarge"}, (500, 1000, 2000)),
              (H100, (1000, 2000)))
    beds = {f"{options['simulate']}, {n} in": (options, n)
            for options, lengths in inputs for n in lengths}
    results, lines, of_base = ratios(args, "9", beds)
    panels = []                 # one of each GPU, as a T4's ratios dwarf the others
    for bed, peak in PAPER_9.items():
        panels.append(Panel(f"{bed}: throughput of neo", {}, "tokens out", level=1.0))
        for base, panel in zip(BASES, of_base, strict=True):
            curves = {label.removeprefix(f"{bed}, ").removesuffix(" neo"): curve
                      for label, curve in panel.series.items()
                      if label.startswith(f"{bed},") and label.endswith("neo")}
            panels[-1].series |= {f"{label}, over {base}": c for label, c in curves.items()}
            if ours := [y for curve in curves.values() for y in curve.values()]:
                there = f", paper {peak}" if base == "gpu-whole" else ""
                lines.append(f"peak on {bed}, throughput / {base}: ours {max(ours):.2f}{there}; "
                             f"least {min(ours):.2f}")
    return results, lines, panels


def figure_grid(args):
    """neo over both baselines and over the fluid limit: testbeds x workloads x KV budgets."""
    spec = common(args, 500) | dict(rate=math.inf, max_batch_tokens=8192)
    keys = list(product(GRID_BEDS, GRID_WORK, GRID_BUDGETS))
    specs = {(*key, s): spec | dict(model=GRID_BEDS[key[0]], simulate=key[0], workload=key[1],
                                    kv_share=key[2], strategy=s)
             for key in keys for s in (*BASES, "neo")}
    results = run(specs, "grid")
    done = [key for key in keys if all((*key, s) in results for s in (*BASES, "neo"))]
    rate = {s: {key: results[(*key, s)]["output_throughput"] for key in done}
            for s in (*BASES, "neo")}
    over = {f"neo / {s}": {key: rate["neo"][key] / rate[s][key] for key in done} for s in BASES}
    shown = over | {"neo / fluid limit": {key: results[(*key, "neo")]["fluid_share"]
                                          for key in done}}
    lines = [f"{'':14s}" + "".join(f"{label:>27s}" for label in shown),
             f"{'':14s}" + len(shown) * f"{'mean':>9s}{'worst':>9s}{'best':>9s}"]
    for value in (*GRID_BEDS, *GRID_WORK, *GRID_BUDGETS, "all"):
        group = [key for key in done if value in (*key, "all")]
        if not group:
            continue
        label = f"{100 * value:g} % KV" if isinstance(value, float) else str(value)
        line = f"{label:14s}"
        for ratio in shown.values():
            values = [ratio[key] for key in group]
            mean = statistics.geometric_mean(values)
            line += f"{mean:9.3f}{min(values):9.3f}{max(values):9.3f}"
        lines.append(line)
    best = {key: min(ratio[key] for ratio in over.values()) for key in done}
    worst = [f"{' '.join(map(str, key))}: {best[key]:.3f}"
             for key in sorted(best, key=best.get)[:8]]
    lines.append("least over the better baseline: " + "; ".join(worst))
    panels = []
    for label, ratio in over.items() if len(done) == len(keys) else ():
        curves = {}
        for bed, budget in product(GRID_BEDS, GRID_BUDGETS):
            mean = statistics.geometric_mean(ratio[bed, work, budget] for work in GRID_WORK)
            curves.setdefault(bed, {})[100 * budget] = mean
        panels.append(Panel(label, curves, "GPU KV budget, %"))
    return results, lines, panels


FIGURES = {"6c": figure_6c, "6-a10g": figure_6_a10g, "6-2xh100": figure_6_2xh100,
           "8": figure_8, "9": figure_9, "10a": figure_10a, "ttft": figure_ttft,
           "bound": figure_bound, "grid": figure_grid}


def make(name, args, json_path, plot_path):
    """Simulate a figure, print it, and write what is asked for."""
    results, lines, panels = FIGURES[name](args)
    print("\n".join(lines), flush=True)
    if json_path:
        config = {"figure": name, "seed": args.seed, "num_prompts": args.num_prompts,
                  "testbed": testbed_numbers(args)}
        points = {}
        for key, result in results.items():
            label = ", ".join(map(str, key))
            points[label] = {metric: result[metric] for metric in SAVED if metric in result}
        write_json(json_path, {"config": config, "table": lines, "results": points})
    if plot_path and panels:
        title = f"Figure {name}" if name[0].isdigit() else name
        plot(plot_path, f"{title}, simulated", panels)


def main(argv=None):
    parser = Parser("The paper's experiments, simulated.")
    add = parser.add_argument
    add("figure", choices=[*FIGURES, "all"])
    add("--num-prompts", type=int, metavar="N", help="requests of each point")
    add("--dataset-path", metavar="FILE", help="OSC's own lengths, for 6c")
    add_testbed_flag(parser)
    add("--seed", type=int, default=0)
    add("--save-result", action="store_true")
    add("--result-filename", type=output_file, metavar="F.json")
    add("--plot", type=output_file, metavar="F.png")
    add("--output-dir", metavar="FOLDER", help="of `all`: figure-NAME.json and .png go there")
    args = parser.parse_args(argv)
    if (args.figure == "all") != bool(args.output_dir):
        parser.error("`all` and --output-dir go together")
    with errors_in_one_line():
        find_testbed("t4", **testbed_numbers(args))     # no unknown number, before any work
    if args.figure == "all":
        for name in FIGURES:
            path = Path(args.output_dir) / f"figure-{name}"
            print(f"\n{name}", flush=True)
            make(name, args, path.with_suffix(".json"), path.with_suffix(".png"))
        return
    path = args.result_filename or (f"figure-{args.figure}.json" if args.save_result else None)
    make(args.figure, args, path, args.plot)


if __name__ == "__main__":
    main()
