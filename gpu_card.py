"""The card of a machine: what it can do at most, and how near the engine comes to it on its GPU.

    python bench.py --card                          the ceilings: memory copies, matrix products, host reads, PCIe
    python gpu_card.py floor --model llama-7b       gpu-only decode against (weights + KV) / bandwidth, beside transformers
    python gpu_card.py all [--part 1|2|3]           the commands behind the README's GPU table; each part fits ten minutes

`all` needs a CUDA GPU and writes results/gpu-*.json, each with the command, the machine and its ceilings as measured in
the same run. Without a GPU the first two measure the cores that play it, which says nothing about a GPU.
"""
import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numba
import numpy as np
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from checkpoint import load_config
from cpu_card import make_cache, read_bandwidth
from neo import LLM, SamplingParams, add_engine_args, engine_args
from startup import device_name, resolve_device

COPIED = 1 << 30               # bytes of a copy on a GPU; a quarter of that elsewhere
HERE = Path(__file__).parent


# --------------------------------------------------------------------------------------------------------- ceilings

def machine():
    """What results were measured on, in words."""
    gpu = torch.cuda.is_available()
    driver = None
    if gpu:
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, IndexError, subprocess.CalledProcessError):
            driver = "unknown: no nvidia-smi"
    return {"gpu": device_name(torch.device("cuda")) if gpu else None, "driver": driver,
            "cpu": device_name(torch.device("cpu")), "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": platform.python_version()}


def host_read_bandwidth(threads=None, rounds=5):
    """GB/s at which this machine's cores read memory front to back: median, past the caches."""
    data = make_cache((1 << 27,)).view(np.uint8)
    threads = threads or numba.get_num_threads()
    read_bandwidth(data, threads)
    return statistics.median(read_bandwidth(data, threads) for _ in range(rounds))


def ceilings(device):
    """The machine's limits on this torch.device, all measured now: copy GB/s (bytes read plus bytes written), matrix TFLOP/s
    in 16 bits, host read GB/s, and on CUDA PCIe GB/s either way through pinned memory."""
    cuda, threads = device.type == "cuda", torch.get_num_threads()
    dtype = torch.float16 if cuda and torch.cuda.get_device_capability(device)[0] < 8 else torch.bfloat16
    size, n = (COPIED, 8192) if cuda else (COPIED // 4, 1024)

    def seconds(run, **names):
        return Timer(run, globals=names, num_threads=threads).blocked_autorange(min_run_time=0.3).median
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    a.random_(), b.random_()
    out = {"copy_gb_s": 2 * size / seconds("b.copy_(a)", a=a, b=b) / 1e9}
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out["matrix_tflops"] = 2 * n ** 3 / seconds("x @ y", x=x, y=y) / 1e12
    if cuda:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for name, run in (("to_gpu_gb_s", "a.copy_(host, non_blocking=True)"),
                          ("from_gpu_gb_s", "host.copy_(a, non_blocking=True)")):
            out[name] = size / seconds(run, a=a, host=host) / 1e9
        del a, b, x, y, host
        torch.cuda.empty_cache()                   # what comes next plans with what is free
    return out | {"host_read_gb_s": host_read_bandwidth(), "host_threads": numba.get_num_threads(), "torch_threads": threads,
                  "dtype": str(dtype)[6:]}


def show(found):
    """Ceilings, a line each."""
    gpu = "to_gpu_gb_s" in found
    cores = f"{found['torch_threads']} threads of torch, which would play the GPU"
    lines = [f"memory copy      {found['copy_gb_s']:8.1f} GB/s read + written, by {'the GPU' if gpu else cores}",
             f"matrix product   {found['matrix_tflops']:8.2f} TFLOP/s in {found['dtype']}, by {'the GPU' if gpu else cores}",
             f"host memory read {found['host_read_gb_s']:8.1f} GB/s, {found['host_threads']} threads"]
    if gpu:
        lines += [f"PCIe to the GPU  {found['to_gpu_gb_s']:8.1f} GB/s, pinned",
                  f"PCIe from it     {found['from_gpu_gb_s']:8.1f} GB/s, pinned"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ floor

def output_len(batch, steps):
    """Tokens a request must be good for: an iteration admits at least one prompt, then some to warm up and `steps` follow."""
    return batch + steps + 10


def decode_times(llm, batch, input_len, steps):
    """Serve `batch` prompts and time `steps` iterations in which all decode: (median ms, its share of GPU idleness, KV
    tokens read in the median iteration)."""
    for i in range(batch):
        prompt = [(7 * i + j) % llm.cfg.vocab_size for j in range(input_len)]
        llm.add_request(prompt, SamplingParams(max_tokens=output_len(batch, steps), ignore_eos=True))
    while len(llm.scheduler.decodes("gpu")) < batch:
        llm.step()
    for _ in range(5):                             # the bucket captured, caches warm
        llm.step()
    times, busy, kv = [], llm.time["gpu_busy"], sum(r.num_tokens for r in llm.scheduler.decodes("gpu")) + batch * steps // 2
    for _ in range(steps):
        start = time.perf_counter()
        llm.step()
        times.append(time.perf_counter() - start)
    idle = 1 - (llm.time["gpu_busy"] - busy) / sum(times)
    for request_id in list(llm.outputs):
        llm.abort(request_id)
    return 1e3 * statistics.median(times), idle, kv


def transformers_rate(cfg, dtype, device, prompts, tokens_out):
    """Output tokens per second of transformers on the same prompts, by generate() and by its continuous batching; a str
    says why one did not run. Random weights, the same geometry."""
    import transformers
    with torch.device(device):
        torch.set_default_dtype(dtype)
        hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=cfg.n_embd, intermediate_size=cfg.n_ffn, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.n_kv_head, head_dim=cfg.head_dim, vocab_size=cfg.vocab_size,
            max_position_embeddings=cfg.max_position, tie_word_embeddings=cfg.tie_embeddings, bos_token_id=None,
            eos_token_id=None, pad_token_id=0)).eval()
        torch.set_default_dtype(torch.float32)
    options = dict(max_new_tokens=tokens_out, do_sample=False)
    config = transformers.GenerationConfig(**options, eos_token_id=-1, pad_token_id=0)
    others = [[(t + 1) % cfg.vocab_size for t in p] for p in prompts]      # for the warm-up: nothing to find in a prefix cache

    def plain(prompts):
        ids = torch.tensor(prompts, device=device)
        hf.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()

    def paged(prompts):
        hf.generate_batch(inputs=prompts, generation_config=config, persistent_manager=True)

    def rate(run):
        try:
            run(others)
            start = time.perf_counter()
            run(prompts)
            return len(prompts) * tokens_out / (time.perf_counter() - start)
        except Exception as error:                 # a peer's failure is a result here, and said so
            return f"{type(error).__name__}: {error}"[:200]
    with torch.inference_mode():
        return {"generate": rate(plain), "continuous_batching": rate(paged)}


def floor(args):
    """gpu-only decode iterations against the time that reading weights and KV takes at the measured copy bandwidth; then
    the whole of some requests beside transformers."""
    engine = engine_args(args)
    need = lambda batch: args.input_len + max(args.output_len, output_len(batch, args.steps))
    engine["max_model_len"] = engine["max_model_len"] or min(need(max(args.batches)), load_config(args.model).max_position)
    limits = ceilings(resolve_device(args.device))
    print(show(limits))
    llm = LLM(args.model, "gpu-only", **engine)
    print(llm.describe())
    embed = 0 if llm.cfg.tie_embeddings else llm.cfg.vocab_size * llm.cfg.n_embd          # rows of it are picked, not read
    weights = (llm.cfg.num_params - embed) * llm.dtype.itemsize
    rows = []
    for batch in tqdm([b for b in args.batches if b * need(b) <= llm.kv_budget["gpu"]], "floor", disable=None, leave=False):
        llm.reset("gpu-only")
        ms, idle, kv = decode_times(llm, batch, args.input_len, args.steps)
        least = 1e3 * (weights + kv * llm.budget.token_bytes * llm.cfg.n_layer) / (limits["copy_gb_s"] * 1e9)
        rows.append({"batch": batch, "kv_tokens": kv, "ms": ms, "floor_ms": least, "over_floor": ms / least, "gpu_idle": idle})
        tqdm.write(f"batch {batch:4d}: {ms:8.2f} ms, floor {least:8.2f} ms, {ms / least:.2f}x; GPU idle {100 * idle:.1f} %")
    out = {"limits": limits, "rows": rows, "kv_budget_gpu_tokens": llm.kv_budget["gpu"], "card": llm.describe().splitlines()}
    if args.peer:
        prompts = np.random.default_rng(args.seed).integers(llm.cfg.vocab_size, size=(args.peer, args.input_len)).tolist()
        params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
        llm.reset("gpu-only")
        llm.generate(prompts, params)
        start = time.perf_counter()
        llm.generate(prompts, params)
        ours = args.peer * args.output_len / (time.perf_counter() - start)
        cfg, dtype, device = llm.cfg, llm.dtype, llm.device
        del llm
        if device.type == "cuda":
            torch.cuda.empty_cache()
        out["peer"] = {"requests": args.peer, "ours": ours,
                       "transformers": transformers_rate(cfg, dtype, device, prompts, args.output_len)}
        print(f"output tok/s, {args.peer} prompts of {args.input_len}, {args.output_len} out: ours {ours:.1f}, transformers "
              f"{out['peer']['transformers']}")
    return out


# -------------------------------------------------------------------------------------------------------------- all

BENCH, FLOOR = "{python} bench.py --result-filename {file} ", "{python} gpu_card.py floor --result-filename {file} "
BIG = BENCH + "--model llama-70b --strategies gpu-only,symmetric,neo --input-len 1000 "
SMALL = BENCH + "--input-len 500 --output-len 200 --num-prompts 200 --repeats 2 "
COMMANDS = {                   # part -> [(result, minutes, command)]
    1: [("tests", 4, "env NEO_TEST_DEVICE=cuda {python} -m pytest -q -k "
                     "'transformers or logits or triton or attention or swap or captured or chunked'"),
        ("floor-7b", 2, FLOOR + "--model llama-7b --batches 1,16,64,128 --peer 64"),
        ("floor-8b", 2, FLOOR + "--model llama-8b --batches 1,16,64,256 --peer 64"),
        ("cpu-attention", 1, "{python} cpu_attn.py --rounds 5"),
        ("floor-70b", 1, FLOOR + "--model llama-70b --batches 1,4,8 --input-len 500")],
    2: [(f"70b-out{n}", 3, BIG + f"--num-prompts 160 --output-len {n}") for n in (100, 200, 400)]
       + [("70b-timeline", 2, BENCH + "--model llama-70b --strategies neo --input-len 1000 --output-len 20 --num-prompts 60 "
                                      "--timeline results/gpu-timeline-70b.json")],
    3: [("70b-out1000", 5, BIG + "--num-prompts 60 --output-len 1000"),
        ("70b-load", 5, BIG + "--num-prompts 60 --output-len 200 --rates 0.5,1,2")]
       + [(f"{m}-{g}gib", 2, SMALL + f"--model llama-{m} --gpu-mem {g}") for m in ("7b", "8b") for g in (16, 24)]}


def run_all(parts):
    """Every command of the parts, each in its own process and within its minutes; what it printed beside its JSON."""
    if not torch.cuda.is_available():
        sys.exit("error: `all` measures a GPU, and torch sees none")
    (HERE / "results").mkdir(exist_ok=True)
    jobs = [job for part in parts for job in COMMANDS[part]]
    for name, minutes, command in jobs:
        file = f"results/gpu-{name}.json"
        command = command.format(python=sys.executable, file=file)
        print(f"\n== {name} (at most {minutes} min): {command}", flush=True)
        start = time.perf_counter()
        with open(HERE / f"results/gpu-{name}.txt", "w") as log:
            try:
                code = subprocess.run(shlex.split(command), cwd=HERE, stdout=log, stderr=subprocess.STDOUT,
                                      timeout=60 * minutes).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
        print((HERE / f"results/gpu-{name}.txt").read_text()[-2500:])
        print(f"== {name}: {code}, {time.perf_counter() - start:.0f} s", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="How near the engine comes to its GPU's limits.", allow_abbrev=False)
    parser.add_argument("what", choices=("floor", "all"))
    parser.add_argument("--model", default="llama-7b")
    parser.add_argument("--batches", default="1,16,64", type=lambda text: [int(b) for b in text.split(",")], metavar="N,N")
    parser.add_argument("--input-len", type=int, default=200, metavar="N")
    parser.add_argument("--output-len", type=int, default=100, metavar="N", help="tokens out, in the comparison")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="iterations timed per batch size")
    parser.add_argument("--peer", type=int, default=0, metavar="N", help="compare with transformers on N requests")
    parser.add_argument("--part", type=int, choices=COMMANDS, help="of all: only this part")
    parser.add_argument("--result-filename", metavar="F.json")
    add_engine_args(parser)
    args = parser.parse_args(argv)
    if args.simulate:
        parser.error("--simulate: this measures a machine, not a simulation")
    if args.what == "all":
        return run_all([args.part] if args.part else list(COMMANDS))
    try:
        found = floor(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.result_filename:
        found = {"command": shlex.join(sys.argv), "machine": machine()} | found
        Path(args.result_filename).write_text(json.dumps(found, indent=1))
        print(f"result: {args.result_filename}")


if __name__ == "__main__":
    main()
