"""Workloads: how long prompts and outputs are, and when they arrive. Drawn, or read from traces."""
import csv
import json
import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from checkpoint import load_tokenizer

# tokens in, then out: mean, p50, p90, p99, max, and the least (of the trace where there is one)
FIGURES = {
    "osc": ((372.5, 371, 514, 555, 589, 29), (45.3, 45, 56, 65, 129, 15)),             # NEO's summarisation requests
    "azure-code": ((2047.8, 1469, 5194, 7436, 7437, 3), (27.9, 13, 55, 252, 1899, 6)),  # Splitwise, Azure 2023
    "azure-conv": ((1154.7, 1020, 2735, 4142, 14050, 1), (211.1, 129, 424, 601, 1000, 1)),
}
DATASETS = ("random", *FIGURES, "sharegpt", "lengths")


@dataclass
class Workload:
    """The requests of a run, the same for every strategy."""
    prompts: list       # token ids of each
    output_lens: list   # tokens each will produce, exactly
    arrivals: list      # seconds after the start, ascending
    source: str         # where the lengths come from
    clipped: int        # requests shortened to the length limit
    goodput: dict = field(default_factory=dict)     # {"ttft", "tpot", "e2el": ms}: what a request must keep to count as good


def draw_lengths(figures, n, rng):
    """n lengths from a distribution with the given (mean, p50, p90, p99, max, min). Between two quantiles lo and hi a
    length is lo + (hi - lo) t^g with t uniform, whose mean is lo + (hi - lo) / (g + 1): one g meets the mean."""
    mean, p50, p90, p99, top, least = figures
    lo, hi = np.array([least, p50, p90, p99]), np.array([p50, p90, p99, top])
    weight = np.array([0.5, 0.4, 0.09, 0.01])
    g = (weight * (hi - lo)).sum() / (mean - (weight * lo).sum()) - 1
    part = rng.choice(4, n, p=weight)
    return np.rint(lo[part] + (hi - lo)[part] * rng.random(n) ** g).astype(int).tolist()


def read_lengths(path, times=False):
    """[(tokens in, tokens out)] of a file: Azure's CSV (ContextTokens, GeneratedTokens) or OSC's JSON (prompt,
    max_tokens). times: [(tokens in, tokens out, seconds after the first)], which takes a CSV with TIMESTAMP. Raises
    ValueError on anything else."""
    try:
        text = Path(path).read_text()
        if text.lstrip().startswith("["):
            rows, names = json.loads(text), ("prompt", "max_tokens")
        else:
            rows, names = list(csv.DictReader(text.splitlines())), ("ContextTokens", "GeneratedTokens")
        pairs = [tuple(int(r[name]) for name in names) for r in rows]
        if times:
            stamps = [datetime.fromisoformat(re.match(r"[-\d]+.[:\d]+(\.\d{1,6})?", r["TIMESTAMP"])[0]) for r in rows]
            pairs = [(*p, (t - stamps[0]).total_seconds()) for p, t in zip(pairs, stamps)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a lengths file ({type(error).__name__}: {error}); expected CSV with ContextTokens "
                         'and GeneratedTokens, or JSON [{"prompt": n, "max_tokens": n}]') from None
    pairs = [p for p in pairs if p[0] > 0 and p[1] > 0]
    if not pairs:
        raise ValueError(f"{path}: no request with tokens both in and out")
    return pairs


def read_sharegpt(path, tokenizer):
    """[(prompt ids, tokens out)] of ShareGPT's JSON: the first turn and the length of its answer."""
    if tokenizer is None:
        raise ValueError("sharegpt is text: it needs a model with a tokenizer (a checkpoint folder)")
    try:
        turns = [c["conversations"][:2] for c in json.loads(Path(path).read_text()) if len(c["conversations"]) > 1]
        pairs = [(tokenizer.encode(a["value"]), len(tokenizer.encode(b["value"]))) for a, b in turns]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not ShareGPT's JSON ({type(error).__name__}: {error})") from None
    return [(ids, out) for ids, out in pairs if ids and out]


def draw_requests(args, n, input_len, output_len, rng):
    """n requests of the asked data set: ([tokens in, or prompt ids], [tokens out], source)."""
    name, path = args.dataset_name, args.dataset_path
    if name in ("sharegpt", "lengths") and not path:
        raise ValueError(f"--dataset-name {name} needs --dataset-path")
    if name == "random":
        ins, outs = (rng.integers(max(1, math.ceil(0.9 * x)), math.floor(1.1 * x), n, endpoint=True).tolist()
                     for x in (input_len, output_len))
        return ins, outs, f"random, {input_len} in, {output_len} out, each within 10 %"
    if not path:
        ins, outs = (draw_lengths(figures, n, rng) for figures in FIGURES[name])
        return ins, outs, f"{name}, lengths drawn to fit its published figures"
    pairs = read_sharegpt(path, load_tokenizer(args.model)) if name == "sharegpt" else read_lengths(path)
    chosen = rng.choice(len(pairs), n, replace=n > len(pairs))
    return [pairs[i][0] for i in chosen], [pairs[i][1] for i in chosen], f"{name}, {n} of {len(pairs)} in {path}"


def draw_arrivals(rate, n, rng):
    """Seconds at which n requests arrive: a Poisson process of `rate` per second, or all at once."""
    return [0.0] * n if math.isinf(rate) else rng.exponential(1 / rate, n).cumsum().tolist()


def replay(path, n, speed):
    """The first n requests of a CSV trace by their time stamps, `speed` times as fast: (tokens in, tokens out, arrivals,
    source)."""
    trace = sorted(read_lengths(path, times=True), key=lambda r: r[2])[:n]
    first = trace[0][2]
    return ([i for i, _, _ in trace], [o for _, o, _ in trace], [(t - first) / speed for _, _, t in trace],
            f"the first {len(trace)} of {path} by their time stamps, {speed:g} times as fast")


def fit_requests(ins, outs, limit):
    """Shorten requests to `limit` tokens, the output to no less than half of it; (ins, outs, how many)."""
    length = lambda x: x if isinstance(x, int) else len(x)
    new_outs = [min(o, max(limit // 2, limit - length(i))) for i, o in zip(ins, outs)]
    new_ins = [i if length(i) + o <= limit else min(i, limit - o) if length(i) == i else i[:limit - o]
               for i, o in zip(ins, new_outs)]
    return new_ins, new_outs, sum(length(i) + o > limit for i, o in zip(ins, outs))
