"""Load-latency curves: every strategy at every request rate, and the highest rate that each sustains at a given latency,
which is the paper's headline measure.

    python bench.py --rates 0.5,1,2,4 --plot curve.png                       in process, on this machine
    python bench.py --rates 1,2 --goodput ttft:2000 tpot:200                 with the rate of requests that met both
    python bench.py --model llama-7b --simulate t4 --gpu-blocks 54 --cpu-mem 18.6 --dataset-name osc --num-prompts 2000 \\
                    --at-latency 1.0                                         simulated; s per output token

All rates share one drawing of arrivals, stretched: a curve's points differ by their rate alone. Strategies take turns.
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np

import bench
from workload import draw_arrivals

CLOSE = {True: 1.02, False: 1.1}       # how near the two rates around the limit must be: simulated, measured
MOST_RUNS = 12                         # of a search, per strategy
COLUMNS = (("request_throughput", "req/s", 1, ".3f"), ("mean_ttft_ms", "TTFT, ms", 1, ".0f"), ("p99_ttft_ms", "p99", 1, ".0f"),
           ("mean_tpot_ms", "TPOT, ms", 1, ".1f"), ("p99_itl_ms", "ITL p99", 1, ".1f"),
           ("per_token_latency_ms", "s/token", 1e-3, ".3f"))


def columns(args):
    return COLUMNS + ((("request_goodput", "goodput/s", 1, ".3f"),) if args.goodput else ())


class Sweep:
    """Runs points of curves and keeps them: results {strategy: {rate: result}}, lowest rate first."""

    def __init__(self, llm, work, args, strategies):
        self.llm, self.work, self.args = llm, work, args
        unit = np.array(draw_arrivals(1.0, len(work.prompts), np.random.default_rng([args.seed, 1])))
        self.unit = unit * len(unit) / unit[-1]                 # one request per second, exactly
        self.results = {s: {} for s in strategies}

    def run(self, strategy, rate):
        """Serve the workload at a rate (requests per second; inf: all at once), print the row; seconds per output token."""
        work = dataclasses.replace(self.work, arrivals=(self.unit / rate).tolist())
        result, _ = bench.serve(self.llm, strategy, work, quiet=bool(self.llm.testbed))
        if result["interrupted"]:
            raise KeyboardInterrupt                             # half a point is none
        self.results[strategy] = dict(sorted((self.results[strategy] | {rate: result}).items()))
        cells = "".join(f"{factor * result[key]:>12{form}}" for key, _, factor, form in columns(self.args))
        print(f"{strategy:12s}{rate:>8.3f}{cells}", flush=True)
        return result["per_token_latency_ms"] / 1e3

    def highest_rate(self, strategy, latency):
        """The highest rate run at which a token took `latency` seconds or less, by doubling or halving and then bisection:
        infinite if even all at once did, None if no rate that was tried did."""
        if self.run(strategy, math.inf) <= latency:
            return math.inf
        served = self.results[strategy][math.inf]["request_throughput"]      # about what it sustains: where to begin
        for _ in range(MOST_RUNS):
            took = {r: x["per_token_latency_ms"] / 1e3 for r, x in self.results[strategy].items() if r < math.inf}
            below = max((r for r, t in took.items() if t <= latency), default=None)
            above = min((r for r, t in took.items() if t > latency and r > (below or 0)), default=None)
            if below and above and above / below < CLOSE[bool(self.llm.testbed)]:
                break
            if not below and len(took) > 1 and sorted(took.values())[1] < 1.02 * took[above]:
                return None                                     # fewer requests make it no faster
            self.run(strategy, math.sqrt(below * above) if below and above else
                     2 * below if below else above / 2 if above else served)
        return max((r for r, x in self.results[strategy].items() if x["per_token_latency_ms"] / 1e3 <= latency), default=None)


def write_plot(path, results, title, latency):
    """Seconds per output token over the request rate, a line per strategy."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ax = plt.subplots(figsize=(6.5, 4))
    for name, points in results.items():
        points = {r: x["per_token_latency_ms"] / 1e3 for r, x in points.items() if math.isfinite(r)}
        ax.plot(list(points), list(points.values()), "o-", label=name)
    if latency:
        ax.axhline(latency, color="gray", lw=0.8, ls="--")
        ax.set_ylim(0, 2 * latency)
    ax.set(xlabel="requests / s", ylabel="s per output token")
    ax.set_title(title, fontsize=8)
    ax.legend()
    ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args, llm, work, strategies):
    """What bench.py does under --rates or --at-latency. Exits with 130 if interrupted, with the results so far."""
    sweep, found, interrupted = Sweep(llm, work, args, strategies), {}, False
    print(f"\n{'strategy':12s}{'rate/s':>8s}" + "".join(f"{label:>12s}" for _, label, _, _ in columns(args)))
    try:
        for rate in args.rates or ():
            for s in strategies:
                sweep.run(s, rate)
        for s in strategies if args.at_latency else ():
            found[s] = sweep.highest_rate(s, args.at_latency)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; the point at hand is dropped", file=sys.stderr)
    where = bench.where(llm)
    served = {s: sweep.results[s][rate]["request_throughput"] for s, rate in found.items() if rate}
    for s, rate in found.items():
        words = ("no rate that was tried" if not rate else
                 "any rate, even all at once (take more requests)" if math.isinf(rate) else
                 f"{rate:.3f} requests/s (served: {served[s]:.3f})")
        one = next(iter(sweep.results[s].values()))
        print(f"{s}: {words} at {args.at_latency:g} s per output token or less, {where}, with a KV budget of "
              f"{one['kv_budget_gpu_tokens']} tokens on the GPU and {one['kv_budget_cpu_tokens']} in host memory")
    if all(found.get(s) and math.isfinite(found[s]) for s in ("neo", "gpu-only")):
        print(f"neo / gpu-only: {found['neo'] / found['gpu-only']:.2f}x the request rate at the same latency, "
              f"{served['neo'] / served['gpu-only']:.2f}x the rate served")
        if any(served[s] < 0.8 * found[s] for s in served):
            print("note: more arrives than is served at such a rate: the queue, and the latency, grow with the length of the run.")
    if args.save_result or args.result_filename:
        path = args.result_filename or f"{Path(args.model).name}-rates.json"
        saved = {"config": bench.saved_config(args, llm, work),
                 "at_latency": {s: str(r) if r == math.inf else r for s, r in found.items()},
                 "results": {s: {str(r): x for r, x in points.items()} for s, points in sweep.results.items()}}
        Path(path).write_text(json.dumps(saved, indent=1))
        print(f"result: {path}")
    if args.plot:
        bench.try_plot(write_plot, args.plot, sweep.results, f"{args.model}, {work.source}, {where}", args.at_latency)
    if interrupted:
        sys.exit(130)
