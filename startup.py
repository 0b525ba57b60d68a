"""What is decided once, at start: device, dtype, threads and memory budgets.

Everything that a user can get wrong about fitting is found here, before anything is loaded, with an
error that names the value, the limit and the way out. Knows no policy: of a strategy it is told
only the name and the tiers. What must be run to be known is in measure.py.
"""
import os
import platform
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from llvmlite import binding

import cpu_attn
from kernels.products import can_pack
from kv_format import NAMES, kv_bytes
from scheduler import MAX_RUNNING

STARTED_AS_RANK = "RANK" in os.environ      # by torchrun, or by rank 0 with the same variables
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))       # among the ranks of this machine
if LOCAL_RANK and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    # It sees its own GPU alone, as cuda:0 in every thread. This must come before CUDA starts.
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(64)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[LOCAL_RANK % len(gpus)]

GIB = 1 << 30
DTYPES = {name: dtype for dtype, name in NAMES.items() if dtype.is_floating_point}
DTYPE_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32",
                 "float": "fp32"}
BLOCK_SIZE = 16                # tokens per block, the paper's
MAX_MODEL_LEN = 8192           # cap of the default; sequences are longer only if asked for
MAX_BATCH_TOKENS = 2048        # default prompt tokens per iteration
EMULATED_GPU_TOKENS = 2048     # default KV budget of the emulated GPU, which is short of memory
TESTBED_SHARE = 0.9            # of a simulated GPU's memory that serving systems commonly take
CUDA_SHARE = 0.95              # of the GPU memory beside the weights, for activations and KV
CARD_SHARE = 0.92              # that a card shows of what it is sold with: 14.76 GiB of a T4's 16,
#                                22.2 of an A10G's 24 (the rest: error correction, the driver)
CPU_TIER_SHARE = 0.5           # of the remaining host memory, by default
EMULATED_CPU_TIER = 4 * GIB    # and at most this where the GPU is emulated


# ------------------------------------------------------------------- device, dtype, threads

def resolve_device(device):
    """auto, cuda or cpu -> torch.device. Raises ValueError on others, and on cuda without a GPU."""
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device {device!r}: must be auto, cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda', but torch sees no CUDA GPU: use --device cpu, which plays "
                         "the GPU with a thread")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype, cfg, device):
    """Name -> torch dtype. auto: the checkpoint's on CUDA, if the GPU has it; on a CPU bf16 where
    its instructions make that fast, or where float32 weights do not fit. Raises ValueError on an
    unknown name."""
    dtype = DTYPE_ALIASES.get(dtype, dtype)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype!r}: must be auto, {', '.join((*DTYPES, *DTYPE_ALIASES))}")
    no_bf16 = device.type == "cuda" and torch.cuda.get_device_capability()[0] < 8
    if dtype == "bf16" and no_bf16:
        raise ValueError(f"dtype bf16: {torch.cuda.get_device_name()} has no bf16 (compute "
                         "capability 8.0 has): take --dtype fp16")
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.float16 if cfg.dtype == "bf16" and no_bf16 else DTYPES[cfg.dtype]
    features = binding.get_host_cpu_features()
    if any(features.get(f) for f in ("avx512bf16", "amx-bf16", "bf16")):
        return torch.bfloat16
    weights, free = 4 * cfg.num_params, host_memory()
    if weights > free:
        warnings.warn(f"float32 weights of {fmt_gib(weights)} do not fit in the {fmt_gib(free)} "
                      "free here: bf16 is taken, which this processor computes slowly",
                      stacklevel=2)
        return torch.bfloat16
    return torch.float32


def take_cores(number, count, cores):
    """Pin this thread, and all that it will start, to the share `number` of `count` of a set of
    cores: neighbours, by NUMA node where Linux tells. With fewer cores than shares, to none."""
    def place(core):
        nodes = Path(f"/sys/devices/system/cpu/cpu{core}").glob("node[0-9]*")
        return min((int(node.name[4:]) for node in nodes), default=0), core
    n = len(cores) // count
    if n:
        os.sched_setaffinity(0, sorted(cores, key=place)[n * number:n * (number + 1)])


def resolve_threads(device, gpu_threads, cpu_threads):
    """-> (cores of this machine, cores that play the GPU, cores for CPU attention); half and half
    unless asked for. Raises ValueError on numbers beyond the cores."""
    cores = num_cores()
    for name, n in (("gpu_threads", gpu_threads), ("cpu_threads", cpu_threads)):
        if n is not None and not 1 <= n <= cores:
            raise ValueError(f"{name} = {n}: must be 1..{cores}, the cores of this machine")
    # before torch's threads are set: starting Numba's threads resets OpenMP's number
    cpu_attn.set_threads(cores)
    if device.type == "cuda":       # two are left for launches, and for copies and the server
        return cores, 0, cpu_threads or max(1, cores - 2)
    gpu_threads = gpu_threads or max(1, cores - cpu_threads if cpu_threads else cores // 2)
    cpu_threads = cpu_threads or max(1, cores - gpu_threads)
    if gpu_threads + cpu_threads > max(cores, 2):
        warnings.warn(f"{gpu_threads} GPU + {cpu_threads} CPU threads on {cores} cores: they will "
                      "slow each other down", stacklevel=2)
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


def machine():
    """What results were measured on: a dict of names and versions."""
    gpu, driver = torch.cuda.is_available(), None
    if gpu:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            driver = done.stdout.split()[0]
        except (OSError, IndexError, subprocess.CalledProcessError):
            driver = "unknown: no nvidia-smi"
    return {"gpu": device_name(torch.device("cuda")) if gpu else None, "driver": driver,
            "cpu": device_name(torch.device("cpu")), "torch": torch.__version__,
            "cuda": torch.version.cuda, "python": platform.python_version()}


# ---------------------------------------------------------------------------- what fits where

@dataclass
class Budget:
    """Memory and lengths of an engine, as `plan_budget` decided them."""
    block_size: int             # tokens per block
    kv_dtypes: dict             # {tier: torch dtype of its K and V}
    row_dtype: torch.dtype      # of k and v rows on their way to the CPU tier
    token_bytes: dict           # {tier: bytes of one token's K and V in one layer}
    block_bytes: dict           # {tier: bytes of one block in all layers}
    weight_bytes: int
    activation_bytes: int       # estimated
    max_model_len: int          # tokens of one request
    max_batch_tokens: int       # prompt tokens of one iteration
    num_blocks: dict = None     # {tier: blocks}
    card: str = ""              # what --gpu-mem leaves of a card of that size, in words

    def check_tiers(self, strategy, tiers):
        """Raise ValueError if a strategy keeps KV in a CPU tier without blocks."""
        if "cpu" in tiers and not self.num_blocks["cpu"]:
            raise ValueError(
                f"strategy {strategy} keeps KV in host memory, and the CPU tier holds no block of "
                f"{fmt_gib(self.block_bytes['cpu'])}: raise --cpu-mem, or use gpu-only")

    def check_length(self, strategy, tiers, wanted):
        """Raise ValueError if `wanted` (None, or a max_model_len) exceeds the larger tier."""
        held = max(self.num_blocks[tier] for tier in tiers) * self.block_size
        if held < 2 or (wanted and wanted > held):
            raise ValueError(
                f"max_model_len = {self.max_model_len} tokens, but the KV budget of {strategy} "
                f"holds {held} (its larger tier): raise --gpu-mem, --gpu-blocks or --cpu-mem, or "
                "lower --max-model-len")

    def describe(self):
        """Both tiers and the limits, a line each."""
        tiers = ", ".join(f"{tier.upper()} {n * self.block_size} tokens "
                          f"({fmt_gib(n * self.block_bytes[tier])})"
                          for tier, n in self.num_blocks.items())
        int8 = [tier.upper() for tier, dtype in self.kv_dtypes.items() if dtype == torch.int8]
        note = f"; {' and '.join(int8)} tier in int8: outputs are not exact" if int8 else ""
        card = f"\nas a card  {self.card}" if self.card else ""
        return (f"KV budget  {tiers}; blocks of {self.block_size}{note}{card}\n"
                f"limits     {self.max_model_len} tokens per request, "
                f"{self.max_batch_tokens} prompt tokens per iteration")


def fmt_gib(n):
    return f"{n / GIB:.2f} GiB"


def host_memory():
    """Bytes of host memory that are free; half of all memory where the system does not tell."""
    try:
        with open("/proc/meminfo") as f:
            line = next(line for line in f if line.startswith("MemAvailable"))
            return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def check_num_ranks(options, cfg, device):
    """Raise ValueError on a number of ranks that this model or machine cannot have."""
    n = options.tensor_parallel_size
    if n < 1:
        raise ValueError(f"tensor_parallel_size = {n}: must be 1 or more")
    if options.simulate:
        if n > 1:
            raise ValueError(f"tensor_parallel_size = {n}: a simulation runs in one process; the "
                             "GPUs of a testbed are --testbed tp=N")
        return
    started = int(os.environ.get("WORLD_SIZE", 1)) if STARTED_AS_RANK else n
    if started != n:
        raise ValueError(f"torchrun has started {started} processes: give "
                         f"--tensor-parallel-size {started}, not {n}")
    if n == 1:
        return
    cfg.shard(n)
    if LOCAL_RANK:
        return                                  # it sees its own GPU and cores alone
    here = ranks_here(n)
    if device.type == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"tensor_parallel_size = {n}: {here} ranks on this machine, which has "
                         f"{torch.cuda.device_count()} GPUs: each rank needs one")
    cores = num_cores()
    if here > cores and not (options.gpu_threads and options.cpu_threads):
        raise ValueError(f"tensor_parallel_size = {n}: {here} ranks on {cores} cores: take fewer, "
                         "or let them share cores with --gpu-threads 1 --cpu-threads 1")


def ranks_here(size):
    """Those of `size` ranks that run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if STARTED_AS_RANK else size


def num_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def plan_budget(options, tiers, cfg, dtype, device, testbed=None, host=None):
    """Options -> Budget, checked against the memory that is free (or that a Testbed has).

    tiers  those in which the strategy keeps KV
    cfg    of one rank: its heads and its part of the feed-forward layers
    host   bytes of host memory for one rank; default: all that is free
    Raises ValueError on what does not fit.
    """
    check_numbers(options, cfg)
    budget = size_up(options, cfg, dtype)
    has_gpu = bool(testbed) or device.type == "cuda"
    host = host_memory() if host is None else host
    packs = not has_gpu and options.gpu_attn != "torch" and can_pack(device, dtype)
    if packs and cfg.tie_embeddings:
        head_bytes = cfg.vocab_size * cfg.n_embd * dtype.itemsize
        budget.weight_bytes += head_bytes // options.tensor_parallel_size   # a packed copy
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else host
    if testbed:
        free, host = int(testbed.gpu_gb * testbed.tp * GIB), int(testbed.host_gb * GIB)
    used = budget.weight_bytes + budget.activation_bytes
    what = (f"{options.model} in {str(dtype)[6:]}: {fmt_gib(budget.weight_bytes)} of weights and "
            f"{fmt_gib(budget.activation_bytes)} of activations ({budget.max_batch_tokens} prompt "
            "tokens)")
    if used > free:
        place = "GPU" if has_gpu else "machine"
        raise ValueError(f"{what} do not fit in the {fmt_gib(free)} free on this {place}: take a "
                         "smaller model, or lower --max-batch-tokens")
    gpu_blocks = options.gpu_blocks
    if gpu_blocks is None and (options.gpu_mem or has_gpu):
        share = TESTBED_SHARE * free if testbed else used + CUDA_SHARE * (free - used)
        card = CARD_SHARE * GIB if device.type == "cuda" and not testbed else GIB
        memory = options.gpu_mem * card if options.gpu_mem else share
        gpu_blocks = int((memory - used) // budget.block_bytes["gpu"])
        if gpu_blocks < 1:
            raise ValueError(
                f"{what} leave no room for a KV block of {fmt_gib(budget.block_bytes['gpu'])} in a "
                f"GPU memory of {fmt_gib(memory)}: raise --gpu-mem, or take a smaller model")
    elif gpu_blocks is None:
        num_tokens = min(EMULATED_GPU_TOKENS, 2 * budget.max_model_len)
        gpu_blocks = -(-num_tokens // budget.block_size)
    gpu_bytes = gpu_blocks * budget.block_bytes["gpu"]
    left = host if has_gpu else max(0, host - used - gpu_bytes)
    cpu_bytes = int(CPU_TIER_SHARE * left)
    if options.cpu_mem is not None:
        cpu_bytes = int(options.cpu_mem * GIB / options.tensor_parallel_size)
    elif not has_gpu:
        cpu_bytes = min(cpu_bytes, EMULATED_CPU_TIER // options.tensor_parallel_size)
    budget.num_blocks = {"gpu": gpu_blocks, "cpu": cpu_bytes // budget.block_bytes["cpu"]}
    for tier, room, flags in (("gpu", free - used, "--gpu-mem or --gpu-blocks"),
                              ("cpu", left, "--cpu-mem")):
        nbytes = budget.num_blocks[tier] * budget.block_bytes[tier]
        if nbytes > room:
            raise ValueError(f"a {tier.upper()} tier of {fmt_gib(nbytes)} does not fit in the "
                             f"{fmt_gib(max(room, 0))} free beside {what}: lower {flags}")
    budget.check_tiers(options.strategy, tiers)
    budget.check_length(options.strategy, tiers, options.max_model_len)
    return budget


def gpu_memory(options, device, testbed=None):
    """GiB of GPU memory that gpu_mem or gpu_memory_utilization ask for; None if neither does.

    Raises ValueError on both, on a share outside 0 to 1, and on a share of an emulated GPU.
    """
    share = options.gpu_memory_utilization
    if share is None:
        return options.gpu_mem
    if options.gpu_mem is not None:
        raise ValueError("gpu_mem and gpu_memory_utilization say the same: give one of them")
    if not 0 < share <= 1:
        raise ValueError(f"gpu_memory_utilization = {share}: must be above 0 and at most 1")
    if testbed:
        return share * testbed.gpu_gb * testbed.tp
    if device.type != "cuda":
        raise ValueError("gpu_memory_utilization: an emulated GPU has no memory of its own: give "
                         "--gpu-mem GIB or --gpu-blocks N")
    return share * torch.cuda.mem_get_info()[1] / GIB / CARD_SHARE


def check_numbers(options, cfg):
    """Raise ValueError on numbers that no machine can serve."""
    for name, limit in (("gpu_mem", 0), ("gpu_blocks", 0), ("block_size", 0),
                        ("max_model_len", 1), ("max_batch_tokens", 1), ("max_num_seqs", 0)):
        value = getattr(options, name)
        if value is not None and value <= limit:
            raise ValueError(f"{name} = {value}: must be above {limit}")
    if options.max_num_seqs and options.max_num_seqs > MAX_RUNNING:
        raise ValueError(f"max_num_seqs = {options.max_num_seqs}: must be at most {MAX_RUNNING}")
    if options.cpu_mem is not None and options.cpu_mem < 0:
        raise ValueError(f"cpu_mem = {options.cpu_mem}: must be 0 or more GiB")
    longest = options.max_model_len or min(cfg.max_position, MAX_MODEL_LEN)
    if cfg.sliding_window and longest > cfg.sliding_window:
        raise ValueError(
            f"max_model_len = {longest}: this model attends to a sliding window of "
            f"{cfg.sliding_window} tokens, and longer sequences are not supported: set "
            f"--max-model-len {cfg.sliding_window} or less")
    if options.max_model_len and options.max_model_len > cfg.max_position:
        raise ValueError(f"max_model_len = {options.max_model_len}: the model knows "
                         f"{cfg.max_position} positions")


def tier_dtypes(options, cfg, dtype):
    """{tier: torch dtype of its K and V} for a model of `dtype`."""
    dtypes, block_size = {}, options.block_size or BLOCK_SIZE
    for tier in ("gpu", "cpu"):
        name = getattr(options, f"{tier}_kv")
        if name not in ("auto", "int8"):
            raise ValueError(f"{tier}_kv {name!r}: must be auto or int8")
        if name == "int8" and block_size * cfg.head_dim % 4:
            raise ValueError(f"{tier}_kv int8: block_size * head size = {block_size} * "
                             f"{cfg.head_dim} must be a multiple of 4: take block_size = 16")
        dtypes[tier] = torch.int8 if name == "int8" else dtype
    return dtypes


def size_up(options, cfg, dtype):
    """Options -> Budget without blocks: lengths, and the bytes that everything takes."""
    block_size = options.block_size or BLOCK_SIZE
    max_batch_tokens = options.max_batch_tokens or MAX_BATCH_TOKENS
    kv_dtypes = tier_dtypes(options, cfg, dtype)
    token_bytes = {tier: kv_bytes(cfg.n_kv_head, cfg.head_dim, kv_dtype)
                   for tier, kv_dtype in kv_dtypes.items()}
    block_bytes = {tier: n * block_size * cfg.n_layer for tier, n in token_bytes.items()}
    # elements of one row: x, h, o | q, k, v, twice | gate, up, product of the FFN
    qkv = (cfg.n_head + 2 * cfg.n_kv_head) * cfg.head_dim
    row = 3 * cfg.n_embd + 2 * qkv + 3 * cfg.n_ffn
    num_params = cfg.num_params         # a rank has a part of lm_head
    if not cfg.tie_embeddings:
        elsewhere = 1 - 1 / options.tensor_parallel_size
        num_params -= int(cfg.vocab_size * cfg.n_embd * elsewhere)
    row_dtype = kv_dtypes["cpu"] if kv_dtypes["cpu"].is_floating_point else dtype
    return Budget(block_size=block_size, kv_dtypes=kv_dtypes, row_dtype=row_dtype,
                  token_bytes=token_bytes,
                  block_bytes=block_bytes, weight_bytes=num_params * dtype.itemsize,
                  activation_bytes=max_batch_tokens * row * dtype.itemsize,
                  max_model_len=options.max_model_len or min(cfg.max_position, MAX_MODEL_LEN),
                  max_batch_tokens=max_batch_tokens)
