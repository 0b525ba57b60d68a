"""Will offloading pay here? Said in plain words, before anything long starts.

`Forecast` predicts how long gpu-only and neo take for requests that all come at once. It needs a
performance model, the KV budget and the lengths of the requests: no simulation, milliseconds.
Both strategies run towards the steady state of aim.py (NEO, section 3.2, says how long an iteration
takes). A run of N requests is that steady state with a slope at either end. If prompts end after n
iterations, the share of the steady state's decodes that run in iteration t is

    left(t - n) - left(t)       left(s): the share that still runs after s more iterations;
                                1 up to s = 0, and 0 once the longest output is over

`advise` asks an engine for the numbers and puts the answer into words. It knows what an LLM holds,
no plans and no tensors. Test: pytest lab -k advice
"""
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch

from aim import MeanRequest, SteadyState, best_aim
from kv_format import kv_bytes
from perfmodel import Roofline

PAYS = 1.02             # offloading pays if neo / gpu-only, in throughput, is above this
MATTERS = 1.05          # GPU memory binds gpu-only if twice as much of it gives more than this
PARTS = 12              # steps of each slope
CPU_ROWS = 16           # decodes over which the CPU's attention is rated
# On a measured profile nobody has measured the other format. How many times as fast int8 is read:
# RESULTS.md, 2 threads of AVX2, with one query head per KV head, and with several.
INT8_SPEED = {"one": 1.75, "several": 1.2}


class Forecast:
    """Predicts gpu-only and neo for one workload.

    perf              perfmodel.PerfModel
    lengths           [(tokens in, tokens out)] of requests that all come at once
    tokens            {tier: KV tokens that it holds}
    max_batch_tokens  prompt tokens of an iteration, at most
    max_running       requests that hold KV at a time, at most
    """

    def __init__(self, perf, lengths, tokens, max_batch_tokens, max_running):
        lengths = [(i, max(o, 2)) for i, o in lengths]
        self.tokens, self.max_running, self.num_requests = tokens, max_running, len(lengths)
        self.steady = SteadyState(perf, MeanRequest.of(lengths))
        self.aims = {name: best_aim(perf, lengths, held, max_batch_tokens)
                     for name, held in (("gpu-only", tokens | {"cpu": 0}), ("neo", tokens))}
        self.left = still_running([o - 1 for _, o in lengths])
        # Tokens that stay free on average: half of the next request, and the longer it is the more
        # often it is the one that waits for room.
        totals = [i + o for i, o in lengths]
        self.all_fit = sum(totals) <= tokens["gpu"]     # then neo keeps nobody in the CPU tier
        if self.all_fit:
            self.aims["neo"] = self.aims["gpu-only"]
        self.spare = sum(n * n for n in totals) / sum(totals) / 2

    def room(self, prompt_tokens):
        """Decodes that the GPU tier holds beside prompts in progress, as in best_aim."""
        i, o, kv, _ = self.steady.mean
        if self.tokens["gpu"] < i + o:
            return 0.0
        waiting_kv = i * max(i / prompt_tokens, 1) / (o - 1)
        return max(1.0, (self.tokens["gpu"] - self.spare) / (kv + waiting_kv))

    def split(self, aim, decodes):
        """Decodes -> (in the GPU tier, in the CPU tier). Strategies fill the GPU tier first."""
        gpu = min(decodes, self.room(aim.prompt_tokens))
        return gpu, decodes - gpu if aim.cpu_decodes else 0.0

    def state(self, name, in_flight=None):
        """The steady state (an aim.Aim) of a strategy while at most in_flight requests are there:
        what its aim comes to when the GPU tier is filled first."""
        aim, limit = self.aims[name], min(in_flight or self.max_running, self.max_running)
        decodes = min(limit, aim.gpu_decodes + aim.cpu_decodes)
        return self.steady.aim(aim.prompt_tokens, *self.split(aim, decodes))

    def seconds(self, name):
        """How long all requests take under a strategy; infinite if it can run none of them."""
        state = self.state(name)
        if not state.rate:
            return float("inf")
        decodes = state.gpu_decodes + state.cpu_decodes
        begun = state.rate * state.ms                           # requests per iteration
        with_prompts = begun * self.steady.mean.prompt / state.prompt_tokens
        n = self.num_requests / begun                           # iterations until prompts end
        steps, _ = self.left                                    # of a slope
        edges = np.unique([0, n, *steps, *(n + steps)])
        total = 0.0
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            t = (start + end) / 2
            running = decodes * (self.share_left(t - n) - self.share_left(t))
            if t < n:
                ms = (with_prompts * self.ms(state, state.prompt_tokens, running)
                      + (1 - with_prompts) * self.ms(state, 0, running))
            else:                       # less than one decode: perhaps the last one is over
                ms = min(1, running) * self.ms(state, 0, max(1, running))
            total += (end - start) * ms
        return float(total) / 1e3

    def ms(self, state, prompt_tokens, decodes):
        """An iteration."""
        if not prompt_tokens + decodes:
            return 0.0
        gpu, cpu = self.split(state, decodes)
        return self.steady.ms(prompt_tokens, gpu, cpu, cpu / decodes if decodes else 0.0)

    def share_left(self, iterations):
        return np.interp(iterations, *self.left)

    @property
    def gain(self):
        """Throughput of neo / gpu-only."""
        base = self.seconds("gpu-only")
        return base / self.seconds("neo") if base < float("inf") else base

    def pays_from(self):
        """The fewest requests in flight, if requests keep coming, for which neo pays; or None."""
        first, last = (max(1, int(a.gpu_decodes + a.cpu_decodes))
                       for a in (self.state("gpu-only"), self.aims["neo"]))
        for n in np.unique(np.geomspace(first, max(first, last) + 1, 40).astype(int)):
            rates = [self.state(name, in_flight=int(n)).rate for name in ("neo", "gpu-only")]
            if rates[0] > PAYS * rates[1]:
                return int(n)
        return None


def still_running(decodes):
    """Lengths of requests in decodes -> (iterations, shares): the share of a steady state's decodes
    that still run after so many iterations, from 1 down to 0, in PARTS steps.

    In a steady state a request of d decodes is equally often at each of them: after s iterations
    sum max(0, d - s) / sum d are left.
    """
    d = np.sort(np.array(decodes, float))
    s = np.concatenate([[0.0], np.unique(d)])
    done = np.concatenate([[0.0], np.cumsum(d)])
    k = np.searchsorted(d, s, side="right")             # requests of at most s decodes
    left = (done[-1] - done[k] - s * (len(d) - k)) / done[-1]
    shares = (1 - np.arange(PARTS + 1) / PARTS) ** 2    # finer towards the end: a long tail
    return np.interp(1 - shares, 1 - left, s), shares


# ------------------------------------------------------------------------- what would be faster

def with_cpu_kv(perf, n_bytes, speed):
    """A copy of perf with n_bytes per token and layer in the CPU tier, read `speed` x as fast."""
    other = copy(perf)
    other.token_bytes = perf.token_bytes | {"cpu": n_bytes}
    other.cpu_decode = lambda n_requests, kv: perf.cpu_decode(n_requests, kv / speed)
    return other


def doubled(perf, tokens, resource):
    """(perf, tokens) of a machine with twice as much of a resource."""
    other = copy(perf)
    if resource == "GPU memory":
        return perf, tokens | {"gpu": 2 * tokens["gpu"]}
    if resource == "GPU compute":                       # and its bandwidth
        other.gpu_scale = perf.gpu_scale / 2
    elif resource == "CPU bandwidth":
        other.cpu_decode = lambda n_requests, kv: perf.cpu_decode(n_requests, kv / 2)
    else:
        assert resource == "PCIe", resource
        other.transfer = lambda n_bytes: perf.transfer(n_bytes) / 2
    return other, tokens


RESOURCES = {"gpu-only": ("GPU memory", "GPU compute"),
             "neo": ("GPU memory", "GPU compute", "CPU bandwidth", "PCIe")}


# ------------------------------------------------------------------------------------ in words

@dataclass
class Advice:
    """What `advise` found out."""
    num_requests: int
    gpu_requests: float     # mean requests that the GPU tier holds
    gpu_tokens: int         # KV tokens that it holds
    all_fit: bool           # it holds all of them at once, to their ends
    gb_s: dict              # {tier: GB/s at which its attention reads KV}
    ratio: float            # tokens that the GPU's attention reads while the CPU's reads one
    rates: dict             # {strategy: requests per second, all at once}
    decodes: dict           # {tier: decodes of an iteration of neo's steady state}
    more: dict              # {strategy: {resource: its rate with twice as much / its rate}}
    gains: dict             # {"exact", "int8": neo / gpu-only with such a CPU tier}
    kv: str                 # "exact" or "int8": the CPU tier of this run
    pays_from: int          # requests in flight, or None
    guessed: str            # the format that was not measured, or ""

    @property
    def gain(self):
        return self.gains.get(self.kv)

    def pays(self, kv):
        return self.gains.get(kv, 0) > PAYS

    @property
    def binds(self):
        """{strategy: the resource that binds it}. Of gpu-only that is memory if twice as much of
        it would help; of neo, what would help most."""
        found = {name: max(more, key=more.get) for name, more in self.more.items()}
        if self.more["gpu-only"]["GPU memory"] > MATTERS:
            found["gpu-only"] = "GPU memory"
        return found

    def describe(self):
        """Three lines, or two without a CPU tier."""
        gb_s, lines, indent = self.gb_s, [f"advice     {self.verdict()}"], 11 * " "
        tier = f"the GPU tier ({self.gpu_tokens} tokens) holds {self.gpu_requests:.1f} requests"
        attention = f"attention reads {gb_s['gpu']:.3g} GB/s on the GPU"
        if "cpu" in gb_s:
            rates = [f"{name} {rate:.3g} requests/s, bound by {self.binds[name]}"
                     for name, rate in self.rates.items()]
            lines.append(f"{indent}predicted: {'; '.join(rates)}. Below the first rate both keep "
                         "up")
            attention += f", {gb_s['cpu']:.3g} on the CPU ({self.ratio:.2g} : 1 in tokens)"
        lines.append(f"{indent}{tier}; {attention}")
        return "\n".join(lines)

    def verdict(self):
        if self.gain is None:
            return "offloading will not pay here: there is no CPU tier (--cpu-mem)"
        if self.gain == float("inf"):
            return "offloading pays here: the GPU tier does not hold even one such request"
        other = "int8" if self.kv == "exact" else "exact"
        flag = {"int8": "with --cpu-kv int8", "exact": "without --cpu-kv int8"}[other]
        guessed = " (guessed)" if other == self.guessed else ""
        beside = f"{flag}{guessed} {times(self.gains[other])}"
        if not self.pays(self.kv):
            also = ", which would pay" if self.pays(other) else ""
            return (f"offloading will not pay here: {self.reason()}; neo / gpu-only "
                    f"{times(self.gain)}, {beside}{also}")
        start = f"; from {self.pays_from} requests in flight on" if self.pays_from else ""
        return (f"offloading pays here: {times(self.gain)} the throughput of gpu-only with all "
                f"{self.num_requests} requests at once, {beside}{start}")

    def reason(self):
        if self.all_fit:
            return f"the GPU tier holds all {self.num_requests} requests"
        if self.binds["gpu-only"] == "GPU compute":
            return "GPU compute binds, and more requests at a time would not help"
        few = f"only {self.decodes['cpu']:.1f}" if self.decodes["cpu"] > 0.1 else "none"
        return (f"GPU memory binds, but beside {self.decodes['gpu']:.1f} decodes in the GPU tier "
                f"the CPU can hide {few}")

    def describe_more(self):
        """What twice as much of each resource would give, and what the words mean."""
        lines = [f"{name:10s} with twice the " + ", ".join(
            f"{resource} {times(x)}" for resource, x in more.items())
            for name, more in self.more.items()]
        return "\n".join((*lines, "           (GPU compute: its bandwidth, too. The gain is in "
                          f"throughput; up to {PAYS:.2f}x does not count as one)"))


def times(x):
    return f"{x:.2f}x" if x < 100 else f"{x:.0f}x"


def speed_up(before, after):
    """How many times as fast, of two times in seconds, which may both be infinite."""
    return 1.0 if before == after else before / after


def advise(llm, lengths):
    """Advice for requests of these lengths, [(tokens in, tokens out)], on this engine (an LLM)."""
    budget, cfg, perf = llm.budget, llm.cfg, llm.new_perf()
    tokens = {tier: n * budget.block_size for tier, n in budget.num_blocks.items()}
    limits = budget.max_batch_tokens, llm.max_num_seqs

    def forecast(perf, tokens):
        return Forecast(perf, lengths, tokens, *limits)

    here = forecast(perf, tokens)
    kv, num = here.steady.mean.kv, max(1.0, here.room(here.aims["gpu-only"].prompt_tokens))
    reads = {"gpu": num * kv / perf.gpu_decode(num * kv)}       # tokens per ms, in one layer
    gains, rates, guessed = {}, {}, ""
    this = "int8" if budget.kv_dtypes["cpu"] == torch.int8 else "exact"
    if tokens["cpu"]:
        reads["cpu"] = CPU_ROWS * kv / perf.cpu_decode(CPU_ROWS, CPU_ROWS * kv)
        other = "exact" if this == "int8" else "int8"
        sizes = {"exact": kv_bytes(cfg.n_kv_head, cfg.head_dim, llm.dtype),
                 "int8": kv_bytes(cfg.n_kv_head, cfg.head_dim, torch.int8)}
        smaller = sizes[this] / sizes[other]            # above 1 if this run is exact
        speed = smaller
        if not isinstance(perf, Roofline):
            guessed = other
            speed = INT8_SPEED["one" if cfg.n_head == cfg.n_kv_head else "several"]
            speed = speed if other == "int8" else 1 / speed
        there = forecast(with_cpu_kv(perf, sizes[other], speed),
                         tokens | {"cpu": int(tokens["cpu"] * smaller)})
        gains = {this: here.gain, other: there.gain}
    more, faster = {}, {}
    if tokens["cpu"]:
        faster = {resource: forecast(*doubled(perf, tokens, resource))
                  for resource in RESOURCES["neo"]}         # all that there are
    for name, resources in RESOURCES.items():
        seconds = here.seconds(name)
        rates[name] = here.num_requests / seconds
        more[name] = {resource: speed_up(seconds, faster[resource].seconds(name))
                      for resource in resources if faster}
    state = here.state("neo")
    return Advice(
        num_requests=len(lengths), gpu_requests=tokens["gpu"] / kv, gpu_tokens=tokens["gpu"],
        all_fit=here.all_fit,
        gb_s={tier: perf.token_bytes[tier] * rate / 1e6 for tier, rate in reads.items()},
        ratio=reads["gpu"] / reads.get("cpu", float("inf")), rates=rates, more=more, gains=gains,
        decodes={"gpu": state.gpu_decodes, "cpu": state.cpu_decodes}, kv=this,
        pays_from=here.pays_from() if tokens["cpu"] else None, guessed=guessed)
