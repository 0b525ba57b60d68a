"""The strategies: which rows an iteration has, and in which tier a prompt's KV goes.

    gpu-only    no CPU tier, prompts mixed evenly with decodes: the baseline
    gpu-whole   no CPU tier, prompts whole: the paper's kind of baseline
    serial      offloads, one sub-batch
    symmetric   all KV in host memory, two equal sub-batches
    neo         GPU decodes in A, prompts and CPU decodes in A and B, towards the best steady state

A strategy is a class with `tiers` (where it keeps KV) and form(s, plan) -> [Batch, ...], registered
by name; `order(s, request)` is optional. It uses the verbs of Scheduler s: admit, decodes, swap_in,
swap_out, refill_gpu, preempt, expected. Integers and predicted milliseconds only: this file knows
no torch and no devices. To write one, see the README and EXPERIMENTS.md.
"""
from bisect import bisect_right
from itertools import accumulate, islice

from aim import best_aim
from perfmodel import Work
from plan import check_strategy, prompt_work
from scheduler import Batch

STRATEGIES = {}
AIM_EVERY = 64        # iterations after which the aim is set anew
SEEN = 64             # waiting requests that the aim takes into account, beside all that run
HUNGER = 2            # While the tiers are empty, prompts come in up to 1 + 2 times as fast.
RESIDENTS = 1.3       # The CPU tier takes 1.3 x the aim's CPU decodes, so that work is at hand,
SPARE = 8             # and 8 requests more while few requests wait.


def strategy(name):
    """Class decorator: register a strategy under the name that LLM(strategy=...) takes."""
    def register(cls):
        check_strategy(name, cls)
        cls.name, STRATEGIES[name] = name, cls
        return cls
    return register


def find_strategy(name):
    """The class registered under a name. Raises ValueError on an unknown name."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


class Even:
    """Prompts mixed evenly with decodes: an iteration has as many prompt tokens as the best steady
    state has, and more while fewer requests run than in it."""
    aim = None

    def set_aim(self, s):
        """Aim at the best steady state for requests like those at hand."""
        requests = [*s.running["gpu"].values(), *s.running["cpu"].values(),
                    *islice(s.waiting, SEEN)]
        lengths = [(len(r.prompt), max(s.expected(r), len(r.output) + 1, 2)) for r in requests]
        tokens = {tier: n * s.block_size for tier, n in s.num_blocks.items()}
        self.aim = best_aim(s.perf, lengths, tokens, s.max_batch_tokens)

    def admit(self, s, plan, num_shares=1):
        """s.admit towards the aim: the CPU tier fills up to RESIDENTS x the aim's decodes.

        While few requests wait, prompts are hurried: they go whole, and SPARE more requests may
        enter the CPU tier.
        """
        if self.aim is None or s.iteration % AIM_EVERY == 0:
            self.set_aim(s)
        aim = self.aim
        emptiness = max(0.0, 1 - s.num_running / max(1, aim.gpu_decodes + aim.cpu_decodes))
        hurried = len(s.waiting) <= s.ttft_queue
        prompt_tokens = aim.prompt_tokens * (1 + HUNGER * emptiness)
        most = RESIDENTS * aim.cpu_decodes + SPARE * hurried
        s.admit(plan, self.tiers,
                lambda tier, r: tier == "gpu" or s.nothing_runs or len(s.running["cpu"]) < most,
                None if hurried else [max(1, prompt_tokens / num_shares)] * num_shares)


@strategy("gpu-only")
class GpuOnly(Even):
    """No CPU tier: the baseline. Prompts are admitted when the GPU tier can hold them to their
    end, and mixed evenly with decodes."""
    tiers = ("gpu",)

    def form(self, s, plan):
        self.admit(s, plan)
        return [Batch(plan.prefill, s.decodes("gpu"))]


@strategy("gpu-whole")
class GpuWhole:
    """No CPU tier, and each prompt in one iteration if it fits: the paper's kind of baseline."""
    tiers = ("gpu",)

    def form(self, s, plan):
        s.admit(plan, self.tiers)
        return [Batch(plan.prefill, s.decodes("gpu"))]


@strategy("serial")
class Serial:
    """Offloading without overlap: one sub-batch of everybody, so the GPU waits for the CPU in
    every layer."""
    tiers = ("gpu", "cpu")

    def form(self, s, plan):
        s.admit(plan, self.tiers)
        s.refill_gpu(plan)
        return [Batch(plan.prefill, s.decodes("gpu"), s.decodes("cpu"))]


@strategy("symmetric")
class Symmetric:
    """All KV on the CPU tier, two equal sub-batches (FastDecode's way)."""
    tiers = ("cpu",)

    def form(self, s, plan):
        s.admit(plan, self.tiers)
        decodes = s.decodes("cpu")
        return [Batch(plan.prefill[i::2], (), decodes[i::2]) for i in range(2)]


@strategy("neo")
class Neo(Even):
    """Asymmetric pipelining, load-aware (NEO, section 3.2).

    Sub-batch A = prompts, GPU decodes and CPU decodes; B = prompts and CPU decodes. With prompts in
    both, both are bound by arithmetic, so reading all weights twice costs nothing. They take turns:

        GPU   [ linear A | attention A ][ linear B | attention B ]
        CPU   [ attention B             ][ attention A            ]

    1. Admit prompts, towards the aim: to the GPU tier while they fit, then to the CPU tier.
    2. Of several shapes, take the one with most tokens per predicted ms. A CPU decode that has
       waited k iterations counts as k tokens.

    So nobody starves. Let w = tokens of an iteration without CPU decodes, and t = predicted time of
    everybody / of those w alone. Once a CPU decode has waited more than w (t - 1) iterations, to
    run everybody is worth more than to run none of the M CPU decodes. From then on at least the
    oldest one runs in each iteration: nobody waits longer than M + w (t - 1) iterations.
    """
    tiers = ("gpu", "cpu")

    def form(self, s, plan):
        if self.aim and not self.aim.cpu_decodes:   # out of the CPU tier, before others come in
            s.refill_gpu(plan)
        gpu, cpu = s.decodes("gpu"), s.decodes("cpu")
        num_prompts = len(s.waiting) + s.num_running - len(gpu) - len(cpu)
        self.admit(s, plan, num_shares=2 if s.running["cpu"] and num_prompts > 1 else 1)
        s.refill_gpu(plan)
        if plan.swap_in:
            gpu, cpu = s.decodes("gpu"), s.decodes("cpu")
        cpu.sort(key=lambda r: (r.last_run, r.arrival))
        ages = [0, *accumulate(s.iteration - r.last_run for r in cpu)]      # of the first n
        # a chunk is worth its share of the first token
        tokens = sum(r.num_scheduled / r.num_tokens for r in plan.prefill) + len(gpu)

        shapes = [Shapes(s.perf, plan.prefill, [], gpu, cpu)]
        if all(plan.shares) and len(plan.shares) > 1:
            shapes.append(Shapes(s.perf, *plan.shares, gpu, cpu))
        found = [(shape, *ends) for shape in shapes for ends in shape.candidates()]
        if not found:
            return []

        def tokens_per_ms(candidate):
            shape, in_b, num_cpu = candidate
            return (tokens + ages[num_cpu]) / shape.ms(in_b, num_cpu)
        shape, in_b, num_cpu = max(found, key=tokens_per_ms)
        return [Batch(shape.prompts[0], gpu, cpu[in_b:num_cpu]),
                Batch(shape.prompts[1], (), cpu[:in_b])]


class Shapes:
    """The ways to give CPU decodes out to sub-batches with given prompts: B gets the first in_b of
    `cpu`, A those from in_b to num_cpu."""

    def __init__(self, perf, prompts_a, prompts_b, gpu, cpu):
        self.perf, self.prompts = perf, (prompts_a, prompts_b)
        self.kv = [0, *accumulate(r.num_tokens for r in cpu)]               # tokens of the first n
        self.rows = [sum(r.num_scheduled for r in prompts) for prompts in self.prompts]
        self.rows[0] += len(gpu)
        self.fixed = [{"gpu_kv": sum(r.num_tokens for r in decodes), **prompt_work(prompts)}
                      for prompts, decodes in zip(self.prompts, (gpu, ()), strict=True)]
        self.num_sampled = len(gpu) + sum(r.ends_prefill for r in prompts_a + prompts_b)

    def load(self, which, start, end):
        """The Load of A (0) or B (1) with the CPU decodes from start to end."""
        num_cpu = end - start
        return self.perf.load(Work(self.rows[which] + num_cpu, num_cpu=num_cpu,
                                   cpu_kv=self.kv[end] - self.kv[start], **self.fixed[which]))

    def ms(self, in_b, num_cpu):
        """Predicted time of an iteration."""
        loads = []
        if self.rows[0] + num_cpu - in_b:
            loads.append(self.load(0, in_b, num_cpu))
        if self.rows[1] + in_b:
            loads.append(self.load(1, 0, in_b))
        return self.perf.iteration(loads, self.num_sampled + num_cpu).total_ms

    def hidden(self, cover_ms, start=0):
        """The end of the CPU decodes from `start` on that cover_ms of the GPU's work hide."""
        kv, perf = self.kv, self.perf
        return start + bisect_right(range(start + 1, len(kv)), cover_ms, key=lambda end:
                                    perf.cpu_time(end - start, kv[end] - kv[start]))

    def candidates(self):
        """{(in_b, num_cpu)}: one sub-batch with none, some or all of the CPU decodes; two with
        those that stay hidden, with all, and halfway."""
        total, in_b, num_cpu, found = len(self.kv) - 1, 0, 0, set()
        if not self.rows[1]:
            gpu_ms = self.load(0, 0, 0).gpu_ms
            found = {(0, n) for n in (0, self.hidden(gpu_ms), total // 2, total)}
        for _ in range(3):          # the rows of each are the cover of the other: this settles
            a = self.perf.load(Work(1))                     # an empty A starts to fill like this
            if self.rows[0] + num_cpu - in_b:
                a = self.load(0, in_b, num_cpu)
            in_b = self.hidden(a.linear_ms + a.gpu_ms)
            b = self.load(1, 0, in_b)
            num_cpu = self.hidden(b.linear_ms + b.gpu_ms, in_b)
        found |= {(min(total, in_b * n // max(num_cpu, 1)), n)
                  for n in (num_cpu, (num_cpu + total) // 2, total)}
        return {(b, n) for b, n in found if n or sum(self.rows)}
