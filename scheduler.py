"""Who runs next, and where its KV lies: requests, queues, plans and the strategies (NEO, section 3.2).

Every iteration `plan()` moves requests between three queues and forms one or two sub-batches; `commit()` books what
they produced. Pure integers and predicted milliseconds: no torch, no devices, no weights.

    waiting --admit--> running["gpu"] <--swap--> running["cpu"]      preempted: back to the head of waiting
       '-------------------admit-------------------^

A strategy is a class with one method, registered by name. To write one, see the README; to read one, start at GpuOnly.
"""
from bisect import bisect_right
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

MAX_WAIT = 32         # iterations: a request in the CPU tier moves at least once in so many
PACE = 256            # prompt tokens of an iteration, the last prompt whole: matrix products are bound by arithmetic long
#                       before, so more at once saves nothing, while each iteration brings a decode but one token
MAX_RUNNING = 512     # requests that hold KV: bounds the rows, and so the logits, of an iteration
TRIAL = 256           # iterations after which decodes of the CPU tier must be worth their cost
SLACK = 1.25          # residents of the CPU tier over what an iteration with prompts hides: somebody is always at hand
SWAP_IN_MARK = 0.95   # share of GPU blocks that swapping in may fill
EXACT_PEAK = 512      # requests up to which the future peak of a tier is computed exactly (quadratic)


@dataclass(eq=False)
class Request:
    """One prompt on its way. The first five fields are set by whoever adds it, the rest by the scheduler."""
    id: object
    prompt: list                       # token ids
    max_tokens: int
    stop_ids: frozenset = frozenset()  # token ids that end it
    exact: bool = False                # it will produce exactly max_tokens (ignore_eos): admission may count on it
    output: list = field(default_factory=list)
    arrival: int = 0                   # order of arrival
    tier: str = None                   # "gpu" or "cpu" while its KV lies there
    num_kv: int = 0                    # tokens in the cache: 0 before prefill, growing by chunks, then all but the last
    rows: int = 0                      # prompt tokens that are prefilled in this iteration
    num_blocks: int = 0                # blocks counted for it
    moved: int = 0                     # iteration in which it last got a token
    finish_reason: str = None          # "stop", "length" or "abort"

    @property
    def num_tokens(self):
        return len(self.prompt) + len(self.output)

    @property
    def last_token(self):
        return self.output[-1]

    @property
    def decodes(self):
        """Is it past its prefill, and gets a token from each iteration that it is part of?"""
        return bool(self.output) and self.num_kv == self.num_tokens - 1

    @property
    def ends_prefill(self):
        """Will this iteration's rows complete its prefill, so that it gets a token?"""
        return self.num_kv + self.rows == self.num_tokens

    def tokens(self, start, stop):
        """A part of all there is to prefill: after a preemption, what it had produced is computed again with the prompt."""
        return (self.prompt + self.output)[start:stop] if stop > len(self.prompt) else self.prompt[start:stop]


class Batch:
    """One sub-batch. Rows: [prefill, CPU-bound prompts first | GPU decode | CPU decode]. A prompt is prefilled by its next
    `rows` tokens."""

    def __init__(self, prefill=(), gpu=(), cpu=()):
        self.prefill = sorted(prefill, key=lambda r: r.tier != "cpu")
        self.gpu, self.cpu = list(gpu), list(cpu)

    @property
    def requests(self):
        return self.prefill + self.gpu + self.cpu

    @property
    def sampled(self):
        """The requests that get a token, in the order of rows: all but prompts with more chunks to come."""
        return [r for r in self.prefill if r.ends_prefill] + self.gpu + self.cpu

    def load(self, perf):
        """Its predicted work per layer: perfmodel.Load."""
        return perf.load(sum(r.rows for r in self.prefill) + len(self.gpu) + len(self.cpu),
                         gpu_kv=sum(r.num_tokens for r in self.gpu), n_cpu=len(self.cpu),
                         cpu_kv=sum(r.num_tokens for r in self.cpu), **prompt_work(self.prefill))


def prompt_work(prefill):
    """What PerfModel.load wants to know of prompts."""
    cpu = [r for r in prefill if r.tier == "cpu"]
    return dict(prompts=[(r.num_kv, r.num_kv + r.rows) for r in prefill], n_stored=sum(r.rows for r in cpu),
                n_fetched=sum(r.num_kv for r in cpu))


@dataclass
class Plan:
    """One iteration: what the cache does first, in this order, then what the model runs."""
    preempted: list = field(default_factory=list)   # requests whose blocks are freed
    swap_out: list = field(default_factory=list)    # to the CPU tier
    swap_in: list = field(default_factory=list)     # to the GPU tier
    prefill: list = field(default_factory=list)     # prompts admitted, their tier set
    batches: list = field(default_factory=list)     # one Batch, or two to be pipelined
    predicted: object = None                        # perfmodel.Prediction, if there is a performance model

    @property
    def requests(self):
        return [r for b in self.batches for r in b.requests]

    @property
    def sampled(self):
        return [r for b in self.batches for r in b.sampled]


class Scheduler:
    """Queues and block accounting; the strategy decides with the verbs below.

    num_blocks        {"gpu": blocks, "cpu": blocks} the cache has; a strategy uses only the tiers it names
    max_batch_tokens  prompt tokens of one iteration; longer prompts are prefilled in chunks
    perf              perfmodel.PerfModel, or None where the strategy does not predict

    Raises ValueError on an unknown strategy.
    """

    def __init__(self, strategy, num_blocks, block_size, max_model_len, max_batch_tokens, perf=None):
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
        self.strategy = STRATEGIES[strategy]()
        self.block_size, self.max_batch_tokens, self.perf = block_size, max_batch_tokens, perf
        self.num_blocks = {tier: n if tier in self.strategy.tiers else 0 for tier, n in num_blocks.items()}
        self.free = dict(self.num_blocks)
        self.max_len = min(max_model_len, max(self.num_blocks.values()) * block_size)  # of one request, in tokens
        self.waiting = deque()
        self.running = {"gpu": {}, "cpu": {}}       # id -> Request, KV in this tier
        self.iteration = self.arrivals = 0
        self.output_ratio = 0.5                     # output / max_tokens of finished requests, a moving average
        self.stats = Counter()

    # ---- what the engine calls

    def check_length(self, num_tokens):
        """Raise ValueError if a prompt of num_tokens can never be served."""
        if num_tokens >= self.max_len:
            raise ValueError(f"prompt of {num_tokens} tokens leaves no room for output: the limit is {self.max_len} "
                             "(max_model_len, or the larger KV tier); shorten it, or raise --max-model-len or the KV budget")

    def add(self, request):
        """Queue a request. Raises ValueError if it can never be served."""
        self.check_length(request.num_tokens)
        request.arrival = self.arrivals = self.arrivals + 1
        self.waiting.append(request)

    def plan(self):
        """Decide one iteration. Some batch has rows unless nothing is waiting or running."""
        self.iteration += 1
        plan = Plan()
        for tier in self.strategy.tiers:
            while self._growth(tier) > self.free[tier]:
                self._evict(max(self.running[tier].values(), key=lambda r: r.arrival), plan)
        self.slack = {tier: self.free[tier] - self._growth(tier) for tier in self.free}
        plan.batches = [b for b in self.strategy.form(self, plan) if b.requests]
        for b in plan.batches:
            for r in b.gpu + b.cpu:
                self._hold(r, r.tier, r.num_tokens)
        if self.perf:
            loads, samples = [b.load(self.perf) for b in plan.batches], [len(b.sampled) for b in plan.batches]
            plan.predicted = self.perf.iteration(loads, samples) if loads else None
        self._count(plan)
        return plan

    def commit(self, plan, tokens):
        """Book the rows that were run and one token for each of plan.sampled; finish those that reached a stop id or their
        length."""
        sampled = plan.sampled
        for b in plan.batches:
            for r in b.prefill:
                r.num_kv, r.moved = r.num_kv + r.rows, self.iteration
        for r, token in zip(sampled, tokens, strict=True):
            r.num_kv, r.moved = r.num_tokens, self.iteration
            r.output.append(token)
            if token in r.stop_ids:
                self.finish(r, "stop")
            elif len(r.output) >= r.max_tokens:
                self.finish(r, "length")

    def finish(self, request, reason):
        """Take a request out, wherever it is, and free what it holds."""
        request.finish_reason = reason
        if request.tier:
            self._leave(request)
        else:
            self.waiting.remove(request)
        if reason != "abort" and not request.exact:
            self.output_ratio += 0.05 * (len(request.output) / request.max_tokens - self.output_ratio)

    # ---- the verbs of a strategy

    @property
    def idle(self):
        """Nothing holds KV in either tier."""
        return not (self.running["gpu"] or self.running["cpu"])

    def decodes(self, tier):
        """Requests of a tier that have been prefilled, each good for one decode row."""
        return [r for r in self.running[tier].values() if r.decodes]

    def admit(self, plan, tiers, may=lambda tier, request: True):
        """Give the iteration's prompt tokens out, in order of arrival: first to prompts that have begun, then to waiting ones,
        each of which enters the first of `tiers` that has room for it now, will have room for what it is expected to grow
        to, and that may(tier, request) allows; stop at the first that must wait."""
        budget, pace, room = self.max_batch_tokens, PACE, MAX_RUNNING - sum(map(len, self.running.values()))
        begun = [r for tier in tiers for r in self.running[tier].values() if not r.decodes]

        def take(r):
            nonlocal budget, pace
            r.rows = min(r.num_tokens - r.num_kv, budget)
            budget, pace = budget - r.rows, pace - r.rows
            plan.prefill.append(r)
        for r in sorted(begun, key=lambda r: r.arrival):
            if min(budget, pace) > 0:
                take(r)
        while self.waiting and min(budget, pace, room) > 0 and not plan.preempted:
            r = self.waiting[0]
            need = self._blocks(r.num_tokens)
            tier = next((t for t in tiers if need <= self.slack[t] and may(t, r) and self._lasts(t, r)), None)
            if tier is None:
                break
            self.waiting.popleft()
            self._enter(r, tier, r.num_tokens)
            take(r)
            room -= 1

    def swap_in(self, plan):
        """Bring CPU-tier requests back to the GPU, the oldest first, while they fit below the mark."""
        if plan.swap_out or plan.preempted:
            return
        spare = (1 - SWAP_IN_MARK) * self.num_blocks["gpu"]
        for r in sorted(self.decodes("cpu"), key=lambda r: r.arrival):
            need = self._blocks(r.num_tokens)
            if need > self.slack["gpu"] - spare or not self._lasts("gpu", r):
                break
            self._leave(r)
            self._enter(r, "gpu", r.num_kv)
            self.slack["gpu"] -= need - r.num_blocks       # its next token, where that opens a block
            plan.swap_in.append(r)

    # ---- block accounting

    def _blocks(self, num_tokens):
        return -(-num_tokens // self.block_size)

    def _growth(self, tier):
        """Blocks needed if every request of a tier gets its next token."""
        return sum(r.num_kv == r.num_blocks * self.block_size for r in self.running[tier].values())

    def _hold(self, r, tier, num_tokens):
        need = self._blocks(num_tokens) - r.num_blocks
        r.num_blocks += need
        self.free[tier] -= need
        assert self.free[tier] >= 0, f"{tier} tier overcommitted by {-self.free[tier]} blocks"

    def _enter(self, r, tier, num_tokens):
        r.tier = tier
        self.running[tier][r.id] = r
        self._hold(r, tier, num_tokens)
        self.slack[tier] -= r.num_blocks

    def _leave(self, r):
        del self.running[r.tier][r.id]
        self.free[r.tier] += r.num_blocks
        r.tier, r.num_blocks = None, 0

    def _evict(self, r, plan):
        """Out of its tier: from the GPU to the CPU tier if there is room, else back to the queue, to be recomputed."""
        was = r.tier
        self._leave(r)
        if was == "gpu" and r.decodes and self._blocks(r.num_tokens) <= self.free["cpu"] - self._growth("cpu"):
            r.tier = "cpu"
            self.running["cpu"][r.id] = r
            self._hold(r, "cpu", r.num_kv)
            plan.swap_out.append(r)
        else:
            r.num_kv = 0
            self.waiting.appendleft(r)
            plan.preempted.append(r)

    def _lasts(self, tier, candidate):
        """Would the tier, with this request added, hold to the end, everyone growing by a token an iteration until its
        expected length? Without this check a tier fills, then evicts what it has just admitted: it thrashes."""
        requests = [*self.running[tier].values(), candidate]
        now = np.array([r.num_tokens for r in requests])                   # stored after this iteration
        more = np.array([max(0, self._expected(r) - len(r.output) - 1) for r in requests])
        blocks = self._blocks(now + more)
        if blocks.sum() <= self.num_blocks[tier]:                          # even if nobody finished early
            return True
        if len(requests) > EXACT_PEAK:
            return False
        at = np.unique(more)[:, None]                                      # memory peaks just before somebody finishes
        return (self._blocks(now + at) * (more >= at)).sum(1).max() <= self.num_blocks[tier]

    def _expected(self, r):
        return r.max_tokens if r.exact else max(int(r.max_tokens * self.output_ratio), 1)

    def _count(self, plan):
        s = self.stats
        s["iterations"] += 1
        s["pipelined_iterations"] += len(plan.batches) == 2
        s["preemptions"] += len(plan.preempted)
        s["prefill_tokens"] += sum(r.rows for r in plan.prefill)
        s["chunks"] += sum(r.rows < r.num_tokens for r in plan.prefill)
        s["cpu_prefills"] += sum(r.tier == "cpu" and r.ends_prefill for r in plan.prefill)
        s["gpu_decode_tokens"] += sum(len(b.gpu) for b in plan.batches)
        s["cpu_decode_tokens"] += sum(len(b.cpu) for b in plan.batches)
        s["rows"] += len(plan.sampled)


# -------------------------------------------------------------------------------------------------------- strategies

STRATEGIES = {}


def strategy(name):
    """Class decorator: register a strategy under the name that LLM(strategy=...) and --strategies take.

    The class has `tiers`, those it keeps KV in, and form(scheduler, plan) -> [Batch] or [Batch, Batch].
    """
    def register(cls):
        STRATEGIES[name] = cls
        return cls
    return register


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
        return (self.worth + n) / self.ms(n, b)

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
