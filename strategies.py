"""The strategies: how an iteration's rows are formed, and in which tier a prompt goes. A class each, registered by name; to
write one, see the README.

    gpu-only    no CPU tier: the baseline
    serial      offloads, one sub-batch
    symmetric   all KV in host memory, two equal sub-batches
    neo         prompts and GPU decodes in A, CPU decodes in both, as many as stay hidden (NEO, section 3.2)

Pure integers and predicted milliseconds, like scheduler.py, whose verbs they use: admit, swap_in, decodes.
"""
from bisect import bisect_right
from collections import Counter
from itertools import accumulate

from scheduler import MAX_WAIT, Batch, prompt_work, strategy

TRIAL = 256           # iterations after which decodes of the CPU tier must be worth their cost
SLACK = 1.25          # residents of the CPU tier over what an iteration with prompts hides: somebody is always at hand


@strategy("gpu-only")
class GpuOnly:
    """No CPU tier: the baseline. Prompts are admitted when the GPU tier will hold them to their end."""
    tiers = ("gpu",)

    def form(self, s, plan):
        s.admit(plan, self.tiers)
        return [Batch(plan.prefill, s.decodes("gpu"))]


@strategy("serial")
class Serial:
    """Offloading without overlap: one sub-batch of everybody; the GPU waits for the CPU in every layer."""
    tiers = ("gpu", "cpu")

    def form(self, s, plan):
        s.admit(plan, self.tiers)
        s.swap_in(plan)
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
class Neo:
    """Asymmetric pipelining, load-aware: sub-batch A = prompts, GPU decodes and a few CPU decodes; B = CPU decodes.

        GPU   [ linear A: prompts, GPU decodes ][ attention A ][ linear B ]
        CPU   [ attention B ..................................][ attention A .. ]

    CPU decodes are given out, those that waited longest first, while the CPU's time stays hidden. Of three shapes
    (GPU rows alone, one sub-batch with everything, two sub-batches) the one with most tokens per second is run. Where
    decodes alone hide little of the CPU's work, CPU decodes so ride along with prompts. Both tiers' tokens bring the same
    prompts, so a prompt goes to the CPU tier only while a decode there adds less time than one in the GPU tier.
    """
    tiers = ("gpu", "cpu")

    def __init__(self):
        self.gpu_tokens = self.gpu_ms = 0.0     # decodes of the GPU tier in an iteration, and the time they add to prompts
        self.cpu_tokens = self.cpu_ms = 0.0     # decodes of the CPU tier, and the time they add to that; moving averages
        self.prompt_tokens = 0.0                # in an iteration that carries prompts, and
        self.prompt_share = 1.0                 # the share of such iterations; moving averages, too
        self.opened = 0                         # iteration from which the CPU tier takes prompts

    def form(self, s, plan):
        gpu_now, cpu_now = s.decodes("gpu"), s.decodes("cpu")
        self.resident = len(cpu_now), sum(r.num_tokens for r in cpu_now)
        self.gpu_load = len(gpu_now), sum(r.num_tokens for r in gpu_now)
        if self._cost("cpu") > self._cost("gpu"):                           # out of the CPU tier, before others come in
            s.swap_in(plan)
        s.admit(plan, self.tiers, lambda tier, r: tier == "gpu" or s.idle or self._pays(s, r))
        if not plan.swap_in:
            s.swap_in(plan)

        gpu = s.decodes("gpu")
        cpu = sorted(s.decodes("cpu"), key=lambda r: (r.moved, r.arrival))
        shapes = _Shapes(s.perf, plan.prefill, gpu, cpu)
        due = self._due(s, shapes)
        n, b = max(shapes.candidates(due), key=lambda shape: shapes.rate(*shape))
        self._learn(shapes, n, b)
        return [Batch(plan.prefill, gpu, cpu[b:n]), Batch(cpu=cpu[:b])]

    def _due(self, s, shapes):
        """How many CPU decodes, the longest waiting first, must move now, so that all move within MAX_WAIT iterations even if
        no prompt comes: those due within t iterations, less what t iterations of decodes hide."""
        n = len(shapes.cpu)
        if not n:
            return 0
        later = Counter(max(0, MAX_WAIT + r.moved - s.iteration) for r in shapes.cpu)
        a = s.perf.load(shapes.decode_rows or 1, gpu_kv=shapes.fixed["gpu_kv"])
        step = self._hidden(s.perf, shapes.kv[n] / n, a.linear + a.gpu + s.perf.load(1).linear)
        return max(n - step * t for t, n in enumerate(accumulate(later[t] for t in range(MAX_WAIT + 1))))

    def _learn(self, shapes, n, b):
        prompts, alone, gpu = shapes.rows - shapes.decode_rows, shapes.prompts_ms(), shapes.ms(0, 0)
        for name, new in (("gpu_tokens", shapes.decode_rows), ("gpu_ms", gpu - alone), ("cpu_tokens", n),
                          ("cpu_ms", shapes.ms(n, b) - gpu), ("prompt_tokens", prompts or self.prompt_tokens),
                          ("prompt_share", prompts > 0)):
            old = getattr(self, name)
            setattr(self, name, old + 0.005 * (new - old) if old else new)  # remembers about as long as a request lives

    def _cost(self, tier):
        """ms that a decode of a tier has added lately; 0 before there was one."""
        tokens = getattr(self, f"{tier}_tokens")
        return getattr(self, f"{tier}_ms") / tokens if tokens else 0.0

    def _pays(self, s, request):
        """Should this prompt decode on the CPU? While a second sub-batch, one more pass over the weights, is shared by
        enough CPU decodes to make each cheaper than one in the GPU tier even with half of them: those that hide behind
        decodes alone; or else those that hide behind prompts, if prompts come so often that nobody waits too long. From
        that half on, what CPU decodes have cost counts as well: if it stays too much, the tier closes for a while."""
        perf = s.perf
        if s.iteration < self.opened:
            return False
        n, kv = self.resident[0] + 1, self.resident[1] + request.num_tokens
        prompt, (rows, gpu_kv) = int(self.prompt_tokens) or request.num_tokens, self.gpu_load
        busy, idle = perf.load(prompt + rows, [(0, prompt)], gpu_kv=gpu_kv), perf.load(rows or 1, gpu_kv=gpu_kv)
        b = perf.load(n).linear
        most, least = (self._hidden(perf, kv / n, a.linear + a.gpu + b) for a in (busy, idle))
        price = self._cost("gpu") if self.gpu_tokens else float("inf")
        if perf.n_layer * b > price * least / 2:
            most *= min(1.0, self.prompt_share * MAX_WAIT / 2)              # half, as prompts come in bursts
            if perf.n_layer * b > price * most / 2:
                return False
        if n > most / 2 and self._cost("cpu") > price:
            if s.iteration > self.opened + TRIAL:
                self.opened = s.iteration + 4 * TRIAL
            return False
        if n > SLACK * most:
            return False
        self.resident = n, kv
        return True

    @staticmethod
    def _hidden(perf, kv_each, cover):
        """CPU decodes of so many cached tokens each that `cover` ms hide."""
        return bisect_right(range(1, 4096), cover, key=lambda n: perf.cpu_time(n, n * kv_each))


class _Shapes:
    """The ways to split one iteration's rows: n CPU decodes run, the first b of them as sub-batch B (0: no second
    sub-batch). `cpu` is in the order in which they are taken."""

    def __init__(self, perf, prefill, gpu, cpu):
        self.perf, self.cpu = perf, cpu
        self.rows = sum(r.rows for r in prefill) + len(gpu)
        self.samples = sum(r.ends_prefill for r in prefill) + len(gpu)
        self.worth = sum(r.rows / r.num_tokens for r in prefill) + len(gpu)     # a chunk is worth its share of the first token
        self.fixed = dict(gpu_kv=sum(r.num_tokens for r in gpu), **prompt_work(prefill))
        self.decode_rows = len(gpu)
        self.kv = [0, *accumulate(r.num_tokens for r in cpu)]              # tokens of the first n

    def a(self, b, n):
        return self.perf.load(self.rows + n - b, n_cpu=n - b, cpu_kv=self.kv[n] - self.kv[b], **self.fixed)

    def b(self, b):
        return self.perf.load(b, n_cpu=b, cpu_kv=self.kv[b])

    def ms(self, n, b):
        """Predicted time of a shape."""
        loads = (self.a(b, n), self.b(b)) if b else (self.a(0, n),)
        return self.perf.iteration(loads, (self.samples + n - b, b)).total if self.rows + n else 0.0

    def prompts_ms(self):
        """Predicted time of the prompts alone."""
        if not self.fixed["prompts"]:
            return 0.0
        load = self.perf.load(self.rows - self.decode_rows, **self.fixed | {"gpu_kv": 0})
        return self.perf.iteration([load], [self.samples - self.decode_rows]).total

    def rate(self, n, b):
        """Predicted tokens per ms."""
        return (self.worth + n) / (self.ms(n, b) or 1.0)           # no rows at all: nothing

    def candidates(self, due):
        """[(n, b)]: GPU rows alone; one sub-batch with 1/8, 2/8 ... 8/8 of the CPU decodes, or as many as hide behind
        its GPU attention; two sub-batches."""
        total, cover = len(self.cpu), self.a(0, 0).gpu
        free = bisect_right(range(1, total + 1), cover, key=lambda m: self.perf.cpu_time(m, self.kv[m]))
        out = {(max(due, n), 0) for n in (free, *(total * i // 8 for i in range(9)))}
        if split := self._split(due):
            out.add(split)
        return sorted((n, b) for n, b in out if n or self.rows) or [(0, 0)]

    def _split(self, due):
        """As many CPU decodes as stay hidden: B's behind A's GPU work, then A's behind B's. A few rounds settle it,
        as each one's rows are the other's cover; an empty A counts as one row, which is how it starts to fill."""
        total, b, n = len(self.cpu), 0, 0
        for _ in range(3):
            a = self.a(b, n) if self.rows + n - b else self.perf.load(1)
            cover = a.linear + a.gpu
            b = bisect_right(range(1, total + 1), cover, key=lambda m: self.perf.cpu_time(m, self.kv[m]))
            cover = self.b(b).linear
            n = b + bisect_right(range(b + 1, total + 1), cover,
                                 key=lambda m: self.perf.cpu_time(m - b, self.kv[m] - self.kv[b]))
        n = max(n, due)
        b = min(max(b, due - (n - b)), n)
        return (n, b) if b and self.rows + n - b else None
