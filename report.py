"""What came out of a benchmark: metrics, a table, sentences and pictures.

Metrics have the names and meanings of vLLM's serving benchmark. Knows nothing of the engine, only
when tokens came and what bench.py adds to a result. Test: pytest -k "bench or overlaps or figures"
"""
import statistics
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

STEADY = (0.3, 0.7)     # the steady window lies between these shares of the completions
FEW = 20                # with fewer completions in it, its throughput may mislead
SHOW_SYMMETRIC = "python bench.py --strategies gpu-only,symmetric --timeline t.html"
SHOW_NEO = ("python bench.py --model llama-7b --simulate t4 --gpu-blocks 54 --cpu-mem 18.6 "
            "--max-batch-tokens 832 --dataset-name osc --num-prompts 300")


class Metric(NamedTuple):
    """One line of the printed comparison."""
    key: str            # of a result
    label: str
    form: str
    factor: float = 1   # printed number / number of the result


METRICS = (
    Metric("request_throughput", "request/s", ".3f"),
    Metric("output_throughput", "output tok/s", ".2f"),
    Metric("steady_output_throughput", "  steady 30-70 %", ".2f"),
    Metric("total_token_throughput", "total tok/s", ".1f"),
    Metric("per_token_latency_ms", "E2EL / output tok, ms", ".0f"),
    Metric("mean_ttft_ms", "TTFT mean, ms", ".0f"),
    Metric("p99_ttft_ms", "TTFT p99, ms", ".0f"),
    Metric("mean_tpot_ms", "TPOT mean, ms", ".1f"),
    Metric("p99_tpot_ms", "TPOT p99, ms", ".1f"),
    Metric("mean_itl_ms", "ITL mean, ms", ".1f"),
    Metric("p99_itl_ms", "ITL p99, ms", ".1f"),
    Metric("gpu_busy", "GPU busy, %", ".1f", 100),
    Metric("cpu_busy", "CPU busy, %", ".1f", 100),
    Metric("mean_batch_size", "rows sampled / iteration", ".1f"),
    Metric("iterations", "iterations", ".0f"),
    Metric("pipelined_iterations", "  pipelined", ".0f"),
    Metric("cpu_decode_tokens", "tokens decoded on CPU", ".0f"),
    Metric("swapped_blocks", "blocks swapped", ".0f"),
    Metric("preemptions", "preemptions", ".0f"),
    Metric("prediction_error", "|predicted/measured - 1|, %", ".0f", 100),
    Metric("outside_model_share", "time outside the model, %", ".1f", 100),
    Metric("fluid_request_rate", "fluid limit, request/s", ".3f"),      # of simulations only
    Metric("fluid_share", "  request/s of it, %", ".0f", 100),
    Metric("pipelining_request_rate", "pipelining bound, request/s", ".3f"),
    Metric("pipelining_share", "  request/s of it, %", ".0f", 100))


# ----------------------------------------------------------------------------------- metrics

def latency_metrics(work, times, duration):
    """vLLM's metrics of a workload.Workload that was run for `duration` seconds.

    times: {completed request: [seconds from the start to each of its tokens]}
    """
    tokens_in = sum(len(work.prompts[i]) for i in times)
    tokens_out = sum(len(t) for t in times.values())
    ttft = [t[0] - work.arrivals[i] for i, t in times.items()]
    e2el = [t[-1] - work.arrivals[i] for i, t in times.items()]
    tpot = [(t[-1] - t[0]) / (len(t) - 1) for t in times.values() if len(t) > 1]
    itl = [end - start for t in times.values() for start, end in pairwise(t)]
    per_token = [total / len(t) for total, t in zip(e2el, times.values(), strict=True)]
    result = {
        "duration": duration,
        "completed": len(times),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(times) / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "per_token_latency_ms": 1e3 * statistics.fmean(per_token or [0.0]),
        **steady(times)}
    for name, seconds in (("ttft", ttft), ("tpot", tpot), ("itl", itl), ("e2el", e2el)):
        ms = 1e3 * np.array(seconds or [0.0])
        result[f"mean_{name}_ms"] = float(ms.mean())
        result[f"median_{name}_ms"] = float(np.median(ms))
        result[f"p99_{name}_ms"] = float(np.percentile(ms, 99))
    return result


def steady(times):
    """Throughput from 30 % to 70 % of the completions: without the ramps at either end."""
    ends = sorted(t[-1] for t in times.values())
    if not ends:
        return {"steady_output_throughput": None, "steady_completions": 0}
    lo, hi = (ends[min(int(share * len(ends)), len(ends) - 1)] for share in STEADY)
    tokens = sum(lo < second <= hi for t in times.values() for second in t)
    return {"steady_output_throughput": tokens / (hi - lo) if hi > lo else None,
            "steady_completions": sum(lo < end <= hi for end in ends)}


def median_result(results):
    """Results of several rounds -> their medians, and the extremes of the throughput."""
    medians = {}
    for key, value in results[0].items():
        numbers = [r[key] for r in results if r[key] is not None]
        if isinstance(value, str) or not numbers:
            medians[key] = value
        elif isinstance(value, bool):
            medians[key] = any(numbers)
        else:
            median = statistics.median(numbers)
            medians[key] = int(median) if isinstance(value, int) else median
    throughputs = [r["output_throughput"] for r in results]
    return medians | {
        "rounds": len(results),
        "output_throughput_min": min(throughputs),
        "output_throughput_max": max(throughputs)}


# -------------------------------------------------------------------------------------- text

def compare(results, metrics=METRICS):
    """{name: result} side by side, as text. A metric that a result lacks is left out."""
    def line(label, cells):
        return f"{label:28s}" + "".join(f"{cell:>14s}" for cell in cells)

    def cell(value, metric):
        return "-" if value is None else format(metric.factor * value, metric.form)

    columns = results.values()
    lines = [line("", results)]
    for m in metrics:
        if all(m.key in r for r in columns):
            lines.append(line(m.label, [cell(r[m.key], m) for r in columns]))
    for name, r in results.items():
        if "fluid_binds" in r:
            lines.append(f"  {name} is bound by {r['fluid_binds']}")
    if any(r["rounds"] > 1 for r in columns):
        lines.append(line("output tok/s, spread", [
            f"{r['output_throughput_min']:.2f}-{r['output_throughput_max']:.2f}"
            for r in columns]))
    return "\n".join(lines)


def notes(results, outputs):
    """What a reader of the table should know, line by line.

    outputs: {name: bench.Run.outputs}; empty where token ids say nothing
    """
    few = [f"{name} {r['steady_completions']}" for name, r in results.items()
           if r["steady_completions"] < FEW]
    if few:
        yield (f"note: fewer than {FEW} requests finish inside the steady window "
               f"({', '.join(few)}): it may mislead.")
    neo = results.get("neo")
    if neo and neo["cpu_decode_tokens"] and not neo["pipelined_iterations"] and neo["gpu_busy"]:
        share = neo["cpu_busy"] / neo["gpu_busy"]
        yield ("note: neo ran one sub-batch throughout, with CPU decodes in it. CPU attention took "
               f"{100 * share:.0f} % of the GPU's time, and to hide it a second sub-batch would "
               "read all weights once more.\n"
               f"      Two sub-batches, for real: {SHOW_SYMMETRIC}\n"
               f"      and under neo, simulated:  {SHOW_NEO}")
    if any(r["interrupted"] for r in results.values()):
        yield "note: interrupted; only completed requests are counted."
    names = list(outputs)
    for name in names[1:]:
        same = [a == b for a, b in zip(outputs[names[0]], outputs[name], strict=True)
                if a and b]
        end = "."
        if not all(same):
            end = " (exact in fp32; in 16 bits rounding depends on the batch's shape)."
        yield f"tokens: {name} and {names[0]} agree on {sum(same)} of {len(same)} requests{end}"


def sentence(results, where):
    """neo over gpu-only in words. where: what the results were made on."""
    neo, base = results["neo"], results["gpu-only"]
    if not (neo["completed"] and base["completed"]):
        return "Nothing to compare: one of neo and gpu-only completed no request."
    throughput = neo["output_throughput"] / base["output_throughput"]
    latency = neo["per_token_latency_ms"] / base["per_token_latency_ms"]
    return (f"neo / gpu-only: {throughput:.2f}x the throughput at {latency:.2f}x the latency per "
            f"token, {where}, with a KV budget of {base['kv_budget_gpu_tokens']} tokens on the GPU "
            f"and {neo['kv_budget_cpu_tokens']} more in host memory for neo.")


# ---------------------------------------------------------------------------------- pictures

@dataclass
class Panel:
    """One set of axes: bars, or lines where there is an xlabel."""
    ylabel: str
    series: dict            # {label: height of a bar}, or {label: {x: y} of a line}
    xlabel: str = None
    paper: dict = field(default_factory=dict)   # {label: {x: y}}: a line's points in the paper
    level: float = None     # of a dashed horizontal line
    top: float = None       # end of the y axis


def plot(path, title, panels):
    """Draw Panels side by side into a file; without matplotlib, say how to get it."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    size = (7, 4.2) if len(panels) == 1 else (4 * len(panels), 3.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.xlabel is None:
            ax.bar(panel.series.keys(), panel.series.values(),
                   color=[f"C{i}" for i in range(len(panel.series))])
            continue
        for i, (label, line) in enumerate(panel.series.items()):
            ax.plot(line.keys(), line.values(), f"C{i}o-", label=label)
            if label in panel.paper:
                points = panel.paper[label]
                ax.plot(points.keys(), points.values(), f"C{i}x--", alpha=0.6,
                        label=f"{label}, paper")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
        if panel.level is not None:
            ax.axhline(panel.level, color="gray", lw=0.8, ls="--")
        if panel.top is not None:
            ax.set_ylim(0, panel.top)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"plot: {path}")
