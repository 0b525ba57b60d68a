"""Load-latency curves: the latency at every request rate, and the highest rate at a latency.

    python -m lab.load_latency --rates 0.5,1,2,4 --plot curve.png
    python -m lab.load_latency --rates 1,2 --goodput ttft:2000 tpot:200
    python -m lab.load_latency --model llama-7b --simulate t4 --gpu-blocks 54 --cpu-mem 18.6 \\
        --dataset-name osc --num-prompts 2000 --at-latency 1.0
    python -m lab.load_latency --replay --speed 10 --dataset-path azure_conv.csv

--at-latency finds the paper's headline measure. --goodput counts the requests per second that kept
every limit. --replay runs a CSV trace by its time stamps and prints bench.py's table instead.
Knows no more of the engine than bench.py. Test: pytest lab -k "load or replay"
"""
import argparse
import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import bench
from options import Parser
from report import METRICS, Metric, Panel, plot
from workload import draw_arrivals, read_arrivals

CLOSE = {True: 1.02, False: 1.1}    # rate above / rate below the limit: simulated, measured
MAX_RUNS = 12                       # of one search
COLUMNS = (
    Metric("request_throughput", "req/s", ".3f"),
    Metric("mean_ttft_ms", "TTFT, ms", ".0f"),
    Metric("p99_ttft_ms", "p99", ".0f"),
    Metric("mean_tpot_ms", "TPOT, ms", ".1f"),
    Metric("p99_itl_ms", "ITL p99", ".1f"),
    Metric("per_token_latency_ms", "s/token", ".3f", 1e-3),
    Metric("request_goodput", "goodput/s", ".3f"))


def add_goodput(run, work, limits):
    """Put the requests per second that kept all limits into a bench.Run's result.

    limits: {"ttft", "tpot" or "e2el": ms}; without limits there is no goodput
    """
    good = 0
    for i, times in run.times.items():
        seconds = {
            "ttft": times[0] - work.arrivals[i],
            "tpot": (times[-1] - times[0]) / max(len(times) - 1, 1),
            "e2el": times[-1] - work.arrivals[i]}
        good += all(1e3 * seconds[key] <= ms for key, ms in limits.items())
    if limits:
        run.result["request_goodput"] = good / run.result["duration"]


def seconds_per_token(result):
    return result["per_token_latency_ms"] / 1e3


class Sweep:
    """Runs points of the curves and keeps them: results {strategy: {rate: result}}.

    All rates share one draw of arrivals, which is stretched: points differ by the rate alone.
    """

    def __init__(self, args, llm, work, strategies):
        self.llm, self.work, self.limits = llm, work, args.goodput
        rng = np.random.default_rng([args.seed, 1])
        unit = np.array(draw_arrivals(1.0, len(work.prompts), rng))
        self.unit = unit * len(unit) / unit[-1]     # exactly one request per second
        self.results = {name: {} for name in strategies}
        self.columns = COLUMNS if self.limits else COLUMNS[:-1]
        labels = "".join(f"{m.label:>12s}" for m in self.columns)
        print(f"\n{'strategy':12s}{'rate/s':>8s}{labels}")

    def run(self, strategy, rate):
        """Run the workload at a rate (requests/s; inf: all at once), print and keep it."""
        work = replace(self.work, arrivals=(self.unit / rate).tolist())
        run = bench.run_workload(self.llm, strategy, work, quiet=bool(self.llm.testbed))
        if run.result["interrupted"]:
            raise KeyboardInterrupt     # half a point would mislead
        add_goodput(run, work, self.limits)
        points = self.results[strategy] | {rate: run.result}
        self.results[strategy] = dict(sorted(points.items()))
        cells = [f"{m.factor * run.result[m.key]:>12{m.form}}" for m in self.columns]
        print(f"{strategy:12s}{rate:>8.3f}{''.join(cells)}", flush=True)
        return run.result

    def highest_rate(self, strategy, latency):
        """The highest rate that was run at which a token took at most `latency` seconds.

        inf: even all requests at once do. None: no rate that was tried does.
        The search doubles or halves the rate until the limit lies between two rates, then bisects.
        """
        all_at_once = self.run(strategy, math.inf)
        if seconds_per_token(all_at_once) <= latency:
            return math.inf
        took = {rate: seconds_per_token(result)
                for rate, result in self.results[strategy].items() if rate < math.inf}
        for _ in range(MAX_RUNS):
            below = max((r for r, t in took.items() if t <= latency), default=0)
            above = min((r for r, t in took.items() if t > latency and r > below), default=0)
            if below and above:
                if above / below < CLOSE[bool(self.llm.testbed)]:
                    break
                rate = math.sqrt(below * above)
            elif below:
                rate = 2 * below
            elif above:
                if len(took) > 1 and sorted(took.values())[1] < 1.02 * took[above]:
                    return None     # a lower rate makes it no faster
                rate = above / 2
            else:
                rate = all_at_once["request_throughput"]    # can be sustained, about
            took[rate] = seconds_per_token(self.run(strategy, rate))
        return max((r for r, t in took.items() if t <= latency), default=None)


def describe_limit(name, rate, points, latency, where):
    """What highest_rate found, in words. points: {rate: result}"""
    if not rate:
        words = "no rate that was tried"
    elif math.isinf(rate):
        words = "any rate, even all at once (take more requests)"
    else:
        words = f"{rate:.3f} requests/s (served: {points[rate]['request_throughput']:.3f})"
    budgets = next(iter(points.values()))
    return (f"{name}: {words} at {latency:g} s per output token or less, {where}, "
            f"with a KV budget of {budgets['kv_budget_gpu_tokens']} tokens on the GPU "
            f"and {budgets['kv_budget_cpu_tokens']} in host memory")


def curves(args, llm, work, strategies):
    """--rates and --at-latency. Exits with 130 after a Ctrl-C, with the results so far."""
    sweep, found, where = Sweep(args, llm, work, strategies), {}, bench.where(llm)
    interrupted = False
    try:
        for rate, name in itertools.product(args.rates, strategies):
            sweep.run(name, rate)
        for name in strategies if args.at_latency else ():
            found[name] = sweep.highest_rate(name, args.at_latency)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; the unfinished point is dropped", file=sys.stderr)
    results = sweep.results
    for name, rate in found.items():
        print(describe_limit(name, rate, results[name], args.at_latency, where))
    neo, base = found.get("neo"), found.get("gpu-only")
    if neo and base and max(neo, base) < math.inf:
        served_neo = results["neo"][neo]["request_throughput"]
        served_base = results["gpu-only"][base]["request_throughput"]
        print(f"neo / gpu-only: {neo / base:.2f}x the request rate at the same latency, "
              f"{served_neo / served_base:.2f}x the rate served")
        if served_neo < 0.8 * neo or served_base < 0.8 * base:
            print("note: more arrives than is served at such a rate: the queue, "
                  "and the latency, grow with the length of the run.")
    if args.save_result or args.result_filename:
        name = f"{Path(args.model).name}-rates.json"
        bench.write_json(args.result_filename or name, {
            "config": bench.saved_config(args, llm, work),
            "at_latency": {name: str(rate) if rate == math.inf else rate
                           for name, rate in found.items()},
            "results": {name: {str(rate): result for rate, result in points.items()}
                        for name, points in results.items()}})
    if args.plot:
        lines = {name: {rate: seconds_per_token(result)
                        for rate, result in points.items() if rate < math.inf}
                 for name, points in results.items()}
        panel = Panel("s per output token", lines, "requests / s")
        if args.at_latency:
            panel.level, panel.top = args.at_latency, 2 * args.at_latency
        plot(args.plot, f"{args.model}, {work.source}, {where}", [panel])
    if interrupted:
        sys.exit(130)


def replay(args, llm, work, strategies):
    """--replay: every strategy on the trace, --repeats times, with bench.py's table and JSON."""
    engines = {name: (llm, name) for name in strategies}
    rounds = bench.run_rounds(engines, work, args.repeats)
    for run in itertools.chain(*rounds.values()):
        add_goodput(run, work, args.goodput)
    goodput = Metric("request_goodput", "goodput, request/s", ".3f")
    bench.finish(args, llm, work, rounds, metrics=(goodput, *METRICS))


# -------------------------------------------------------------------------------------- main

def rates(text):
    """An argparse type: 1,2 -> [1.0, 2.0]."""
    return [float(rate) for rate in text.split(",")]


def limit(text):
    """An argparse type: ttft:2000 -> ("ttft", 2000.0)."""
    match = re.fullmatch(r"(ttft|tpot|e2el):([\d.]+)", text)
    if match and float(match[2]) > 0:
        return match[1], float(match[2])
    raise argparse.ArgumentTypeError(
        f"{text}: give terms like ttft:2000, of ttft, tpot or e2el and ms above 0")


def parse_args(argv=None):
    parser = Parser("Latency over the request rate.")
    add = parser.add_argument
    add("--rates", type=rates, default=[], metavar="R,R",
        help="run every strategy at these Poisson rates")
    add("--at-latency", type=float, metavar="S",
        help="search the highest rate at which an output token takes S seconds (mean of "
        "end-to-end latency / tokens out)")
    add("--goodput", nargs="+", type=limit, default=[], metavar="KEY:MS",
        help="count requests that keep these: ttft:MS tpot:MS e2el:MS")
    add("--replay", action="store_true",
        help="arrivals by the time stamps of --dataset-path")
    add("--speed", type=float, default=1.0, metavar="X",
        help="of --replay: X times as fast")
    bench.add_flags(parser)
    parser.set_defaults(request_rate=math.inf)
    args = parser.parse_args(argv)
    args.goodput = dict(args.goodput)
    bench.require_positive(parser, args, "rates", "at_latency", "speed")
    points = args.rates or args.at_latency
    if args.speed != 1 and not args.replay:
        parser.error("--speed goes with --replay")
    if args.replay and (points or not args.dataset_path):
        parser.error("--replay takes the arrivals of a CSV: give --dataset-path, "
                     "and neither --rates nor --at-latency")
    if not (points or args.replay):
        parser.error("give --rates, --at-latency or --replay")
    if points and args.repeats > 1:
        parser.error("--rates and --at-latency run each point once: leave out --repeats")
    return args


def main(argv=None):
    args, requests = parse_args(argv), None
    with bench.errors_in_one_line():
        if args.replay:
            num_requests, _, _ = bench.default_sizes(args)
            requests = read_arrivals(args.dataset_path, num_requests, args.speed)
        llm, work, strategies = bench.prepare(args, requests)
    if not args.replay:
        work.pace = "at several rates"
    print(bench.describe_run(llm, work, args), flush=True)
    run = replay if args.replay else curves
    run(args, llm, work, strategies)


if __name__ == "__main__":
    main()
