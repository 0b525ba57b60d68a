"""Workloads: how long prompts and outputs are, and when requests arrive.

Both are drawn, or read from files. Knows nothing of the engine; to read text it loads a tokenizer.
Test: pytest test_neo.py -k "lengths or workload or figures"
"""
import csv
import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from checkpoint import load_tokenizer

# Of tokens in, then of tokens out: mean, p50, p90, p99, maximum, minimum
LENGTH_STATISTICS = {
    "osc": (                        # the summarisation requests of NEO's evaluation
        (372.5, 371, 514, 555, 589, 29), (45.3, 45, 56, 65, 129, 15)),
    "azure-code": (                 # Azure's traces of 2023 (Splitwise, ISCA 2024)
        (2047.8, 1469, 5194, 7436, 7437, 3), (27.9, 13, 55, 252, 1899, 6)),
    "azure-conv": (
        (1154.7, 1020, 2735, 4142, 14050, 1), (211.1, 129, 424, 601, 1000, 1)),
}
DATASETS = ("random", *LENGTH_STATISTICS, "sharegpt", "lengths")


@dataclass
class Workload:
    """The requests of a benchmark, the same for every strategy."""
    prompts: list       # token ids of each request
    output_lens: list   # tokens that each request will produce, exactly
    arrivals: list      # seconds after the start, ascending
    source: str         # where the lengths come from
    clipped: int        # requests that were shortened to the length limit
    pace: str = "all at once"   # what the arrivals are, in words

    @property
    def lengths(self):
        """[(tokens in, tokens out)]"""
        return [(len(p), n) for p, n in zip(self.prompts, self.output_lens, strict=True)]


def draw_lengths(statistics, n, rng):
    """n lengths from a distribution with these (mean, p50, p90, p99, maximum, minimum).

    Between two neighbouring quantiles lo and hi a length is lo + (hi - lo) * t^g with t uniform in
    0..1; its mean is lo + (hi - lo) / (g + 1). One g for all of them gives the wanted mean.
    """
    mean, p50, p90, p99, maximum, minimum = statistics
    lo, hi = np.array([minimum, p50, p90, p99]), np.array([p50, p90, p99, maximum])
    share = np.array([0.5, 0.4, 0.09, 0.01])
    g = (share * (hi - lo)).sum() / (mean - (share * lo).sum()) - 1
    part = rng.choice(4, n, p=share)
    return np.rint(lo[part] + (hi - lo)[part] * rng.random(n) ** g).astype(int).tolist()


def read_lengths(path, times=False):
    """[(tokens in, tokens out)] of a file, without requests that have none of either.

    The file is Azure's CSV (ContextTokens, GeneratedTokens) or OSC's JSON (prompt, max_tokens).
    times: also the seconds after the first request, from the CSV's TIMESTAMP. Raises ValueError
    on any other file.
    """
    try:
        text = Path(path).read_text()
        if text.lstrip().startswith("["):
            records, keys = json.loads(text), ("prompt", "max_tokens")
        else:
            records = list(csv.DictReader(text.splitlines()))
            keys = "ContextTokens", "GeneratedTokens"
        requests = [tuple(int(record[key]) for key in keys) for record in records]
        if times:
            stamps = [read_stamp(record["TIMESTAMP"]) for record in records]
            requests = [(*lengths, (stamp - stamps[0]).total_seconds())
                        for lengths, stamp in zip(requests, stamps, strict=True)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a lengths file ({type(error).__name__}: {error}); expected CSV with "
            "ContextTokens and GeneratedTokens, or JSON "
            '[{"prompt": n, "max_tokens": n}]') from None
    requests = [r for r in requests if r[0] > 0 and r[1] > 0]
    if not requests:
        raise ValueError(f"{path}: no request with tokens both in and out")
    return requests


def read_stamp(text):
    """A time stamp -> datetime, which holds six decimals of a second; Azure writes seven."""
    return datetime.fromisoformat(re.match(r"[-\d]+.[:\d]+(\.\d{1,6})?", text)[0])


def read_arrivals(path, n, speed):
    """The first n requests of a CSV by their time stamps, `speed` times as fast.

    Returns (tokens in, tokens out, seconds after the first arrival, source).
    """
    requests = sorted(read_lengths(path, times=True), key=lambda request: request[2])[:n]
    ins, outs, times = (list(column) for column in zip(*requests, strict=True))
    source = f"the first {len(ins)} of {path} by their time stamps, {speed:g} times as fast"
    return ins, outs, [(t - times[0]) / speed for t in times], source


def read_sharegpt(path, tokenizer):
    """[(prompt ids, tokens out)] of ShareGPT's JSON: first turns and the lengths of the answers."""
    if tokenizer is None:
        raise ValueError(
            "sharegpt is text: it needs a model with a tokenizer (a checkpoint folder)")
    try:
        chats = [chat["conversations"] for chat in json.loads(Path(path).read_text())]
        pairs = [(tokenizer.encode(chat[0]["value"]), len(tokenizer.encode(chat[1]["value"])))
                 for chat in chats if len(chat) > 1]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not ShareGPT's JSON ({type(error).__name__}: {error})") from None
    return [(ids, n) for ids, n in pairs if ids and n]


def draw_requests(name, path, n, input_len, output_len, rng, model=None):
    """n requests of a data set: (prompts, output lengths, source).

    A prompt is its number of tokens, or its token ids if the data set is text. input_len,
    output_len: mean tokens, for random. model: its tokenizer reads sharegpt.
    """
    if name in ("sharegpt", "lengths") and not path:
        raise ValueError(f"--dataset-name {name} needs --dataset-path")
    if name == "random":
        ranges = [(max(1, math.ceil(0.9 * mean)), math.floor(1.1 * mean))
                  for mean in (input_len, output_len)]
        ins, outs = (rng.integers(*ends, n, endpoint=True).tolist() for ends in ranges)
        return ins, outs, f"random, {input_len} in, {output_len} out, each within 10 %"
    if not path:
        ins, outs = (draw_lengths(statistics, n, rng) for statistics in LENGTH_STATISTICS[name])
        return ins, outs, f"{name}, lengths drawn to fit its published figures"
    if name == "sharegpt":
        pairs = read_sharegpt(path, load_tokenizer(model))
    else:
        pairs = read_lengths(path)
    chosen = [pairs[i] for i in rng.choice(len(pairs), n, replace=n > len(pairs))]
    ins, outs = (list(column) for column in zip(*chosen, strict=True))
    return ins, outs, f"{name}, {n} of {len(pairs)} in {path}"


def draw_arrivals(rate, n, rng):
    """Seconds at which n requests arrive: Poisson with `rate` per second, or all at once (inf)."""
    return [0.0] * n if math.isinf(rate) else rng.exponential(1 / rate, n).cumsum().tolist()


def num_tokens(prompt):
    """Length of a prompt that is given as its token ids or as their number."""
    return prompt if isinstance(prompt, int) else len(prompt)


def fit_requests(prompts, output_lens, limit):
    """Shorten requests to `limit` tokens; an output keeps at least limit / 2 of its own.

    Returns (prompts, output lengths, number of requests that were shortened).
    """
    new_prompts, new_lens, clipped = [], [], 0
    for prompt, output_len in zip(prompts, output_lens, strict=True):
        n = num_tokens(prompt)
        new_lens.append(min(output_len, max(limit // 2, limit - n)))
        room = limit - new_lens[-1]
        if n > room:
            prompt = room if isinstance(prompt, int) else prompt[:room]
        new_prompts.append(prompt)
        clipped += n + output_len > limit
    return new_prompts, new_lens, clipped
