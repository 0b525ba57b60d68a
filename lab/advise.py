"""Will offloading pay here? In plain words, before anything long starts.

    python -m lab.advise --model llama-7b --testbed t4 --input-len 500 --output-len 200
    python -m lab.advise --model llama-7b           # this machine, on the profile measured at start

It says what binds (GPU memory; GPU compute, its bandwidth included; CPU bandwidth; PCIe), how many
requests the GPU tier holds, the rates of attention on GPU and CPU, the predicted gain of neo over
gpu-only with and without an int8 CPU tier, from how many requests in flight on it pays, and what
twice as much of each resource would give. All but the last are lines that bench.py prints, too,
before it starts. Flags and defaults are bench.py's, the engine's among them, except that --testbed
names a testbed of perfmodel.TESTBEDS. How it predicts: advice.py; how right it is on simulated
testbeds: RESULTS.md. Test: pytest lab -k advice
"""
import math

import bench
from advice import advise
from options import Parser, add_engine_flags
from perfmodel import TESTBEDS
from workload import DATASETS


def main(argv=None):
    parser = Parser("Will offloading pay here? Predicted, in plain words.")
    add = parser.add_argument
    add("--model", default="llama-160m", help="preset with random weights, or a checkpoint folder")
    add("--testbed", dest="simulate", choices=TESTBEDS,
        help="a simulated machine; without it, this one: the model is built and its profile "
        "measured, or read if that was done before")
    add("--num-prompts", type=int, metavar="N", help="requests that all come at once "
        "(default: by device and model)")
    add("--input-len", type=int, metavar="N", help="tokens per prompt, for random")
    add("--output-len", type=int, metavar="N", help="tokens per output, for random")
    add("--dataset-name", default="random", choices=DATASETS, help="where lengths come from")
    add("--dataset-path", metavar="FILE", help="Azure CSV, OSC JSON or ShareGPT JSON")
    add_engine_flags(parser, ("strategy", "simulate", "ttft_queue"))
    parser.set_defaults(strategies="gpu-only,neo", request_rate=math.inf, repeats=1, verbose=False)
    args = parser.parse_args(argv)
    bench.require_positive(parser, args)
    with bench.errors_in_one_line():
        llm, work, _ = bench.prepare(args)
    print(bench.describe_run(llm, work, args))
    print(advise(llm, work.lengths).describe_more())


if __name__ == "__main__":
    main()
