"""The order of work on CUDA streams, without CUDA: a fuzzer.

torch.cuda's streams and events are replaced by queues, and what the engine launches is put on them
instead of being run. Whoever waits runs it, in a random order that streams and events allow. The
real model on CPU tensors then gives the reference's tokens under any order, or a wait is missing;
and if one of the waits is taken away, some order gives other tokens.

    python -m pytest kernels/test_streams.py        NEO_EXAMPLES=300 tries more orders
"""
import os
import random
import threading
import time
from collections import deque
from functools import partial

import pytest
import torch

import cpu_attn
import gpu_attn
import kvcache
import model
import neo
import queues
from kvcache import KVCache
from neo import LLM, SamplingParams
from plan import Batch
from strategies import STRATEGIES

ORDERS = int(os.environ.get("NEO_EXAMPLES", 40))      # of each strategy
TOKENS = SamplingParams(max_tokens=9, ignore_eos=True)


class Streams:
    """What stands for torch.cuda. Items of a stream are functions, markers and gates."""

    def __init__(self, seed):
        self.rng, self.lock, self.local = random.Random(seed), threading.Lock(), threading.local()
        self.streams, self.busy, self.num_run = [], set(), 0
        self.default = Stream(self)

    def current(self, device=None):
        return getattr(self.local, "stream", self.default)

    def put(self, fn, *args):
        with self.lock:
            self.current().items.append(partial(fn, *args))

    def run_until(self, done):
        """Run items in any legal order until done(), and then perhaps some more."""
        deadline = time.monotonic() + 20
        # What the porter would run for others might wait for the porter.
        mine = [self.current()] if in_porter() else self.streams
        while not done() or self.rng.random() < 0.5:
            with self.lock:
                heads = [s for s in mine if s.items and s not in self.busy
                         and not (isinstance(s.items[0], Event) and not s.items[0].passed)]
                if heads:
                    stream = self.rng.choice(heads)
                    item = stream.items.popleft()
                    self.busy.add(stream)
                elif done():
                    return
            if heads:
                if not isinstance(item, Event):     # a gate that is open
                    with torch.inference_mode():
                        item()
                    self.num_run += 1
                with self.lock:
                    self.busy.discard(stream)
            else:
                time.sleep(0)
                assert time.monotonic() < deadline, "deadlock: every stream waits"

    def set_stream(self, stream):
        self.local.stream = stream

    def stream(self, stream):
        return Within(self, stream)

    def synchronize(self):
        self.run_until(lambda: not any(s.items or s in self.busy for s in self.streams))


def in_porter():
    return threading.current_thread().name.startswith("porter")


class Within:
    def __init__(self, cuda, stream):
        self.cuda, self.stream = cuda, stream

    def __enter__(self):
        self.before = self.cuda.current()
        self.cuda.set_stream(self.stream)

    def __exit__(self, *error):
        self.cuda.set_stream(self.before)


class Stream:
    def __init__(self, cuda, priority=0):
        self.cuda, self.items = cuda, deque()
        cuda.streams.append(self)

    def wait_stream(self, other):
        event = Event(self.cuda)
        event.record(other)
        with self.cuda.lock:
            self.items.append(event)

    def synchronize(self):
        event = Event(self.cuda)
        event.record(self)
        event.synchronize()


class Event:
    def __init__(self, cuda, enable_timing=False):
        self.cuda, self.passed = cuda, True

    def record(self, stream=None):
        self.passed = False
        with self.cuda.lock:
            (stream or self.cuda.current()).items.append(partial(setattr, self, "passed", True))

    def synchronize(self):
        if not self.passed:
            self.cuda.run_until(lambda: self.passed)

    def elapsed_time(self, other):
        return 0.0


class Padded(gpu_attn.TorchAttention):
    """Plain torch that skips rows of padding, so that decodes are captured."""
    padded = True

    def store(self, k, v, k_cache, v_cache, slots):
        live = slots >= 0
        super().store(k[live], v[live], k_cache, v_cache, slots[live])

    def decode(self, q, k_cache, v_cache, block_table, seq_lens, out, scale, lse=None):
        live = seq_lens > 0
        rows = out[live]
        if len(rows):
            super().decode(q[live], k_cache, v_cache, block_table[live], seq_lens[live], rows,
                           scale)
            out[live] = rows


@pytest.fixture
def fake(monkeypatch):
    """fake(seed) -> Streams in the place of torch.cuda's, for what is made and run from now on."""
    monkeypatch.setitem(gpu_attn.BACKENDS, "padded", Padded)
    monkeypatch.setattr(neo, "measure_gpu_blocks", lambda model, budget, gpu_mem: 10 ** 6)
    monkeypatch.setattr(neo, "profile_points", lambda *args: POINTS)
    monkeypatch.setattr(neo, "TIMED_EVERY", 5)
    for module in (queues, model, kvcache, neo):
        if hasattr(module, "on_cuda"):
            monkeypatch.setattr(module, "on_cuda", lambda device: True)
        if hasattr(module, "host_tensor"):
            monkeypatch.setattr(module, "host_tensor",
                                lambda shape, dtype, pinned: torch.zeros(shape, dtype=dtype))
    monkeypatch.setattr(queues.CudaQueue, "capture", lambda self, calls: calls)
    monkeypatch.setattr(queues.CudaQueue, "free_bytes", lambda self: 0)
    store_kv = cpu_attn.store_kv

    def slow_store(*args):              # the porter is sometimes late
        if in_porter() and random.random() < 0.2:
            time.sleep(0.002)
        store_kv(*args)
    monkeypatch.setattr(cpu_attn, "store_kv", slow_store)

    settle = KVCache.settle

    def start(seed):
        cuda = Streams(seed)

        def settle_late(kv):
            if kv.fetches:      # `attend` takes them when it is launched, which is later here
                cuda.synchronize()
            return settle(kv)
        monkeypatch.setattr(KVCache, "settle", settle_late)
        for name, value in {"Stream": partial(Stream, cuda), "Event": partial(Event, cuda),
                            "stream": cuda.stream, "current_stream": cuda.current,
                            "set_stream": cuda.set_stream, "synchronize": cuda.synchronize}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(queues.CudaQueue, "launch", staticmethod(cuda.put))
        monkeypatch.setattr(KVCache, "launch", staticmethod(cuda.put))
        return cuda
    return start


# A profile under which neo has reasons to pipeline, to swap and to prefill for the CPU tier.
POINTS = {"linear": [[1, 1.0], [512, 2.0]], "lm_head": [[1, 0.1], [64, 0.2]],
          "prefill": [[1, 0.1], [512, 1.0]], "gpu_decode": [[1, 0.1], [1000, 0.3]],
          "cpu_decode": [[1, 16, 0.05], [8, 400, 0.3]], "transfer": [[1000, 0.01]]}


def make(strategy, **options):
    return LLM("tiny", strategy, device="cpu", dtype="fp32", gpu_attn="padded", gpu_blocks=9,
               max_model_len=70, max_batch_tokens=40, cpu_threads=1, gpu_threads=1, **options)


def work(vocab_size):
    """Prompts of 3 to 45 tokens: some are longer than an iteration takes."""
    lengths = 3, 45, 20, 7, 31, 12, 18, 26
    return [[(31 * i + 7 * j) % vocab_size for j in range(n)] for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def expected():
    llm = LLM("tiny", "gpu-only", device="cpu", dtype="fp32", max_model_len=70)
    return [out.token_ids for out in llm.generate(work(llm.cfg.vocab_size), TOKENS)]


def first_wrong_order(llm, cuda, strategy, expected, orders):
    """How many orders ran before one gave other tokens or an error; None if none of them does."""
    for seed in range(orders):
        cuda.rng.seed(seed)
        llm.reset(strategy)
        try:
            outs = llm.generate(work(llm.cfg.vocab_size), TOKENS)
            if [out.token_ids for out in outs] != expected:
                return seed
        except (AssertionError, RuntimeError, ValueError):
            return seed
    return None


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_any_order_gives_the_same_tokens(strategy, fake, expected):
    cuda = fake(0)
    llm = make(strategy)
    flights, land = [], llm._land
    llm._land = lambda: flights.append(llm.flight) or land()
    assert first_wrong_order(llm, cuda, strategy, expected, ORDERS) is None
    llm.kv.check()
    s = llm.stats()
    assert cuda.num_run > 1000 and s["chunks"]
    if strategy.startswith("gpu"):
        assert any(flights) and llm.model.captures.passes
    else:
        assert s["cpu_decode_tokens"] and s["cpu_prefills"] and llm.model.captures.stages


def swap_there_and_back(cuda, seed):
    """Blocks that the GPU has just been told to write go to the CPU tier, others take their place,
    and they come back -> are they what was written?"""
    cuda.rng.seed(seed)
    kv = KVCache((2, 1, 4), 2, {"gpu": 10, "cpu": 10}, 32,
                 dict.fromkeys(("gpu", "cpu"), torch.float32), torch.float32, torch.device("cpu"))
    gpu = kv.tiers["gpu"]

    def write(request, value):
        blocks = list(kv.sequences[request].blocks)
        for tensor in (gpu.k, gpu.v):
            kv.launch(lambda tensor=tensor: tensor.index_fill_(1, torch.tensor(blocks), value))

    def move(request, tier):
        kv.swap([request], tier)
        for layer in range(2):
            kv.wait_swaps(layer)
    kv.reserve("a", "gpu", 10)
    write("a", 1.0)
    move("a", "cpu")
    kv.reserve("b", "gpu", 10)
    write("b", 2.0)
    if seed % 2:
        move("a", "gpu")
    cuda.synchronize()
    tier = kv.tiers[kv.sequences["a"].tier]
    kv.settle()
    return all(bool((t[:, kv.sequences[name].blocks] == value).all())
               for name, value, tier in (("a", 1.0, tier), ("b", 2.0, gpu))
               for t in (tier.k, tier.v))


def test_swaps_in_any_order(fake, monkeypatch):
    monkeypatch.setattr(kvcache, "STAGE_BYTES", 128)        # two blocks a trip
    cuda = fake(0)
    assert all(swap_there_and_back(cuda, seed) for seed in range(100))


@pytest.mark.parametrize("owner, attribute, instead", [
    (Stream, "wait_stream", lambda self, other: None),
    (kvcache, "mark", lambda: Event(None)),
    (KVCache, "wait_swaps", lambda self, layer: None),
])
def test_swaps_without_a_wait(owner, attribute, instead, fake, monkeypatch):
    """The copy out follows what the GPU does with these blocks; the host touches a half of the
    buffer when its copy has ended; who swaps waits for the blocks."""
    monkeypatch.setattr(kvcache, "STAGE_BYTES", 128)
    cuda = fake(0)
    monkeypatch.setattr(owner, attribute, instead)
    assert not all(swap_there_and_back(cuda, seed) for seed in range(100))


def nothing(*args, **kwargs):
    pass


WAITS = {   # name -> (strategy, object, attribute, what takes its place)
    "CPU attention waits for q, k and v": ("symmetric", queues.CudaQueue, "wait", nothing),
    "copies of prompts follow the linear layers": ("serial", Stream, "wait_stream", nothing),
    "attention waits for swapped blocks": ("serial", KVCache, "wait_swaps", nothing),
    "a place of prompts is used again when it is stored": ("symmetric", KVCache, "wait_stored",
                                                           nothing),
    "tokens wait for their copy": ("gpu-only", Event, "synchronize", nothing),
}


@pytest.mark.parametrize("name", WAITS)
def test_without_a_wait_some_order_differs(name, fake, expected, monkeypatch):
    strategy, owner, attribute, instead = WAITS[name]
    cuda = fake(0)
    llm = make(strategy)
    monkeypatch.setattr(owner, attribute, instead)
    assert first_wrong_order(llm, cuda, strategy, expected, 60) is not None


# ------------------------------------------------------------------------- captures that fail

def failing_captures(monkeypatch, calls, fails):
    """CudaQueue.capture notes its calls, and raises from call number `fails` on."""
    def capture(self, what):
        calls.append(what)
        if len(calls) >= fails:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return what
    monkeypatch.setattr(queues.CudaQueue, "capture", capture)


def test_a_failed_capture_is_said_once_and_never_repeated(fake, expected, monkeypatch):
    """An error of CUDA in a capture costs the graphs of later sizes, nothing else."""
    cuda, calls = fake(0), []
    failing_captures(monkeypatch, calls, 7)     # the warm-up has three or four, of stages
    with pytest.warns(UserWarning, match="out of memory.*kernel by kernel") as warned:
        llm = make("gpu-only")
    num_captured = sum(x is not None for x in llm.model.captures.passes.values())
    assert len(calls) == 7 and num_captured in (2, 3)
    assert first_wrong_order(llm, cuda, "gpu-only", expected, 2) is None
    assert len(calls) == 7 and sum("kernel by kernel" in str(w.message) for w in warned) == 1


def test_captures_end_with_their_budget(fake, expected, monkeypatch):
    cuda, free = fake(0), [1000]

    def spend(self):                        # every second call comes after a capture
        free[0] -= 5
        return free[0]
    monkeypatch.setattr(queues.CudaQueue, "free_bytes", spend)
    llm = make("gpu-only")
    captures = llm.model.captures
    captures.budget, made = captures.spent + 12, []
    captures.passes.clear()
    monkeypatch.setattr(queues.CudaQueue, "capture", lambda self, calls: made.append(1) or calls)
    assert first_wrong_order(llm, cuda, "gpu-only", expected, 2) is None
    assert len(made) == 2 and captures.spent <= captures.budget     # 5 bytes each


# --------------------------------------------------------------------- iterations in flight

def test_streams_of_clients_end_while_iterations_are_in_flight(fake, expected):
    """The engine's thread sends every token once, also where two came with one step."""
    import asyncio

    from server.engine_thread import EngineThread
    fake(0)
    llm = make("gpu-only", max_num_seqs=8)          # fewer than the profile runs at once
    engine, got = EngineThread(llm), {}

    async def read():
        prompts = work(llm.cfg.vocab_size)
        params = [SamplingParams(max_tokens=1 + i, ignore_eos=True) for i in range(len(prompts))]
        stream = engine.submit(prompts, params)
        async for delta in stream:
            got.setdefault(delta.index, []).extend(delta.token_ids)
        assert not stream.error
    asyncio.run(asyncio.wait_for(read(), 60))
    engine.close()
    engine.join(20)
    assert [got[i] for i in range(8)] == [ids[:1 + i] for i, ids in enumerate(expected)]
    assert not llm.kv.sequences


@pytest.mark.parametrize("end", ["preempt", "swap"])
def test_all_of_a_plan_ended_while_it_was_made(end, fake):
    """The rows of a plan end when the iteration before lands. What else it says is done still."""
    fake(0)
    llm = make("gpu-only" if end == "preempt" else "neo")
    stop = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=6, ignore_eos=True))[0].token_ids
    llm.reset(llm.strategy)
    ids = [llm.add_request([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True,
                                                     stop_token_ids=[stop[3]])),
           llm.add_request([4, 5, 6], SamplingParams(max_tokens=9, ignore_eos=True))]
    first, second = (llm.outputs[i] for i in ids)
    while not (llm.flight and len(first.token_ids) == 3):
        llm.step()
    form = llm.scheduler.strategy.form

    def leave_second_out(s, plan):
        r = second.request
        s.preempt(plan, r) if end == "preempt" else s.swap_out(plan, r)
        return [Batch((), [first.request])]
    llm.scheduler.strategy.form = leave_second_out
    llm.step()
    assert first.finish_reason == "stop"
    llm.scheduler.strategy.form = form
    held = {tier: sum(len(s.blocks) for s in llm.kv.sequences.values() if s.tier == tier)
            for tier in ("gpu", "cpu")}
    assert all(llm.scheduler.num_blocks[tier] - llm.scheduler.num_free[tier] == n
               for tier, n in held.items())
    while llm.outputs:
        llm.step()
    assert second.finish_reason == "length"
    llm.kv.check()
