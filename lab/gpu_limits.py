"""What a machine can do at most, and how near the engine comes to it on its GPU.

    python -m lab.gpu_limits ceilings   memory copies, matrix products, host reads, PCIe
    python -m lab.gpu_limits floor --model llama-7b
                                        gpu-only decode against (weights + KV) / bandwidth
    python -m lab.gpu_limits linear --model llama-8b
                                        a layer's linear parts, 1 to 512 rows, against the roofline

Without a GPU both measure the cores that play it, which says nothing about a GPU. gpu_first.sh has
the commands behind the GPU table. Of the engine this knows LLM's methods, its memory budget and
which requests decode. Test: pytest lab -k limits
"""
import shlex
import statistics
import sys
import time

import numba
import numpy as np
import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from bench import errors_in_one_line, write_json
from checkpoint import load_config
from hub import find_model
from kernels.cpu_bandwidth import host_read_bandwidth
from measure import Deadline, made_up_request, time_stages
from neo import LLM, SamplingParams
from options import Parser, add_engine_flags, engine_options, output_file
from startup import machine, resolve_device

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}
MIN_SECONDS = 0.3       # of one measurement
ROWS = [1, 2, 4, 8, 16, 24, *range(32, 257, 16), *range(288, 513, 32)]      # of `linear`
WARM_UP = 5             # iterations that are not timed: graphs get captured, caches get warm


# ---------------------------------------------------------------------------------- ceilings

def ceilings(device):
    """The limits of the machine with this torch.device, all measured now.

    Copies in GB/s (bytes read plus bytes written), matrix products in TFLOP/s (16 bits), host
    reads in GB/s; on CUDA also PCIe in GB/s each way, through pinned memory.
    """
    cuda, threads = device.type == "cuda", torch.get_num_threads()
    size, n = COPY_BYTES[device.type], MATRIX_SIZE[device.type]
    dtype = torch.bfloat16
    if cuda and torch.cuda.get_device_capability(device)[0] < 8:
        dtype = torch.float16

    def seconds(statement, **names):
        timer = Timer(statement, globals=names, num_threads=threads)
        return timer.blocked_autorange(min_run_time=MIN_SECONDS).median

    src, dst = (torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(2))
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    limits = {
        "copy_gb_s": 2 * size / seconds("dst.copy_(src)", dst=dst, src=src) / 1e9,
        "matrix_tflops": 2 * n ** 3 / seconds("x @ y", x=x, y=y) / 1e12}
    if cuda:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        copy = "dst.copy_(src, non_blocking=True)"
        limits["to_gpu_gb_s"] = size / seconds(copy, dst=dst, src=host) / 1e9
        limits["from_gpu_gb_s"] = size / seconds(copy, dst=host, src=src) / 1e9
        del src, dst, x, y, host
        torch.cuda.empty_cache()    # the engine's budget is planned from what is free
    return limits | {
        "host_read_gb_s": host_read_bandwidth(),
        "host_threads": numba.get_num_threads(),
        "torch_threads": threads,
        "dtype": str(dtype).removeprefix("torch.")}


def describe_limits(limits):
    """Ceilings as text, a line each."""
    by = f"{limits['torch_threads']} threads of torch, which would play the GPU"
    pcie = ""
    if "to_gpu_gb_s" in limits:
        by = "the GPU"
        pcie = ("\nPCIe to the GPU  {to_gpu_gb_s:8.1f} GB/s, pinned"
                "\nPCIe from it     {from_gpu_gb_s:8.1f} GB/s, pinned")
    return ("memory copy      {copy_gb_s:8.1f} GB/s read + written, by {by}\n"
            "matrix product   {matrix_tflops:8.2f} TFLOP/s in {dtype}, by {by}\n"
            "host memory read {host_read_gb_s:8.1f} GB/s, {host_threads} threads"
            + pcie).format(by=by, **limits)


def run_ceilings(args):
    """The subcommand `ceilings`: prints, and returns what is saved."""
    limits = ceilings(resolve_device(args.device))
    lines = [f"{name:16s} {value}" for name, value in machine().items() if value]
    print("\n".join((*lines, describe_limits(limits))))
    return {"limits": limits}


# ------------------------------------------------------------------------------------- floor

def decode_times(llm, num_requests, input_len, steps):
    """Time `steps` iterations in which `num_requests` requests decode.

    Returns (median ms, cached tokens that the median iteration read).
    """
    params = SamplingParams(max_tokens=tokens_for(num_requests, steps), ignore_eos=True)
    for i in range(num_requests):
        prompt = [(7 * i + j) % llm.cfg.vocab_size for j in range(input_len)]
        llm.add_request(prompt, params)
    while len(llm.scheduler.decodes("gpu")) < num_requests:
        llm.step()
    for _ in range(WARM_UP):
        llm.step()
    cached = sum(r.num_tokens for r in llm.scheduler.decodes("gpu"))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        llm.step()
        times.append(time.perf_counter() - start)
    for request_id in list(llm.outputs):
        llm.abort(request_id)
    return 1e3 * statistics.median(times), cached + num_requests * steps // 2


def tokens_for(num_requests, steps):
    """Output tokens that keep all requests decoding to the end of decode_times.

    Each iteration admits at least one prompt; warm-up and timed iterations follow.
    """
    return num_requests + 2 * WARM_UP + steps


def transformers_rate(cfg, dtype, device, prompts, tokens_out):
    """Output tokens/s of transformers on the same prompts, with random weights.

    Returns {"generate", "continuous_batching": rate, or a str: why it did not run}.
    """
    import transformers
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=cfg.n_embd, intermediate_size=cfg.n_ffn,
            num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
            num_key_value_heads=cfg.n_kv_head, head_dim=cfg.head_dim,
            vocab_size=cfg.vocab_size, max_position_embeddings=cfg.max_position,
            tie_word_embeddings=cfg.tie_embeddings,
            bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
        torch.set_default_dtype(torch.float32)
    options = dict(max_new_tokens=tokens_out, do_sample=False)
    config = transformers.GenerationConfig(**options, eos_token_id=-1, pad_token_id=0)
    # Other prompts for the warm-up, so that a prefix cache does not know the timed ones.
    others = [[(t + 1) % cfg.vocab_size for t in prompt] for prompt in prompts]

    def generate(prompts):
        ids = torch.tensor(prompts, device=device)
        model.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()

    def continuous_batching(prompts):
        model.generate_batch(
            inputs=prompts, generation_config=config, persistent_manager=True)

    rates = {}
    for run in (generate, continuous_batching):
        try:
            with torch.inference_mode():
                run(others)
                start = time.perf_counter()
                run(prompts)
            seconds = time.perf_counter() - start
            rates[run.__name__] = len(prompts) * tokens_out / seconds
        except Exception as error:      # that a peer failed is a result here
            rates[run.__name__] = f"{type(error).__name__}: {error}"[:200]
    return rates


def run_floor(args):
    """The subcommand `floor`: prints, and returns what is saved.

    floor_ms = (bytes of the weights + bytes of the KV) / measured copy bandwidth
    """
    options = engine_options(args)

    def length(num_requests):           # of each request
        output_len = max(args.output_len, tokens_for(num_requests, args.steps))
        return args.input_len + output_len
    if args.max_model_len is None:
        limit = load_config(find_model(args.model)).max_position
        options["max_model_len"] = min(length(max(args.batches)), limit)
    limits = ceilings(resolve_device(args.device))
    print(describe_limits(limits))
    llm = LLM(args.model, "gpu-only", **options)
    print(llm.describe())
    cfg = llm.cfg
    # An embedding matrix that is not lm_head too is not read: a few of its rows are picked.
    picked = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.n_embd
    weight_bytes = (cfg.num_params - picked) * llm.dtype.itemsize
    kv_bytes = llm.budget.token_bytes["gpu"] * cfg.n_layer      # of one token
    found = []
    fitting = [n for n in args.batches if n * length(n) <= llm.kv_budget["gpu"]]
    for n in tqdm(fitting, "floor", disable=None, leave=False):
        llm.reset("gpu-only")
        ms, kv_tokens = decode_times(llm, n, args.input_len, args.steps)
        floor_ms = (weight_bytes + kv_tokens * kv_bytes) / (limits["copy_gb_s"] * 1e6)
        over = ms / floor_ms
        found.append({"batch": n, "kv_tokens": kv_tokens, "ms": ms, "floor_ms": floor_ms,
                      "over_floor": over})
        tqdm.write(f"batch {n:4d}: {ms:8.2f} ms, floor {floor_ms:8.2f} ms, {over:.2f}x")
    captures = llm.model.captures
    graphs = captures and {"passes": len(captures.passes), "bytes": captures.spent}
    del captures                        # it holds the model
    saved = {"limits": limits, "rows": found,
             "graphs": graphs,
             "kv_budget_gpu_tokens": llm.kv_budget["gpu"],
             "card": llm.describe().splitlines()}
    if args.peer:
        rng, shape = np.random.default_rng(args.seed), (args.peer, args.input_len)
        prompts = rng.integers(cfg.vocab_size, size=shape).tolist()
        params = SamplingParams(max_tokens=args.output_len, ignore_eos=True)
        llm.reset("gpu-only")
        llm.generate(prompts, params)
        start = time.perf_counter()
        llm.generate(prompts, params)
        ours = args.peer * args.output_len / (time.perf_counter() - start)
        dtype, device = llm.dtype, llm.device
        del llm                         # its memory is for transformers now
        if device.type == "cuda":
            torch.cuda.empty_cache()
        theirs = transformers_rate(cfg, dtype, device, prompts, args.output_len)
        saved["peer"] = {"requests": args.peer, "ours": ours, "transformers": theirs}
        print(f"output tok/s, {args.peer} prompts of {args.input_len}, "
              f"{args.output_len} out: ours {ours:.1f}, transformers {theirs}")
    return saved


# ------------------------------------------------------------------------------------ linear

def run_linear(args):
    """The subcommand `linear`: prints, and returns what is saved.

    roofline_ms = max(operations / measured peak, bytes of the weights / measured copy bandwidth).
    How far above it the middle lies is the softness of the ridge (perfmodel.Testbed.softness).
    """
    options = engine_options(args) | {"max_model_len": max(ROWS), "max_batch_tokens": max(ROWS)}
    limits = ceilings(resolve_device(args.device))
    print(describe_limits(limits))
    llm = LLM(args.model, "gpu-only", **options)
    print(llm.describe())
    w = llm.model.layers[0]
    matrices = w.wqkv, w.wo, w.w_gate_up, w.w_down
    params = sum(t.numel() for t in matrices)
    memory_ms = sum(t.nbytes for t in matrices) / (limits["copy_gb_s"] * 1e6)
    fitting = [n for n in ROWS if n <= llm.kv_budget["gpu"]]
    found = []
    for n in tqdm(fitting, "linear", disable=None, leave=False):
        requests = [made_up_request(llm.kv, n, "gpu")]
        ms = time_stages(llm.model, llm.kv, requests, "prefill", Deadline(60))["linear"]
        roofline_ms = max(memory_ms, 2 * params * n / (limits["matrix_tflops"] * 1e9))
        found.append({"rows": n, "ms": ms, "roofline_ms": roofline_ms,
                      "over_roofline": ms / roofline_ms})
        tqdm.write(f"{n:4d} rows: {ms:8.3f} ms a layer, roofline {roofline_ms:8.3f} ms, "
                   f"{ms / roofline_ms:.2f}x")
    return {"limits": limits, "rows": found, "card": llm.describe().splitlines()}


def numbers(text):
    """An argparse type: 1,16 -> [1, 16]."""
    return [int(number) for number in text.split(",")]


def main(argv=None):
    parser = Parser("The machine's limits, and how near the engine comes to them.")
    add = parser.add_argument
    add("what", choices=("ceilings", "floor", "linear"))
    add("--model", default="llama-7b")
    add("--batches", type=numbers, default=[1, 16, 64], metavar="N,N",
        help="numbers of requests that decode together")
    add("--input-len", type=int, default=200, metavar="N")
    add("--output-len", type=int, default=100, metavar="N", help="of --peer")
    add("--steps", type=int, default=30, metavar="N",
        help="iterations that are timed, for each number of requests")
    add("--peer", type=int, default=0, metavar="N",
        help="compare with transformers on N requests")
    add("--result-filename", type=output_file, metavar="F.json")
    add_engine_flags(parser, leave_out=("strategy", "simulate"))
    args = parser.parse_args(argv)
    with errors_in_one_line():
        runs = {"ceilings": run_ceilings, "floor": run_floor, "linear": run_linear}
        saved = runs[args.what](args)
    if args.result_filename:
        saved = {"command": shlex.join(sys.argv), "machine": machine()} | saved
        write_json(args.result_filename, saved)


if __name__ == "__main__":
    main()
