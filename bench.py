"""Benchmark: the same requests under several strategies, side by side, on one machine in one run.

    python bench.py                                   llama-160m, under a minute on a laptop
    python bench.py --model llama-7b                  the main job, on a CUDA GPU or without one
    python bench.py --dataset-name osc --dataset-path osc_lengths.json --request-rate 2 --save-result
    python bench.py --model llama-8b --simulate g5.4xlarge --input-len 1000 --output-len 200      on a virtual clock
    python bench.py --figure 10a --plot 10a.png       the paper's experiments, simulated (figures.py)
    python bench.py --rates 0.5,1,2,4 --plot curve.png                        load-latency curves (loadlatency.py)
    python bench.py --card                            what this machine can do at most (gpu_card.py)

A card first (what runs where, with what KV budget), then every strategy with a progress bar, a table, and one sentence.
Metrics have the names and meanings of vLLM's serving benchmark. Knows nothing of the engine beyond LLM.
"""
import argparse
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkpoint import load_config
from neo import LLM, STRATEGIES, SamplingParams, add_engine_args, engine_args
from perfmodel import fluid_limit
from startup import BLOCK_SIZE, resolve_device
from workload import DATASETS, Workload, draw_arrivals, draw_requests, fit_requests, replay

SIZES_CPU = ((0.5e9, 24, 128, 32), (2e9, 16, 64, 24), (math.inf, 12, 32, 16))  # parameters up to: requests, in, out
SIZES_CUDA = (64, 1000, 200)
LANES = {"gpu": (1, "GPU"), "cpu": (2, "CPU"), "copy": (3, "copies")}        # of a timeline
STEADY = (0.3, 0.7)            # of completions: the window of the steady throughput
ROWS = (                       # of the table: key of a result, label, factor, format
    ("request_throughput", "request/s", 1, ".3f"), ("output_throughput", "output tok/s", 1, ".2f"),
    ("steady_output_throughput", "  steady 30-70 %", 1, ".2f"), ("total_token_throughput", "total tok/s", 1, ".1f"),
    ("per_token_latency_ms", "E2EL / output tok, ms", 1, ".0f"), ("mean_ttft_ms", "TTFT mean, ms", 1, ".0f"),
    ("p99_ttft_ms", "TTFT p99, ms", 1, ".0f"), ("mean_tpot_ms", "TPOT mean, ms", 1, ".1f"),
    ("p99_tpot_ms", "TPOT p99, ms", 1, ".1f"), ("mean_itl_ms", "ITL mean, ms", 1, ".1f"),
    ("p99_itl_ms", "ITL p99, ms", 1, ".1f"), ("gpu_busy", "GPU busy, %", 100, ".1f"),
    ("cpu_busy", "CPU busy, %", 100, ".1f"), ("mean_batch_size", "rows sampled / iteration", 1, ".1f"),
    ("iterations", "iterations", 1, ".0f"), ("pipelined_iterations", "  pipelined", 1, ".0f"),
    ("cpu_decode_tokens", "tokens decoded on CPU", 1, ".0f"), ("swapped_blocks", "blocks swapped", 1, ".0f"),
    ("preemptions", "preemptions", 1, ".0f"), ("prediction_error", "|predicted/measured - 1|, %", 100, ".0f"),
    ("outside_model_share", "time outside the model, %", 100, ".1f"))
GOODPUT_ROWS = (("request_goodput", "goodput, request/s", 1, ".3f"),)
FLUID_ROWS = (("fluid_request_rate", "fluid limit, request/s", 1, ".3f"),
              ("fluid_share", "request/s of the limit, %", 100, ".0f"))


# ------------------------------------------------------------------------------------------------------------ one run

def serve(llm, strategy, work, trace=None, quiet=False):
    """Serve the workload under one strategy, requests entering when they arrive. Returns (result, token ids of each
    request or None); a Ctrl-C ends it early, with what finished."""
    llm.reset(strategy)
    if trace is not None:
        llm.on_iteration = lambda records, start, end: trace.extend((strategy, *r) for r in records)
    n, outs, times, failed, interrupted = len(work.prompts), {}, {}, 0, False
    bar = tqdm(total=n, desc=f"{strategy:10s}", unit="req", disable=quiet or None)
    start, nxt = llm.clock(), 0
    try:
        while nxt < n or llm.outputs:
            while nxt < n and start + work.arrivals[nxt] <= llm.clock():
                try:
                    params = SamplingParams(max_tokens=work.output_lens[nxt], ignore_eos=True)
                    outs[nxt] = llm.outputs[llm.add_request(work.prompts[nxt], params, request_id=nxt)]
                    times[nxt] = []
                except ValueError as error:
                    failed += 1
                    tqdm.write(f"request {nxt} refused: {error}", file=sys.stderr)
                nxt += 1
            if not llm.outputs:
                if nxt < n:
                    llm.wait(max(0.0, start + work.arrivals[nxt] - llm.clock()))
                continue
            stepped = llm.step()
            now = llm.clock() - start
            for out in stepped:
                times[out.request_id].append(now)
                bar.update(out.finish_reason is not None)
    except KeyboardInterrupt:
        interrupted = True
        for request_id in list(llm.outputs):
            llm.abort(request_id)
    bar.close()
    llm.on_iteration = None
    done = {i for i, out in outs.items() if out.finish_reason == "length"}
    result = metrics(work, {i: times[i] for i in sorted(done)}, llm.clock() - start, llm)
    result |= {"failed": failed, "interrupted": interrupted}
    return result, [outs[i].token_ids if i in done else None for i in range(n)]


def metrics(work, times, duration, llm):
    """times {request: [seconds of each token]} of completed requests -> one result, vLLM's keys and ours."""
    stats, budget = llm.stats(), llm.kv_budget
    tokens_in, tokens_out = sum(len(work.prompts[i]) for i in times), sum(map(len, times.values()))
    e2el = {i: t[-1] - work.arrivals[i] for i, t in times.items()}
    series = {"ttft": [t[0] - work.arrivals[i] for i, t in times.items()],
              "tpot": [(t[-1] - t[0]) / (len(t) - 1) for t in times.values() if len(t) > 1],
              "itl": [b - a for t in times.values() for a, b in zip(t, t[1:])], "e2el": list(e2el.values())}
    if work.goodput:
        spent = {"ttft": lambda i, t: t[0] - work.arrivals[i], "tpot": lambda i, t: (t[-1] - t[0]) / max(len(t) - 1, 1),
                 "e2el": lambda i, t: e2el[i]}
        good = sum(all(1e3 * spent[k](i, t) <= most for k, most in work.goodput.items()) for i, t in times.items())
    ends = sorted(t[-1] for t in times.values())
    lo, hi = (ends[min(int(share * len(ends)), len(ends) - 1)] if ends else 0.0 for share in STEADY)
    result = {"duration": duration, "completed": len(times), "failed": 0, "total_input_tokens": tokens_in,
              "total_output_tokens": tokens_out, "request_throughput": len(times) / duration,
              "output_throughput": tokens_out / duration, "total_token_throughput": (tokens_in + tokens_out) / duration}
    result |= {"request_goodput": good / duration} if work.goodput else {}
    for name, values in series.items():
        ms = 1e3 * np.array(values or [0.0])
        result |= {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms)),
                   f"p99_{name}_ms": float(np.percentile(ms, 99))}
    if llm.testbed:
        lengths = [(len(p), o) for p, o in zip(work.prompts, work.output_lens)]
        rate, binds = fluid_limit(llm.model.perf, lengths, budget["gpu"], budget["cpu"])
        result |= {"fluid_request_rate": rate, "fluid_share": len(times) / duration / rate, "fluid_binds": ", ".join(binds)}
    return result | {
        "per_token_latency_ms": 1e3 * statistics.fmean([e2el[i] / len(t) for i, t in times.items()] or [0.0]),
        "steady_output_throughput": sum(lo < x <= hi for t in times.values() for x in t) / (hi - lo) if hi > lo else None,
        "steady_completions": sum(lo < x <= hi for x in ends),
        "kv_budget_gpu_tokens": budget["gpu"], "kv_budget_cpu_tokens": budget["cpu"],
        "gpu_busy": stats["gpu_busy_s"] / duration, "cpu_busy": stats["cpu_busy_s"] / duration,
        **{k: stats[k] for k in ("mean_batch_size", "iterations", "pipelined_iterations", "cpu_decode_tokens",
                                 "swapped_blocks", "preemptions", "prediction_error", "outside_model_share")}}


def median_result(rounds):
    """Several rounds of one strategy -> medians, with the spread of the throughput beside them."""
    numbers = lambda key: [r[key] for r in rounds if r[key] is not None]
    result = {k: v if isinstance(v, str) else statistics.median(numbers(k)) if numbers(k) else None
              for k, v in rounds[0].items() if k != "interrupted"}
    result = {k: int(v) if isinstance(v, float) and isinstance(rounds[0][k], int) else v for k, v in result.items()}
    return result | {"interrupted": any(r["interrupted"] for r in rounds), "rounds": len(rounds),
                     "output_throughput_min": min(numbers("output_throughput")),
                     "output_throughput_max": max(numbers("output_throughput"))}


# ------------------------------------------------------------------------------------------------------------- output

def table(results):
    """Strategies side by side."""
    cell = lambda value, factor, form: "-" if value is None else format(factor * value, form)
    lines = [f"{'':28s}" + "".join(f"{name:>14s}" for name in results)]
    fluid, goodput = (all(key in r for r in results.values()) for key in ("fluid_share", "request_goodput"))
    for key, label, factor, form in (GOODPUT_ROWS if goodput else ()) + ROWS + (FLUID_ROWS if fluid else ()):
        lines.append(f"{label:28s}" + "".join(f"{cell(r[key], factor, form):>14s}" for r in results.values()))
    if fluid:
        lines += [f"  {name} is bound by {r['fluid_binds']}" for name, r in results.items()]
    if any(r["rounds"] > 1 for r in results.values()):
        spread = (f"{r['output_throughput_min']:.2f}-{r['output_throughput_max']:.2f}" for r in results.values())
        lines.append(f"{'output tok/s, spread':28s}" + "".join(f"{s:>14s}" for s in spread))
    return "\n".join(lines)


def where(llm):
    """What a figure was made on, in words."""
    return (f"simulated on {llm.testbed.name}, not measured" if llm.testbed else
            "on a GPU played by a CPU thread (an emulation)" if llm.device.type == "cpu" else "on the GPU")


def sentence(results, llm):
    """The comparison in words, KV budget beside it."""
    neo, base = results["neo"], results["gpu-only"]
    if not (neo["completed"] and base["completed"]):
        return "Nothing to compare: one of neo and gpu-only completed no request."
    return (f"neo / gpu-only: {neo['output_throughput'] / base['output_throughput']:.2f}x the throughput at "
            f"{neo['per_token_latency_ms'] / base['per_token_latency_ms']:.2f}x the latency per token, {where(llm)}, with a KV "
            f"budget of {base['kv_budget_gpu_tokens']} tokens on the GPU and {neo['kv_budget_cpu_tokens']} more in host "
            "memory for neo.")


def notes(results, outputs, simulated):
    """What a reader of the table should know."""
    few = [f"{k} {r['steady_completions']}" for k, r in results.items() if r["steady_completions"] < 20]
    if few:
        yield f"note: fewer than 20 requests finish inside the steady window ({', '.join(few)}): it may mislead."
    if any(r["interrupted"] for r in results.values()):
        yield "note: interrupted; only completed requests are counted."
    first, *others = outputs
    for name in () if simulated else others:
        both = [(a, b) for a, b in zip(outputs[first], outputs[name]) if a and b]
        yield f"tokens: {name} and {first} agree on {sum(a == b for a, b in both)} of {len(both)} requests" + (
            "." if all(a == b for a, b in both) else " (exact in fp32; in 16 bits rounding depends on the batch's shape).")


def write_trace(path, trace):
    """Chrome / Perfetto trace (open it in ui.perfetto.dev): a process per strategy, a lane for the GPU, one for the CPU
    and on CUDA one for the copies between them; spans named by stage, layer and sub-batch."""
    strategies = list(dict.fromkeys(t[0] for t in trace))
    zero = min((t[5] for t in trace), default=0.0)
    events = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": s}} for pid, s in enumerate(strategies)]
    events += [{"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}}
               for pid in range(len(strategies)) for tid, lane in LANES.values() if lane != "copies" or
               any(t[1] == "copy" for t in trace)]
    for s, lane, stage, layer, index, start, end in trace:
        events.append({"ph": "X", "name": f"{stage} {layer}{'AB'[index]}", "pid": strategies.index(s),
                       "tid": LANES[lane][0], "ts": 1e6 * (start - zero), "dur": 1e6 * (end - start),
                       "args": {"layer": layer, "sub_batch": "AB"[index]}})
    Path(path).write_text(json.dumps({"traceEvents": events}))


def try_plot(write, path, *args):
    """write(path, *args), or say what it takes."""
    try:
        write(path, *args)
        print(f"plot: {path}")
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)


def write_plot(path, results, title):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5))
    for ax, key, label in zip(axes, ("output_throughput", "per_token_latency_ms"),
                              ("output tokens / s", "latency per output token, ms")):
        ax.bar(list(results), [r[key] for r in results.values()], color=[f"C{i}" for i in range(len(results))])
        ax.set_ylabel(label)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Strategies side by side on the same requests.", allow_abbrev=False)
    parser.add_argument("--model", default="llama-160m", help="preset with random weights, or a checkpoint folder")
    parser.add_argument("--strategies", default="gpu-only,neo", help="comma separated, in the order they run")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="requests (default: by device and model)")
    parser.add_argument("--input-len", type=int, metavar="N", help="tokens per prompt, for random")
    parser.add_argument("--output-len", type=int, metavar="N", help="tokens per output, for random")
    parser.add_argument("--request-rate", type=float, default=math.inf, help="Poisson arrivals per second; inf: all at once")
    parser.add_argument("--rates", type=lambda text: [float(r) for r in text.split(",")], metavar="R,R",
                        help="load-latency: every strategy at each of these Poisson rates")
    parser.add_argument("--at-latency", type=float, metavar="S", help="search the highest rate at which an output token takes "
                        "S seconds (end-to-end latency / tokens out, a mean)")
    parser.add_argument("--goodput", nargs="+", metavar="KEY:MS",
                        help="count requests that keep these: ttft:MS tpot:MS e2el:MS")
    parser.add_argument("--replay", action="store_true", help="arrivals by the time stamps of the CSV in --dataset-path")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="of --replay: so many times as fast")
    parser.add_argument("--dataset-name", default="random", choices=DATASETS, help="where lengths come from")
    parser.add_argument("--dataset-path", metavar="FILE", help="Azure CSV, OSC JSON or ShareGPT JSON; without it osc, "
                        "azure-code and azure-conv are drawn to fit their published figures")
    parser.add_argument("--figure", metavar="NAME", help="redraw a figure of the paper, simulated: 6c, 8, 9, 10a; or grid: neo "
                        "against the fluid limit")
    parser.add_argument("--card", action="store_true", help="print what this machine can do at most (copies, matrix products, "
                        "host reads, PCIe), and stop")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="interleaved rounds; medians are reported")
    parser.add_argument("--save-result", action="store_true", help="write the JSON (also if --result-filename is given)")
    parser.add_argument("--result-filename", metavar="F.json")
    parser.add_argument("--plot", metavar="F.png", help="bars of throughput and latency; with --rates the "
                        "load-latency curves (needs matplotlib)")
    parser.add_argument("--timeline", metavar="F.json", help="Chrome / Perfetto trace of the first round")
    parser.add_argument("--verbose", action="store_true", help="one line per iteration")
    add_engine_args(parser)
    args = parser.parse_args(argv)
    args.twin = args.simulate == "self"
    args.simulate = None if args.twin else args.simulate
    for name in ("num_prompts", "input_len", "output_len", "repeats", "request_rate", "rates", "at_latency", "speed"):
        value = getattr(args, name)
        for v in value if isinstance(value, list) else [value]:
            if v is not None and not (v > 0 and (math.isfinite(v) or name == "request_rate")):
                parser.error(f"--{name.replace('_', '-')} {v}: must be above 0")
    if (args.rates or args.at_latency) and (args.repeats > 1 or args.timeline or math.isfinite(args.request_rate)):
        parser.error("--rates and --at-latency run each point once: leave out --repeats, --timeline and --request-rate")
    if args.speed != 1 and not args.replay:
        parser.error("--speed goes with --replay")
    try:
        args.goodput = {k: float(ms) for k, ms in (term.split(":") for term in args.goodput or ())}
    except ValueError:
        parser.error(f"--goodput {' '.join(args.goodput)}: give terms like ttft:2000 (ms)")
    for key, most in args.goodput.items():
        if key not in ("ttft", "tpot", "e2el") or not most > 0:
            parser.error(f"--goodput {key}:{most}: must be ttft, tpot or e2el, and above 0 ms")
    if args.replay and (not args.dataset_path or args.rates or args.at_latency):
        parser.error("--replay takes the arrivals of a CSV: give --dataset-path, and neither --rates nor --at-latency")
    if args.twin and (args.rates or args.at_latency):
        parser.error("--simulate self runs one workload: give neither --rates nor --at-latency")
    return args


def prepare(args):
    """Draw the requests, size the engine for them, warm it up: (LLM, Workload, strategies)."""
    cfg, engine = load_config(args.model), engine_args(args)
    on_gpu = bool(args.simulate) or resolve_device(args.device).type == "cuda"
    strategies = list(dict.fromkeys(args.strategies.split(",")))
    if unknown := [s for s in strategies if s not in STRATEGIES]:
        raise ValueError(f"unknown strategy {unknown[0]!r}: choose from {', '.join(STRATEGIES)}")
    rng = np.random.default_rng(args.seed)
    sizes = SIZES_CUDA if on_gpu else next(s[1:] for s in SIZES_CPU if cfg.num_params <= s[0])
    n, input_len, output_len = (asked or size for asked, size in
                                zip((args.num_prompts, args.input_len, args.output_len), sizes))
    if args.replay:
        ins, outs, arrivals, source = replay(args.dataset_path, n, args.speed)
        n = len(ins)
    else:
        ins, outs, source = draw_requests(args, n, input_len, output_len, rng)
        arrivals = None
    limit = args.max_model_len or cfg.max_position
    ins, outs, clipped = fit_requests(ins, outs, limit)
    totals = [(i if isinstance(i, int) else len(i)) + o for i, o in zip(ins, outs)]
    if not on_gpu and args.gpu_blocks is None and args.gpu_mem is None:
        block = args.block_size or BLOCK_SIZE     # the emulated GPU is as short of memory as the paper's T4: two requests
        engine["gpu_blocks"] = max(2 * math.ceil(1.1 * statistics.fmean(totals) / block), math.ceil(max(totals) / block))
    if args.max_model_len is None:
        engine["max_model_len"] = max(totals)
    llm = LLM(args.model, max(strategies, key=lambda s: len(STRATEGIES[s].tiers)), **engine)
    limits = []
    for s in strategies:
        llm.reset(s)
        limits.append(llm.max_request_len)
    ins, outs, more = fit_requests(ins, outs, min(limits))
    draw = (lambda i: [0] * i) if args.simulate else lambda i: rng.integers(cfg.vocab_size, size=i).tolist()
    prompts = [draw(i) if isinstance(i, int) else i for i in ins]
    arrivals = arrivals or draw_arrivals(args.request_rate, n, rng)
    for s in () if args.simulate else strategies:
        llm.reset(s)
        llm.generate([prompts[0][:8]], SamplingParams(max_tokens=2, ignore_eos=True))
    return llm, Workload(prompts, outs, arrivals, source, max(clipped, more), args.goodput), strategies


def card(llm, work, args):
    """What is about to run."""
    ins, outs = [len(p) for p in work.prompts], work.output_lens
    rate = ("at their times" if args.replay else "at several rates" if args.rates or args.at_latency else
            "all at once" if math.isinf(args.request_rate) else f"Poisson, {args.request_rate:g} per second")
    chosen = "found by auto" if args.device == "auto" else "asked for"
    return (f"{llm.describe()}\n"
            f"chosen     device {chosen}, dtype {'by auto' if args.dtype == 'auto' else 'asked for'}, seed {args.seed}\n"
            f"workload   {len(ins)} requests: {work.source}; in {min(ins)}..{max(ins)} (mean {statistics.fmean(ins):.1f}), "
            f"out {min(outs)}..{max(outs)} (mean {statistics.fmean(outs):.1f}); {rate}; {work.clipped} clipped to the "
            f"limit of {llm.budget.max_model_len} tokens")


def saved_config(args, llm, work):
    """What a saved result says of how it came about."""
    config = {**vars(args), "request_rate": str(args.request_rate), "command": shlex.join(sys.argv),
              "card": card(llm, work, args).splitlines(), "max_model_len": llm.budget.max_model_len}
    if not args.simulate:
        from gpu_card import host_read_bandwidth, machine
        config |= {"machine": machine(), "host_read_gb_s": host_read_bandwidth(llm.cpu_threads)}
    return config


def print_card(args):
    """--card: the machine's ceilings, as JSON too."""
    from gpu_card import ceilings, machine, show
    try:
        found = {"machine": machine(), "limits": ceilings(resolve_device(args.device))}
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("\n".join(f"{k:16s} {v}" for k, v in found["machine"].items() if v) + "\n" + show(found["limits"]))
    if args.result_filename:
        Path(args.result_filename).write_text(json.dumps(found | {"command": shlex.join(sys.argv)}, indent=1))


def main(argv=None):
    args = parse_args(argv)
    if args.figure:
        import figures
        sys.exit(figures.main(args))
    if args.card:
        return print_card(args)
    try:
        llm, work, strategies = prepare(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first request")
    print(card(llm, work, args), flush=True)
    if args.rates or args.at_latency:
        import loadlatency
        return loadlatency.main(args, llm, work, strategies)
    runs = {s: (llm, s) for s in strategies}
    if args.twin:
        twin = LLM(args.model, strategies[0], simulate=llm)
        runs = {name: run for s in strategies for name, run in ((s, (llm, s)), (f"{s} sim", (twin, s)))}
    llm.verbose, rounds, outputs, trace = args.verbose, {name: [] for name in runs}, {}, []
    for round_ in range(args.repeats):
        for name, (engine, s) in runs.items():
            if not any(r["interrupted"] for rs in rounds.values() for r in rs):
                result, outputs[name] = serve(engine, s, work, trace if args.timeline and round_ == 0 else None)
                rounds[name].append(result)
    results = {s: median_result(rs) for s, rs in rounds.items() if rs}
    print("\n" + table(results) + "\n")
    for line in notes(results, outputs, args.simulate or args.twin):
        print(line)
    if {"neo", "gpu-only"} <= results.keys():
        print(sentence(results, llm))
    for s in strategies if args.twin else ():
        ratios = (f"{label} {results[f'{s} sim'][key] / results[s][key]:.2f}" for key, label in (
            ("output_throughput", "throughput"), ("mean_ttft_ms", "TTFT"), ("mean_tpot_ms", "TPOT")))
        print(f"simulated / real, {s}: {', '.join(ratios)}")

    if args.save_result or args.result_filename:
        path = args.result_filename or f"{Path(args.model).name}-{args.dataset_name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        Path(path).write_text(json.dumps({"config": saved_config(args, llm, work), "results": results}, indent=1))
        print(f"result: {path}")
    if args.timeline:
        write_trace(args.timeline, trace)
        print(f"timeline: {args.timeline} (open in ui.perfetto.dev)")
    if args.plot:
        try_plot(write_plot, args.plot, results, f"{args.model}, {work.source}")
    if any(r["interrupted"] for r in results.values()):
        sys.exit(130)


if __name__ == "__main__":
    main()
