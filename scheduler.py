"""Who runs next, and where its KV lies: requests, queues, plans and the strategies (NEO, section 3.2).

Every iteration `plan()` moves requests between three queues and forms one or two sub-batches; `commit()` books what
they produced. Pure integers and predicted milliseconds: no torch, no devices, no weights.

    waiting --admit--> running["gpu"] <--swap--> running["cpu"]      preempted: back to the head of waiting
       '-------------------admit-------------------^

A strategy is a class with one method, registered by name. To write one, see the README; to read one, start at GpuOnly.
"""
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

MAX_WAIT = 32         # iterations: a request in the CPU tier moves at least once in so many
PACE = 256            # prompt tokens of an iteration, the last prompt whole: matrix products are bound by arithmetic long
#                       before, so more at once saves nothing, while each iteration brings a decode but one token
MAX_RUNNING = 512     # requests that hold KV: bounds the rows, and so the logits, of an iteration
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
    moved: int = 0                     # iteration in which it last got a token, or a chunk was prefilled
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
    prefill: list = field(default_factory=list)     # prompts admitted or continued, their tier and rows set
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
        self.output_ratio = 0.5                     # output / max_tokens of finished requests, a moving average, and
        self.output_mean = None                     # their tokens: who asks for all there is will hardly use it
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
            made = len(request.output)
            self.output_ratio += 0.05 * (made / request.max_tokens - self.output_ratio)
            self.output_mean = made if self.output_mean is None else self.output_mean + 0.05 * (made - self.output_mean)

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
        while self.waiting and min(budget, pace, room) > 0 and not (plan.preempted and not self.idle):
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
        """Tokens that a request will produce: known, or judged by those that have finished."""
        if r.exact:
            return r.max_tokens
        likely = r.max_tokens * self.output_ratio
        if self.output_mean is not None:
            likely = min(likely, max(2 * self.output_mean, len(r.output) + self.block_size))
        return max(int(likely), 1)

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


import strategies  # noqa: E402, F401  registers them; they need what stands above
