"""Who runs next, and where its KV lies: queues, admission, preemption, block accounting.

Every iteration `plan()` moves requests between three queues, and the strategy forms sub-batches of
them; `commit()` records what they produced. Integers and predicted milliseconds only: this file
knows no torch, no devices, no weights and no particular strategy (NEO, section 3.2).

    waiting --admit--> running["gpu"] <--swap--> running["cpu"]
       |'----------------admit----------------------^     |
       '<-------------------- preempt --------------------'

Blocks are counted here and owned in kvcache.py, on purpose: counts can plan ahead and run on a
virtual clock without memory, and the cache asserts that they were right.
To write a strategy, use the verbs below: admit, decodes, swap_in, swap_out, refill_gpu, preempt.
"""
import math
from collections import Counter, deque
from contextlib import suppress

import numpy as np

from plan import Batch, Plan, StrategyError, check_plan, check_speed, fail
from request import Request

PACE = 256            # Without shares, stop admitting prompts after 256 prompt tokens in one
#                       iteration (the last prompt may exceed it). Above a few hundred rows the GPU
#                       is compute-bound: a larger batch only makes every decode wait longer.
CRUMB = 1.25          # A prompt is not cut if it exceeds its share by less than a quarter.
MAX_RUNNING = 512     # requests that hold KV: bounds the rows, and so the logits, of an iteration
SWAP_IN_MARK = 0.95   # share of GPU blocks that refilling the GPU tier may use
EXACT_PEAK = 512      # requests up to which a tier's future peak is computed exactly (quadratic)
__all__ = ["Batch", "Plan", "Request", "Scheduler", "StrategyError"]


class Scheduler:
    """Queues and block accounting; a strategy decides, with the verbs below.

    strategy          an instance of a class of strategies.py
    num_blocks        {tier: blocks} of the cache; a strategy uses only the tiers that it names
    max_batch_tokens  prompt tokens of one iteration; longer prompts are prefilled in chunks
    perf              perfmodel.PerfModel, or None where the strategy does not predict
    ttft_queue        requests that may wait while prompts are prefilled whole (strategies.Even)
    """

    def __init__(self, strategy, num_blocks, block_size, max_model_len, max_batch_tokens,
                 perf=None, ttft_queue=-1, max_running=MAX_RUNNING):
        self.strategy, self.perf, self.ttft_queue = strategy, perf, ttft_queue
        self.block_size, self.max_batch_tokens = block_size, max_batch_tokens
        self.max_running = max_running
        self.num_blocks = {tier: n if tier in strategy.tiers else 0
                           for tier, n in num_blocks.items()}
        largest_tier = max(self.num_blocks.values()) * block_size
        self.max_len = min(max_model_len, largest_tier)     # of one request, in tokens
        self.waiting = deque()
        self.running = {"gpu": {}, "cpu": {}}               # id -> Request, KV in this tier
        self.num_free = dict(self.num_blocks)               # blocks that nobody holds
        self.slack = dict(self.num_blocks)                  # and that no next token will need
        self.iteration = self.num_added = self.num_slow_plans = 0
        self.output_ratio = 0.5     # output / max_tokens of finished requests, a moving average
        self.mean_output = None     # tokens of finished requests, a moving average
        self.stats = Counter()

    # ---- what the engine calls

    def check_length(self, num_tokens):
        """Raise ValueError if a prompt of num_tokens can never be served."""
        if num_tokens >= self.max_len:
            raise ValueError(
                f"prompt of {num_tokens} tokens leaves no room for output: the limit is "
                f"{self.max_len} (max_model_len, or the larger KV tier); shorten it, or raise "
                "--max-model-len or the KV budget")

    def add(self, request):
        """Queue a request. Raises ValueError if it can never be served."""
        self.check_length(request.num_tokens)
        request.arrival = self.num_added = self.num_added + 1
        self.waiting.append(request)

    def plan(self):
        """Decide one iteration -> Plan. Raises StrategyError if the strategy breaks a rule."""
        self.iteration += 1
        plan, before = Plan(), ({t: dict(self.running[t]) for t in self.running}, len(self.waiting))
        for tier, requests in self.running.items():
            # _blocks, without a call for every request of every iteration
            needed = sum(-(-r.num_tokens // self.block_size) for r in requests.values())
            self.slack[tier] = self.num_blocks[tier] - needed
        try:
            for tier in self.strategy.tiers:                # next tokens that do not fit
                while self.slack[tier] < 0:
                    newest = max(self.running[tier].values(), key=self._rank)
                    if not (tier == "gpu" and newest.is_decoding and self.swap_out(plan, newest)):
                        self._to_queue(plan, newest)
            plan.batches = [b for b in self.strategy.form(self, plan) if b.requests]
        except StrategyError:
            raise
        except Exception as error:
            fail(self, f"form() or order() failed with {type(error).__name__}: {error}", error)
        check_plan(self, plan, before)
        if self.perf and plan.batches:
            loads = [self.perf.load(b.work()) for b in plan.batches]
            plan.predicted = self.perf.iteration(loads, len(plan.sampled))
        check_speed(self, plan)
        for batch in plan.batches:
            for r in batch.gpu_decodes + batch.cpu_decodes:
                if r.num_tokens > r.num_blocks * self.block_size:   # few need a new block
                    self._hold(r, r.num_tokens)
        self._count(plan)
        return plan

    def commit(self, plan, tokens):
        """Record the rows that were run, and one token for each request of plan.sampled."""
        sampled = plan.sampled
        self.advance(plan)
        self.arrive(sampled, tokens)

    def advance(self, plan):
        """Record the rows that are run. Each request of plan.sampled has one more token pending:
        the next plan may be made before `arrive` brings its value."""
        sampled = plan.sampled
        for r in plan.prefill:
            r.num_cached += r.num_scheduled
            r.last_run = self.iteration
        for r in sampled:
            r.num_cached = r.num_tokens
            r.last_run = self.iteration
            r.num_pending += 1

    def arrive(self, sampled, tokens):
        """Record the oldest pending token of each request; finish those that reached a stop id or
        their length. Tokens of requests that have finished meanwhile are dropped."""
        for r, token in zip(sampled, tokens, strict=True):
            r.num_pending -= 1
            if r.finish_reason:
                continue
            r.output.append(token)
            if token in r.stop_ids:
                self.finish(r, "stop")
            elif len(r.output) >= r.max_tokens:
                self.finish(r, "length")

    def finish(self, r, reason):
        """Take a request out, wherever it is, and free what it holds."""
        r.finish_reason = reason
        if r.tier:
            self._leave(r)
        else:
            with suppress(ValueError):      # a strategy at fault may have lost it
                self.waiting.remove(r)
        if reason != "abort" and not r.exact_length:
            n = len(r.output)
            self.output_ratio += 0.05 * (n / r.max_tokens - self.output_ratio)
            mean = n if self.mean_output is None else self.mean_output
            self.mean_output = mean + 0.05 * (n - mean)

    def snapshot(self):
        """Where every request is, for `restore`."""
        running = {tier: dict(requests) for tier, requests in self.running.items()}
        return list(self.waiting), running, [
            (r, tier, r.num_cached, r.num_blocks)
            for tier, requests in running.items() for r in requests.values()]

    def restore(self, snapshot):
        """After an error in plan(): every request is again where it was. Call `keep` next."""
        waiting, self.running, fields = snapshot
        self.waiting = deque(waiting)
        for r in waiting:
            r.tier, r.num_cached, r.num_blocks = None, 0, 0
        for r, *values in fields:
            r.tier, r.num_cached, r.num_blocks = values
        # The rules that count over many plans start anew.
        self.stats["recomputed_tokens"] = self.num_slow_plans = 0

    def keep(self, requests):
        """Keep these requests alone, and count the blocks anew: after an error, for which any of
        the methods above may have been left half done."""
        ids = {r.id for r in requests}
        self.waiting = deque(r for r in self.waiting if r.id in ids)
        for tier, running in self.running.items():
            running = {r.id: r for r in running.values() if r.id in ids}
            self.running[tier] = running
            self.num_free[tier] = self.num_blocks[tier] - sum(
                r.num_blocks for r in running.values())

    # ---- the verbs of a strategy

    @property
    def num_running(self):
        """Requests that hold KV."""
        return len(self.running["gpu"]) + len(self.running["cpu"])

    @property
    def nothing_runs(self):
        """No request holds KV in either tier."""
        return not self.num_running

    def decodes(self, tier):
        """Requests of a tier whose prefill is over; each is good for one decode row."""
        return [r for r in self.running[tier].values() if r.is_decoding]

    def expected(self, r):
        """Tokens that a request will produce: known, or judged by those that have finished."""
        if r.exact_length:
            return r.max_tokens
        likely = r.max_tokens * self.output_ratio
        if self.mean_output is not None:
            # Clients often set max_tokens to the maximum, so the guess is also bounded by the mean
            # length of finished outputs.
            likely = min(likely, max(2 * self.mean_output, len(r.output) + self.block_size))
        return max(int(likely), 1)

    def admit(self, plan, tiers, may=lambda tier, request: True, shares=None):
        """Give the iteration's prompt tokens out, in the strategy's order: first to prompts that
        have begun, then to waiting ones; stop at the first that must wait.

        shares  prompt tokens for each sub-batch, such as (40, 40): prompts are cut into chunks, and
                plan.shares has the prompts of each. None: PACE tokens, the last prompt whole.

        A waiting prompt enters the first of `tiers` that has room for it now, that will have room
        for its expected length, and that may(tier, request) allows. After a preemption nothing is
        admitted until the next iteration, unless nothing runs.
        """
        if unknown := set(tiers) - set(self.strategy.tiers):
            fail(self, f"admits to {sorted(unknown)}, but its tiers are {self.strategy.tiers}")
        left = list(shares or [PACE])       # prompt tokens that each share still has
        plan.shares = [[] for _ in left]
        begun = [r for t in tiers for r in self.running[t].values() if not r.is_decoding]
        for r in sorted(begun, key=self._rank):
            self._schedule(plan, r, left, cut=bool(shares))
        while (self.waiting and max(left) >= 1 and self._tokens_left(plan)
               and self.num_running < self.max_running):
            if plan.preempted and not self.nothing_runs:
                break
            r = self._next_waiting()
            tier = next((t for t in tiers if self._fits(t, r) and may(t, r) and self._lasts(t, r)),
                        None)
            if tier is None:
                break
            self.waiting.remove(r)
            self._enter(r, tier, r.num_tokens)
            self._schedule(plan, r, left, cut=bool(shares))

    def swap_in(self, plan, r):
        """Move a decode from the CPU to the GPU tier. False, and no move, if it does not fit."""
        return self._swap(plan.swap_in, r, "gpu")

    def swap_out(self, plan, r):
        """Move a decode from the GPU to the CPU tier. False, and no move, if it does not fit."""
        return self._swap(plan.swap_out, r, "cpu")

    def preempt(self, plan, r):
        """Put a running request back into the queue, to be recomputed. Nothing is admitted in this
        iteration after that (see admit)."""
        self.stats["recomputed_tokens"] += r.num_cached
        self._to_queue(plan, r)

    def refill_gpu(self, plan):
        """Bring CPU decodes back to the GPU tier, in the strategy's order, while it stays below a
        mark: without the mark, the next tokens would push them out again."""
        if plan.swap_out or plan.preempted:
            return
        spare = (1 - SWAP_IN_MARK) * self.num_blocks["gpu"]
        for r in sorted(self.decodes("cpu"), key=self._rank):
            if self._blocks(r.num_tokens) > self.slack["gpu"] - spare or not self._lasts("gpu", r):
                break
            self.swap_in(plan, r)

    # ---- order and prompt tokens

    def _rank(self, r):
        """Sort key, the strategy's if it has one: the first enters first, the last is evicted."""
        order = getattr(self.strategy, "order", None)
        return (order(self, r), r.arrival) if order else r.arrival

    def _next_waiting(self):
        """Who may be admitted next. Without an order, preempted ones stand at the head."""
        if hasattr(self.strategy, "order"):
            return min(self.waiting, key=self._rank)
        return self.waiting[0]

    def _tokens_left(self, plan):
        return self.max_batch_tokens - sum(r.num_scheduled for r in plan.prefill)

    def _schedule(self, plan, r, left, cut):
        """Give a prompt rows of the first share that has some left: all that the prompt lacks, or a
        chunk if it may be cut. What exceeds a share is taken from the next one."""
        rows = min(r.num_tokens - r.num_cached, self._tokens_left(plan))
        i = next((i for i, n in enumerate(left) if n >= 1), None)
        if i is None or not rows:
            return
        if cut and rows > CRUMB * left[i]:
            rows = math.ceil(left[i])
        left[i] -= rows
        if i + 1 < len(left):
            left[i + 1] += min(0, left[i])
        r.num_scheduled = rows
        plan.shares[i].append(r)
        plan.prefill.append(r)

    # ---- block accounting

    def _blocks(self, num_tokens):
        return -(-num_tokens // self.block_size)

    def _fits(self, tier, r):
        return self._blocks(r.num_tokens) <= self.slack[tier]

    def _hold(self, r, num_tokens):
        """Count the blocks that r needs for num_tokens tokens."""
        more = self._blocks(num_tokens) - r.num_blocks
        r.num_blocks += more
        self.num_free[r.tier] -= more
        assert self.num_free[r.tier] >= 0, \
            f"{r.tier} tier overcommitted by {-self.num_free[r.tier]} blocks"

    def _enter(self, r, tier, num_tokens):
        r.tier = tier
        self.running[tier][r.id] = r
        self._hold(r, num_tokens)
        self.slack[tier] -= self._blocks(r.num_tokens)      # its next token included

    def _leave(self, r):
        del self.running[r.tier][r.id]
        self.num_free[r.tier] += r.num_blocks
        self.slack[r.tier] += self._blocks(r.num_tokens)
        r.tier, r.num_blocks = None, 0

    def _swap(self, moved, r, tier):
        if r.tier in (None, tier) or not r.is_decoding:
            fail(self, f"{r} is no decode of the other tier, so it cannot move to the {tier} tier")
        if not self._fits(tier, r):
            return False
        self._leave(r)
        self._enter(r, tier, r.num_cached)
        moved.append(r)
        return True

    def _to_queue(self, plan, r):
        if r in plan.prefill + plan.swap_in + plan.swap_out:
            fail(self, f"{r} was admitted or swapped in this iteration, so it cannot be preempted "
                       "in the same one")
        self._leave(r)
        r.num_cached = 0
        self.waiting.appendleft(r)
        plan.preempted.append(r)

    def _lasts(self, tier, candidate):
        """Would the tier, with this request added, hold everyone to the end?

        Everyone grows by a token per iteration until its expected length. Without this check a
        tier fills, then evicts what it has just admitted: it thrashes.
        """
        requests = [*self.running[tier].values(), candidate]
        now = np.array([r.num_tokens for r in requests])        # stored after this iteration
        more = np.array([max(0, self.expected(r) - r.num_output - 1) for r in requests])
        blocks = self._blocks(now + more)
        if blocks.sum() <= self.num_blocks[tier]:               # even if nobody finished early
            return True
        if len(requests) > EXACT_PEAK:
            return False
        ends = np.unique(more)[:, None]         # memory peaks just before somebody finishes
        peak = (self._blocks(now + ends) * (more >= ends)).sum(1).max()
        return peak <= self.num_blocks[tier]

    def _count(self, plan):
        stats, prompts, batches = self.stats, plan.prefill, plan.batches
        stats["iterations"] += 1
        stats["pipelined_iterations"] += len(batches) > 1
        stats["preemptions"] += len(plan.preempted)
        stats["prefill_tokens"] += sum(r.num_scheduled for r in prompts)
        stats["chunks"] += sum(r.num_scheduled < r.num_tokens for r in prompts)
        stats["cpu_prefills"] += sum(r.tier == "cpu" and r.ends_prefill for r in prompts)
        stats["gpu_decode_tokens"] += sum(len(b.gpu_decodes) for b in batches)
        stats["cpu_decode_tokens"] += sum(len(b.cpu_decodes) for b in batches)
        stats["rows"] += len(plan.sampled)
