"""The simulator against the real engine: the same requests, on this machine and on its profile.

    python -m lab.simulator_check --num-prompts 24

The simulation runs on the virtual clock with the times that the engine measured at its start. Both
should make the same plans in about the same time. Takes bench.py's flags and prints its table, with
a column "NAME sim" beside each strategy, and then simulated / real. Test: pytest lab -k simulat
"""
import math

import bench
from neo import LLM
from options import Parser

RATIOS = {"output_throughput": "throughput", "mean_ttft_ms": "TTFT", "mean_tpot_ms": "TPOT"}


def main(argv=None):
    parser = Parser("The real engine and its simulation, side by side.")
    bench.add_flags(parser, leave_out=("simulate",))
    parser.set_defaults(simulate=None, request_rate=math.inf)
    args = parser.parse_args(argv)
    bench.require_positive(parser, args)
    with bench.errors_in_one_line():
        llm, work, strategies = bench.prepare(args)
        simulated = LLM(args.model, strategies[0], simulate=llm)
    print(bench.describe_run(llm, work, args), flush=True)
    engines = {}
    for name in strategies:
        engines |= {name: (llm, name), f"{name} sim": (simulated, name)}
    rounds = bench.run_rounds(engines, work, args.repeats)
    results = bench.finish(args, llm, work, rounds, compare_tokens=False)
    for name in strategies:
        real, sim = results[name], results[f"{name} sim"]
        ratios = [f"{label} {sim[key] / real[key]:.2f}" for key, label in RATIOS.items()]
        print(f"simulated / real, {name}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
