"""A fault anywhere costs at most the requests of its step: errors are raised once, at random lines
of the engine, under random traffic.

    NEO_FAULTS=10000 pytest server/test_faults.py
"""
import asyncio
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest

import cpu_attn
from neo import LLM, SamplingParams
from scheduler import StrategyError
from strategies import STRATEGIES

pytest.importorskip("prometheus_client")
from server.engine_thread import EngineThread, failure_text  # noqa: E402

NUM_FAULTS = int(os.environ.get("NEO_FAULTS", 1000))     # in all, over the strategies
ROOT = Path(__file__).resolve().parent.parent
FILES = {str(ROOT / f"{name}.py") for name in (
    "neo scheduler strategies aim plan perfmodel kvcache model queues sampling request gpu_attn "
    "cpu_attn checkpoint server/engine_thread server/metrics").split()}
TIGHT = dict(device="cpu", dtype="fp32", gpu_blocks=9, cpu_mem=0.0006, max_model_len=100,
             max_batch_tokens=24)
MOST_STEPS = 400        # of a request: then it hangs


class Fault(Exception):
    """What is raised, beside MemoryError and KeyboardInterrupt."""


KINDS = (Fault, MemoryError, KeyboardInterrupt)


class Injector:
    """Raises once at a line of FILES: the n-th that runs, or a certain one the next time it runs.
    Faults in worker threads come from `functions`: {(object, name)} whose next call raises."""

    def __init__(self, rng, functions=()):
        self.rng, self.functions = rng, functions
        self.seen = {}                  # (code, line) -> times
        self.hit = Counter()            # function -> faults
        self.countdown = self.target = self.patched = None
        self.num_lines, self.fired = 1000, None

    @property
    def armed(self):
        return bool(self.countdown or self.target or self.patched)

    def arm(self):
        self.fired, way = None, self.rng.random()
        if way < 0.4:
            self.countdown = self.rng.randrange(1, self.num_lines)
        elif way < 0.8 and self.seen:
            self.target = self.rng.choice(list(self.seen))
        elif self.functions:
            self._patch(*self.rng.choice(self.functions))

    def disarm(self):
        self.countdown = self.target = None
        if self.patched:
            setattr(*self.patched)
            self.patched = None

    def _patch(self, owner, name):
        original = getattr(owner, name)
        self.patched = owner, name, original

        def raises_once(*args, **kwargs):
            if self.patched and not self.fired:
                self.raise_at(f"{name} (called)")
            return original(*args, **kwargs)
        setattr(owner, name, raises_once)

    def raise_at(self, place):
        self.fired, self.countdown, self.target = place, None, None
        self.hit[place] += 1
        raise self.rng.choice(KINDS)(f"injected at {place}")

    def trace(self, frame, event, arg):
        return self.local if frame.f_code.co_filename in FILES else None

    def local(self, frame, event, arg):
        if event == "line" and frame.f_code.co_name not in ("_repair", "_recover", "_die"):
            where = frame.f_code, frame.f_lineno
            self.seen[where] = self.seen.get(where, 0) + 1
            if self.countdown:
                self.countdown -= 1
            if self.countdown == 0 or where == self.target:
                self.raise_at(frame.f_code.co_name)
        return self.local


def worker_functions(llm):
    """What other threads than the engine's run."""
    return [(llm.model, name) for name in ("linear", "attend", "send", "cpu_attend", "head")] + [
        (llm.kv, "_move"), (llm.kv, "_gather_past"), (cpu_attn, "store_kv"),
        (cpu_attn, "paged_decode"), (llm.kv, "fetch_past"), (llm.kv, "store_prompts")]


class Traffic:
    """Prompts with the output that each must get, as an engine without faults gives it."""

    def __init__(self, llm, rng, num_prompts=24):
        self.rng, V = rng, llm.cfg.vocab_size
        self.prompts = [[rng.randrange(V) for _ in range(rng.randrange(1, 60))]
                        for _ in range(num_prompts)]
        self.params = [SamplingParams(rng.randrange(1, 16), ignore_eos=True, seed=i,
                                      temperature=rng.choice((0, 0.8)), logprobs=i % 3 == 0)
                       for i in range(num_prompts)]
        outs = llm.generate(self.prompts, self.params)
        self.want = [(out.token_ids, out.text) for out in outs]

    def draw(self):
        return self.rng.randrange(len(self.prompts))


def check_books(llm):
    """Both tiers' books are right, and agree with each other."""
    s = llm.scheduler
    llm.kv.check()
    held = {r.id: r for tier in s.running.values() for r in tier.values()}
    assert {r.id for r in s.waiting} | held.keys() == llm.outputs.keys()
    assert llm.kv.sequences.keys() <= held.keys()
    for tier, requests in s.running.items():
        used = sum(r.num_blocks for r in requests.values())
        assert used + s.num_free[tier] == s.num_blocks[tier]
        for r in requests.values():
            assert r.tier == tier and len(llm.kv.sequences[r.id].blocks) <= r.num_blocks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fault_costs_at_most_the_requests_of_its_step(strategy, text_models):
    rng = random.Random(strategy)
    llm = LLM(str(text_models["tokenizers"]), strategy, **TIGHT)
    traffic = Traffic(llm, rng)
    injector = Injector(rng, worker_functions(llm))
    live, born, steps, faults, right = {}, {}, 0, 0, 0     # live: request id -> (output, number)
    plans, plan = [], llm.scheduler.plan

    def remember():
        plans.append(plan())
        return plans[-1]
    llm.scheduler.plan = remember

    def act():
        """One call of the engine: a new request, an abort or a step."""
        way = rng.random()
        if live and way < 0.03:
            request_id = rng.choice(list(live))
            llm.abort(request_id)
        elif len(live) < 3 or (len(live) < 12 and way < 0.4):
            number = traffic.draw()
            request_id = llm.add_request(traffic.prompts[number], traffic.params[number])
            live[request_id], born[request_id] = (llm.outputs[request_id], number), steps
        else:
            llm.step()

    while faults < NUM_FAULTS // len(STRATEGIES) or live:
        steps += 1
        if faults >= NUM_FAULTS // len(STRATEGIES):
            injector.disarm()
            act = llm.step
        elif steps % 2 and (not injector.armed or steps % 16 == 1):     # its line may not run again
            injector.disarm()
            injector.arm()
        plans.clear()
        before = {i: out for i, (out, _) in live.items()}
        lines = sum(injector.seen.values())
        sys.settrace(injector.trace)
        try:
            act()
        except (*KINDS, StrategyError) as error:
            sys.settrace(None)
            cause = error.__cause__ if isinstance(error, StrategyError) else error
            assert isinstance(cause, KINDS) and injector.fired, error
            faults += 1
            injector.disarm()
            lost = {i for i, out in before.items() if out.finish_reason == "abort"}
            rows = {r.id for p in plans for r in p.requests + p.swap_in + p.swap_out}
            assert lost <= rows or (not plans and len(lost) <= 1), injector.fired
        finally:
            sys.settrace(None)
        injector.num_lines = max(50, sum(injector.seen.values()) - lines)
        check_books(llm)
        for i, (out, number) in list(live.items()):
            if out.finish_reason:
                if out.finish_reason != "abort" and i not in llm.outputs:
                    assert (out.token_ids, out.text) == traffic.want[number], injector.hit
                    right += 1
                del live[i]
            else:
                assert steps - born[i] < MOST_STEPS, f"{out} hangs; {injector.hit}"
    assert not llm.outputs and llm.scheduler.num_free == llm.scheduler.num_blocks
    # gpu-whole has every decode in each step, so a fault there leaves few to survive
    assert right > faults / 25 and len(injector.hit) > min(30, faults / 10), (right, injector.hit)


def test_every_call_ends_with_an_answer(text_models):
    """The same through the engine's thread, with its own lines as candidates."""
    rng = random.Random(1)
    llm = LLM(str(text_models["tokenizers"]), "neo", **TIGHT)
    traffic, injector = Traffic(llm, rng), Injector(rng, worker_functions(llm))
    engine = EngineThread(llm)
    step, quiet = llm.step, [0]         # steps since the last fault
    faults, answers, end = [], Counter(), NUM_FAULTS // 8

    def traced_step():
        sys.settrace(None)
        if injector.fired:
            faults.append(injector.fired)
            injector.fired, quiet[0] = None, 0
            injector.disarm()
        quiet[0] += 1
        if len(faults) < end and quiet[0] > 4 and (not injector.armed or quiet[0] % 8 == 0):
            injector.disarm()
            injector.arm()
            injector.fired = None
        lines = sum(injector.seen.values())
        sys.settrace(injector.trace)    # of this thread, until the next fault
        outs = step()
        injector.num_lines = max(50, 2 * (sum(injector.seen.values()) - lines))
        return outs
    llm.step = traced_step

    async def client():
        while len(faults) < end and not engine.dead:
            numbers = [traffic.draw() for _ in range(rng.randrange(1, 3))]
            stream = engine.submit([traffic.prompts[n] for n in numbers],
                                   [traffic.params[n] for n in numbers])
            got = [[] for _ in numbers]
            leave = rng.random() < 0.1

            async def read(stream=stream, got=got, leave=leave):
                async for delta in stream:
                    got[delta.index] += delta.token_ids
                    if leave:
                        engine.drop(stream)
            await asyncio.wait_for(read(), 60)
            if stream.error or leave:
                answers["error" if stream.error else "left"] += 1
                continue
            assert got == [traffic.want[n][0] for n in numbers]
            answers["right"] += 1

    async def all_of_them():
        await asyncio.gather(*(client() for _ in range(6)))

    asyncio.run(all_of_them())
    assert not engine.dead, faults[-3:]
    injector.disarm()
    engine.close()
    engine.join(20)
    assert not engine.is_alive() and not engine.open and not engine.in_flight
    assert not llm.outputs and llm.scheduler.num_free == llm.scheduler.num_blocks
    llm.kv.check()
    assert answers["right"] > end / 8, (answers, Counter(faults))


def test_clients_see_the_kind_of_an_error_and_no_more():
    assert failure_text(RuntimeError("prompt [1, 2, 3]")) == "the engine failed: RuntimeError"
    assert "out of memory" in failure_text(MemoryError())


@pytest.mark.parametrize("finished", [False, True])
def test_an_abort_is_idempotent(finished, text_models):
    llm = LLM(str(text_models["tokenizers"]), "neo", **TIGHT)
    request_id = llm.add_request([1, 2, 3], SamplingParams(2 if finished else 5, ignore_eos=True))
    other = llm.add_request([4, 5], SamplingParams(4, ignore_eos=True))
    grow = llm._grow
    if finished:
        llm._grow = lambda out: None        # committed, but not closed
    llm.step(), llm.step()
    llm._grow = grow
    assert llm.abort(request_id) is not None and llm.abort(request_id) is None
    while other in llm.outputs:
        llm.step()
    check_books(llm)
