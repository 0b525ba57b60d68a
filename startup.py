"""What is decided once, at start: device, dtype, threads, memory budgets, and the measured profile of one layer.

Everything a user can get wrong about fitting is found here, before anything is loaded, with an error that names the
value, the limit and the way out.
"""
import hashlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from llvmlite import binding
from tqdm import tqdm

import cpu_attn
from kvcache import FORMATS, KVCache
from perfmodel import load_profile, save_profile
from scheduler import MAX_RUNNING, STRATEGIES, Batch, Request

GIB = 1 << 30
DTYPES = {name: dtype for dtype, name in FORMATS.items()}
BLOCK_SIZE = 16                # tokens per block, the paper's
MAX_MODEL_LEN = 8192           # cap of the default; longer only if asked for
MAX_BATCH_TOKENS = 2048        # default prompt tokens per iteration
EMULATED_GPU_TOKENS = 2048     # default KV budget of the emulated GPU: small, as the point is a GPU short of memory
TESTBED_SHARE = 0.9            # of a simulated GPU's memory for all of it, as serving systems commonly take
CUDA_SHARE = 0.95              # of the GPU memory that weights leave free, for activations and KV; the rest is a reserve
GRAPH_BYTES = 256 << 20        # set aside for captured launches, which take memory of the driver's that torch does not count
CPU_TIER_SHARE = 0.5           # of the host memory that is left, by default
EMULATED_CPU_TIER = 4 * GIB    # at most so much of it where the GPU is emulated
PROFILE_VERSION = 4            # of the measured profile: change it when what is measured changes
PROFILE_DIR = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "neo"


# ----------------------------------------------------------------------------------------------- device, dtype, threads

def resolve_device(device):
    """auto, cuda or cpu -> torch.device. Raises ValueError on anything else, and on cuda without a GPU."""
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device {device!r}: must be auto, cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda', but torch sees no CUDA GPU: use --device cpu, which plays the GPU with a thread")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype, cfg, device):
    """auto: the checkpoint's on CUDA, as far as the GPU has it; on a CPU bf16 where its instructions make that fast."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype!r}: must be auto, {', '.join(DTYPES)}")
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        no_bf16 = torch.cuda.get_device_capability()[0] < 8
        return torch.float16 if cfg.dtype == "bf16" and no_bf16 else DTYPES[cfg.dtype]
    features = binding.get_host_cpu_features()
    return torch.bfloat16 if any(features.get(f) for f in ("avx512bf16", "amx-bf16", "bf16")) else torch.float32


def resolve_threads(device, gpu_threads, cpu_threads):
    """(cores of this machine, cores that play the GPU, cores for CPU attention); half and half unless asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name, n in (("gpu_threads", gpu_threads), ("cpu_threads", cpu_threads)):
        if n is not None and not 1 <= n <= cores:
            raise ValueError(f"{name} = {n}: must be 1..{cores}, the cores of this machine")
    cpu_attn.set_threads(cores)         # before torch's are set: starting Numba's threads resets OpenMP's count
    if device.type == "cuda":
        return cores, 0, cpu_threads or cores
    gpu_threads = gpu_threads or max(1, cores - cpu_threads if cpu_threads else cores // 2)
    cpu_threads = cpu_threads or max(1, cores - gpu_threads)
    if gpu_threads + cpu_threads > max(cores, 2):
        warnings.warn(f"{gpu_threads} GPU + {cpu_threads} CPU threads on {cores} cores: they will slow each other down")
    return cores, gpu_threads, cpu_threads


def device_name(device):
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------- what fits where

@dataclass
class Budget:
    """Memory and lengths of an engine, as `plan_budget` decided them."""
    num_blocks: dict            # {"gpu": blocks, "cpu": blocks}
    block_size: int             # tokens per block
    token_bytes: int            # one token's K and V in one layer
    block_bytes: int            # one block's over all layers
    weight_bytes: int
    max_model_len: int          # tokens of one request
    max_batch_tokens: int       # prompt tokens of one iteration

    def check_length(self, strategy, asked):
        """Raise ValueError if a max_model_len that was asked for (None: none was) exceeds the strategy's larger tier."""
        held = max(self.num_blocks[tier] for tier in STRATEGIES[strategy].tiers) * self.block_size
        if held < 2 or (asked and asked > held):
            raise ValueError(f"max_model_len = {self.max_model_len} tokens, but the KV budget of {strategy} holds {held} (its "
                             "larger tier): raise --gpu-mem, --gpu-blocks or --cpu-mem, or lower --max-model-len")


def host_memory():
    """Bytes of host memory that are free to use; half of it all where the system does not tell."""
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def fmt_gib(n):
    return f"{n / GIB:.2f} GiB"


def plan_budget(name, cfg, dtype, device, strategy, gpu_mem=None, gpu_blocks=None, cpu_mem=None, block_size=None,
                max_model_len=None, max_batch_tokens=None, testbed=None):
    """LLM's memory arguments -> Budget, checked against what is free (a perfmodel.Testbed: against what it has). Raises
    ValueError on what does not fit."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    for arg, value, least in (("gpu_mem", gpu_mem, 0), ("gpu_blocks", gpu_blocks, 0), ("block_size", block_size, 0),
                              ("max_model_len", max_model_len, 1), ("max_batch_tokens", max_batch_tokens, 1)):
        if value is not None and value <= least:
            raise ValueError(f"{arg} = {value}: must be above {least}")
    if cpu_mem is not None and cpu_mem < 0:
        raise ValueError(f"cpu_mem = {cpu_mem}: must be 0 or more GiB")
    if max_model_len and max_model_len > cfg.max_position:
        raise ValueError(f"max_model_len = {max_model_len}: the model knows {cfg.max_position} positions")
    block_size = block_size or BLOCK_SIZE
    limit = max_model_len or min(cfg.max_position, MAX_MODEL_LEN)
    max_batch_tokens = max_batch_tokens or MAX_BATCH_TOKENS

    weight_bytes = cfg.num_params * dtype.itemsize
    token_bytes = 2 * cfg.n_kv_head * cfg.head_dim * dtype.itemsize
    block_bytes = token_bytes * block_size * cfg.n_layer
    row = 3 * cfg.n_embd + 2 * (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim + 3 * cfg.n_ffn  # x, h, o | q, k, v | FFN
    activation_bytes = max_batch_tokens * row * dtype.itemsize
    used, on_cuda, host = weight_bytes + activation_bytes, testbed or device.type == "cuda", host_memory()
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else host
    if testbed:
        free, host = int(testbed.gpu_gb * testbed.tp * GIB), int(testbed.host_gb * GIB)
    what = (f"{name} in {str(dtype)[6:]}: {fmt_gib(weight_bytes)} of weights and {fmt_gib(activation_bytes)} of "
            f"activations ({max_batch_tokens} prompt tokens)")
    if used > free:
        raise ValueError(f"{what} do not fit in the {fmt_gib(free)} free on this {'GPU' if on_cuda else 'machine'}: take "
                         "a smaller model, or lower --max-batch-tokens")

    if gpu_blocks is None and (gpu_mem is not None or on_cuda):
        memory = gpu_mem * GIB if gpu_mem else TESTBED_SHARE * free if testbed else used + CUDA_SHARE * (free - used)
        gpu_blocks = int((memory - used) // block_bytes)
        if gpu_blocks < 1:
            raise ValueError(f"{what} leave no room for a KV block of {fmt_gib(block_bytes)} in a GPU memory of "
                             f"{fmt_gib(memory)}: raise --gpu-mem, or take a smaller model")
    elif gpu_blocks is None:
        gpu_blocks = -(-min(EMULATED_GPU_TOKENS, 2 * limit) // block_size)
    left = max(0, host - (0 if on_cuda else used + gpu_blocks * block_bytes))
    cpu_bytes = int(CPU_TIER_SHARE * left if cpu_mem is None else cpu_mem * GIB)
    if cpu_mem is None and not on_cuda:
        cpu_bytes = min(cpu_bytes, EMULATED_CPU_TIER)
    num_blocks = {"gpu": gpu_blocks, "cpu": cpu_bytes // block_bytes}
    for tier, room, flags in (("gpu", free - used, "--gpu-mem or --gpu-blocks"), ("cpu", left, "--cpu-mem")):
        if num_blocks[tier] * block_bytes > room:
            raise ValueError(f"a {tier.upper()} tier of {fmt_gib(num_blocks[tier] * block_bytes)} does not fit in the "
                             f"{fmt_gib(max(room, 0))} free beside {what}: lower {flags}")
    if "cpu" in STRATEGIES[strategy].tiers and not num_blocks["cpu"]:
        raise ValueError(f"strategy {strategy} keeps KV in host memory, and the CPU tier of {fmt_gib(cpu_bytes)} holds no "
                         f"block of {fmt_gib(block_bytes)}: raise --cpu-mem, or use gpu-only")
    budget = Budget(num_blocks, block_size, token_bytes, block_bytes, weight_bytes, limit, max_batch_tokens)
    budget.check_length(strategy, max_model_len)
    return budget


def largest_batches(budget, kv, paged):
    """The sub-batches that take most memory: all prompt tokens of an iteration, in the longest prompts; and as many
    decodes as may run, each over the longest sequence there can be (all of them the same block's) - unless attention is not
    paged and would gather those sequences, which no memory holds."""
    def request(n, decode=False):
        r = Request(("largest", len(kv.sequences)), [0] * n, 1, tier="gpu", rows=n)
        if decode:
            r.output, r.num_kv = [0], n
        return r
    whole, rest = divmod(budget.max_batch_tokens, budget.max_model_len)
    prompts = [request(n) for n in whole * [budget.max_model_len] + [rest] * (rest > 0)]
    if not whole:                                                # the last chunk of the longest prompt
        prompts = [request(budget.max_model_len)]
        prompts[0].rows, prompts[0].num_kv = rest, budget.max_model_len - rest
    yield kv.bind(Batch(prompts))
    for r in prompts:
        kv.release(r.id)
    if not paged:
        return
    decodes = kv.bind(Batch(gpu=[request(1, True) for _ in range(MAX_RUNNING)]))
    width = kv.table.shape[1]
    decodes.gpu_table = decodes.gpu_table.new_zeros(MAX_RUNNING, width)
    decodes.gpu_lens = decodes.gpu_lens.new_full((MAX_RUNNING,), width * budget.block_size)
    yield decodes


def measure_gpu_blocks(llm, gpu_mem, draw):
    """KV blocks that the GPU has room for beside the loaded weights and the largest activations. These are measured: two
    layers of the largest sub-batches (the peak is the same in every layer) and draw(logits), which samples.

    gpu_mem  GiB that weights, activations and KV share; None: what is free, but for a small reserve

    Raises ValueError if not one fits.
    """
    model, budget, cfg, cuda = llm.model, llm.budget, llm.cfg, torch.cuda
    if not model.eager:
        model.reserve(-(-budget.max_model_len // budget.block_size))
    cuda.empty_cache()
    held, eager, model.eager, peaks = cuda.memory_allocated(), model.eager, True, []
    most = 2 * max(budget.max_batch_tokens, budget.max_model_len)                  # however the prompts are cut
    blocks = MAX_RUNNING + -(-most // budget.block_size)
    depth = min(2, cfg.n_layer)                                # the last one's FFN takes but the sampled rows
    try:
        kv = KVCache((depth, cfg.n_kv_head, cfg.head_dim), budget.block_size, blocks, 0, budget.max_model_len, llm.dtype,
                     llm.device)
        for inputs in largest_batches(budget, kv, model.attn.padded):
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()
            start = cuda.memory_reserved()
            model.run([inputs], kv, depth)
            draw(inputs.logits)
            peaks.append(cuda.max_memory_reserved() - start)
            del inputs
        del kv
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{llm.name}: the {fmt_gib(held)} of weights fit, but not the activations of "
                         f"{budget.max_batch_tokens} prompt tokens beside them ({error}): lower --max-batch-tokens, or take a "
                         "smaller model") from None
    finally:
        model.eager = eager
    cuda.empty_cache()
    activations = max(peaks) + (0 if eager else peaks[-1] + GRAPH_BYTES)       # captured decodes have a pool of their own
    room = min(cuda.mem_get_info()[0] * CUDA_SHARE, math.inf if gpu_mem is None else gpu_mem * GIB - held)
    if room - activations < budget.block_bytes:
        raise ValueError(f"{llm.name}: {fmt_gib(held)} of weights and {fmt_gib(activations)} of activations, measured with "
                         f"{budget.max_batch_tokens} prompt tokens, leave {fmt_gib(max(room - activations, 0))} of GPU memory: "
                         f"no KV block of {fmt_gib(budget.block_bytes)} fits. Raise --gpu-mem, lower --max-batch-tokens, or "
                         "take a smaller model")
    return int((room - activations) // budget.block_bytes)


# ---------------------------------------------------------------------------------- warm-up and the measured profile

def warm_up(llm):
    """Run one layer of a prompt and of a decode in each tier, so that no request waits for kernels to be compiled."""
    for tier in ("gpu", "cpu"):
        if llm.budget.num_blocks[tier]:
            r = Request("warm-up", [0, 0], 1, tier=tier, rows=2)
            llm.model.run([llm.kv.bind(Batch([r]))], llm.kv, 1)
            r.prompt, r.output, r.num_kv = [0], [0], 1
            llm.model.run([llm.kv.bind(Batch(**{tier: [r]}))], llm.kv, 1)
            llm.kv.release(r.id)


def profile_samples(llm):
    """perfmodel.Profile's samples for this engine: from the cache if measured under the same key, else measured now."""
    cfg, budget = llm.cfg, llm.budget
    key = dict(version=PROFILE_VERSION, device=device_name(llm.device), torch=torch.__version__, dtype=str(llm.dtype),
               threads=[llm.gpu_threads, llm.cpu_threads], attention=llm.model.attention(budget.block_size),
               geometry=[cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.n_embd, cfg.n_ffn, cfg.vocab_size],
               tiers=[n.bit_length() for n in budget.num_blocks.values()],  # roughly, as they bound what is measured
               block_size=budget.block_size, max_model_len=budget.max_model_len,
               max_batch_tokens=budget.max_batch_tokens)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = PROFILE_DIR / f"profile-{digest}.json"
    samples = load_profile(path, key)
    if samples is None:
        samples = measure_profile(llm)
        save_profile(path, key, samples)
    return samples


def measure_profile(llm, seconds=8.0):
    """Time one layer's parts on made-up batches through the very code that serves: perfmodel.Profile's samples.
    Layers are taken in turn, as many as outgrow the caches; points that would not fit in `seconds` are left out."""
    model, kv, cfg, budget = llm.model, llm.kv, llm.cfg, llm.budget
    bs = budget.block_size
    layer_bytes = cfg.num_params * llm.dtype.itemsize / cfg.n_layer
    depth = int(min(cfg.n_layer, max(3, -(-100e6 // layer_bytes))))
    samples = {k: [] for k in ("linear", "head", "prefill", "gpu_decode", "cpu_decode", "transfer")}
    start, last = time.perf_counter(), 0.0

    def request(n, tier, decode):
        r = Request(("profile", len(kv.sequences)), [0] * n, 1, tier=tier, rows=n)
        if decode:
            r.prompt, r.output, r.num_kv = [0] * (n - 1), [0], n - 1
        kv.reserve(r.id, tier, n)
        return r

    def timed(requests, tier=None):
        """Median ms per layer of each stage, and of what comes once. Slow passes are not repeated."""
        nonlocal last
        times = {"linear": [], "attend": [], "cpu_attend": [], "head": []}
        inputs = kv.bind(Batch(requests) if tier is None else Batch(**{tier: requests}))
        for repeat in range(4):
            begin = time.perf_counter()
            model.run([inputs], kv, depth)
            records = model.records                              # waits for the GPU
            last = time.perf_counter() - begin
            if repeat == 0 and (last < 0.5 or tier):
                continue                                         # warm-up; for decodes also the first touch of the KV
            layers = Counter()                                   # copies are work of a GPU that makes them itself, else the
            for lane, stage, layer, _, t0, t1 in records:        # CPU's rows wait for them
                of = stage if stage.endswith("attend") else "cpu_attend" if lane == "copy" else "linear"
                layers[of, layer] += 1e3 * (t1 - t0)
            once = layers.pop(("linear", 0)) + layers.pop(("linear", cfg.n_layer))    # a layer and the head
            for (of, _), ms in layers.items():
                times[of].append(ms)
            times["head"].append(max(once - statistics.median(times["linear"]), 0.0))
            if last > 0.1:
                break
        for r in requests:
            kv.release(r.id)
        return {k: statistics.median(v) for k, v in times.items() if v}

    most = min(budget.max_batch_tokens, budget.max_model_len, kv.cpu.num_blocks * bs)
    points = [2 ** i for i in range(14) if 2 ** i <= most]
    longest = min(budget.max_model_len, 1024)
    bar = tqdm(total=len(points) + 8 + 6, desc="profile of one layer", disable=None, leave=False)
    for n in points:                                             # one prompt, stored to the CPU tier
        if last * 4 > seconds - (time.perf_counter() - start) - seconds / 3:
            break                                                # the last slope carries on from here
        t = timed([request(n, "cpu", False)])
        samples["linear"].append([n, t["linear"]])
        samples["prefill"].append([n, t["attend"]])
        samples["transfer"].append([n * budget.token_bytes, t["cpu_attend"]])
        bar.update()
    for n in (1, 4, 16, 64):                                     # n decodes of equal length in the CPU tier
        for share in (4, 1):
            length = min(longest, kv.cpu.num_blocks // n * bs) // share
            if length >= 2 and (n <= 4 or last * 4 < seconds - (time.perf_counter() - start)):
                t = timed([request(length, "cpu", True) for _ in range(n)], "cpu")
                samples["cpu_decode"].append([n, n * length, t["cpu_attend"]])
                samples["head"].append([n, t["head"]])
            bar.update()
    for n, share in ((1, 4), (1, 2), (1, 1), (8, 1), (64, 1), (256, 1)):     # n GPU decodes over so much of the GPU tier
        length = min(longest, kv.gpu.num_blocks // n * bs) // share
        if length >= 2 and (n == 1 or last * 4 < seconds - (time.perf_counter() - start)):
            samples["gpu_decode"].append([n * length, timed([request(length, "gpu", True) for _ in range(n)], "gpu")["attend"]])
        bar.update()
    bar.close()
    return samples
