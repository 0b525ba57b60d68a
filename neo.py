"""NEO: online LLM inference with part of the KV cache, and its decode attention, on the CPU.

    from neo import LLM, SamplingParams
    llm = LLM("tiny")               # a preset with random weights, or a checkpoint folder
    print(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8))[0].token_ids)

    python neo.py --model PATH --prompt "The capital of France is"

The one loop is `LLM.step`: plan, bind, forward, commit, measure (arXiv 2411.01142). Knows no
kernels, and not how a plan is made.
"""
import contextlib
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from chat import converse, follow
from checkpoint import StreamDecoder, load_config, load_tokenizer
from cpu_attn import choose_path
from gpu_attn import choose
from hub import find_model
from kv_format import NAMES
from kvcache import KVCache
from measure import MOST_PROFILED, measure_gpu_blocks, profile_points, warm_up
from model import Model
from options import Options, Parser, add_engine_flags, engine_options
from perfmodel import Prediction, Profile, Roofline, SimulatedModel, busy_seconds, find_testbed
from queues import on_cuda
from ranks import Ranks
from request import Request, RequestOutput, SamplingParams
from sampling import is_greedy, sample
from scheduler import MAX_RUNNING, Scheduler
from startup import (
    check_num_ranks,
    device_name,
    fmt_gib,
    gpu_memory,
    host_memory,
    plan_budget,
    resolve_device,
    resolve_dtype,
    resolve_threads,
)
from strategies import STRATEGIES, find_strategy

MAX_ERRORS = 4096       # iterations whose prediction error is remembered
TIMED_EVERY = 32        # on CUDA one iteration in 32 is timed stage by stage, which costs launches


class Flight(NamedTuple):
    """An iteration that was launched. It may be in flight: the GPU still computes its tokens while
    the next one is planned."""
    plan: object            # plan.Plan
    sampled: list           # its Requests that get a token,
    outs: list              # and their RequestOutputs
    result: object          # perfmodel.Result without logits: the next run overwrites them
    start: float            # of the iteration, by the engine's clock
    number: int             # of the iteration


class LLM:
    """The engine. LLM(model, strategy="neo", **options).

    model    a preset of checkpoint.py with random weights (tiny, llama-7b, qwen3-8b, ...), a
             checkpoint folder, a name of the Hugging Face hub, or smollm2 (see hub.py)
    options  the fields of options.Options: device, dtype, gpu_mem, gpu_blocks, cpu_mem, ...
             simulate may also be a perfmodel.Testbed, or an LLM on whose measured profile to run:
             nothing is computed, a virtual clock runs, every token is 0
             tensor_parallel_size > 1 starts other processes, which `close` ends (see ranks.py)

    Raises ValueError, before anything is loaded, on what does not exist or does not fit.
    """

    def __init__(self, model, strategy="neo", **options):
        options = Options.of(str(model), strategy, options)
        self.name, self.seed, self.ttft_queue = options.model, options.seed, options.ttft_queue
        self.max_num_seqs = options.max_num_seqs or MAX_RUNNING
        self.path = find_model(self.name, weights=not options.simulate)
        self.verbose = False            # print each iteration
        self.may_fly, self.flight = False, None
        self.watch(None)
        self.cfg = load_config(self.path)
        self.testbed = self.points = self.outputs = None
        self.ranks = Ranks()
        if options.simulate:
            self._simulate(options)
        else:
            self._load(options)
        self.reset(strategy)

    def _load(self, options):
        cfg, tiers = self.cfg, find_strategy(options.strategy).tiers
        if Path(self.path).is_file():
            raise ValueError(f"{self.path} has no weights: give the folder of the checkpoint, or "
                             "--simulate TESTBED, which needs none")
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype, cfg, self.device)
        options.dtype = NAMES[self.dtype]           # the same in every rank
        check_num_ranks(options, cfg, self.device)
        # A strategy of the user's own is not known in other ranks. They only need its tiers.
        like = (name for name, known in STRATEGIES.items() if set(known.tiers) == set(tiers))
        arguments = options.model, next(like, options.strategy), options.keywords()
        self.ranks = Ranks(options.tensor_parallel_size, on_cuda(self.device), arguments)
        with self.ranks.ending_all():
            self._load_share(options, tiers)

    def _load_share(self, options, tiers):
        """What every rank does: its share of model and cache, and then its part in the loop."""
        cfg, ranks = self.cfg, self.ranks
        cores, self.gpu_threads, self.cpu_threads = resolve_threads(
            self.device, options.gpu_threads, options.cpu_threads)
        options.gpu_mem = gpu_memory(options, self.device)
        self.budget = budget = plan_budget(
            options, tiers, cfg.shard(ranks.size), self.dtype, self.device,
            host=ranks.least(host_memory() // ranks.local_size))
        attn = choose(options.gpu_attn, self.device, self.dtype)
        ranks.check_same(options.keywords() | {"GPU attention": attn.describe()})
        cpu_path = choose_path(options.cpu_attn, NAMES[budget.kv_dtypes["cpu"]], cfg.head_dim,
                               budget.block_size)
        self.tokenizer = load_tokenizer(self.path)

        start = time.perf_counter()
        torch.set_num_threads(cores)                        # to fill the weights
        self.model = Model(
            self.path, cfg, self.dtype, budget.row_dtype, self.device, budget.max_model_len,
            self.gpu_threads, self.cpu_threads, attn, cpu_path, ranks, options.eager, options.seed)
        torch.set_num_threads(self.gpu_threads or cores)    # this thread samples: the GPU idles
        self.load_seconds = time.perf_counter() - start
        ranks.wait_for_all()    # only then sums begin, which have a time limit
        self.model.allow_captures(-(-budget.max_model_len // budget.block_size),
                                  max(self.max_num_seqs, MOST_PROFILED))
        if on_cuda(self.device):
            most = measure_gpu_blocks(self.model, budget, options.gpu_mem)
            if options.gpu_blocks and options.gpu_blocks > most:
                raise ValueError(f"gpu_blocks = {options.gpu_blocks}: beside weights, activations "
                                 f"and CUDA graphs the GPU has room for {most}: lower it, or "
                                 "--max-batch-tokens")
            budget.num_blocks["gpu"] = options.gpu_blocks or most
            if options.gpu_memory_utilization:
                budget.card = ""            # it names no card
        budget.num_blocks = {tier: ranks.least(n) for tier, n in budget.num_blocks.items()}
        budget.check_tiers(options.strategy, tiers)         # again: now the numbers are final
        budget.check_length(options.strategy, tiers, options.max_model_len)
        self.kv = KVCache(self.model.kv_geometry, budget.block_size, budget.num_blocks,
                          budget.max_model_len, budget.kv_dtypes, budget.row_dtype, self.device)
        self.clock, self.wait = time.perf_counter, time.sleep
        self.may_fly = on_cuda(self.device)
        warm_up(self.model, self.kv)
        self.model.capture_passes(self.kv)
        if ranks.rank:
            ranks.repeat(self.model, self.kv)       # until rank 0 ends
        ranks.lead(self.model, self.kv)
        threads = [self.gpu_threads, self.cpu_threads]
        self.points = profile_points(self.model, self.kv, budget, threads)

    def _simulate(self, options):
        """What _load does, for a simulation."""
        check_num_ranks(options, self.cfg, None)
        source, cfg = options.simulate, self.cfg
        self.device, self.tokenizer = torch.device("cpu"), None
        if isinstance(source, LLM):
            self.dtype, self.budget, self.points = source.dtype, source.budget, source.points
            if self.points is None:
                raise ValueError("simulate: this LLM is itself a simulation: it has no profile")
        else:
            self.testbed = find_testbed(source) if isinstance(source, str) else source
            dtype = "fp16" if options.dtype == "auto" else options.dtype
            self.dtype = resolve_dtype(dtype, cfg, self.device)
            tiers = find_strategy(options.strategy).tiers
            options.gpu_mem = gpu_memory(options, self.device, self.testbed)
            self.budget = plan_budget(options, tiers, cfg, self.dtype, self.device, self.testbed)
        budget, geometry = self.budget, (cfg.n_layer, cfg.n_kv_head, cfg.head_dim)
        self.kv = KVCache(geometry, budget.block_size, budget.num_blocks, budget.max_model_len,
                          budget.kv_dtypes, budget.row_dtype, self.device, empty=True)
        self.model = SimulatedModel(self.new_perf())
        self.clock, self.wait = self.model.clock, self.model.wait

    def new_perf(self):
        """A performance model before anything was observed."""
        if self.testbed:
            return Roofline(self.testbed, self.cfg, self.dtype.itemsize, self.budget.token_bytes)
        return Profile(self.points, self.cfg.n_layer, self.budget.token_bytes)

    def reset(self, strategy):
        """Start over under a strategy: no requests, statistics at zero; model, cache and profile
        are kept. Raises ValueError on an unknown strategy or one whose tier has no blocks, and
        RuntimeError while requests are in flight."""
        if self.outputs:
            raise RuntimeError(f"{len(self.outputs)} requests are in flight: finish or abort them")
        budget, cls = self.budget, find_strategy(strategy)
        budget.check_tiers(strategy, cls.tiers)
        self.perf = self.new_perf()
        self.scheduler = Scheduler(cls(), budget.num_blocks, budget.block_size,
                                   budget.max_model_len, budget.max_batch_tokens, self.perf,
                                   self.ttft_queue, self.max_num_seqs)
        self.strategy, self.outputs, self.num_added = strategy, {}, 0
        self.flight, self.last_end = None, 0.0
        self.seconds = dict.fromkeys(("wall", "model", "timed", "gpu_busy", "cpu_busy"), 0.0)
        self.swapped_before, self.errors = self.kv.swapped_blocks, deque(maxlen=MAX_ERRORS)

    # ---- requests in

    def add_request(self, prompt, params=None, request_id=None):
        """Queue one prompt (str, or list of token ids) and return its id.

        Raises ValueError if it can never be served. Requests in flight are not touched.
        """
        params = params or SamplingParams()
        return self.add_checked(self.check_prompt(prompt, params), params, request_id)

    def add_checked(self, ids, params, request_id=None):
        """`add_request` for what `check_prompt` has returned."""
        request_id = self.num_added if request_id is None else request_id
        if request_id in self.outputs:
            raise ValueError(f"request id {request_id!r} is in flight already")
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= set(self.cfg.eos_ids)
        request = Request(request_id, ids, min(params.max_tokens, self.max_request_len - len(ids)),
                          stop_ids, exact_length=params.ignore_eos and not stop_ids)
        self.num_added += 1
        out = RequestOutput(request, params)
        if params.temperature:
            unseeded = f"{self.seed}/{self.num_added}"
            out.rng = random.Random(unseeded if params.seed is None else str(params.seed))
        if self.tokenizer:
            out.decoder = StreamDecoder(self.tokenizer)
        try:
            self.outputs[request_id] = out
            self.scheduler.add(request)
            return request_id
        except BaseException:
            self._repair([request])
            raise

    def check_prompt(self, prompt, params):
        """Token ids of a prompt that can be served. It changes nothing, so any thread may call it.
        Raises ValueError."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{self.name} comes without a tokenizer: give the prompt as token "
                                 "ids")
            if not prompt:
                raise ValueError("the prompt is empty: give at least one character")
            self.tokenizer.check_chars(prompt, self.max_request_len)
            prompt = self.tokenizer.encode(prompt)
        elif isinstance(prompt, list):
            self.scheduler.check_length(len(prompt))
        try:
            ids = [int(t) for t in prompt]
        except (TypeError, ValueError):
            raise ValueError(f"a prompt is a str or a list of token ids, got {prompt!r:.60}"
                             ) from None
        if not ids:
            raise ValueError("the prompt is empty: give at least one token id")
        V = self.cfg.vocab_size
        for what, some in (("token id", ids), ("stop_token_ids:", params.stop_token_ids),
                           ("logit_bias: token id", params.logit_bias)):
            wrong = next((t for t in some if not 0 <= t < V), None)
            if wrong is not None:
                raise ValueError(f"{what} {wrong} is outside the vocabulary 0..{V - 1}")
        if params.stop and not self.tokenizer:
            raise ValueError(f"stop strings need text, and {self.name} comes without a tokenizer")
        self.scheduler.check_length(len(ids))
        return ids

    def abort(self, request_id):
        """Drop a request and free what it holds. Returns its output, or None if it is not in
        flight."""
        out = self.outputs.get(request_id)
        if out:
            try:
                self.scheduler.finish(out.request, "abort")
                self._close(out)
            except BaseException:
                self._repair([out.request])
                raise
        return out

    # ---- tokens out

    def step(self):
        """One iteration. Returns an output for each token that came: none when nothing is in
        flight, when all rows belong to prompts with more chunks to come, or when the tokens come
        with the next step; then an output may be there twice.

        On CUDA an iteration of the GPU tier alone is left in flight, and its tokens are recorded
        behind the launch of the next one: see `_may_leave`.

        Whatever raises, it is raised again, and the engine can go on: what fails while planning
        changes nothing, and what fails later aborts the requests of this iteration alone (and of
        the one in flight).
        """
        if not self.outputs:
            self.flight = None              # nobody waits for it
            return []
        before = plan = None
        landed = []
        try:
            # 1) Plan: who has rows, and in which tier their KV lies.
            start, before = self.clock(), self.scheduler.snapshot()
            plan = self.scheduler.plan()
            if self.flight and (plan.host_works or any(r.num_pending for r in plan.prefill)):
                landed = self._land()
                plan.leave_out([out.request for out in landed if out.finish_reason])

            # 2) Bind: blocks are freed, moved and reserved; rows become tensors.
            late = self.flight and (self.flight.result.best, {
                r.id: row for row, r in enumerate(self.flight.sampled)})
            for r in plan.preempted:
                self.kv.release(r.id)
            for requests, tier in ((plan.swap_out, "cpu"), (plan.swap_in, "gpu")):
                if requests:
                    self.kv.swap([r.id for r in requests], tier)
            if not plan.batches:            # all of them ended when the last iteration landed
                return landed
            sub_batches = [self.kv.bind(batch, i, self.model.padded_rows, late)
                           for i, batch in enumerate(plan.batches)]

            # 3) Forward: all layers, then one token for each row that is sampled.
            sampled = plan.sampled
            outs = [self.outputs[r.id] for r in sampled]
            plan.counts, plan.num_sampled = [b.counts() for b in plan.batches], len(sampled)
            every = TIMED_EVERY if self.may_fly and not self.times_all else 1
            timed = self.scheduler.iteration % every == 0
            self.model.timed = timed
            with self._model_time():
                result = self.model.run(sub_batches, self.kv)
            flight = Flight(plan, sampled, outs, result._replace(logits=None), start,
                            self.scheduler.iteration)
            landed += self._land()          # the iteration before, behind the launch of this one
            if self._may_leave(plan, outs, timed):
                self.scheduler.advance(plan)
                self.flight = flight
                return landed
            with self._model_time():
                tokens = sample(result.logits, outs, result.arrived())
            self.ranks.check()              # if one has ended, the sums were not whole

            # 4) Commit: tokens are appended, finished requests leave, text grows.
            if landed:                      # which may have ended some of them
                outs = [out for out in outs if out.finish_reason is None]
            self.scheduler.commit(plan, tokens)
            for out in outs:
                self._grow(out)

            # 5) Measure: correct the predictions.
            self._measure(flight, self.model.spans)
            return landed + outs
        except BaseException:
            if before and not plan:
                self.scheduler.restore(before)
            lost = plan.requests + plan.swap_in + plan.swap_out if plan else []
            if plan and self.flight:
                lost += self.flight.sampled
                self.flight = None
            self._repair(lost)
            raise

    def watch(self, on_iteration, always=True):
        """Call on_iteration(plan, spans, start, end) after each iteration; None: nothing.

        spans  perfmodel.Spans; none of an iteration that was not timed
        always time every iteration. On CUDA that costs launches, and none is left in flight
        """
        self.on_iteration, self.times_all = on_iteration, bool(on_iteration) and always

    def _may_leave(self, plan, outs, timed):
        """May an iteration stay in flight while the next one is planned?

        Yes if the host has no part in it, no token is drawn or needs its log-probability, and
        nobody gets a last token. Whoever ends by a stop id or string takes part in one iteration
        too many; that row is dropped.
        """
        return (self.may_fly and not timed and len(plan.batches) == 1 and not plan.host_works
                and bool(outs) and all(map(is_greedy, outs))
                and all(r.num_output + 1 < r.max_tokens for r in plan.sampled))

    def _land(self):
        """Wait for the iteration in flight, if there is one, and record its tokens -> the outputs
        that got one."""
        if not self.flight:
            return []
        flight = self.flight
        with self._model_time():
            tokens = flight.result.arrived()
        self.ranks.check()
        outs = [out for out in flight.outs if out.finish_reason is None]
        self.scheduler.arrive(flight.sampled, tokens)
        for out in outs:
            self._grow(out)
        self._measure(flight, [])
        self.flight = None
        return outs

    @contextlib.contextmanager
    def _model_time(self):
        """Count the time inside as the model's."""
        start = self.clock()
        yield
        self.seconds["model"] += self.clock() - start

    def _repair(self, lost):
        """After an error, which may have left any function half done: end the `lost` requests, and
        make the books of both tiers anew from the requests that remain."""
        self.model.settle(self.kv)
        for r in lost:
            out = self.outputs.pop(r.id, None)
            if out:
                r.finish_reason = "abort"
        self.scheduler.keep([out.request for out in self.outputs.values()])
        self.kv.keep({r.id for tier in self.scheduler.running.values() for r in tier.values()})

    def _grow(self, out):
        """After a new token: text, stop strings, the end."""
        if out.decode_more() and out.finish_reason is None:
            self.scheduler.finish(out.request, "stop")
        if out.finish_reason:
            self._close(out)

    def _close(self, out):
        self.kv.release(out.request_id)
        self.outputs.pop(out.request_id, None)

    def _measure(self, flight, spans):
        """After an iteration: count its times, correct the predictions, tell who listens. If it was
        in flight, the one before may have ended after its start."""
        plan, busy, end = flight.plan, busy_seconds(spans), self.clock()
        wall, self.last_end = end - max(flight.start, self.last_end), end
        for name, value in (("wall", wall), ("timed", wall if spans else 0.0),
                            ("gpu_busy", busy["gpu"]), ("cpu_busy", busy["cpu"])):
            self.seconds[name] += value
        measured = Prediction(1e3 * wall, 1e3 * busy["gpu"], 1e3 * busy["cpu"])
        predicted_ms = plan.predicted.total_ms if plan.predicted else float("nan")
        if plan.predicted and not self.model.captured:
            self.errors.append(abs(predicted_ms / measured.total_ms - 1))
            if spans:
                self.perf.observe(plan.predicted, measured)
        if self.verbose:
            rows = " | ".join("prefill {:5d} gpu {:3d} cpu {:3d}".format(*counts)
                              for counts in plan.counts)
            waiting = len(self.scheduler.waiting)
            print(f"iteration {flight.number:5d}  {rows}  waiting {waiting:3d}  predicted "
                  f"{predicted_ms:8.1f} ms  measured {measured.total_ms:8.1f} ms", file=sys.stderr)
        if self.on_iteration:
            self.on_iteration(plan, spans, flight.start, end)

    def generate(self, prompts, params=None):
        """Continue every prompt; returns outputs in the order of the prompts.

        prompts  list of str or of lists of token ids
        params   one SamplingParams for all, or a list of them

        Raises ValueError, naming the prompt, before any work is done. If interrupted, it frees
        what it added.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list: wrap the string in [ ]")
        if not isinstance(params, list):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} SamplingParams")
        ids = []
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            try:
                ids.append(self.check_prompt(prompt, p))
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from None
        outs = []
        try:
            for prompt, p in zip(ids, params, strict=True):
                outs.append(self.outputs[self.add_checked(prompt, p)])
            with tqdm(total=len(outs), desc="generate", unit="req", disable=None,
                      leave=False) as bar:
                while any(out.finish_reason is None for out in outs):
                    self.step()
                    bar.update(sum(out.finish_reason is not None for out in outs) - bar.n)
        finally:
            for out in outs:
                if out.finish_reason is None:
                    self.abort(out.request_id)
        return outs

    def close(self):
        """End the other ranks. A simulation, and an engine of one rank, have nothing to end."""
        self.ranks.close()

    # ---- what it is and what it did

    @property
    def max_request_len(self):
        """Longest prompt + output, in tokens, that the present strategy can serve."""
        return self.scheduler.max_len

    @property
    def kv_budget(self):
        """Tokens of each tier that the strategy may use: {"gpu": n, "cpu": n}."""
        return {tier: n * self.budget.block_size for tier, n in self.scheduler.num_blocks.items()}

    def stats(self):
        """Counters since the last reset, times in seconds, and the present state of both tiers in
        blocks."""
        s, seconds = self.scheduler, self.seconds
        counters = ("iterations", "pipelined_iterations", "preemptions", "prefill_tokens", "chunks",
                    "cpu_prefills", "gpu_decode_tokens", "cpu_decode_tokens")
        share = seconds["model"] / seconds["wall"] if seconds["wall"] else 1.0
        timed = seconds["wall"] / seconds["timed"] if seconds["timed"] else 0.0
        return {
            **{name: s.stats[name] for name in counters},
            "swapped_blocks": self.kv.swapped_blocks - self.swapped_before,
            "mean_batch_size": s.stats["rows"] / max(s.stats["iterations"], 1),
            "waiting": len(s.waiting), "running_gpu": len(s.running["gpu"]),
            "running_cpu": len(s.running["cpu"]),
            "gpu_blocks": s.num_blocks["gpu"], "gpu_blocks_free": s.num_free["gpu"],
            "cpu_blocks": s.num_blocks["cpu"], "cpu_blocks_free": s.num_free["cpu"],
            # busy: as in those iterations that were timed
            "wall_s": seconds["wall"], "gpu_busy_s": seconds["gpu_busy"] * timed,
            "cpu_busy_s": seconds["cpu_busy"] * timed, "outside_model_share": 1 - share,
            "prediction_error": statistics.median(self.errors) if self.errors else None}

    def describe(self):
        """What was chosen, a line each."""
        cfg = self.cfg
        weights, threads, device = "no weights", "none", "simulated from a measured profile"
        if self.testbed:
            device = self.testbed.describe()
        elif not isinstance(self.model, SimulatedModel):
            device, threads = device_name(self.device), f"{self.cpu_threads} for CPU attention"
            weights = "random weights" if self.model.random_weights else "checkpoint"
            weights += f", ready in {self.load_seconds:.1f} s"
            if self.device.type == "cpu":
                device = f"CPU ({device}); a thread plays the GPU: an emulation, not a GPU"
                threads = f"{self.gpu_threads} as the GPU, {threads}"
            if self.ranks.size > 1:
                threads += f", in each of {self.ranks.size} ranks"
                weights += f" (this rank's {self.model.num_heads[0]} heads)"
        return "\n".join((
            f"device     {device}",
            f"model      {self.name}: {cfg.num_params / 1e9:.2f} B parameters, {cfg.n_layer} "
            f"layers, {cfg.n_head}/{cfg.n_kv_head} heads of {cfg.head_dim}; {str(self.dtype)[6:]}, "
            f"{fmt_gib(self.budget.weight_bytes)}: {weights}",
            f"threads    {threads}",
            f"attention  {self.model.describe_attention()}",
            self.budget.describe()))


# ------------------------------------------------------------------------------ command line

def main(argv=None):
    parser = Parser("Continue a prompt, printing the text as it comes, or chat.")
    parser.add_argument("--model", required=True, help="checkpoint folder, name on the Hugging "
                        "Face hub, smollm2 (see lab.demo_model), or a preset with random weights")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--token-ids", metavar="IDS", help='the prompt as numbers: "1 15043 3186"')
    prompt.add_argument("--chat", action="store_true",
                        help="a conversation, with the checkpoint's chat template")
    parser.add_argument("--max-tokens", type=int, help="default 64, with --chat 512")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--stop", action="append", help="end at this string; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--verbose", action="store_true",
                        help="one line per iteration: rows, predicted and measured ms")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    try:
        prompt = args.prompt
        if args.token_ids is not None:
            prompt = [int(t) for t in args.token_ids.split()]
        max_tokens = args.max_tokens
        if max_tokens is None:
            max_tokens = 512 if args.chat else 64
        params = SamplingParams(max_tokens, args.temperature, args.top_p, args.top_k,
                                args.seed, args.ignore_eos, args.stop)
        llm = LLM(args.model, args.strategy, **engine_options(args))
        llm.verbose = args.verbose
        if args.chat:
            print(llm.describe(), file=sys.stderr)
            return converse(llm, params)
        out = llm.outputs[llm.add_request(prompt, params)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first token")
    print(llm.describe(), file=sys.stderr)
    follow(llm, out)
    print(f"\n[{len(out.token_ids)} tokens, {out.finish_reason}]", file=sys.stderr)
    sys.exit(130 if out.finish_reason == "abort" else 0)


if __name__ == "__main__":
    main()
