"""What is measured once, at start: the largest activations, and the profile of one layer.

Made-up batches run through the code that serves. Knows no requests of users and no policy.
"""
import contextlib
import hashlib
import json
import math
import statistics
import time
import uuid
import warnings
from collections import Counter
from dataclasses import replace

import torch
from tqdm import tqdm

from hub import cache_folder
from kvcache import STAGE_BYTES, KVCache
from plan import Batch
from request import Request, SamplingParams
from sampling import SAMPLED_AT_ONCE, draw
from scheduler import MAX_RUNNING
from startup import CARD_SHARE, CUDA_SHARE, GIB, device_name, fmt_gib

GRAPH_BYTES = 1 << 30       # set aside for CUDA graphs, which torch does not count: at most this,
GRAPH_SHARE = 0.06          # and this share of what weights and activations leave
CONTEXT_BYTES = 1 << 30     # most that the CUDA context and kernels take, as far as we know
MOST_PROFILED = 64          # CPU decodes that the profile runs at once
PROFILE_SECONDS = 8.0       # time for measuring the profile; what does not fit is left out
PROFILE_VERSION = 9         # change it when what is measured changes


PROFILE_DIR = cache_folder()


# ------------------------------------------------------------- what the GPU has room for

def largest_sub_batches(budget, kv, padded):
    """The SubBatches that take most memory.

    The first has all prompt tokens of an iteration, in the longest prompts, of which the last one
    or two are the last chunks of their prompts, and as many decodes as may run. The second has
    these decodes alone, each over the longest sequence (all of them the same block's); a back end
    that is not paged (`padded` is False) would gather those sequences, so it goes without.
    """
    longest = budget.max_model_len
    whole, rest = divmod(budget.max_batch_tokens, longest)
    chunks = [rest]
    if not rest:
        whole, chunks = whole - 1, 2 * [longest // 2]
    prompts = [made_up_request(kv, longest, "gpu") for _ in range(whole + len(chunks))]
    for r, n in zip(prompts[whole:], chunks, strict=True):
        r.num_scheduled, r.num_cached = n, longest - n
    decodes = [made_up_request(kv, 2, "gpu", decoding=True) for _ in range(MAX_RUNNING)]
    yield kv.bind(Batch(prompts, decodes))
    for r in prompts:
        kv.release(r.id)
    if not padded:
        return
    b = kv.bind(Batch(gpu_decodes=decodes))
    width = kv.table.shape[1]
    yield replace(b, gpu_table=b.gpu_table.new_zeros(MAX_RUNNING, width),
                  gpu_lens=b.gpu_lens.new_full((MAX_RUNNING,), width * budget.block_size))


def made_up_request(kv, num_tokens, tier, decoding=False):
    """A Request with blocks for num_tokens: a prompt, or one that decodes its last token."""
    r = Request(("made up", len(kv.sequences)), [0] * num_tokens, 1, tier=tier,
                num_scheduled=num_tokens)
    if decoding:
        r.prompt, r.output, r.num_cached = r.prompt[1:], [0], num_tokens - 1
    kv.reserve(r.id, tier, num_tokens)
    return r


def draw_some(logits):
    """Sample as many rows as are sampled at once."""
    n = min(len(logits), SAMPLED_AT_ONCE)
    draw(logits[:n], [SamplingParams(temperature=1.0)] * n, [0.5] * n)


def measure_gpu_blocks(model, budget, gpu_mem):
    """KV blocks that the GPU has room for, beside the loaded weights and the largest activations.

    The activations are measured on the largest sub-batches, sampling included. Also set aside:
    what swaps need, and a part for CUDA graphs, which is told to model.captures.
    gpu_mem  GiB of the card that this one plays, all in it; None: what is free, except a small
             reserve

    Raises ValueError if not one block fits.
    """
    cuda, captures, peaks = torch.cuda, model.captures, []
    cuda.empty_cache()
    held = cuda.memory_allocated()
    # however the prompts are cut, each with its past, and one block for each decode
    most_tokens = 2 * (budget.max_batch_tokens + 2 * budget.max_model_len)
    num_blocks = {"gpu": MAX_RUNNING + -(-most_tokens // budget.block_size), "cpu": 0}
    # Two layers, because in the last layer only the sampled rows pass the FFN and the peak would
    # be too low.
    L, Hkv, D = model.kv_geometry
    depth = min(2, L)
    model.captures = None
    try:
        kv = KVCache((depth, Hkv, D), budget.block_size, num_blocks, budget.max_model_len,
                     budget.kv_dtypes, budget.row_dtype, model.device)
        for b in largest_sub_batches(budget, kv, model.attn.padded):
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()
            start = cuda.memory_reserved()
            draw_some(model.run([b], kv, depth).logits)
            peaks.append(cuda.max_memory_reserved() - start)
            del b
        del kv
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the {fmt_gib(held)} of weights fit, but not the activations of "
                         f"{budget.max_batch_tokens} prompt tokens beside them ({error}): lower "
                         "--max-batch-tokens, or take a smaller model") from None
    finally:
        model.captures = captures
    cuda.empty_cache()
    activations = max(peaks) + (STAGE_BYTES if budget.num_blocks["cpu"] else 0)
    free, total = cuda.mem_get_info()
    limit = math.inf
    if gpu_mem is not None:
        context = min(total - free - cuda.memory_reserved(), CONTEXT_BYTES)
        limit = CARD_SHARE * gpu_mem * GIB - context - held
        budget.card = (f"of {gpu_mem:g} GiB: {CARD_SHARE * gpu_mem:.2f} GiB usable, "
                       f"{fmt_gib(context)} of it for the CUDA context, {fmt_gib(limit)} beside "
                       "the weights")
    room = min(free * CUDA_SHARE, limit) - activations
    block_bytes = budget.block_bytes["gpu"]
    if captures:                # captured decodes have temporaries of their own
        pool, graphs = peaks[-1], min(GRAPH_BYTES, int(GRAPH_SHARE * max(room, 0)))
        captures.budget = pool + graphs
        room -= captures.budget
    if room < block_bytes:
        raise ValueError(
            f"{fmt_gib(held)} of weights and {fmt_gib(activations)} of activations, measured with "
            f"{budget.max_batch_tokens} prompt tokens, leave {fmt_gib(max(room, 0))} of GPU "
            f"memory: no KV block of {fmt_gib(block_bytes)} fits. Raise --gpu-mem, lower "
            "--max-batch-tokens, or take a smaller model")
    return int(room // block_bytes)


# --------------------------------------------------------- warm-up and the measured profile

def warm_up(model, kv):
    """Run one layer of a prompt and of a decode in each tier, so that no request waits for kernels
    to be compiled."""
    for tier in ("gpu", "cpu"):
        if kv.tiers[tier].num_blocks:
            r = made_up_request(kv, 2, tier)
            model.run([kv.bind(Batch([r]))], kv, 1)
            r.prompt, r.output, r.num_cached = [0], [0], 1
            model.run([kv.bind(Batch(**{f"{tier}_decodes": [r]}))], kv, 1)
            kv.release(r.id)


def profile_points(model, kv, budget, threads):
    """perfmodel.Profile's points for this engine: from the cache if they were measured under the
    same key, otherwise measured now.

    threads  [cores that play the GPU, cores for CPU attention]
    """
    cfg = model.cfg
    key = {"version": PROFILE_VERSION, "device": device_name(model.device),
           "torch": torch.__version__, "ranks": model.ranks.size, "dtype": str(model.dtype),
           "kv_dtypes": [str(dtype) for dtype in budget.kv_dtypes.values()], "threads": threads,
           "attention": model.describe_attention(),
           "geometry": [cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.n_embd,
                        cfg.n_ffn, cfg.vocab_size],
           # roughly, because they bound what is measured
           "tiers": [n.bit_length() for n in budget.num_blocks.values()],
           "block_size": budget.block_size, "max_model_len": budget.max_model_len,
           "max_batch_tokens": budget.max_batch_tokens}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = PROFILE_DIR / f"profile-{digest}.json"
    points = load_profile(path, key)
    if points is None:
        points = measure_profile(model, kv, budget)
        save_profile(path, key, points)
    return points


# Numbers of a point of each kind: ms, and what it depends on
POINT_KINDS = {"linear": 2, "lm_head": 2, "prefill": 2, "gpu_decode": 2, "cpu_decode": 3,
               "transfer": 2}


def load_profile(path, key):
    """Points saved under exactly this key (a dict), or None. A file that cannot be read, or is not
    what `save_profile` wrote, is warned about: measure again."""
    try:
        saved = json.loads(path.read_text())
        points = saved["points"] if saved["key"] == key else None
        if points is not None:
            _check_points(points)
        return points
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(f"the profile {path} cannot be used ({type(error).__name__}: {error}): it is "
                      "measured again", stacklevel=2)
        return None


def _check_points(points):
    for kind, width in POINT_KINDS.items():
        for point in points[kind]:
            if len(point) != width or not point[-1] or not all(
                    type(x) in (int, float) and 0 <= x < float("inf") for x in point):
                raise ValueError(f"{kind}: {point!r:.60} is no point")
    if not points["linear"] or not points["lm_head"]:
        raise ValueError("points are missing")


def save_profile(path, key, points):
    """Write points, and the key that tells when they hold: all of it or nothing. Without a place to
    write it warns."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"key": key, "points": points}))
        temporary.replace(path)
    except OSError as error:
        warnings.warn(f"the profile cannot be saved as {path} ({error}): the next start measures "
                      "again", stacklevel=2)
        with contextlib.suppress(OSError):
            temporary.unlink()


class Deadline:
    """Time that is left for measuring, and how long the last pass took."""

    def __init__(self, seconds):
        self.end, self.pass_seconds = time.perf_counter() + seconds, 0.0

    def allows_point(self, reserve=0.0):
        """Is there time for one more point, four passes like the last one, before the reserve?"""
        return 4 * self.pass_seconds < self.end - time.perf_counter() - reserve


def measure_profile(model, kv, budget):
    """Time one layer's parts on made-up batches, through the code that serves -> Profile's points.

    Layers are taken in turn, enough of them to exceed the caches. Points that would not fit in
    PROFILE_SECONDS are left out.
    """
    bs, deadline = budget.block_size, Deadline(PROFILE_SECONDS)
    gpu_tokens, cpu_tokens = (kv.tiers[tier].num_blocks * bs for tier in ("gpu", "cpu"))
    points = {kind: [] for kind in POINT_KINDS}
    tier = "cpu" if cpu_tokens else "gpu"
    prompts = list(prompt_lengths(budget, kv.tiers[tier].num_blocks))
    longest = min(budget.max_model_len, 1024)
    cpu_cases = [(n, part) for n in (1, 4, 16, MOST_PROFILED) for part in (4, 1)]
    gpu_cases = (1, 4), (1, 2), (1, 1), (8, 1), (64, 1), (256, 1)
    num_points = len(prompts) + len(cpu_cases) + len(gpu_cases)
    bar = tqdm(total=num_points, desc="profile of one layer", disable=None, leave=False)

    def decode_length(num_requests, tokens_of_tier, part):
        return min(longest, tokens_of_tier // bs // num_requests * bs) // part

    for lengths in prompts:                 # stored to the CPU tier if there is one
        if not deadline.allows_point(reserve=PROFILE_SECONDS / 3):
            break
        n, requests = sum(lengths), [made_up_request(kv, length, tier) for length in lengths]
        ms = time_stages(model, kv, requests, "prefill", deadline)
        points["linear"].append([n, ms["linear"]])
        if len(lengths) == 1:
            points["prefill"].append([n, ms["attend"]])
        if cpu_tokens:
            points["transfer"].append([n * budget.token_bytes["cpu"], ms["move"]])
        bar.update()
    for n, part in cpu_cases:                           # n decodes of equal length
        length = decode_length(n, cpu_tokens, part)
        if length >= 2 and (n <= 4 or deadline.allows_point()):
            decodes = [made_up_request(kv, length, "cpu", decoding=True) for _ in range(n)]
            ms = time_stages(model, kv, decodes, "cpu_decodes", deadline)
            points["cpu_decode"].append([n, n * length, ms["cpu_attend"]])
            points["lm_head"].append([n, ms["lm_head"]])
        bar.update()
    for n, part in gpu_cases:                           # n decodes over 1/part of the GPU tier
        length = decode_length(n, gpu_tokens, part)
        if length >= 2 and (n == 1 or deadline.allows_point()):
            decodes = [made_up_request(kv, length, "gpu", decoding=True) for _ in range(n)]
            ms = time_stages(model, kv, decodes, "gpu_decodes", deadline)
            points["gpu_decode"].append([n * length, ms["attend"]])
            points["lm_head"].append([n, ms["lm_head"]])
        bar.update()
    bar.close()
    return points


def prompt_lengths(budget, num_blocks):
    """Prompts for 1, 2, 4, ... rows, up to what an iteration may have and a tier of num_blocks
    holds: one prompt, or several equal ones where one would be too long."""
    n = 1
    while n <= budget.max_batch_tokens:
        count = -(-n // budget.max_model_len)
        if count * -(-(n // count) // budget.block_size) > num_blocks:
            return
        yield [n // count] * count
        n *= 2


def time_stages(model, kv, requests, kind, deadline):
    """Median ms per layer of each stage, and of what an iteration does once ("lm_head").

    kind  the field of a Batch that the requests go to. They are released at the end.
    """
    L = len(model.layers)
    layer_bytes = model.cfg.num_params * model.dtype.itemsize / L
    depth = int(min(L, max(3, -(-100e6 // layer_bytes))))
    times = {"linear": [], "attend": [], "cpu_attend": [], "move": [], "lm_head": []}
    b = kv.bind(Batch(**{kind: requests}))
    for repeat in range(4):
        start = time.perf_counter()
        model.run([b], kv, depth)
        spans = model.spans                             # waits for the GPU
        deadline.pass_seconds = time.perf_counter() - start
        if model.captured or (
                repeat == 0 and (deadline.pass_seconds < 0.5 or kind != "prefill")):
            continue                # warm-up; for decodes also the first touch of their KV
        per_rank, ms = Counter(), Counter()
        for span in spans:
            per_rank[counted_as(span), span.layer, span.rank] += 1e3 * (span.end - span.start)
        for (*key, _), value in per_rank.items():          # the slowest rank counts
            ms[tuple(key)] = max(ms[tuple(key)], value)
        # `ends` is the embedding and the half layers before the first and after the last attention.
        ends, head = ms.pop(("linear", 0)) + ms.pop(("linear", L)), ms.pop(("head", L))
        for (stage, _), value in ms.items():
            times[stage].append(value)
        if depth == 1:
            times["linear"].append(ends)
        times["lm_head"].append(head + max(ends - statistics.median(times["linear"]), 0.0))
        if deadline.pass_seconds > 0.1:
            break                                       # a slow pass is not repeated
    for r in requests:
        kv.release(r.id)
    return {stage: statistics.median(values) for stage, values in times.items() if values}


def counted_as(span):
    """The stage whose time a span belongs to. The KV of prompts is moved; but where a thread plays
    the GPU, it makes the copies to the host, so their time counts as linear."""
    if span.lane in ("move", "copy"):
        return "move"
    return "linear" if span.stage == "send" else span.stage
