"""Checks of the CUDA path that only a GPU can make, each on a small model and in seconds.

    python -m lab.gpu_checks tokens     every strategy's greedy tokens are those of the CPU engine
    python -m lab.gpu_checks syncs      no call in the pass waits for the GPU behind our back
    python -m lab.gpu_checks memory     what CUDA graphs and swaps take beside the KV budget
    python -m lab.gpu_checks host       where the host's time goes while 64 requests decode

lab/gpu_first.sh runs them all. Needs a CUDA GPU. Test: pytest lab -k gpu_checks
"""
import collections
import cProfile
import io
import pstats
import sys
import traceback
import warnings

import torch

from bench import errors_in_one_line, write_json
from neo import LLM, SamplingParams
from options import Parser, output_file
from startup import machine
from strategies import STRATEGIES

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
STARVED = {"dtype": "fp32", "gpu_blocks": 14, "max_model_len": 110, "max_batch_tokens": 64}


def prompts(n, vocab_size, length=20):
    """n prompts of about `length` tokens, the same at every call."""
    return [[(31 * i + 7 * j) % vocab_size for j in range(length + i % 7)] for i in range(n)]


def check_tokens():
    """-> {strategy: {"requests that differ": 0, counters of what ran}}"""
    cpu = LLM("tiny", "gpu-only", device="cpu", dtype="fp32", max_model_len=110)
    work = prompts(24, cpu.cfg.vocab_size)
    expected = [out.token_ids for out in cpu.generate(work, PARAMS)]
    found = {}
    for eager in (False, True):
        for strategy in STRATEGIES:
            llm = LLM("tiny", strategy, device="cuda", eager=eager, **STARVED)
            outs = [out.token_ids for out in llm.generate(work, PARAMS)]
            wrong = sum(a != b for a, b in zip(outs, expected, strict=True))
            stats = llm.stats()
            found[strategy + (", eager" if eager else "")] = {"requests that differ": wrong} | {
                name: stats[name] for name in ("iterations", "pipelined_iterations", "chunks",
                                               "cpu_prefills", "swapped_blocks", "preemptions")}
    return found


def check_syncs():
    """-> {strategy: {place in the code: waits}}, of a second run of the same work."""
    found = {}
    for strategy in STRATEGIES:
        llm = LLM("tiny", strategy, device="cuda", **STARVED)
        work = prompts(24, llm.cfg.vocab_size)
        llm.generate(work, PARAMS)              # everything is compiled and captured
        places = collections.Counter()

        def show(message, category, *rest, places=places):
            if "synchroniz" in str(message):
                stack = [f for f in traceback.extract_stack() if "torch/" not in f.filename][:-1]
                places[" < ".join(f"{f.name}:{f.lineno}" for f in stack[:-4:-1])] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            torch.cuda.set_sync_debug_mode("warn")
            try:
                llm.generate(work, PARAMS)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found[strategy] = {"iterations": llm.stats()["iterations"], "waits": dict(places)}
    return found


def check_memory():
    """-> MiB: what the budget left, before and after traffic of many sizes."""
    def mib():
        free, total = torch.cuda.mem_get_info()
        return {"free": free >> 20, "allocated": torch.cuda.memory_allocated() >> 20,
                "reserved": torch.cuda.memory_reserved() >> 20,
                "not torch's": (total - free - torch.cuda.memory_reserved()) >> 20}
    found = {"before": mib()}
    llm = LLM("llama-1b", "neo", device="cuda", gpu_mem=6.0, cpu_mem=4.0)
    found["started"] = mib()
    for n in (1, 3, 20, 90, 200):
        llm.generate(prompts(n, llm.cfg.vocab_size, 50), SamplingParams(max_tokens=8,
                                                                        ignore_eos=True))
        found[f"after {n} requests"] = mib()
    return found


def check_host(model="llama-1b", num_requests=64):
    """-> the profile of 30 iterations, as text."""
    llm = LLM(model, "gpu-only", device="cuda")
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    for prompt in prompts(num_requests, llm.cfg.vocab_size, 200):
        llm.add_request(prompt, params)
    for _ in range(40):
        llm.step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(30):
        llm.step()
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(22)
    return {"30 iterations": text.getvalue().splitlines()}


def main(argv=None):
    checks = {"tokens": check_tokens, "syncs": check_syncs, "memory": check_memory,
              "host": check_host}
    parser = Parser("Checks of the CUDA path, on a GPU.")
    parser.add_argument("what", choices=tuple(checks))
    parser.add_argument("--result-filename", type=output_file, metavar="F.json")
    args = parser.parse_args(argv)
    with errors_in_one_line():
        if not torch.cuda.is_available():
            raise ValueError("gpu_checks checks a GPU, and torch sees none")
        found = checks[args.what]()
    for name, value in found.items():
        if args.what == "host":
            print("\n".join(value))
        else:
            print(f"{name:20s} {value}")
    if args.result_filename:
        write_json(args.result_filename, {"machine": machine(), args.what: found})
    if args.what == "tokens" and any(x["requests that differ"] for x in found.values()):
        sys.exit("error: tokens differ from the CPU engine's")


if __name__ == "__main__":
    main()
