"""Every option of the engine, once: name, default, unit and help text.

One `Options` gives LLM its keyword arguments, the three doors (neo.py, bench.py, serve.py) their
flags, and `startup.plan_budget` what the memory budget is computed from. To add an option, add a
field here and use it where it matters. Knows nothing of torch, models or strategies.
"""
import argparse
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from perfmodel import TESTBEDS, find_testbed


def option(default, kind, help, unit=None, alias=None):
    """A dataclass field with what its command-line flag needs; kind: str, int, float or bool.
    alias: vLLM's spelling of the flag."""
    return field(default=default,
                 metadata={"kind": kind, "help": help, "unit": unit, "alias": alias})


@dataclass
class Options:
    """How an engine is set up. None means: decided at start, from the model and the machine."""
    model: str
    strategy: str = option("neo", str, "gpu-only, gpu-whole, serial, symmetric, neo, or your own")
    device: str = option("auto", str, "auto, cuda, or cpu (a worker thread plays the GPU)")
    dtype: str = option("auto", str, "of weights, activations and KV: auto, bf16, fp16, fp32")
    gpu_mem: float = option(
        None, float, "memory of the whole GPU: weights, activations and KV", "GIB")
    gpu_memory_utilization: float = option(
        None, float, "the same as a share of the GPU's memory, 0.9 say", "SHARE")
    gpu_blocks: int = option(None, int, "KV blocks of the GPU tier; overrides --gpu-mem", "N")
    cpu_mem: float = option(None, float, "memory of the KV cache's CPU tier", "GIB")
    cpu_kv: str = option(
        "auto", str, "KV of the CPU tier: auto (as --dtype) or int8 (half the bytes, not exact)")
    gpu_kv: str = option("auto", str, "KV of the GPU tier: auto or int8")
    block_size: int = option(None, int, "tokens per KV block (default 16)", "N")
    max_model_len: int = option(
        None, int, "longest prompt + output, in tokens (default: what model and cache allow, "
        "at most 8192)", "N")
    max_batch_tokens: int = option(
        None, int, "prompt tokens per iteration (default 2048); longer prompts are prefilled "
        "in chunks", "N", alias="--max-num-batched-tokens")
    max_num_seqs: int = option(
        None, int, "requests that hold KV at a time; more wait (default and most 512)", "N")
    ttft_queue: int = option(
        4, int, "while at most N requests wait, prompts are prefilled whole, for a short time to "
        "first token; with more, in even chunks, for throughput (-1: always even)", "N")
    gpu_threads: int = option(None, int, "cores of the emulated GPU", "N")
    cpu_threads: int = option(None, int, "cores for CPU attention", "N")
    simulate: object = option(
        None, str, f"run on a virtual clock instead: {', '.join(TESTBEDS)}", "TESTBED")
    seed: int = option(0, int, "of random weights, and of requests that bring none", "N")
    gpu_attn: str = option(
        "auto", str, "attention on the GPU tier: auto, or a back end of gpu_attn.py "
        "(torch, numba, triton)")
    cpu_attn: str = option(
        "auto", str, "attention on the CPU tier: auto, or a path of cpu_attn.py that this "
        "processor has (dot, fma, int, portable)")
    eager: bool = option(False, bool, "launch every GPU kernel by itself: no CUDA graphs")
    tensor_parallel_size: int = option(
        1, int, "ranks: processes that share every layer, each with its GPU, or with its share of "
        "the cores; thread numbers and --gpu-mem are each one's", "N", alias="-tp")

    @classmethod
    def of(cls, model, strategy, given):
        """LLM's arguments -> Options. Raises TypeError on a keyword that is no option."""
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise TypeError(f"LLM has no option {unknown[0]!r}: the options are {', '.join(known)}")
        return cls(model, strategy, **given)

    def keywords(self):
        """LLM's keyword arguments: all but model and strategy."""
        return {f.name: getattr(self, f.name) for f in fields(self)[2:]}


# ------------------------------------------------------------------------------ command line

MOVED = {  # a flag of earlier versions -> what to write now
    "--figure": "python -m lab.figures NAME",
    "--rates": "python -m lab.load_latency --rates R,R",
    "--at-latency": "python -m lab.load_latency --at-latency S",
    "--goodput": "python -m lab.load_latency --goodput KEY:MS",
    "--replay": "python -m lab.load_latency --replay",
    "--speed": "python -m lab.load_latency --replay --speed X",
    "--card": "python -m lab.gpu_limits ceilings",
    **{f"--{f.name.replace('_', '-')}": f"--testbed {f.name}=X"
       for f in fields(next(iter(TESTBEDS.values())))[2:]},
}


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and says where flags of earlier versions went."""

    def __init__(self, description, **kwargs):
        super().__init__(description=description, allow_abbrev=False, **kwargs)

    @property
    def has_testbed(self):
        return "--testbed" in self._option_string_actions

    def parse_args(self, argv=None):
        argv = sys.argv[1:] if argv is None else argv
        for flag in (arg.partition("=")[0] for arg in argv):
            moved = flag in MOVED and flag not in self._option_string_actions
            if moved and MOVED[flag].startswith("--testbed") and not self.has_testbed:
                self.error(f"{flag} is a number of a testbed: this command simulates none")
            if moved:
                self.error(f"{flag} is no flag of this command any more. Now: {MOVED[flag]}")
        return super().parse_args(argv)


def output_file(text):
    """An argparse type: a file that can be written. It is asked before any work, not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: its folder does not exist, or it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: no permission to write there")
    return text


def add_engine_flags(parser, leave_out=()):
    """Give a parser one flag per engine option, but for the model and those left out."""
    for f in fields(Options)[1:]:
        if f.name in leave_out:
            continue
        flags, kind = [f"--{f.name.replace('_', '-')}"], f.metadata["kind"]
        if f.metadata["alias"]:
            flags.append(f.metadata["alias"])
        if kind is bool:
            parser.add_argument(*flags, action="store_true", help=f.metadata["help"])
        else:
            parser.add_argument(*flags, type=kind, default=f.default, metavar=f.metadata["unit"],
                                help=f.metadata["help"])
    if "simulate" not in leave_out:
        add_testbed_flag(parser)


def add_testbed_flag(parser):
    parser.add_argument("--testbed", action="append", default=[], metavar="NUMBER=X",
                        help="a number of the simulated testbed, in place of the preset's, such as "
                        "cpu_bw=60 (names and units: perfmodel.Testbed); may be repeated")


def testbed_numbers(args):
    """{number: its value as text} of --testbed."""
    return dict(number.partition("=")[::2] for number in getattr(args, "testbed", []))


def engine_options(args):
    """Parsed flags -> LLM's keyword arguments, but for model and strategy.

    The numbers of --testbed are folded into `simulate`. Raises ValueError on an unknown testbed
    or number.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Options)[2:] if hasattr(args, f.name)}
    numbers = testbed_numbers(args)
    if numbers and not args.simulate:
        raise ValueError(f"--testbed {next(iter(numbers))} changes a simulated testbed: "
                         "add --simulate TESTBED")
    if given.get("simulate") == "self":
        raise ValueError("--simulate self is now: python -m lab.simulator_check")
    if given.get("simulate"):
        given["simulate"] = find_testbed(args.simulate, **numbers)
    return given
