"""What one iteration does, as plain data: Batch, Plan, and the rules that a Plan obeys.

`check_plan` holds every strategy to these rules, in a simulation and for real: a strategy that
breaks one is stopped with a StrategyError before anything runs. Knows no torch and no policy.
"""
from dataclasses import dataclass, field
from typing import NamedTuple

from perfmodel import Work

MAX_LEFT_OUT = 512    # iterations in a row that may leave a running request out
MAX_SLOW_PLANS = 64   # plans in a row that may leave requests out and be slow by it,
SLOW_SHARE = 0.5      # which means: below this share of the predicted rate of running everybody
MAX_RECOMPUTED = 0.5  # share of all rows that may be recomputation after preempt(),
MIN_RECOMPUTED = 1024   # counted from this number of recomputed tokens on


class StrategyError(RuntimeError):
    """A strategy broke a rule. The message names the strategy, the fault and the request."""


class Batch:
    """One sub-batch. Rows: [prefill, CPU-bound prompts first | GPU decodes | CPU decodes].

    A prompt has `num_scheduled` rows, a decode has one.
    """

    def __init__(self, prefill=(), gpu_decodes=(), cpu_decodes=()):
        self.prefill = sorted(prefill, key=lambda r: r.tier != "cpu")
        self.gpu_decodes, self.cpu_decodes = list(gpu_decodes), list(cpu_decodes)

    @property
    def requests(self):
        return self.prefill + self.gpu_decodes + self.cpu_decodes

    @property
    def sampled(self):
        """The requests that get a token, in row order: all but prompts with chunks to come."""
        ending = [r for r in self.prefill if r.ends_prefill]
        return ending + self.gpu_decodes + self.cpu_decodes

    def counts(self):
        """(prompt rows, GPU decodes, CPU decodes)"""
        num_prompt_rows = sum(r.num_scheduled for r in self.prefill)
        return num_prompt_rows, len(self.gpu_decodes), len(self.cpu_decodes)

    def work(self):
        """What it does in a layer (perfmodel.Work)."""
        return Work(sum(self.counts()), gpu_kv=sum(r.num_tokens for r in self.gpu_decodes),
                    num_cpu=len(self.cpu_decodes),
                    cpu_kv=sum(r.num_tokens for r in self.cpu_decodes),
                    **prompt_work(self.prefill))


class Rows(NamedTuple):
    """What kvcache.KVCache.bind reads of a Request, for another process."""
    id: object
    tier: str
    num_cached: int
    num_scheduled: int
    num_tokens: int
    num_pending: int
    output: list            # the last token
    ends_prefill: bool
    new: list               # of a prompt: the tokens to prefill

    def tokens(self, start, end):
        return self.new


def pack(batch):
    """Batch -> plain tuples, which are pickled faster than objects; `unpack` is the way back."""
    def rows(r, is_prompt):
        new = is_prompt and r.tokens(r.num_cached, r.num_cached + r.num_scheduled)
        return (r.id, r.tier, r.num_cached, r.num_scheduled, r.num_tokens, r.num_pending,
                r.output[-1:], is_prompt and r.ends_prefill, new)
    decodes = batch.gpu_decodes, batch.cpu_decodes
    return [rows(r, True) for r in batch.prefill], *([rows(r, False) for r in d] for d in decodes)


def unpack(packed):
    """What `pack` has returned -> a Batch of Rows, for KVCache.bind."""
    return Batch(*(map(Rows._make, rows) for rows in packed))


def prompt_work(prefill):
    """The part of a Work that prompts make."""
    cpu_bound = [r for r in prefill if r.tier == "cpu"]
    return {"prompts": [(r.num_cached, r.num_cached + r.num_scheduled) for r in prefill],
            "num_stored": sum(r.num_scheduled for r in cpu_bound),
            "num_fetched": sum(r.num_cached for r in cpu_bound)}


@dataclass
class Plan:
    """One iteration: what the cache does first, in this order, then what the model runs."""
    preempted: list = field(default_factory=list)   # requests whose blocks are freed
    swap_out: list = field(default_factory=list)    # to the CPU tier
    swap_in: list = field(default_factory=list)     # to the GPU tier
    prefill: list = field(default_factory=list)     # prompts with rows in this iteration,
    shares: list = field(default_factory=list)      # and the same, by the share that they take
    batches: list = field(default_factory=list)     # Batches; two or more are pipelined
    predicted: object = None                        # perfmodel.Prediction, if there is a model
    # set when it is launched, for who looks later: by then its requests have changed
    counts: list = None                             # Batch.counts of each sub-batch
    num_sampled: int = 0                            # requests that get a token

    @property
    def requests(self):
        return [r for batch in self.batches for r in batch.requests]

    @property
    def sampled(self):
        return [r for batch in self.batches for r in batch.sampled]

    @property
    def host_works(self):
        """Does the host move or read KV for it, or put requests back into the queue?"""
        return bool(self.preempted or self.swap_out or self.swap_in
                    or any(b.cpu_decodes for b in self.batches)
                    or any(r.tier == "cpu" for r in self.prefill))

    def leave_out(self, ended):
        """Take requests out that ended after the plan was made."""
        rows = [row for b in self.batches for row in (b.prefill, b.gpu_decodes, b.cpu_decodes)]
        for requests in (self.preempted, self.swap_out, self.swap_in, self.prefill, *rows):
            requests[:] = [r for r in requests if r not in ended]
        self.batches = [b for b in self.batches if b.requests]


# ------------------------------------------------------------------ the rules of a strategy

def check_strategy(name, cls):
    """Raise StrategyError unless a class has what a strategy needs: tiers and form()."""
    tiers = getattr(cls, "tiers", None)
    if not (isinstance(tiers, tuple) and tiers and set(tiers) <= {"gpu", "cpu"}):
        raise StrategyError(f'strategy {name}: tiers = {tiers!r} must be a tuple of "gpu" and '
                            '"cpu", such as ("cpu",)')
    if not callable(getattr(cls, "form", None)):
        raise StrategyError(f"strategy {name} has no method form(self, s, plan)")


def check_plan(s, plan, before):
    """Raise StrategyError unless the strategy of Scheduler s kept every rule.

    before  ({tier: {id: Request}}, number waiting) at the start of the iteration
    """
    have_rows = _check_rows(s, plan)
    _check_moves(s, plan, before)
    running = [r for tier in s.running.values() for r in tier.values()]
    if (running or s.waiting) and not have_rows:
        fail(s, f"no rows, although {len(running)} requests run and {len(s.waiting)} wait")
    for r in running:
        if s.iteration - r.last_run > MAX_LEFT_OUT and r.id not in have_rows:
            fail(s, f"{r} had no rows for {MAX_LEFT_OUT} iterations")
    recomputed, rows = s.stats["recomputed_tokens"], s.stats["prefill_tokens"] + s.stats["rows"]
    if recomputed > max(MIN_RECOMPUTED, MAX_RECOMPUTED * rows):
        fail(s, f"{recomputed} of {rows} rows recompute what s.preempt threw away: it thrashes")


def fail(s, fault, cause=None):
    """Raise a StrategyError that names the strategy of Scheduler s."""
    raise StrategyError(f"strategy {s.strategy.name}: {fault}") from cause


def _check_rows(s, plan):
    """Each request once and in the list of its kind. Returns the ids of those with rows."""
    have_rows = set()
    for batch in plan.batches:
        for r in batch.prefill:
            if r not in plan.prefill:
                fail(s, f"{r} is in a Batch's prefill, but s.admit gave it no rows")
        for tier, decodes in (("gpu", batch.gpu_decodes), ("cpu", batch.cpu_decodes)):
            for r in decodes:
                if r.tier != tier or s.running[tier].get(r.id) is not r or not r.is_decoding:
                    fail(s, f"{r} is in a Batch's {tier}_decodes, but it is no decode of that "
                            "tier. Call s.decodes(tier) after all moves, not before")
        for r in batch.requests:
            if r.id in have_rows:
                fail(s, f"{r} is in the sub-batches twice")
            have_rows.add(r.id)
    for r in plan.prefill:
        if r.id not in have_rows:
            fail(s, f"s.admit gave rows to {r}, but no Batch has it in its prefill")
    return have_rows


def _check_moves(s, plan, before):
    """Who entered or left a tier did it through a verb, and the books add up."""
    running, num_waiting = before
    entered = {"gpu": plan.swap_in + plan.prefill, "cpu": plan.swap_out + plan.prefill}
    left = {"gpu": plan.swap_out + plan.preempted, "cpu": plan.swap_in + plan.preempted}
    for tier in s.running:
        now = s.running[tier]
        for r in running[tier].values():
            if r.id not in now and r not in left[tier]:
                fail(s, f"{r} left the {tier} tier without s.preempt, s.swap_in or s.swap_out")
        for r in now.values():
            if r.id not in running[tier] and r not in entered[tier]:
                fail(s, f"{r} entered the {tier} tier without s.admit, s.swap_in or s.swap_out")
        used = sum(r.num_blocks for r in now.values())
        if used + s.num_free[tier] != s.num_blocks[tier]:
            fail(s, f"{tier} tier: {used} blocks used + {s.num_free[tier]} free are not "
                    f"{s.num_blocks[tier]}")
    for r in plan.preempted:
        if r.num_cached or (r.tier is None and r.num_blocks):
            fail(s, f"{r} was preempted by hand: call s.preempt(plan, r)")
    moved = plan.swap_in + plan.swap_out
    if len(set(map(id, moved))) < len(moved):
        fail(s, "a request was swapped twice in one iteration")
    expected = num_waiting + sum(map(len, running.values()))
    found = len(s.waiting) + sum(map(len, s.running.values()))
    if found != expected:
        fail(s, f"{expected} requests waited or ran before form(), {found} after it")


def check_speed(s, plan):
    """Raise StrategyError after a long row of plans that leave decodes out and are slow by it."""
    if not plan.predicted:
        return
    slow, num_left_out, num_rows = False, 0, len(plan.requests)
    if num_rows < s.num_running:        # decodes are left out, or prompts got no rows
        everybody = Batch(plan.prefill, s.decodes("gpu"), s.decodes("cpu"))
        num_left_out = len(everybody.requests) - num_rows
    if num_left_out:
        num_sampled = len(everybody.sampled)
        predicted = s.perf.iteration([s.perf.load(everybody.work())], num_sampled)
        rate = len(plan.sampled) / plan.predicted.total_ms
        slow = rate < SLOW_SHARE * num_sampled / predicted.total_ms
    s.num_slow_plans = s.num_slow_plans + 1 if slow else 0
    if s.num_slow_plans > MAX_SLOW_PLANS:
        fail(s, f"for {MAX_SLOW_PLANS} iterations it left decodes out ({num_left_out} "
                f"now), with less than {SLOW_SHARE:g} x the predicted rate of one "
                "sub-batch of everybody")
