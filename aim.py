"""The steady state that a strategy aims at: prompt tokens and CPU decodes of an iteration.

Suppose that all requests were like the mean of those at hand: i tokens in, o out. An iteration with
p prompt tokens lets p / i requests begin. Each of them decodes o - 1 times, so that in a steady
state (o - 1) p / i decodes go with those p tokens. The GPU tier holds a certain number of decodes;
the CPU tier takes the others, as long as their attention stays hidden. `best_aim` tries many p and
many numbers of CPU decodes, and predicts how many requests begin per ms.

Knows no torch, no scheduler and no strategy: lengths of requests, and a performance model.
"""
from typing import NamedTuple

from perfmodel import Work, layer_ms

GOOD = 0.98                 # share of the best rate that is enough: the shortest iteration is taken
# What is tried: prompt tokens of an iteration; CPU decodes, as a share of those that stay hidden;
# and splits: the shares of the prompt tokens and of the CPU decodes that sub-batch B gets.
PROMPT_TOKENS = [32 * 1.3 ** k for k in range(20)]
HIDDEN = (0, 0.4, 0.7, 0.9, 1.1)
SPLITS = [(x, y) for x in (0, 0.5) for y in (1, 0.75, 0.5)]
FEW = 4                     # CPU decodes: with fewer, whole requests are too coarse for a mean
CPU_TIER = 0.9              # share of the CPU tier that its decodes can fill


class Aim(NamedTuple):
    """A steady state: means over iterations."""
    rate: float             # requests per ms
    ms: float               # of an iteration
    prompt_tokens: float    # of an iteration that has prompts
    gpu_decodes: float
    cpu_decodes: float


class MeanRequest(NamedTuple):
    """In tokens."""
    prompt: float
    output: float
    kv: float               # cached, over its decodes
    longest: float          # mean over prompt tokens: the length of the prompt it is part of

    @classmethod
    def of(cls, lengths):
        """lengths: [(tokens in, tokens out, at least 2)]"""
        n, prompt_tokens = len(lengths), sum(i for i, _ in lengths)
        decodes = sum(o - 1 for _, o in lengths)
        return cls(prompt_tokens / n, decodes / n + 1,
                   sum((o - 1) * (i + o / 2) for i, o in lengths) / decodes,
                   sum(i * i for i, _ in lengths) / prompt_tokens)


class SteadyState:
    """Predicts iterations of mean requests."""

    def __init__(self, perf, mean):
        self.perf, self.mean = perf, mean
        prompt = Work(0, ((0, mean.longest),))
        self.prompt_ms = perf.load(prompt).gpu_ms / mean.longest    # attention of a prompt token

    def load(self, p, gpu, cpu, stored):
        """The Load of a sub-batch: p prompt tokens, a share `stored` of them for the CPU tier, and
        decodes of both tiers."""
        kv = self.mean.kv
        fetched = stored * max(0, self.mean.longest - p) / 2 if p else 0
        load = self.perf.load(Work(p + gpu + cpu, (), p * stored, fetched, gpu * kv, cpu, cpu * kv))
        return load._replace(gpu_ms=load.gpu_ms + p * self.prompt_ms)

    def ms(self, p, gpu, cpu, stored, splits=SPLITS):
        """An iteration of one sub-batch or of two, whichever is shorter."""
        layer = layer_ms(self.load(p, gpu, cpu, stored))
        for x, y in splits if cpu else ():
            if p or not x:
                a = self.load(p * (1 - x), gpu, cpu * (1 - y), stored)
                layer = min(layer, layer_ms(a, self.load(p * x, 0, cpu * y, stored)))
        num_sampled = p / self.mean.prompt + gpu + cpu
        perf = self.perf
        return perf.n_layer * layer + perf.once_ms(num_sampled) + perf.overhead_ms

    def hidden(self, p, gpu):
        """CPU decodes that p prompt tokens and the GPU decodes hide, with a second sub-batch."""
        perf, kv = self.perf, self.mean.kv
        a = self.load(p, gpu, 0, 0)
        cover = a.linear_ms + a.gpu_ms + perf.load(Work(1)).linear_ms
        first, next_ms = perf.cpu_time(1, kv), perf.cpu_time(2, 2 * kv) - perf.cpu_time(1, kv)
        return max(0.0, 1 + (cover - first) / max(next_ms, 1e-9))

    def aim(self, p, gpu, cpu):
        """At most gpu and cpu decodes beside p prompt tokens -> Aim."""
        i, o = self.mean.prompt, self.mean.output
        begun = min(p / i, (gpu + cpu) / (o - 1))           # requests per iteration
        if not begun:
            return Aim(0.0, 0.0, p, 0, 0)
        # With few prompts not all decodes are there; with few decodes not all iterations have
        # prompts.
        used, with_prompts = begun * (o - 1) / (gpu + cpu), begun * i / p
        gpu, cpu, stored = used * gpu, used * cpu, cpu / (gpu + cpu)
        ms = with_prompts * self.ms(p, gpu, cpu, stored)
        if with_prompts < 1:
            ms += (1 - with_prompts) * self.ms(0, gpu, cpu, stored)
        return Aim(begun / ms, ms, p, gpu, cpu)


def best_aim(perf, lengths, tokens, max_batch_tokens):
    """The steady state that serves most requests per second; of those almost as good, the one with
    the shortest iteration.

    lengths           [(tokens in, tokens out)]; if empty, the Aim asks for nothing
    tokens            {tier: KV tokens that it holds}
    max_batch_tokens  prompt tokens of an iteration, at most
    """
    found = [Aim(0.0, 0.0, max_batch_tokens, 0, 0)]
    if not lengths:
        return found[0]
    mean = MeanRequest.of(lengths)
    steady, (i, o, kv, _) = SteadyState(perf, mean), mean
    for p in (i, max_batch_tokens, *PROMPT_TOKENS):
        if p > max_batch_tokens:
            continue
        gpu = 0
        if tokens["gpu"] >= i + o:
            # For i / p iterations, at least one, a prompt in progress holds KV but does not decode.
            # That counts as KV of each decode. Half a request's tokens stay free, on average.
            waiting_kv = i * max(i / p, 1) / (o - 1)
            gpu = max(1, (tokens["gpu"] - (i + o) / 2) / (kv + waiting_kv))
        most = CPU_TIER * tokens["cpu"] / kv
        hidden = steady.hidden(p, gpu) if most else 0
        aims = [steady.aim(p, gpu, cpu) for cpu in {min(x * hidden, most) for x in HIDDEN}]
        found += [aim for aim in aims if not 0 < aim.cpu_decodes < FEW]
    enough = GOOD * max(aim.rate for aim in found)
    return min((aim for aim in found if aim.rate >= enough), key=lambda aim: aim.ms)
