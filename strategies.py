"""The strategies: which rows an iteration has, and in which tier a prompt's KV goes.

    gpu-only    no CPU tier: the baseline
    serial      offloads, one sub-batch
    symmetric   all KV in host memory, two equal sub-batches
    neo         prompts and GPU decodes in A, CPU decodes in both, as many as stay hidden

A strategy is a class with `tiers` (where it keeps KV) and form(s, plan) -> [Batch, ...], registered
by name; `order(s, request)` is optional. It uses the verbs of Scheduler s: admit, decodes, swap_in,
swap_out, refill_gpu, preempt, expected. Integers and predicted milliseconds only: this file knows
no torch, no devices and no blocks. To write one, see the README and EXPERIMENTS.md.
"""
from bisect import bisect_right
from collections import Counter
from itertools import accumulate

from perfmodel import Work
from plan import check_strategy, prompt_work
from scheduler import Batch

STRATEGIES = {}


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


@strategy("gpu-only")
class GpuOnly:
    """No CPU tier: the baseline. Prompts are admitted when the GPU tier can hold them to their
    end."""
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


# --------------------------------------------------------------------------------------- neo

MAX_WAIT = 32         # iterations: a request in the CPU tier gets a token at least once in them
TRIAL = 256           # iterations after which CPU decodes must be worth what they cost
CLOSED = 4 * TRIAL    # iterations for which the CPU tier takes no prompts if they were not
RESIDENTS = 1.25      # Keep up to 1.25 x as many requests in the CPU tier as one iteration can
#                       hide, so that there is always CPU work to fill it.
MEMORY = 0.005        # share of the newest value in the moving averages: about a request's life
MAX_HIDDEN = 4096     # CPU decodes beyond which nobody asks how many one iteration hides


class Average:
    """A moving average. The first value counts fully."""

    def __init__(self, value=0.0):
        self.value = value

    def add(self, new):
        self.value = self.value + MEMORY * (new - self.value) if self.value else new


@strategy("neo")
class Neo:
    """Asymmetric pipelining, load-aware (NEO, section 3.2).

    Sub-batch A = prompts, GPU decodes and a few CPU decodes; B = most CPU decodes. In a steady
    state the two take turns like this:

        GPU   [ linear A: prompts, GPU decodes ][ attention A ][ linear B ]
        CPU   [ attention B ..................................][ attention A .. ]

    1. Admit prompts: to the GPU tier while they fit, then to the CPU tier while that pays.
    2. Give CPU decodes out, those that waited longest first, while the CPU's time stays hidden.
    3. Compare three shapes: GPU rows alone, one sub-batch of everything, two sub-batches. Run the
       one with most predicted tokens per ms.
    """
    tiers = ("gpu", "cpu")

    def __init__(self):
        # of an iteration: decodes of each tier, and the ms that they add to it
        self.gpu_tokens, self.gpu_ms = Average(), Average()
        self.cpu_tokens, self.cpu_ms = Average(), Average()
        self.prompt_tokens = Average()      # of an iteration that carries prompts
        self.prompt_share = Average(1.0)    # share of the iterations that carry prompts
        self.opened = 0                     # iteration from which the CPU tier takes prompts

    def form(self, s, plan):
        gpu_now, cpu_now = s.decodes("gpu"), s.decodes("cpu")
        self.residents = len(cpu_now), sum(r.num_tokens for r in cpu_now)
        self.gpu_work = len(gpu_now), sum(r.num_tokens for r in gpu_now)
        if self._cost("cpu") > self._cost("gpu"):   # out of the CPU tier, before others come in
            s.refill_gpu(plan)
        s.admit(plan, self.tiers,
                lambda tier, r: tier == "gpu" or s.nothing_runs or self._pays(s, r))
        if not plan.swap_in:
            s.refill_gpu(plan)

        gpu = s.decodes("gpu")
        cpu = sorted(s.decodes("cpu"), key=lambda r: (r.last_run, r.arrival))
        shapes = _Shapes(s.perf, plan.prefill, gpu, cpu)
        due = self._due(s, shapes)
        num_cpu, num_in_b = max(shapes.candidates(due), key=lambda c: shapes.tokens_per_ms(*c))
        self._learn(shapes, num_cpu, num_in_b)
        return [Batch(plan.prefill, gpu, cpu[num_in_b:num_cpu]),
                Batch(cpu_decodes=cpu[:num_in_b])]

    def _due(self, s, shapes):
        """CPU decodes, the longest waiting first, that must run now, so that all run within
        MAX_WAIT iterations even if no prompt comes.

        For every horizon t: (requests whose deadline is within t iterations) - t x (decodes hidden
        per iteration). The largest value must run now.
        """
        num_cpu = len(shapes.cpu)
        if not num_cpu:
            return 0
        deadlines = Counter(max(0, MAX_WAIT + r.last_run - s.iteration) for r in shapes.cpu)
        a = s.perf.load(Work(shapes.num_decodes or 1, gpu_kv=shapes.fixed["gpu_kv"]))
        hidden = self._hidden(s.perf, shapes.kv[num_cpu] / num_cpu,
                              a.linear_ms + a.gpu_ms + s.perf.load(Work(1)).linear_ms)
        within = accumulate(deadlines[t] for t in range(MAX_WAIT + 1))
        return max(num_due - hidden * t for t, num_due in enumerate(within))

    def _learn(self, shapes, num_cpu, num_in_b):
        """Remember what the decodes of each tier add to an iteration."""
        num_prompt_rows = shapes.num_rows - shapes.num_decodes
        gpu_ms = shapes.ms(0, 0)
        self.gpu_tokens.add(shapes.num_decodes)
        self.gpu_ms.add(gpu_ms - shapes.prompts_ms())
        self.cpu_tokens.add(num_cpu)
        self.cpu_ms.add(shapes.ms(num_cpu, num_in_b) - gpu_ms)
        self.prompt_tokens.add(num_prompt_rows or self.prompt_tokens.value)
        self.prompt_share.add(num_prompt_rows > 0)

    def _cost(self, tier):
        """ms that a decode of a tier has added lately; 0 before there was one."""
        tokens, ms = getattr(self, f"{tier}_tokens").value, getattr(self, f"{tier}_ms").value
        return ms / tokens if tokens else 0.0

    def _pays(self, s, request):
        """Should this prompt decode on the CPU?

        A second sub-batch reads all weights once more. Accept if that cost, divided by half the
        expected number of CPU decodes, is below the cost of one GPU decode. The expected number
        is what decodes alone hide; or else what prompts hide, if prompts come often. Once half of
        that number is there, what CPU decodes have really cost counts too: if it stays too high,
        the tier closes for a while.
        """
        perf = s.perf
        if s.iteration < self.opened:
            return False
        num_cpu, kv = self.residents[0] + 1, self.residents[1] + request.num_tokens
        num_gpu, gpu_kv = self.gpu_work
        prompt = int(self.prompt_tokens.value) or request.num_tokens
        with_prompts = perf.load(Work(prompt + num_gpu, ((0, prompt),), gpu_kv=gpu_kv))
        decodes_alone = perf.load(Work(num_gpu or 1, gpu_kv=gpu_kv))
        b_linear = perf.load(Work(num_cpu)).linear_ms
        hidden, hidden_alone = (
            self._hidden(perf, kv / num_cpu, a.linear_ms + a.gpu_ms + b_linear)
            for a in (with_prompts, decodes_alone))
        price = self._cost("gpu") if self.gpu_tokens.value else float("inf")
        if perf.n_layer * b_linear > price * hidden_alone / 2:
            hidden *= min(1.0, self.prompt_share.value * MAX_WAIT / 2)  # half: they come in bursts
            if perf.n_layer * b_linear > price * hidden / 2:
                return False
        if num_cpu > hidden / 2 and self._cost("cpu") > price:
            if s.iteration > self.opened + TRIAL:
                self.opened = s.iteration + CLOSED
            return False
        if num_cpu > RESIDENTS * hidden:
            return False
        self.residents = num_cpu, kv
        return True

    @staticmethod
    def _hidden(perf, kv_each, gpu_ms):
        """CPU decodes of kv_each cached tokens that gpu_ms of the GPU's work hide."""
        return bisect_right(range(1, MAX_HIDDEN), gpu_ms,
                            key=lambda n: perf.cpu_time(n, n * kv_each))


class _Shapes:
    """The ways to split one iteration's rows: num_cpu CPU decodes run, the first num_in_b of them
    as sub-batch B (0: no second sub-batch). `cpu` is in the order in which they are taken."""

    def __init__(self, perf, prefill, gpu, cpu):
        self.perf, self.cpu = perf, cpu
        self.num_decodes = len(gpu)
        self.num_rows = sum(r.num_scheduled for r in prefill) + len(gpu)
        self.num_sampled = sum(r.ends_prefill for r in prefill) + len(gpu)
        # a chunk is worth its share of the first token
        self.tokens = sum(r.num_scheduled / r.num_tokens for r in prefill) + len(gpu)
        self.fixed = {"gpu_kv": sum(r.num_tokens for r in gpu), **prompt_work(prefill)}
        self.kv = [0, *accumulate(r.num_tokens for r in cpu)]      # tokens of the first n

    def load_a(self, num_cpu, num_in_b):
        num_in_a = num_cpu - num_in_b
        return self.perf.load(Work(self.num_rows + num_in_a, num_cpu=num_in_a,
                                   cpu_kv=self.kv[num_cpu] - self.kv[num_in_b], **self.fixed))

    def load_b(self, num_in_b):
        return self.perf.load(Work(num_in_b, num_cpu=num_in_b, cpu_kv=self.kv[num_in_b]))

    def ms(self, num_cpu, num_in_b):
        """Predicted time of a shape."""
        if not self.num_rows + num_cpu:
            return 0.0
        loads = [self.load_a(num_cpu, num_in_b)]
        if num_in_b:
            loads.append(self.load_b(num_in_b))
        num_sampled = self.num_sampled + num_cpu - num_in_b, num_in_b
        return self.perf.iteration(loads, num_sampled).total_ms

    def prompts_ms(self):
        """Predicted time of the prompts alone."""
        if not self.fixed["prompts"]:
            return 0.0
        work = Work(self.num_rows - self.num_decodes, **self.fixed | {"gpu_kv": 0})
        num_sampled = self.num_sampled - self.num_decodes
        return self.perf.iteration([self.perf.load(work)], [num_sampled]).total_ms

    def tokens_per_ms(self, num_cpu, num_in_b):
        return (self.tokens + num_cpu) / (self.ms(num_cpu, num_in_b) or 1.0)   # no rows: nothing

    def candidates(self, due):
        """[(num_cpu, num_in_b)]: GPU rows alone; one sub-batch with 1/8, 2/8 ... 8/8 of the CPU
        decodes, or as many as hide behind its GPU attention; two sub-batches."""
        total, gpu_ms = len(self.cpu), self.load_a(0, 0).gpu_ms
        hidden = bisect_right(range(1, total + 1), gpu_ms,
                              key=lambda n: self.perf.cpu_time(n, self.kv[n]))
        found = {(max(due, n), 0) for n in (hidden, *(total * i // 8 for i in range(9)))}
        if split := self._split(due):
            found.add(split)
        return sorted((n, in_b) for n, in_b in found if n or self.num_rows) or [(0, 0)]

    def _split(self, due):
        """As many CPU decodes as stay hidden: B's behind A's GPU work, then A's behind B's.

        A few rounds settle it, because the rows of each are the cover of the other. An empty A
        counts as one row: that is how it starts to fill.
        """
        total, num_in_b, num_cpu = len(self.cpu), 0, 0
        for _ in range(3):
            a = self.perf.load(Work(1))
            if self.num_rows + num_cpu - num_in_b:
                a = self.load_a(num_cpu, num_in_b)
            num_in_b = bisect_right(range(1, total + 1), a.linear_ms + a.gpu_ms,
                                    key=lambda n: self.perf.cpu_time(n, self.kv[n]))
            num_cpu = num_in_b + self._hidden_behind_b(num_in_b)
        num_cpu = max(num_cpu, due)
        num_in_b = min(max(num_in_b, due - (num_cpu - num_in_b)), num_cpu)
        return (num_cpu, num_in_b) if num_in_b and self.num_rows + num_cpu - num_in_b else None

    def _hidden_behind_b(self, num_in_b):
        """CPU decodes after the first num_in_b that B's linear layers hide."""
        kv = self.kv
        return bisect_right(
            range(num_in_b + 1, len(kv)), self.load_b(num_in_b).linear_ms,
            key=lambda n: self.perf.cpu_time(n - num_in_b, kv[n] - kv[num_in_b]))
