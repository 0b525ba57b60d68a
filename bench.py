"""Benchmark: the same requests under several strategies, side by side, on one machine in one run.

    python bench.py                              llama-160m, one to two minutes on a laptop
    python bench.py --model llama-7b             the main job, on a CUDA GPU or without one
    python bench.py --dataset-name osc --dataset-path osc_lengths.json --request-rate 2
    python bench.py --model llama-8b --simulate g5.4xlarge --input-len 1000 --output-len 200

It prints what runs where with which KV budget, then a table and one sentence (report.py). Of the
engine it knows LLM's public methods, the names and tiers of strategies, and the performance model
of a simulation, for the two limits; nothing of plans, tensors or lab/. Test: pytest -k bench
"""
import json
import math
import shlex
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import report
import timeline
from advice import advise
from bounds import fluid_limit, pipelining_bound
from checkpoint import load_config
from hub import find_model
from kernels.cpu_bandwidth import host_read_bandwidth
from neo import LLM, SamplingParams
from options import Parser, add_engine_flags, engine_options, output_file
from startup import BLOCK_SIZE, machine, resolve_device
from strategies import find_strategy
from workload import DATASETS, Workload, draw_arrivals, draw_requests, fit_requests, num_tokens

# Default (requests, tokens in, tokens out) on a GPU, and on a CPU by the model's parameters
SIZES_CUDA = (64, 1000, 200)
SIZES_CPU = {0.5e9: (24, 128, 32), 2e9: (16, 64, 24), math.inf: (12, 32, 16)}
COUNTERS = ("mean_batch_size", "iterations", "pipelined_iterations", "cpu_decode_tokens",
            "swapped_blocks", "preemptions", "prediction_error", "outside_model_share")
PLOTTED = {"output_throughput": "output tokens / s",
           "per_token_latency_ms": "latency per output token, ms"}


# ----------------------------------------------------------------------------------- one run

class Run(NamedTuple):
    """A workload that was run under one strategy."""
    result: dict    # metrics: vLLM's keys and ours
    outputs: list   # token ids of each request; None if it did not complete
    times: dict     # {completed request: [seconds from the start to each of its tokens]}


def run_workload(llm, strategy, work, trace=None, quiet=False):
    """Run a Workload under one strategy -> Run. Requests enter when they arrive.

    trace: a list that receives a timeline.Recorder of the run. quiet: no progress bar.
    After a Ctrl-C the result counts the requests that had completed.
    """
    llm.reset(strategy)
    if trace is not None:
        trace.append(timeline.Recorder(llm))
    n, arrived, failed, interrupted = len(work.prompts), 0, 0, False
    outs, times = {}, {}
    bar = tqdm(total=n, desc=f"{strategy:10s}", unit="req", disable=quiet or None)
    start = llm.clock()
    try:
        while arrived < n or llm.outputs:
            # 1. Queue the requests that have arrived in the meantime.
            while arrived < n and start + work.arrivals[arrived] <= llm.clock():
                params = SamplingParams(max_tokens=work.output_lens[arrived], ignore_eos=True)
                try:
                    llm.add_request(work.prompts[arrived], params, request_id=arrived)
                    outs[arrived], times[arrived] = llm.outputs[arrived], []
                except ValueError as error:
                    failed += 1
                    tqdm.write(f"request {arrived} refused: {error}", file=sys.stderr)
                arrived += 1
            # 2. If nothing is in flight, wait for the next arrival.
            if not llm.outputs:
                if arrived < n:
                    llm.wait(max(0.0, start + work.arrivals[arrived] - llm.clock()))
                continue
            # 3. Run one iteration and note when its tokens came.
            stepped = llm.step()
            now = llm.clock() - start
            for out in stepped:
                times[out.request_id].append(now)
            finished = {out.request_id for out in stepped if out.finish_reason}
            bar.update(len(finished))
    except KeyboardInterrupt:
        interrupted = True
        for request_id in list(llm.outputs):
            llm.abort(request_id)
    bar.close()
    llm.watch(None)
    times = {i: times[i] for i, out in outs.items() if out.finish_reason == "length"}
    result = report.latency_metrics(work, times, llm.clock() - start)
    result |= engine_metrics(llm, work, result)
    result |= {"failed": failed, "interrupted": interrupted}
    outputs = [outs[i].token_ids if i in times else None for i in range(n)]
    return Run(result, outputs, times)


def engine_metrics(llm, work, result):
    """What the engine adds to a result: budgets, counters, the fluid limit."""
    stats, budget = llm.stats(), llm.kv_budget
    more = {
        "kv_budget_gpu_tokens": budget["gpu"],
        "kv_budget_cpu_tokens": budget["cpu"],
        "gpu_busy": stats["gpu_busy_s"] / result["duration"],
        "cpu_busy": stats["cpu_busy_s"] / result["duration"]}
    more |= {key: stats[key] for key in COUNTERS}
    if llm.testbed:
        rate, binds = fluid_limit(llm.model.perf, work.lengths, budget["gpu"], budget["cpu"])
        more["fluid_request_rate"] = rate
        more["fluid_share"] = result["request_throughput"] / rate
        more["fluid_binds"] = ", ".join(binds)
    return more


def add_pipelining_bound(llm, work, results):
    """Add to simulated results what one or two passes over the weights can reach at best."""
    try:
        for r in results.values():
            rate = pipelining_bound(llm.model.perf, work.lengths, r["kv_budget_gpu_tokens"],
                                    r["kv_budget_cpu_tokens"])
            r["pipelining_request_rate"] = rate
            r["pipelining_share"] = r["request_throughput"] / rate
    except ImportError:
        print("note: with the package scipy, the bound of pipelining would stand here too.")


def run_rounds(engines, work, repeats, trace=None):
    """Run the workload on all engines in turn, `repeats` times: {name: [Run of each round]}.

    engines: {name: (LLM, strategy)}. trace: receives a timeline.Recorder of each run of the first
    round. A Ctrl-C ends the rounds; names that were not reached are missing.
    """
    rounds = {}
    for i in range(repeats):
        for name, (llm, strategy) in engines.items():
            run = run_workload(llm, strategy, work, trace if i == 0 else None)
            rounds.setdefault(name, []).append(run)
            if run.result["interrupted"]:
                return rounds
    return rounds


# ------------------------------------------------------------------------------------- flags

def add_flags(parser, leave_out=()):
    """The flags that bench.py and the experiments of lab/ share, the engine's among them."""
    add = parser.add_argument
    add("--model", default="llama-160m", help="preset with random weights, or a checkpoint folder")
    add("--strategies", default="gpu-only,neo", help="comma separated, in the order they run")
    add("--num-prompts", type=int, metavar="N", help="requests (default: by device and model)")
    add("--input-len", type=int, metavar="N", help="tokens per prompt, for random")
    add("--output-len", type=int, metavar="N", help="tokens per output, for random")
    add("--dataset-name", default="random", choices=DATASETS, help="where lengths come from")
    add("--dataset-path", metavar="FILE", help="Azure CSV, OSC JSON or ShareGPT JSON; without it "
        "osc, azure-code and azure-conv are drawn to fit their published figures")
    add("--repeats", type=int, default=1, metavar="N", help="interleaved rounds; gives medians")
    add("--save-result", action="store_true", help="write JSON (also with --result-filename)")
    add("--result-filename", type=output_file, metavar="F.json")
    add("--plot", type=output_file, metavar="F.png", help="draw the results (needs matplotlib)")
    add("--verbose", action="store_true", help="one line per iteration")
    add_engine_flags(parser, ("strategy", *leave_out))


def require_positive(parser, args, *more):
    """End with a usage error if a number of add_flags, or one of `more`, is not above 0."""
    for name in ("num_prompts", "input_len", "output_len", "repeats", *more):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not 0 < number < math.inf:
                parser.error(f"--{name.replace('_', '-')} {number}: must be above 0")


def parse_args(argv=None):
    parser = Parser("Strategies side by side on the same requests.")
    parser.add_argument("--request-rate", type=float, default=math.inf, metavar="R",
                        help="Poisson arrivals per second; inf: all at once")
    parser.add_argument("--timeline", type=timeline.timeline_file, metavar="F.html",
                        help="draw the first round. F.html: a page with all iterations; F.png: one "
                        "iteration of the last strategy; F.json: a trace for ui.perfetto.dev")
    parser.add_argument("--timeline-iteration", type=int, metavar="N",
                        help="the iteration of F.png, from 1 (default: the first with two "
                        f"sub-batches after {timeline.RAMP}, else the longest)")
    add_flags(parser)
    args = parser.parse_args(argv)
    require_positive(parser, args, "timeline_iteration")
    if args.timeline_iteration and not str(args.timeline).endswith(".png"):
        parser.error("--timeline-iteration chooses what a picture shows: add --timeline F.png")
    if not args.request_rate > 0:
        parser.error(f"--request-rate {args.request_rate}: must be above 0")
    return args


@contextmanager
def errors_in_one_line():
    """What a user got wrong ends the program with one line, without a traceback."""
    try:
        yield
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first request")


# --------------------------------------------------------------------------------- preparing

def has_gpu(args):
    """Whether the engine will run on a GPU, a real or a simulated one."""
    return bool(args.simulate) or resolve_device(args.device).type == "cuda"


def model_path(args):
    """A preset's name or a path, of whatever --model names."""
    return find_model(args.model, weights=not args.simulate)


def default_sizes(args):
    """[requests, tokens in, tokens out] that the flags ask for, else by device and model."""
    return sizes_for(args, load_config(model_path(args)))


def sizes_for(args, cfg):
    """default_sizes, where the model's Config is known already."""
    sizes = SIZES_CUDA
    if not has_gpu(args):
        sizes = next(sizes for limit, sizes in SIZES_CPU.items() if cfg.num_params <= limit)
    flags = (args.num_prompts, args.input_len, args.output_len)
    return [flag or size for flag, size in zip(flags, sizes, strict=True)]


def engine_sizes(args, totals):
    """LLM's options for the flags, and for requests of `totals` tokens (in + out)."""
    options = engine_options(args)
    if args.max_model_len is None:
        options["max_model_len"] = max(totals)
    if not has_gpu(args) and args.gpu_blocks is None and args.gpu_mem is None:
        # The emulated GPU is as short of memory as the paper's T4: its tier holds two requests
        # of 1.1 x the mean length, or one of the longest.
        block_size = args.block_size or BLOCK_SIZE
        two = 2 * math.ceil(1.1 * statistics.fmean(totals) / block_size)
        options["gpu_blocks"] = max(two, math.ceil(max(totals) / block_size))
    return options


def prepare(args, requests=None):
    """Draw requests, build an engine for them and warm it up: (LLM, Workload, strategies).

    requests: what workload.read_arrivals returned, instead of drawing.
    Raises ValueError on what does not exist or does not fit.
    """
    strategies = {name: find_strategy(name) for name in args.strategies.split(",")}
    path, rng = model_path(args), np.random.default_rng(args.seed)
    cfg = load_config(path)

    # 1. The lengths of the requests.
    if requests:
        prompts, output_lens, arrivals, source = requests
        pace = "at their times"
    else:
        prompts, output_lens, source = draw_requests(
            args.dataset_name, args.dataset_path, *sizes_for(args, cfg), rng, path)
        rate, arrivals = args.request_rate, None
        pace = "all at once" if math.isinf(rate) else f"Poisson, {rate:g} per second"
    limit = args.max_model_len or cfg.max_position
    prompts, output_lens, clipped = fit_requests(prompts, output_lens, limit)

    # 2. An engine for them. Each strategy must be able to run the longest.
    totals = [num_tokens(p) + n for p, n in zip(prompts, output_lens, strict=True)]
    most_tiers = max(strategies, key=lambda name: len(strategies[name].tiers))
    llm = LLM(args.model, most_tiers, **engine_sizes(args, totals))
    for name in strategies:
        llm.reset(name)
        limit = min(limit, llm.max_request_len)
    prompts, output_lens, more = fit_requests(prompts, output_lens, limit)

    # 3. Token ids, where there are only lengths, and arrivals.
    def token_ids(prompt):
        if not isinstance(prompt, int):
            return prompt
        if args.simulate:                   # nothing will read them
            return [0] * prompt
        return rng.integers(cfg.vocab_size, size=prompt).tolist()
    prompts = [token_ids(p) for p in prompts]
    if arrivals is None:
        arrivals = draw_arrivals(args.request_rate, len(prompts), rng)

    # 4. A short request under each strategy, so that no first use is timed.
    for name in () if args.simulate else strategies:
        llm.reset(name)
        llm.generate([prompts[0][:8]], SamplingParams(max_tokens=2, ignore_eos=True))
    work = Workload(prompts, output_lens, arrivals, source, max(clipped, more), pace)
    llm.verbose = args.verbose
    return llm, work, list(strategies)


# -------------------------------------------------------------------------------------- main

def describe_run(llm, work, args):
    """What is about to run, in a few lines."""
    def spread(lengths):
        return f"{min(lengths)}..{max(lengths)} (mean {statistics.fmean(lengths):.1f})"

    def chosen(flag):
        return "by auto" if flag == "auto" else "asked for"

    found = "found " if args.device == "auto" else ""
    return (f"{llm.describe()}\n"
            f"chosen     device {found}{chosen(args.device)}, dtype {chosen(args.dtype)}, "
            f"seed {args.seed}\n"
            f"workload   {len(work.prompts)} requests: {work.source}; "
            f"in {spread([len(p) for p in work.prompts])}, out {spread(work.output_lens)}; "
            f"{work.pace}; {work.clipped} clipped to the limit of "
            f"{llm.budget.max_model_len} tokens\n"
            f"{advise(llm, work.lengths).describe()}")


def where(llm):
    """What the results were made on, in words."""
    if llm.testbed:
        return f"simulated on {llm.testbed.name}, not measured"
    if llm.device.type == "cpu":
        return "on a GPU played by a CPU thread (an emulation)"
    return "on the GPU"


def write_json(path, content):
    """Write a result and say where."""
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
    print(f"result: {path}")


def saved_config(args, llm, work):
    """What a saved result says about how it came about."""
    config = vars(args) | {
        "request_rate": str(args.request_rate),
        "command": shlex.join(sys.argv),
        "card": describe_run(llm, work, args).splitlines(),
        "max_model_len": llm.budget.max_model_len}
    if not args.simulate:
        config["machine"] = machine()
        config["host_read_gb_s"] = host_read_bandwidth(llm.cpu_threads)
    return config


def draw_timeline(args, llm, trace):
    """Write --timeline; one line and status 1 if it has no such iteration."""
    title = f"{Path(args.model).name}, {where(llm)}"
    try:
        timeline.write(args.timeline, trace, title, args.timeline_iteration)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"timeline: {args.timeline}")


def finish(args, llm, work, rounds, trace=None, metrics=report.METRICS, compare_tokens=True):
    """Print and write the outcome of run_rounds; returns {name: result}, or exits after a Ctrl-C.

    compare_tokens: say whether all strategies produced the same token ids.
    """
    results = {name: report.median_result([run.result for run in runs])
               for name, runs in rounds.items()}
    if llm.testbed:
        add_pipelining_bound(llm, work, results)
    outputs = {}
    if compare_tokens and not args.simulate:
        outputs = {name: runs[-1].outputs for name, runs in rounds.items()}
    print("\n" + report.compare(results, metrics) + "\n")
    for line in report.notes(results, outputs):
        print(line)
    if {"neo", "gpu-only"} <= results.keys():
        print(report.sentence(results, where(llm)))
    if args.save_result or args.result_filename:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = f"{Path(args.model).name}-{args.dataset_name}-{stamp}.json"
        write_json(args.result_filename or name,
                   {"config": saved_config(args, llm, work), "results": results})
    if args.plot:
        panels = [report.Panel(label, {name: r[key] for name, r in results.items()})
                  for key, label in PLOTTED.items()]
        report.plot(args.plot, f"{args.model}, {work.source}", panels)
    if trace is not None:
        draw_timeline(args, llm, trace)
    if any(r["interrupted"] for r in results.values()):
        sys.exit(130)
    return results


def main(argv=None):
    args = parse_args(argv)
    with errors_in_one_line():
        llm, work, strategies = prepare(args)
    print(describe_run(llm, work, args), flush=True)
    trace = [] if args.timeline else None
    rounds = run_rounds({name: (llm, name) for name in strategies}, work, args.repeats, trace)
    finish(args, llm, work, rounds, trace)


if __name__ == "__main__":
    main()
