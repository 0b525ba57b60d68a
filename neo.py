"""NEO: online LLM inference with part of the KV cache, and its decode attention, on the CPU (arXiv 2411.01142).

    from neo import LLM, SamplingParams
    llm = LLM("tiny")                                       # a preset with random weights, or a checkpoint folder
    print(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8))[0].token_ids)

    python neo.py --model PATH --prompt "The capital of France is"

The one loop is `LLM.step`: plan, forward, sample, commit. Knows no kernels, no blocks, not how a plan is made.
"""
import argparse
import random
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from tqdm import tqdm

from checkpoint import load_config, load_tokenizer
from gpu_attn import BACKENDS, choose
from kvcache import KVCache
from model import Model
from perfmodel import TESTBEDS, Prediction, Profile, Roofline, SimulatedModel, Testbed, find_testbed
from sampling import draw_some, sample
from scheduler import STRATEGIES, Request, Scheduler
from startup import BLOCK_SIZE, device_name, fmt_gib, measure_gpu_blocks, plan_budget, profile_samples, resolve_device, \
    resolve_dtype, resolve_threads, warm_up


@dataclass
class SamplingParams:
    """How to continue one prompt. Raises ValueError on values out of range."""
    max_tokens: int = 16
    temperature: float = 0.0       # 0: greedy
    top_p: float = 1.0             # keep the likeliest tokens up to this probability
    top_k: int = 0                 # keep so many of the likeliest tokens; 0: all
    seed: int = None               # of this request; None: drawn from the engine's seed and the request's number
    ignore_eos: bool = False       # always produce max_tokens
    stop: list = None              # strings that end the text (a str, or a list), themselves left out of it
    logprobs: bool = False         # also the log-probability of every token, as the model gave it

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        for name, ok, need in (("max_tokens", self.max_tokens >= 1, "1 or more"),
                               ("temperature", self.temperature == 0 or 1e-4 <= self.temperature <= 1e4,
                                "0, or from 0.0001 to 10000"),
                               ("top_p", 1e-6 <= self.top_p <= 1, "from 0.000001 to 1"),
                               ("top_k", 0 <= self.top_k < 2 ** 31, "0 or more, below 2^31"),
                               ("stop", all(self.stop), "strings that are not empty")):
            if not ok:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {need}")


@dataclass
class RequestOutput:
    """A request as its user sees it; grows with every token."""
    request_id: object
    prompt_token_ids: list
    params: SamplingParams
    token_ids: list                # grows; an end-of-text id that ended the request is its last
    text: str = ""                 # grows, whole characters only; empty without a tokenizer
    finish_reason: str = None      # "stop", "length" or "abort" once finished
    logprobs: list = field(default_factory=list)                # of token_ids, natural; empty unless asked for
    rng: random.Random = field(default=None, repr=False)        # its own, if it samples
    decoder: object = field(default=None, repr=False)           # tokens -> text, if there is a tokenizer

    def settled_text(self):
        """The text that can change no more: its end may yet turn out to begin a stop string."""
        hold = 0 if self.finish_reason else max(map(len, self.params.stop), default=1) - 1
        return self.text[:len(self.text) - hold]


class StreamDecoder:
    """Token ids -> text, piece by piece. Decodes the tail twice, without and with the new tokens, and hands out the
    difference once it ends in a whole character; the tail starts where text was last handed out."""

    def __init__(self, tokenizer):
        self.tokenizer, self.start, self.shown = tokenizer, 0, 0

    def __call__(self, ids, last=False):
        old = self.tokenizer.decode(ids[self.start:self.shown])
        new = self.tokenizer.decode(ids[self.start:])
        if len(new) <= len(old) or (new.endswith("\ufffd") and not last):
            return ""
        self.start, self.shown = self.shown, len(ids)
        return new[len(old):]


# --------------------------------------------------------------------------------------------------------- the engine

class LLM:
    """The engine.

    model             preset with random weights (tiny, llama-160m, -1b, -7b, -8b, -13b, -70b) or a checkpoint folder
    strategy          gpu-only, serial, symmetric, neo, or one of your own
    device            auto, cuda, cpu (a worker thread plays the GPU)
    dtype             auto, bf16, fp16, fp32
    gpu_mem, cpu_mem  GiB. gpu_mem is the whole GPU (weights and activations included); cpu_mem the CPU tier of the KV
    gpu_blocks        KV blocks of the GPU tier; overrides gpu_mem
    block_size        tokens per block; default 16
    max_model_len     longest prompt + output, in tokens; default what model and cache allow, at most 8192
    max_batch_tokens  prompt tokens per iteration; default 2048. Longer prompts are prefilled in chunks
    gpu_threads       cores of the emulated GPU;  cpu_threads  cores for CPU attention
    gpu_attn          attention on the GPU tier: auto, or a back end of gpu_attn.py (torch, numba, triton)
    eager             launch every GPU kernel by itself, instead of capturing decodes in CUDA graphs
    simulate          a testbed's name (t4, g5.4xlarge, h100, ...), a perfmodel.Testbed, or an LLM whose measured profile to
                      run on: nothing is computed, a virtual clock runs, every token is 0
    seed              of random weights and of requests that bring none

    Raises ValueError, before anything is loaded, on what does not exist or does not fit.
    """

    def __init__(self, model, strategy="neo", device="auto", dtype="auto", gpu_mem=None, gpu_blocks=None, cpu_mem=None,
                 block_size=None, max_model_len=None, max_batch_tokens=None, gpu_threads=None, cpu_threads=None,
                 simulate=None, seed=0, gpu_attn="auto", eager=False):
        self.name, self.seed = str(model), seed
        self.verbose, self.on_iteration = False, None    # print each iteration; called with (records, start, end)
        self.cfg = cfg = load_config(self.name)
        self.testbed = None
        if simulate:
            self._simulate(simulate, dtype, strategy, gpu_mem, gpu_blocks, cpu_mem, block_size, max_model_len,
                           max_batch_tokens)
            return self.reset(strategy)
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, cfg, self.device)
        cores, self.gpu_threads, self.cpu_threads = resolve_threads(self.device, gpu_threads, cpu_threads)
        self.budget = budget = plan_budget(self.name, cfg, self.dtype, self.device, strategy, gpu_mem, gpu_blocks, cpu_mem,
                                           block_size, max_model_len, max_batch_tokens)
        attn = choose(gpu_attn, self.device, self.dtype)
        self.tokenizer = load_tokenizer(self.name)

        started = time.perf_counter()
        torch.set_num_threads(cores)                                    # to fill the weights
        self.model = Model(self.name, cfg, self.dtype, self.device, budget.max_model_len, self.gpu_threads,
                           self.cpu_threads, attn, eager, seed)
        torch.set_num_threads(self.gpu_threads or cores)                # this thread samples while the GPU idles
        self.load_seconds = time.perf_counter() - started
        if self.device.type == "cuda" and gpu_blocks is None:
            budget.num_blocks["gpu"] = measure_gpu_blocks(self, gpu_mem, partial(
                draw_some, out=RequestOutput(None, [], SamplingParams(temperature=1.0), [], rng=random.Random(0))))
            budget.check_length(strategy, max_model_len)
        self.kv = self._cache()
        self.clock, self.wait = time.perf_counter, time.sleep
        warm_up(self)
        self.perf_samples = profile_samples(self) if budget.num_blocks["cpu"] else None
        self.reset(strategy)

    def _simulate(self, simulate, dtype, *memory):
        """What __init__ does, for a simulation."""
        self.device, self.tokenizer, self.perf_samples = torch.device("cpu"), None, None
        if isinstance(simulate, LLM):
            self.dtype, self.budget, self.perf_samples = simulate.dtype, simulate.budget, simulate.perf_samples
            if self.perf_samples is None:
                raise ValueError("simulate: this LLM has no profile, as it has no CPU tier")
        else:
            self.testbed = simulate if isinstance(simulate, Testbed) else find_testbed(simulate)
            self.dtype = resolve_dtype("fp16" if dtype == "auto" else dtype, self.cfg, self.device)
            self.budget = plan_budget(self.name, self.cfg, self.dtype, self.device, *memory, testbed=self.testbed)
        self.kv = self._cache(empty=True)
        self.model = SimulatedModel(self._predictor())
        self.clock, self.wait = self.model.clock, self.model.wait

    def _cache(self, empty=False):
        cfg, budget = self.cfg, self.budget
        return KVCache((cfg.n_layer, cfg.n_kv_head, cfg.head_dim), budget.block_size, budget.num_blocks["gpu"],
                       budget.num_blocks["cpu"], budget.max_model_len, self.dtype, self.device, empty)

    def _predictor(self):
        """A performance model as it is before anything was observed; None where nothing was measured."""
        if self.testbed:
            return Roofline(self.testbed, self.cfg, self.dtype.itemsize)
        return self.perf_samples and Profile(self.perf_samples, self.cfg.n_layer, self.budget.token_bytes)

    def reset(self, strategy):
        """Start over under a strategy: nothing queued, statistics at zero; model, cache and profile are kept.
        Raises ValueError on an unknown strategy and RuntimeError while requests are in flight."""
        if getattr(self, "outputs", None):
            raise RuntimeError(f"{len(self.outputs)} requests are in flight: finish or abort them first")
        budget = self.budget
        self.perf = self._predictor()
        self.scheduler = Scheduler(strategy, budget.num_blocks, budget.block_size, budget.max_model_len,
                                   budget.max_batch_tokens, self.perf)
        self.strategy, self.outputs, self.requests, self.count = strategy, {}, {}, 0
        self.time = dict.fromkeys(("wall", "model", "gpu_busy", "cpu_busy"), 0.0)
        self.swapped_before, self.errors = self.kv.swapped_blocks, deque(maxlen=4096)

    # ---- requests in, tokens out

    def add_request(self, prompt, params=None, request_id=None):
        """Queue one prompt (str, or list of token ids) and return its id. Raises ValueError if it can never be served;
        requests in flight are not touched."""
        params = params or SamplingParams()
        ids = self.check(prompt, params)
        request_id = self.count if request_id is None else request_id
        if request_id in self.outputs:
            raise ValueError(f"request id {request_id!r} is in flight already")
        request = Request(request_id, ids, min(params.max_tokens, self.max_request_len - len(ids)),
                          frozenset() if params.ignore_eos else frozenset(self.cfg.eos_ids), params.ignore_eos)
        self.scheduler.add(request)
        self.count += 1
        out = self.outputs[request.id] = RequestOutput(request.id, ids, params, request.output)
        self.requests[request.id] = request
        if params.temperature:
            out.rng = random.Random(f"{self.seed}/{self.count}" if params.seed is None else str(params.seed))
        if self.tokenizer:
            out.decoder = StreamDecoder(self.tokenizer)
        return request.id

    def check(self, prompt, params):
        """Token ids of a prompt that can be served; changes nothing, and may be called from any thread. Raises ValueError."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{self.name} comes without a tokenizer: give the prompt as token ids")
            if not prompt:
                raise ValueError("the prompt is empty: give at least one character")
            prompt = self.tokenizer.encode(prompt)
        try:
            ids = [int(t) for t in prompt]
        except (TypeError, ValueError):
            raise ValueError(f"a prompt is a str or a list of token ids, got {prompt!r:.60}") from None
        if not ids:
            raise ValueError("the prompt is empty: give at least one token id")
        bad = next((t for t in ids if not 0 <= t < self.cfg.vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is outside the vocabulary 0..{self.cfg.vocab_size - 1}")
        if params.stop and not self.tokenizer:
            raise ValueError(f"stop strings need text, and {self.name} comes without a tokenizer")
        self.scheduler.check_length(len(ids))
        return ids

    def abort(self, request_id):
        """Drop a request and free what it holds. Returns its output, or None if it is not in flight."""
        out = self.outputs.get(request_id)
        if out:
            self.scheduler.finish(self.requests[request_id], "abort")
            self._close(out)
        return out

    def step(self):
        """One iteration: plan, forward, sample, commit. Returns the outputs that got a token: none when idle, or while there
        are only prompts with more chunks to come.

        If anything raises, the requests of this iteration are aborted (the rest go on) and it is raised again.
        """
        if not self.outputs:
            return []
        t0 = self.clock()
        plan = self.scheduler.plan()
        try:
            for r in plan.preempted:
                self.kv.release(r.id)
            for requests, tier in ((plan.swap_out, "cpu"), (plan.swap_in, "gpu")):
                if requests:
                    self.kv.swap([r.id for r in requests], tier)
            inputs = [self.kv.bind(b, i, self.model.bucket) for i, b in enumerate(plan.batches)]
            outs = [[self.outputs[r.id] for r in b.sampled] for b in plan.batches]
            t1 = self.clock()
            self.model.run(inputs, self.kv)
            tokens = [t for b, rows in zip(inputs, outs) for t in sample(b.logits, rows)]
            t2 = self.clock()
            self.scheduler.commit(plan, tokens)
            outs = [out for rows in outs for out in rows]
            for out in outs:
                self._grow(out)
        except BaseException:
            for r in {id(r): r for r in plan.requests + plan.swap_in + plan.swap_out}.values():
                self.abort(r.id)
            raise
        self._measure(plan, t0, t1, t2, self.clock())
        return outs

    def _grow(self, out):
        """After a new token: text, stop strings, the end."""
        request = self.requests[out.request_id]
        reason, stops = request.finish_reason, out.params.stop
        if out.decoder:
            ended = reason == "stop"                     # an end-of-text id is no text
            new = out.decoder(out.token_ids[:-1] if ended else out.token_ids, last=reason is not None)
            seen = max(0, len(out.text) - max(map(len, stops), default=0))
            out.text += new
            hits = [at for at in (out.text.find(s, seen) for s in stops) if at >= 0]
            if hits:
                out.text = out.text[:min(hits)]
                if reason is None:
                    self.scheduler.finish(request, "stop")
                reason = "stop"
        if reason:
            request.finish_reason = reason
            self._close(out)

    def _close(self, out):
        request = self.requests.pop(out.request_id)
        out.finish_reason = request.finish_reason
        self.kv.release(out.request_id)
        del self.outputs[out.request_id]

    def _measure(self, plan, t0, t1, t2, t3):
        records = self.model.records
        busy = {lane: sum(r[5] - r[4] for r in records if r[0] == lane) for lane in ("gpu", "cpu", "copy")}
        self.time["wall"] += t3 - t0
        self.time["model"] += t2 - t1
        self.time["gpu_busy"] += busy["gpu"]
        self.time["cpu_busy"] += busy["cpu"]
        measured = Prediction(1e3 * (t3 - t0), 1e3 * busy["gpu"], 1e3 * (busy["cpu"] + busy["copy"]))
        if plan.predicted and not self.model.captured:
            self.errors.append(abs(plan.predicted.total / measured.total - 1))
            self.perf.observe(plan.predicted, measured)
        if self.verbose:
            rows = " | ".join(f"prefill {sum(r.rows for r in b.prefill):5d} gpu {len(b.gpu):3d} cpu {len(b.cpu):3d}"
                              for b in plan.batches)
            print(f"iteration {self.scheduler.iteration:5d}  {rows}  waiting {len(self.scheduler.waiting):3d}  "
                  f"predicted {plan.predicted.total if plan.predicted else float('nan'):8.1f} ms  "
                  f"measured {measured.total:8.1f} ms", file=sys.stderr)
        if self.on_iteration:
            self.on_iteration(records, t0, t3)

    def generate(self, prompts, params=None):
        """Continue every prompt; outputs in the order of the prompts.

        prompts  list of str or of lists of token ids;  params  one SamplingParams for all, or a list of them

        Raises ValueError, naming the prompt, before any work is done. If interrupted, frees what it added.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list: wrap the string in [ ]")
        params = params if isinstance(params, list) else [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} SamplingParams")
        ids = []
        for i, (prompt, p) in enumerate(zip(prompts, params)):
            try:
                ids.append(self.check(prompt, p))
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from None
        outs = [self.outputs[self.add_request(prompt, p)] for prompt, p in zip(ids, params)]
        try:
            with tqdm(total=len(outs), desc="generate", unit="req", disable=None, leave=False) as bar:
                while any(out.finish_reason is None for out in outs):
                    self.step()
                    bar.update(sum(out.finish_reason is not None for out in outs) - bar.n)
        finally:
            for out in outs:
                if out.finish_reason is None:
                    self.abort(out.request_id)
        return outs

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
        """Counters since the last reset, times in seconds, and the present state of both tiers in blocks."""
        s, t = self.scheduler, self.time
        return {**{k: s.stats[k] for k in ("iterations", "pipelined_iterations", "preemptions", "prefill_tokens", "chunks",
                                           "cpu_prefills", "gpu_decode_tokens", "cpu_decode_tokens")},
                "swapped_blocks": self.kv.swapped_blocks - self.swapped_before,
                "mean_batch_size": s.stats["rows"] / max(s.stats["iterations"], 1),
                "waiting": len(s.waiting), "running_gpu": len(s.running["gpu"]), "running_cpu": len(s.running["cpu"]),
                "gpu_blocks": s.num_blocks["gpu"], "gpu_blocks_free": s.free["gpu"],
                "cpu_blocks": s.num_blocks["cpu"], "cpu_blocks_free": s.free["cpu"],
                "wall_s": t["wall"], "gpu_busy_s": t["gpu_busy"], "cpu_busy_s": t["cpu_busy"],
                "outside_model_share": 1 - t["model"] / t["wall"] if t["wall"] else 0.0,
                "prediction_error": statistics.median(self.errors) if self.errors else None}

    def describe(self):
        """What was chosen, a line each."""
        cfg, budget, bed, cpu = self.cfg, self.budget, self.testbed, self.device.type == "cpu"
        simulated = isinstance(self.model, SimulatedModel)
        if bed:
            device = (f"simulated {bed.name}: {bed.tp} x {bed.gpu}, {bed.tflops:g} TFLOP/s x {bed.compute_eff:g}, "
                      f"{bed.gpu_bw:g} GB/s x {bed.memory_eff:g}; PCIe {bed.pcie_bw:g} GB/s; host {bed.cores} cores, "
                      f"{bed.host_gb:g} GiB, {bed.cpu_bw:g} GB/s. Not a measurement")
        elif simulated:
            device = "simulated from a measured profile"
        else:
            name = device_name(self.device)
            device = f"CPU ({name}); a thread plays the GPU: an emulation, not a GPU" if cpu else name
        how = ("no weights" if simulated else
               f"{'random weights' if self.model.random_weights else 'checkpoint'}, ready in {self.load_seconds:.1f} s")
        threads = ("none" if simulated else
                   f"{f'{self.gpu_threads} as the GPU, ' if cpu else ''}{self.cpu_threads} for CPU attention")
        tiers = ", ".join(f"{tier.upper()} {n * budget.block_size} tokens ({fmt_gib(n * budget.block_bytes)})"
                          for tier, n in budget.num_blocks.items())
        return "\n".join((
            f"device     {device}",
            f"model      {self.name}: {cfg.num_params / 1e9:.2f} B parameters, {cfg.n_layer} layers, {cfg.n_head}/"
            f"{cfg.n_kv_head} heads of {cfg.head_dim}; {str(self.dtype)[6:]}, {fmt_gib(budget.weight_bytes)}: {how}",
            f"threads    {threads}",
            f"attention  {self.model.attention(budget.block_size)}",
            f"KV budget  {tiers}; blocks of {budget.block_size}",
            f"limits     {budget.max_model_len} tokens per request, {budget.max_batch_tokens} prompt tokens per iteration"))


# ------------------------------------------------------------------------------------------------------- command line

ENGINE_ARGS = ("device", "dtype", "gpu_mem", "gpu_blocks", "cpu_mem", "block_size", "max_model_len", "max_batch_tokens",
               "gpu_threads", "cpu_threads", "gpu_attn", "eager", "seed")
TESTBED_NUMBERS = fields(Testbed)[2:]          # all but its name and its GPU's


def add_engine_args(parser):
    """The flags that neo.py and bench.py share: LLM's arguments."""
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu (a thread plays the GPU)")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp16, fp32")
    parser.add_argument("--gpu-mem", type=float, metavar="GIB", help="memory of the GPU, weights included")
    parser.add_argument("--gpu-blocks", type=int, metavar="N", help="KV blocks of the GPU tier; overrides --gpu-mem")
    parser.add_argument("--cpu-mem", type=float, metavar="GIB", help="KV in host memory")
    parser.add_argument("--block-size", type=int, metavar="N", help=f"tokens per block (default {BLOCK_SIZE})")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt + output, in tokens")
    parser.add_argument("--max-batch-tokens", type=int, metavar="N",
                        help="prompt tokens per iteration; longer prompts are prefilled in chunks")
    parser.add_argument("--gpu-threads", type=int, metavar="N", help="cores that play the GPU")
    parser.add_argument("--cpu-threads", type=int, metavar="N", help="cores for CPU attention")
    parser.add_argument("--gpu-attn", default="auto", help=f"attention on the GPU tier: auto, {', '.join(BACKENDS)}")
    parser.add_argument("--eager", action="store_true", help="launch every GPU kernel by itself: no CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulate", metavar="TESTBED", help=f"run on a virtual clock: {', '.join(TESTBEDS)}; "
                        "bench.py also: self, this machine from its measured profile, beside the real run")
    group = parser.add_argument_group("numbers of a simulated testbed", "in place of the preset's; units: perfmodel.Testbed")
    for f in TESTBED_NUMBERS:
        group.add_argument(f"--{f.name.replace('_', '-')}", type=f.type, metavar="X")


def engine_args(args):
    """Parsed flags -> LLM's arguments, the numbers of a simulated testbed folded into `simulate`. Raises ValueError."""
    numbers = {f.name: getattr(args, f.name) for f in TESTBED_NUMBERS if getattr(args, f.name) is not None}
    if numbers and not args.simulate:
        raise ValueError(f"--{next(iter(numbers)).replace('_', '-')} changes a simulated testbed: add --simulate TESTBED")
    return {k: getattr(args, k) for k in ENGINE_ARGS} | {
        "simulate": find_testbed(args.simulate, **numbers) if args.simulate else None}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Continue a prompt, printing the text as it comes.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint folder, or a preset (random weights)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument("--token-ids", metavar="IDS", help="the prompt as numbers: \"1 15043 3186\"")
    parser.add_argument("--strategy", default="neo", help=", ".join(STRATEGIES))
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--stop", action="append", help="end at this string; may be given several times")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="one line per iteration: rows, predicted and measured ms")
    add_engine_args(parser)
    args = parser.parse_args(argv)
    try:
        prompt = [int(t) for t in args.token_ids.split()] if args.prompt is None else args.prompt
        params = SamplingParams(args.max_tokens, args.temperature, args.top_p, args.top_k, args.seed,
                                args.ignore_eos, args.stop)
        llm = LLM(args.model, args.strategy, **engine_args(args))
        out = llm.outputs[llm.add_request(prompt, params)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first token")
    print(llm.describe(), file=sys.stderr)
    llm.verbose, shown, ids = args.verbose, 0, 0
    try:
        while out.finish_reason is None:
            llm.step()
            if llm.tokenizer is None:
                print("".join(f"{t} " for t in out.token_ids[ids:]), end="", flush=True)
                ids = len(out.token_ids)
            else:
                text = out.settled_text()
                print(text[shown:], end="", flush=True)
                shown = max(shown, len(text))
    except KeyboardInterrupt:
        llm.abort(out.request_id)
    print(f"\n[{len(out.token_ids)} tokens, {out.finish_reason}]", file=sys.stderr)
    sys.exit(130 if out.finish_reason == "abort" else 0)


if __name__ == "__main__":
    main()
