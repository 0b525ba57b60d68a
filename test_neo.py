"""Tests: exact tokens against transformers, every fast path against its slow reference, invariants, bad input.

    pip install -r requirements.txt -r requirements-extra.txt && pytest -q

Models are tiny and made on the spot; nothing is downloaded. What is slow or random is asserted on tokens, invariants
and overlap, never on time.
"""
import atexit
import dataclasses
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

os.environ["XDG_CACHE_HOME"] = CACHE = tempfile.mkdtemp()        # of profiles; read when startup is imported
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when Triton is imported: its kernels then run on the CPU, slowly

import bench
import cpu_attn
import figures
import gpu_attn
import gpu_card
import startup
import workload
from checkpoint import PRESETS, load_config, load_tokenizer
from kvcache import KVCache
from model import TorchOps, rope_table
from neo import LLM, SamplingParams
from perfmodel import TESTBEDS, Load, PerfModel, Prediction, Profile, Roofline, find_testbed, fluid_limit, layer_ms
from sampling import sample
from scheduler import MAX_RUNNING, MAX_WAIT, STRATEGIES, Batch, Request, Scheduler

DEVICE = os.environ.get("NEO_TEST_DEVICE", "cpu")       # cuda: the exactness tests on a GPU
DATA = Path(__file__).resolve().parent.parent / "shared" / "data"
GREEDY = SamplingParams(max_tokens=24)
EXACT = SamplingParams(max_tokens=24, ignore_eos=True)


class FixedPerf(PerfModel):
    """A performance model for tests: weights take 1 ms whatever the rows, a CPU decode `cpu` ms, nothing is learnt."""

    def __init__(self, cpu=0.2, n_layer=4):
        super().__init__(n_layer, 128)
        self.cpu = cpu

    def linear(self, n_tokens):
        return 1.0 + 0.01 * n_tokens

    def head(self, n_rows):
        return 1.0

    def prefill(self, lengths):
        return 0.001 * sum(lengths)

    def gpu_decode(self, n_kv_tokens):
        return 0.0001 * n_kv_tokens

    def cpu_decode(self, n_requests, n_kv_tokens):
        return self.cpu * n_requests

    def transfer(self, n_bytes):
        return 1e-6 * n_bytes

    def observe(self, predicted, measured):
        pass


def blocks_to_gib(llm_or_cfg, blocks, itemsize=4, block_size=16):
    c = llm_or_cfg
    return blocks * 2 * c.n_layer * c.n_kv_head * block_size * c.head_dim * itemsize / 2 ** 30


def make_prompts(n, vocab, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randrange(1, longest))] for _ in range(n)]


# ------------------------------------------------------------------------------------ exact tokens, against transformers

GEOMETRIES = {
    "mha-d64-linear": dict(num_attention_heads=4, num_key_value_heads=4, head_dim=64, hidden_size=256, vocab_size=503,
                           rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "gqa4-d128-llama3": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=128, hidden_size=192, vocab_size=512,
                             rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0,
                                                  low_freq_factor=1.0, high_freq_factor=4.0,
                                                  original_max_position_embeddings=64)),
    "gqa8-d80-tied": dict(num_attention_heads=8, num_key_value_heads=1, head_dim=80, hidden_size=320, vocab_size=331,
                          tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (folder, transformers model): random Llama checkpoints, saved as transformers does."""
    transformers = pytest.importorskip("transformers")
    out = {}
    for name, geometry in GEOMETRIES.items():
        torch.manual_seed(1)
        cfg = transformers.LlamaConfig(num_hidden_layers=3, intermediate_size=416, max_position_embeddings=256,
                                       initializer_range=0.1, bos_token_id=None, eos_token_id=None, **geometry)
        hf = transformers.LlamaForCausalLM(cfg).eval()
        folder = tmp_path_factory.mktemp(name)
        hf.save_pretrained(folder)
        out[name] = folder, hf
    return out


def hf_generate(hf, prompts, n, **kwargs):
    """Greedy tokens of a left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0, **kwargs)
    return out[:, width:].tolist()


@pytest.fixture(scope="module")
def reference(checkpoints):
    """name -> (prompts, the tokens transformers generates for them)."""
    out = {}
    for name, (_, hf) in checkpoints.items():
        prompts = make_prompts(12, hf.config.vocab_size, 60)
        out[name] = prompts, hf_generate(hf, prompts, 40)
    return out


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("name", GEOMETRIES)
def test_tokens_equal_transformers(checkpoints, reference, name, strategy):
    """float32 greedy tokens, with tiers so small that swaps, preemptions and CPU prefills all happen."""
    folder, _ = checkpoints[name]
    prompts, want = reference[name]
    cfg = load_config(str(folder))
    cpu_blocks = {"gpu-only": 20, "symmetric": 18}.get(strategy, 11)
    llm = LLM(str(folder), strategy, device=DEVICE, dtype="fp32", gpu_blocks=10, cpu_mem=blocks_to_gib(cfg, cpu_blocks),
              max_model_len=110)
    outs = llm.generate(prompts, SamplingParams(max_tokens=40))
    stats = llm.stats()
    llm.kv.check()
    assert [o.token_ids for o in outs] == want
    assert stats["preemptions"] > 0
    if strategy in ("serial", "neo"):
        assert stats["swapped_blocks"] > 0 and stats["cpu_prefills"] > 0 and stats["cpu_decode_tokens"] > 0
    if strategy == "symmetric":
        assert stats["pipelined_iterations"] > 0 and stats["gpu_decode_tokens"] == 0
    assert stats["gpu_blocks_free"] == stats["gpu_blocks"] and stats["cpu_blocks_free"] == stats["cpu_blocks"]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_tokens_equal_transformers_when_neo_pipelines(checkpoints, reference, name):
    """neo with a performance model under which two sub-batches pay: GPU and CPU rows in one pipeline."""
    folder, _ = checkpoints[name]
    prompts, want = reference[name]
    llm = LLM(str(folder), "neo", device=DEVICE, dtype="fp32", gpu_blocks=14, max_model_len=110)
    llm.perf = llm.scheduler.perf = FixedPerf(cpu=0.3, n_layer=3)
    outs = llm.generate(prompts, SamplingParams(max_tokens=40))
    stats = llm.stats()
    assert [o.token_ids for o in outs] == want
    assert stats["pipelined_iterations"] > 0 and stats["gpu_decode_tokens"] > 0 and stats["cpu_decode_tokens"] > 0


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 5e-2), ("fp16", 6e-3)])
def test_logits_within_tolerance(checkpoints, dtype, tolerance):
    """Prompt and decode logits of a pipelined pass over both tiers against transformers in float32: |a - b| / |b|."""
    folder, hf = checkpoints["gqa4-d128-llama3"]
    llm = LLM(str(folder), device=DEVICE, dtype=dtype, gpu_blocks=20, max_model_len=110)
    kv, prompts = llm.kv, make_prompts(6, 512, 60, seed=2)
    with torch.no_grad():
        want = [hf(torch.tensor([p])).logits[0] for p in prompts]

    def check(batches):
        inputs = [kv.bind(b, i) for i, b in enumerate(batches)]
        llm.model.run(inputs, kv)
        for b, inp in zip(batches, inputs):
            for r, got in zip(b.requests, inp.logits.cpu()):
                ref = want[r.id][r.num_tokens - 1]
                assert (got - ref).norm() / ref.norm() < tolerance
    # all but the last token as prompts of either tier, then the last one as a decode
    requests = [Request(i, p[:-1] or p, 1, tier="gpu" if i % 2 else "cpu", rows=len(p[:-1] or p)) for i, p in enumerate(prompts)]
    check([Batch(requests[:3]), Batch(requests[3:])])
    for r, p in zip(requests, prompts):
        r.num_kv, r.output = len(r.prompt), [p[-1]]
    check([Batch(gpu=[r for r in requests if r.tier == "gpu"], cpu=requests[:1]),
           Batch(cpu=[r for r in requests[1:] if r.tier == "cpu"])])


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("chunk", [7, 16, 33])
def test_chunked_prefill_gives_the_same_tokens(checkpoints, reference, strategy, chunk):
    """Prompts longer than an iteration's prompt tokens, into either tier, recomputed after preemptions, too."""
    folder, _ = checkpoints["gqa4-d128-llama3"]
    prompts, want = reference["gqa4-d128-llama3"]
    cfg = load_config(str(folder))
    llm = LLM(str(folder), strategy, device=DEVICE, dtype="fp32", gpu_blocks=10, max_model_len=110, max_batch_tokens=chunk,
              cpu_mem=blocks_to_gib(cfg, 18 if strategy == "symmetric" else 11))
    seen, run = [], llm.model.run

    def spy(batches, kv):
        seen.extend((sum(b.prefill_lens), b.num_stored > 0 and any(n for n, _ in b.prefill_past)) for b in batches)
        run(batches, kv)
    llm.model.run = spy
    assert [o.token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=40))] == want
    stats = llm.stats()
    assert max(rows for rows, _ in seen) <= chunk and stats["chunks"] > 10 and stats["prefill_tokens"] >= sum(map(len, prompts))
    assert any(fetched for _, fetched in seen) == (strategy != "gpu-only")        # later chunks over what lies in host memory
    llm.kv.check()


def test_a_chunk_costs_the_attention_that_it_adds():
    perf = FixedPerf()
    perf.prefill = lambda lengths: sum(1.0 + n + n * n for n in lengths)
    whole, parts = perf.load(10, [(0, 10)]), [perf.load(4, [(0, 4)]), perf.load(6, [(4, 10)])]
    assert parts[0].gpu + parts[1].gpu == pytest.approx(whole.gpu)
    assert perf.load(6, [(4, 10)], n_fetched=4).gpu == pytest.approx(parts[1].gpu + perf.transfer(4 * 128))


def test_long_prompts_do_not_freeze_the_others():
    """Decodes go on in every iteration while a long prompt is prefilled, and each of them is short."""
    def iterations(budget):
        llm = LLM("llama-7b", "gpu-only", simulate="a100", gpu_blocks=2000, max_model_len=4000, max_batch_tokens=budget)
        short = [llm.outputs[llm.add_request([0] * 50, SamplingParams(max_tokens=60, ignore_eos=True))] for _ in range(4)]
        for _ in range(10):
            llm.step()
        long = llm.outputs[llm.add_request([0] * 3900, SamplingParams(max_tokens=2, ignore_eos=True))]
        times = []
        while not long.token_ids:
            before, start = [len(o.token_ids) for o in short], llm.clock()
            llm.step()
            times.append(llm.clock() - start)
            assert [len(o.token_ids) for o in short] == [n + 1 for n in before]
        return times
    whole, chunks = iterations(4000), iterations(256)
    assert len(whole) == 1 and len(chunks) == -(-3900 // 256)
    assert max(chunks) < whole[0] / 5 and sum(chunks) < 2 * whole[0]


def test_eos_ends_a_request(checkpoints, reference, tmp_path):
    """Several end-of-text ids; the id is the last token, as transformers has it."""
    folder, hf = checkpoints["mha-d64-linear"]
    prompts, tokens = reference["mha-d64-linear"]
    eos = [tokens[0][5], tokens[1][9]]
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": eos}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    outs = LLM(str(tmp_path), device="cpu", dtype="fp32", gpu_blocks=20, max_model_len=110).generate(
        prompts, SamplingParams(max_tokens=40))
    for out, want in zip(outs, tokens):
        end = next((i + 1 for i, t in enumerate(want) if t in eos), 40)
        assert out.token_ids == want[:end]
        assert out.finish_reason == ("stop" if want[end - 1] in eos else "length")
    assert {o.finish_reason for o in outs} == {"stop", "length"} or len(outs[0].token_ids) <= 6


# --------------------------------------------------------------------------------------------------------- checkpoints

def as_meta(folder, hf, shards):
    """Write a transformers model the way Meta ships one: their names, RoPE layout and split."""
    c, sd = hf.config, hf.state_dict()

    def neighbours(w):                          # halves of a head -> neighbours
        return w.view(-1, 2, c.head_dim // 2, c.hidden_size).transpose(1, 2).reshape(w.shape)
    full = {"tok_embeddings.weight": (sd["model.embed_tokens.weight"], 1), "norm.weight": (sd["model.norm.weight"], None),
            "output.weight": (sd["lm_head.weight"], 0)}
    for i in range(c.num_hidden_layers):
        a, b = f"model.layers.{i}.", f"layers.{i}."
        full |= {b + "attention.wq.weight": (neighbours(sd[a + "self_attn.q_proj.weight"]), 0),
                 b + "attention.wk.weight": (neighbours(sd[a + "self_attn.k_proj.weight"]), 0),
                 b + "attention.wv.weight": (sd[a + "self_attn.v_proj.weight"], 0),
                 b + "attention.wo.weight": (sd[a + "self_attn.o_proj.weight"], 1),
                 b + "feed_forward.w1.weight": (sd[a + "mlp.gate_proj.weight"], 0),
                 b + "feed_forward.w2.weight": (sd[a + "mlp.down_proj.weight"], 1),
                 b + "feed_forward.w3.weight": (sd[a + "mlp.up_proj.weight"], 0),
                 b + "attention_norm.weight": (sd[a + "input_layernorm.weight"], None),
                 b + "ffn_norm.weight": (sd[a + "post_attention_layernorm.weight"], None)}
    for s in range(shards):
        part = {k: (w if dim is None else w.chunk(shards, dim)[s]).clone() for k, (w, dim) in full.items()}
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{s:02d}.pth")
    (folder / "params.json").write_text(json.dumps(dict(
        dim=c.hidden_size, n_layers=c.num_hidden_layers, n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads,
        multiple_of=32, norm_eps=c.rms_norm_eps, vocab_size=-1, max_seq_len=256)))


@pytest.mark.parametrize("shards", [1, 2])
def test_meta_checkpoint(tmp_path, shards):
    transformers = pytest.importorskip("transformers")
    cfg = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=4, num_key_value_heads=2,
                                   head_dim=32, intermediate_size=352, vocab_size=96, max_position_embeddings=256,
                                   rms_norm_eps=1e-5, initializer_range=0.1, bos_token_id=None, eos_token_id=None)
    hf = transformers.LlamaForCausalLM(cfg).eval()
    as_meta(tmp_path, hf, shards)
    prompts = make_prompts(4, 96, 30)
    llm = LLM(str(tmp_path), device="cpu", dtype="fp32", max_model_len=128)
    assert [o.token_ids for o in llm.generate(prompts, EXACT)] == hf_generate(hf, prompts, 24)


def test_sharded_safetensors_and_peak_shapes(checkpoints, tmp_path):
    """An index and several files load to the same weights."""
    folder, hf = checkpoints["gqa8-d80-tied"]
    hf.save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    one, many = (LLM(str(f), device="cpu", dtype="fp32", max_model_len=64) for f in (folder, tmp_path))
    a, b = one.model.slots(), many.model.slots()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_broken_checkpoints(checkpoints, tmp_path):
    """Each error names the tensor or the file."""
    from safetensors.torch import load_file, save_file
    folder, _ = checkpoints["mha-d64-linear"]
    good = load_file(folder / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    cases = {"lacks.*" + norm: {k: v for k, v in good.items() if k != norm},
             "unexpected.*model.extra": good | {"model.extra": torch.ones(2)},
             norm + r" has shape \[5\].*\[256\]": good | {norm: torch.ones(5)}}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    load = lambda: LLM(str(tmp_path), device="cpu", dtype="fp32", max_model_len=64)
    with pytest.raises(ValueError, match="no .*safetensors"):
        load()
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load()
    whole = (folder / "model.safetensors").read_bytes()
    for data in (whole[:len(whole) // 2], b"not tensors at all"):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="model.safetensors is truncated"):
            load()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {norm: "gone.safetensors"}}))
    with pytest.raises(ValueError, match="gone.safetensors .*missing"):
        load()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load()


@pytest.mark.parametrize("rope", GEOMETRIES.values(), ids=GEOMETRIES)
def test_rope_config_of_older_transformers(rope, tmp_path):
    """rope_theta + rope_scaling read like rope_parameters."""
    base = dict(architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=1, intermediate_size=32,
                max_position_embeddings=128, **{k: v for k, v in rope.items() if k != "rope_parameters"})
    new = dict(rope["rope_parameters"])
    old = dict(new)
    theta = old.pop("rope_theta")
    tables = []
    for extra in (dict(rope_parameters=new), dict(rope_theta=theta, rope_scaling=old if len(old) > 1 else None),
                  dict(rope_theta=theta, rope_scaling={"type": old["rope_type"], "factor": 1.0} | {k: v for k, v in old.items() if k != "rope_type"} if len(old) > 1 else None)):
        (tmp_path / "config.json").write_text(json.dumps(base | extra))
        tables.append(rope_table(load_config(str(tmp_path)), 32))
    assert all(torch.equal(a, b) for t in tables[1:] for a, b in zip(tables[0], t))


@pytest.mark.parametrize("change, message", [
    (dict(architectures=["MistralForCausalLM"], model_type="mistral"), "MistralForCausalLM.*not supported"),
    (dict(attention_bias=True), "attention_bias"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"), (dict(num_key_value_heads=3), "multiple of 3")])
def test_unsupported_configs(change, message, tmp_path):
    base = dict(architectures=["LlamaForCausalLM"], num_hidden_layers=1, num_attention_heads=4, hidden_size=64,
                intermediate_size=32, vocab_size=32)
    (tmp_path / "config.json").write_text(json.dumps(base | change))
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path))


def test_presets_have_the_published_sizes():
    billions = {"llama-160m": 0.162, "llama-1b": 1.236, "llama-7b": 6.738, "llama-8b": 8.030, "llama-13b": 13.016,
                "llama-70b": 70.554}
    for name, size in billions.items():
        assert PRESETS[name].num_params / 1e9 == pytest.approx(size, abs=0.001)


def test_random_weights_are_seeded_and_varied():
    a, b, c = (LLM("tiny", device="cpu", dtype="fp32", seed=s, max_model_len=64).model for s in (3, 3, 4))
    assert torch.equal(a.layers[2].w_down, b.layers[2].w_down) and not torch.equal(a.embed, c.embed)
    w = torch.cat([x.flatten() for x in a.slots().values() if x.ndim == 2])
    assert abs(w.mean()) < 1e-3 and w.std() == pytest.approx(0.02, rel=0.05)
    assert len(torch.unique(a.embed, dim=0)) == len(a.embed)


# ----------------------------------------------------------------------------------------------------------- attention

def paged_case(rng, B, H, Hkv, D, bs, lens, dtype):
    """Random caches with permuted tables; unused slots hold NaN. Returns arguments of paged_decode_reference."""
    width = -(-max(lens) // bs) + 1
    k, v = (rng.standard_normal((B * width, Hkv, bs, D), dtype=np.float32) for _ in "kv")
    table = rng.permutation(B * width).astype(np.int32).reshape(B, width)
    for b, n in enumerate(lens):
        for j in range(width):
            used = min(max(n - j * bs, 0), bs)
            k[table[b, j], :, used:] = v[table[b, j], :, used:] = np.nan
    if dtype == "bf16":
        k, v = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (k, v))
    elif dtype == "fp16":
        k, v = (x.astype(np.float16).view(np.uint16) for x in (k, v))
    q = rng.standard_normal((B, H, D), dtype=np.float32)
    return q, k, v, table, np.array(lens, np.int32)


def torch_cache(x, dtype):
    return torch.from_numpy(x) if dtype == "fp32" else torch.from_numpy(x).view(
        {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype, path", [("bf16", "dot"), ("bf16", "portable"), ("fp16", "portable"), ("fp32", "portable")])
@pytest.mark.parametrize("H, Hkv, D, bs", [
    (4, 4, 64, 16), (3, 3, 96, 32), (6, 3, 80, 16), (4, 2, 128, 16), (9, 3, 96, 48), (8, 2, 128, 32), (8, 2, 96, 16),
    (7, 1, 64, 16), (8, 1, 256, 16), (16, 1, 128, 16), (16, 2, 32, 48), (16, 1, 20, 8)])
def test_cpu_attention_equals_reference(H, Hkv, D, bs, dtype, path, threads):
    """Lengths around block and item edges, permuted and shared tables, NaN in unused slots and in the output."""
    if path not in cpu_attn.PATHS:
        pytest.skip("no AVX512-BF16")
    if threads > cpu_attn.numba.config.NUMBA_NUM_THREADS:
        pytest.skip("one core")
    rng = np.random.default_rng([H, D, threads])
    lens = [1, 2, bs - 1, bs, bs + 1, 255, 256, 257, int(rng.integers(600, 1300)), int(rng.integers(1300, 5000))]
    q, k, v, table, seq_lens = paged_case(rng, len(lens), H, Hkv, D, bs, lens, dtype)
    table[5], seq_lens[5] = table[7], 200           # two sequences may share blocks
    out = np.full(q.shape, np.nan, np.float32)
    cpu_attn.set_threads(threads)
    cpu_attn.paged_decode(q, k, v, table, seq_lens, out, D ** -0.5, dtype, path)
    want = cpu_attn.paged_decode_reference(q, k, v, table, seq_lens, D ** -0.5, dtype)
    assert np.linalg.norm(out - want) / np.linalg.norm(want) < (3e-3 if path == "dot" and D % 32 == 0 else 2e-6)
    again = np.full(q.shape, np.nan, np.float32)
    cpu_attn.paged_decode(q, k, v, table, seq_lens, again, D ** -0.5, dtype, path)
    assert np.array_equal(out, again)               # scratch kept between calls leaves no trace


@pytest.mark.parametrize("path", cpu_attn.PATHS)
def test_cpu_attention_with_large_scores(path):
    """Scores of plus and minus 1e4: weights of 0 and 1, nothing overflows."""
    rng = np.random.default_rng(0)
    q, k, v, table, lens = paged_case(rng, 3, 4, 2, 64, 16, [1, 300, 700], "bf16")
    q = np.rint(q).astype(np.float32)               # exact in bf16, so that both paths see the same scores
    q[q == 0] = 1
    out = np.empty_like(q)
    cpu_attn.paged_decode(q, k, v, table, lens, out, 1e4 / 16, "bf16", path)
    want = cpu_attn.paged_decode_reference(q, k, v, table, lens, 1e4 / 16)
    assert np.isfinite(out).all() and np.linalg.norm(out - want) / np.linalg.norm(want) < 3e-3


def test_cpu_attention_refuses_what_does_not_fit():
    q, k, v, table, lens = paged_case(np.random.default_rng(0), 2, 4, 2, 64, 16, [5, 9], "bf16")
    good = dict(q=q, k_cache=k, v_cache=v, block_table=table, seq_lens=lens, out=np.empty_like(q), scale=1.0)
    for change, message in ((dict(q=q.astype(np.float64)), "q: expected float32"), (dict(q=q[:, :3].copy(),
                            out=np.empty((2, 3, 64), np.float32)), "3 heads"), (dict(v_cache=v[:-1]), "v_cache"),
                            (dict(block_table=table.astype(np.int64)), "block_table"), (dict(out=q[:1]), "out"),
                            (dict(seq_lens=np.array([0, 9], np.int32)), "seq_lens.*0..9"), (dict(dtype="int8"), "int8"),
                            (dict(seq_lens=np.array([5, 99], np.int32)), "seq_lens must lie in 1..32"),
                            (dict(path="gpu"), "path 'gpu'"), (dict(q=np.asfortranarray(q)), "q: expected a C-contiguous")):
        with pytest.raises(ValueError, match=message):
            cpu_attn.paged_decode(**(good | change))
    with pytest.raises(ValueError, match="CPU threads"):
        cpu_attn.set_threads(10 ** 6)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_store_kv(dtype):
    rng = np.random.default_rng(0)
    _, k, v, _, _ = paged_case(rng, 2, 2, 2, 32, 16, [40, 40], dtype)
    new_k, new_v = (rng.integers(0, 60000, (20, 2, 32)).astype(k.dtype) for _ in "kv")
    slots = rng.permutation(k.shape[0] * 16)[:20].astype(np.int64)
    want_k, want_v = k.copy(), v.copy()
    want_k[slots // 16, :, slots % 16], want_v[slots // 16, :, slots % 16] = new_k, new_v
    cpu_attn.store_kv(new_k, new_v, k, v, slots)
    assert k.tobytes() == want_k.tobytes() and v.tobytes() == want_v.tobytes()


GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")       # a CPU runs Triton's kernels under its interpreter


def backend(name, dtype, device=torch.device("cpu")):
    """A back end on the device it is tested on, or a skip."""
    if name == "triton":
        pytest.importorskip("triton")
        device = GPU
    return gpu_attn.choose(name, device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]), device


def relative(got, want):
    return np.linalg.norm(got.float().cpu().numpy() - want) / np.linalg.norm(want)


@pytest.mark.parametrize("name", sorted(gpu_attn.BACKENDS))
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-6), ("bf16", 8e-3), ("fp16", 1e-3)])
def test_gpu_attention_equals_reference(name, dtype, tolerance):
    """store + prefill of a ragged batch, whole and after earlier positions, and paged decode, against float64."""
    rng, (attn, dev) = np.random.default_rng(5), backend(name, dtype)
    H, Hkv, D, bs, lens = 6, 2, 48, 16, [1, 37, 16]
    q, k, v, table, seq_lens = paged_case(rng, 3, H, Hkv, D, bs, lens, dtype)
    k, v = np.where(np.isnan(cpu_attn.to_float64(k, dtype)), 0, k).astype(k.dtype), \
        np.where(np.isnan(cpu_attn.to_float64(v, dtype)), 0, v).astype(v.dtype)  # the engine's GPU tier holds no NaN
    tk, tv = torch_cache(k, dtype).to(dev), torch_cache(v, dtype).to(dev)
    tq = torch.from_numpy(q).to(dev, tk.dtype)
    out = torch.full_like(tq, float("nan"))
    tq = torch.cat((tq, tq), 1)[:, :H]              # a view, as q is one of the merged projection
    attn.decode(tq, tk, tv, torch.from_numpy(table[:, :3].copy()).to(dev), torch.from_numpy(seq_lens).to(dev), D ** -0.5, out)
    want = cpu_attn.paged_decode_reference(tq.float().cpu().contiguous().numpy(), k, v, table, seq_lens, D ** -0.5, dtype)
    assert relative(out, want) < tolerance

    n = sum(lens)
    qkv = torch.from_numpy(rng.standard_normal((n, H + 2 * Hkv, D), dtype=np.float32)).to(dev, tk.dtype)
    rows = qkv.split((H, Hkv, Hkv), 1)
    out = torch.full_like(rows[0], float("nan"))
    attn.prefill(*rows, lens, lens, D ** -0.5, out)
    late = [1, 5, 16]                               # the last rows of each prompt alone, as a later chunk of it has them
    ends = np.cumsum(lens)
    late_q = torch.cat([rows[0][end - m:end] for end, m in zip(ends, late)])
    late_out = torch.full_like(late_q, float("nan"))
    attn.prefill(late_q, *rows[1:], late, lens, D ** -0.5, late_out)
    whole = torch.cat([out[end - m:end] for end, m in zip(ends, late)])
    assert relative(late_out, whole.float().cpu().numpy()) < tolerance

    slots = np.concatenate([table[b, np.arange(m) // bs] * bs + np.arange(m) % bs for b, m in enumerate(lens)])
    attn.store(rows[1], rows[2], tk, tv, torch.from_numpy(slots).to(dev))
    for array, stored in ((k, tk), (v, tv)):
        stored = stored.cpu()
        array[:] = (stored.view(torch.uint16) if dtype != "fp32" else stored).numpy()
    start = 0
    for b, m in enumerate(lens):                # causal prefill = a decode of every row over the rows up to it
        every = np.arange(1, m + 1, dtype=np.int32)
        want = cpu_attn.paged_decode_reference(rows[0][start:start + m].float().cpu().numpy(), k, v,
                                               np.repeat(table[b:b + 1], m, 0), every, D ** -0.5, dtype)
        assert relative(out[start:start + m], want) < tolerance
        start += m


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 2e-6), ("bf16", 5e-3), ("fp16", 1e-3)])
@pytest.mark.parametrize("H, Hkv, D, bs", [(4, 4, 64, 16), (8, 2, 128, 16), (8, 1, 80, 24), (20, 1, 20, 8), (2, 2, 256, 16),
                                           (5, 1, 256, 32)])
def test_triton_decode_splits_and_merges(H, Hkv, D, bs, dtype, tolerance):
    """Lengths around chunk and block edges, in one chunk and in many, NaN in unused slots; padding stays untouched."""
    kernels = pytest.importorskip("gpu_kernels")
    rng = np.random.default_rng([H, D])
    lens = [1, bs, 127, 128, 129, 300]
    q, k, v, table, seq_lens = paged_case(rng, len(lens) + 1, H, Hkv, D, bs, [*lens, 1], dtype)
    seq_lens[-1] = 0
    there = lambda x: torch.from_numpy(x).to(GPU)
    tk, tv = torch_cache(k, dtype).to(GPU), torch_cache(v, dtype).to(GPU)
    tq = there(q).to(tk.dtype)
    want = cpu_attn.paged_decode_reference(tq[:-1].float().cpu().numpy(), k, v, table[:-1], seq_lens[:-1], D ** -0.5, dtype)
    for chunk in (64, 128, 1024):
        out = torch.full_like(tq, float("nan"))
        kernels.paged_decode(tq, tk, tv, there(table), there(seq_lens), D ** -0.5, out, chunk)
        assert relative(out[:-1], want) < tolerance and out[-1].isnan().all()


def test_triton_store_rope_and_swiglu_equal_torch():
    """Bits of a store, its rows of padding dropped; RoPE in place and SwiGLU, on widths that fill no block."""
    kernels = pytest.importorskip("gpu_kernels")
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).bfloat16().to(GPU)
    qkv, k_cache, v_cache = draw(7, 5 + 6, 20), draw(4, 3, 8, 20), draw(4, 3, 8, 20)
    slots = torch.tensor([3, 31, -1, 8, 0, -1, 17], dtype=torch.int32, device=GPU)
    k, v = qkv[:, 5:8], qkv[:, 8:]
    want_k, want_v, live = k_cache.clone(), v_cache.clone(), slots >= 0
    gpu_attn.TorchAttention.store(None, k[live], v[live], want_k, want_v, slots[live])
    kernels.store(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, want_k) and torch.equal(v_cache, want_v)

    cos, sin = (t.to(GPU) for t in rope_table(PRESETS["tiny"], 30))
    x = draw(6, 11, 16).float()                     # the interpreter cuts float32 to bf16 where a GPU rounds
    y, positions = x.clone(), torch.tensor([0, 29, 5, 5, 1, 17], dtype=torch.int32, device=GPU)
    TorchOps.rotate_(x, cos, sin, positions, 9)
    kernels.rotate_(y, cos, sin, positions, 9)
    assert torch.equal(x[:, 9:], y[:, 9:]) and relative(y, x.cpu().numpy()) < 1e-6
    x = draw(5, 2 * 1100).float()
    assert relative(kernels.swiglu(x), TorchOps.swiglu(x.clone()).cpu().numpy()) < 1e-6


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_triton_decode_compiles_for_gpus_that_are_not_here(capability):
    """To machine code: within the registers (nothing spilled) and the shared memory of a T4, an A10G and an H100; with
    matrix instructions where a group has several heads, and reads of 16 bytes."""
    pytest.importorskip("triton")
    script = f"""
import gpu_kernels, pathlib, subprocess, tempfile, triton
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
fn = gpu_kernels._decode
for dtype, size in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
    for D, G in ((64, 4), (80, 8), (128, 1), (128, 8), (256, 2)):
        if {capability} < 80 and dtype == "bf16":
            continue
        DP, mma = max(16, triton.next_power_of_2(D)), {capability} >= 80
        const = dict(G=G, D=D, GP=1 if G == 1 else 16, DP=DP, N=gpu_kernels.step_tokens(G, DP, size, mma), SPLIT=True, WIDE=False)
        kinds = dict(q="*" + dtype, k_cache="*" + dtype, v_cache="*" + dtype, o="*fp32", lse="*fp32", table="*i32", lens="*i32",
                     scale="fp32")
        names = fn.arg_names
        aligned = {{(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
                   if n not in const and n not in ("scale", "bs", "chunk", "H")}}
        src = ASTSource(fn, {{n: "constexpr" if n in const else kinds.get(n, "i32") for n in names}}, const, aligned)
        made = triton.compile(src, target=GPUTarget("cuda", {capability}, 32), options=dict(num_warps=4, num_stages=2))
        with tempfile.NamedTemporaryFile() as file:
            file.write(made.asm["cubin"])
            file.flush()
            used = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        assert "STACK:0 " in used, (dtype, D, G, used)
        ptx = made.asm["ptx"]
        assert made.metadata.shared <= 64 << 10 or dtype == "fp32", made.metadata.shared
        assert ".v4." in ptx
        assert ("mma" in ptx) == (mma and G > 1 and dtype != "fp32"), (dtype, D, G)
print("compiled")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300,
                          cwd=Path(__file__).parent, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


def test_flash_attention_of_any_torch_version():
    """Whatever of scale, causality and grouped heads a version's varlen_attn knows, the same attention is asked for."""
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    ends = torch.tensor([0, 3], dtype=torch.int32)

    def oldest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal and key.shape == value.shape == query.shape and torch.equal(key[:, 0], key[:, 1])
        return "oldest"

    def newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0) and enable_gqa and scale == 0.5 and key.shape[1] == 2
        return "newest"
    for fake in (oldest, newest):
        assert gpu_attn.bind_varlen(fake)(q, k, k, ends, ends, 3, 3, 0.5) == fake.__name__
    flash, why = gpu_attn.find_varlen(torch.device("cpu"), torch.bfloat16)
    assert flash is None and why == "no CUDA"


def test_back_ends_are_chosen_by_name_or_refused():
    cpu = torch.device("cpu")
    assert gpu_attn.choose("auto", cpu, torch.float32).describe() == "Numba decode, torch prefill"
    with pytest.raises(ValueError, match="gpu_attn 'flash': must be auto, torch, numba, triton"):
        gpu_attn.choose("flash", cpu, torch.float32)
    with pytest.raises(ValueError, match="on CUDA take triton"):
        gpu_attn.choose("numba", torch.device("cuda"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        if importlib.util.find_spec("triton"):
            with pytest.raises(ValueError, match="needs a CUDA GPU"):
                gpu_attn.choose("triton", cpu, torch.float32)


@pytest.mark.parametrize("strategy", ["gpu-only", "symmetric", "neo"])
def test_padded_and_captured_decodes_give_the_same_tokens(strategy):
    """What CUDA graphs need, without CUDA: decodes padded to buckets, in memory that stays, by kernels that skip padding.
    Both the Triton kernels and every sub-batch of decodes are used, prompts come and go in between."""
    pytest.importorskip("triton")
    prompts = make_prompts(7, 512, 50, seed=4)
    make = lambda **kw: LLM("tiny", strategy, device=GPU.type, dtype="fp32", gpu_blocks=24, max_model_len=80, **kw)
    params = [SamplingParams(max_tokens=3 + i, ignore_eos=True) for i in range(7)]
    want = [o.token_ids for o in make(eager=True).generate(prompts, params)]
    llm = make(gpu_attn="triton")
    llm.model.eager = False
    if strategy == "neo":
        llm.perf = llm.scheduler.perf = FixedPerf(cpu=0.3)
    shapes, place = [], llm.model.place

    def spy(b, kv):
        out = place(b, kv)
        shapes.append((len(b.tokens) - len(b.last), b.num_prefill, out[0] != llm.model.linear))
        return out
    llm.model.place = spy
    assert [o.token_ids for o in llm.generate(prompts, params)] == want
    captured = [padding for padding, _, captured in shapes if captured]
    assert all((prompts == 0) == captured for _, prompts, captured in shapes)
    assert len(llm.model.graphs) < len(captured)                                  # captured once, replayed often
    assert any(captured) or strategy != "symmetric"                               # rows of padding there were
    llm.kv.check()


def test_buckets():
    """Never fewer rows, of GPU rows alone few more, few sizes; nothing padded where nothing is captured."""
    model = LLM("tiny", device="cpu", dtype="fp32", max_model_len=64).model
    assert model.bucket(5, 3) == (5, 3)
    model.eager = False
    rows = [model.bucket(n, 0)[0] for n in range(513)]
    assert all(n <= r <= n * 1.25 for n, r in enumerate(rows)) and len(set(rows)) <= 64
    assert model.bucket(5, 3) == (8, 4) and model.bucket(0, 9) == (0, 16) and model.bucket(600, 1) == (600, 1)


# ------------------------------------------------------------------------------------------------- cache and scheduler

def test_cache_accounting_catches_a_leak_and_a_shared_block():
    kv = KVCache((1, 1, 8), 4, 6, 6, 64, torch.float32, torch.device("cpu"))
    kv.reserve("a", "gpu", 9)
    kv.reserve("b", "cpu", 4)
    kv.check()
    kv.sequences["a"].blocks.append(kv.sequences["a"].blocks[0])
    with pytest.raises(AssertionError, match="gpu tier"):
        kv.check()
    kv.sequences["a"].blocks.pop()
    kv.cpu.free.pop()
    with pytest.raises(AssertionError, match="cpu tier"):
        kv.check()
    with pytest.raises(AssertionError, match="scheduler bug"):
        kv.reserve("a", "gpu", 400)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swap_moves_the_bits(dtype):
    kv = KVCache((2, 3, 8), 4, 8, 8, 64, dtype, torch.device(DEVICE))
    kv.reserve("x", "cpu", 3)                   # so that block numbers differ between the tiers
    kv.reserve("a", "gpu", 9)
    kv.gpu.k.copy_(torch.randn(kv.gpu.k.shape))
    kv.gpu.v.copy_(torch.randn(kv.gpu.v.shape))
    before = [t[:, kv.sequences["a"].blocks].clone() for t in (kv.gpu.k, kv.gpu.v)]
    kv.swap(["a"], "cpu")
    assert kv.swapped_blocks == 3
    kv.check()
    kv.settle()
    assert all(torch.equal(t[:, kv.sequences["a"].blocks], b.cpu()) for t, b in zip((kv.cpu.k, kv.cpu.v), before))
    kv.gpu.k.zero_(), kv.gpu.v.zero_()
    kv.swap(["a"], "gpu")
    kv.check()
    kv.settle()
    assert all(torch.equal(t[:, kv.sequences["a"].blocks], b) for t, b in zip((kv.gpu.k, kv.gpu.v), before))


@pytest.fixture(scope="module")
def tiny_llms():
    """strategy -> an LLM so small in memory that random traffic fills both tiers."""
    return {s: LLM("tiny", s, device="cpu", dtype="fp32", gpu_blocks=10, max_model_len=150, max_batch_tokens=48,
                   cpu_mem=blocks_to_gib(PRESETS["tiny"], 14)) for s in STRATEGIES}


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@settings(max_examples=int(os.environ.get("NEO_EXAMPLES", 15)), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_traffic_keeps_the_invariants(tiny_llms, strategy, data):
    """add, step, abort, a failing step, in any order: no block lost or shared, every request ends, CPU-tier requests move
    at least once in MAX_WAIT iterations, running GPU requests in every one."""
    llm = tiny_llms[strategy]
    for i in list(llm.outputs):                 # left by an example that failed
        llm.abort(i)
    llm.reset(strategy)
    if strategy == "neo":
        llm.perf = llm.scheduler.perf = FixedPerf(cpu=data.draw(st.sampled_from([0.01, 0.3, 5.0])))
    seen, last = {}, {}

    def step():
        running = {t: {r.id for r in llm.scheduler.decodes(t)} for t in ("gpu", "cpu")}
        moved = {o.request_id for o in llm.step()}
        for i in running["gpu"] & set(llm.outputs):
            r = llm.requests[i]
            assert i in moved or r.tier != "gpu"                 # preempted, or swapped out and waiting its turn
        for i in moved:
            last[i] = llm.scheduler.iteration
        for r in llm.scheduler.decodes("cpu"):
            assert llm.scheduler.iteration - last[r.id] < MAX_WAIT

    def invariants():
        llm.kv.check()
        for tier in ("gpu", "cpu"):
            total = llm.scheduler.num_blocks[tier]
            held = sum(len(s.blocks) for s in llm.kv.sequences.values() if s.tier == tier)
            assert total - llm.scheduler.free[tier] == held

    for op in data.draw(st.lists(st.sampled_from(["add", "add", "step", "step", "step", "abort", "fail"]), max_size=40)):
        if op == "add":
            n = data.draw(st.integers(1, 140))
            p = SamplingParams(max_tokens=data.draw(st.integers(1, 60)), ignore_eos=data.draw(st.booleans()))
            i = llm.add_request([j % 512 for j in range(n)], p)
            seen[i] = llm.outputs[i]
        elif op == "step":
            step()
        elif op == "abort" and llm.outputs:
            i = data.draw(st.sampled_from(sorted(llm.outputs)))
            assert llm.abort(i).finish_reason == "abort"
        elif op == "fail" and llm.outputs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(llm.model.attn, "store", lambda *a: 1 / 0)
                patch.setattr(cpu_attn, "store_kv", lambda *a: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    llm.step()
        invariants()
    for _ in range(3000):
        if not llm.outputs:
            break
        step()
    invariants()
    assert not llm.outputs and not llm.kv.sequences
    assert all(o.finish_reason in ("length", "stop", "abort") for o in seen.values())


def test_a_failing_step_aborts_its_requests_only():
    llm = LLM("tiny", "gpu-only", device="cpu", dtype="fp32", gpu_blocks=4, max_model_len=64)
    ids = [llm.add_request([1] * 30, SamplingParams(max_tokens=20, ignore_eos=True)) for _ in range(3)]
    outs = [llm.outputs[i] for i in ids]
    llm.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.model.attn, "decode", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.step()
    assert outs[0].finish_reason == "abort" and outs[-1].finish_reason is None
    while llm.outputs:
        llm.step()
    assert outs[-1].finish_reason == "length" and len(outs[-1].token_ids) == 20
    llm.kv.check()


def simulate(strategy, requests, gpu_blocks, cpu_blocks, perf=None, limit=10 ** 5):
    """Run a scheduler alone, without a model: every row gets token 7. Returns it, and its plans."""
    s = Scheduler(strategy, {"gpu": gpu_blocks, "cpu": cpu_blocks}, 16, 2048, 2048, perf)
    for i, (n, out) in enumerate(requests):
        s.add(Request(i, [0] * n, out, exact=True))
    plans = []
    while s.waiting or not s.idle:
        plans.append(s.plan())
        assert plans[-1].requests, "an iteration without rows"
        rows = [(len(b.prefill), len(b.gpu), len(b.cpu)) for b in plans[-1].batches]
        plans[-1].rows = rows
        s.commit(plans[-1], [7] * len(plans[-1].requests))
        assert len(plans) < limit
    return s, plans


def test_gpu_only_does_not_thrash():
    """More waiting requests neither preempt anybody nor lengthen the run of those before them."""
    rng = random.Random(0)
    requests = [(rng.randrange(100, 500), rng.randrange(5, 100)) for _ in range(200)]
    few, many = (simulate("gpu-only", requests[:n], 80, 0)[0] for n in (50, 200))
    assert few.stats["preemptions"] == many.stats["preemptions"] == 0
    rows = [s.stats["rows"] / s.stats["iterations"] for s in (few, many)]
    assert rows[1] >= 0.95 * rows[0]


@pytest.mark.parametrize("strategy", ["serial", "neo"])
def test_a_lone_request_that_outgrows_its_tier_moves_at_once(strategy):
    """Preempted from a CPU tier smaller than the GPU's, with nobody else there: no iteration without rows."""
    s = Scheduler(strategy, {"gpu": 6, "cpu": 5}, 16, 400, 2048, FixedPerf())
    s.swap_in = lambda plan: None                       # as if others had held the GPU tier until just now
    s.add(Request(0, [0] * 50, 46))
    plan = s.plan()
    s.commit(plan, [7])
    r = s.running["gpu"][0]                             # put it where it will not fit
    s._leave(r)
    s._enter(r, "cpu", r.num_kv)
    while not r.finish_reason:
        plan = s.plan()
        assert plan.requests
        s.commit(plan, [7] * len(plan.sampled))
    assert s.stats["preemptions"] == 1 and r.tier is None


def test_who_asks_for_everything_is_not_expected_to_use_it():
    """Chats that leave max_tokens open and end early, among short completions that use theirs up: the open ones reserve
    about what such requests have used, not their share of everything, and run side by side."""
    s = Scheduler("gpu-only", {"gpu": 100, "cpu": 0}, 16, 1600, 2048)
    for i in range(120):
        s.add(Request(i, [0] * 30, 1500 if i % 2 else 21, stop_ids=frozenset([9])))
    rows = []
    while s.waiting or not s.idle:
        plan = s.plan()
        rows.append(len(plan.requests))
        s.commit(plan, [9 if len(r.output) == 20 else 7 for r in plan.sampled])
    assert len(rows) < 200                                      # 1,239 when each is expected to use a share of its max_tokens


def test_running_requests_are_bounded():
    _, plans = simulate("gpu-only", [(1, 3000)] * (MAX_RUNNING + 5), 10 ** 6, 0)
    assert max(len(p.requests) for p in plans) == MAX_RUNNING


def test_gpu_only_admits_all_that_fits():
    """Two requests of 27 blocks at their longest fill 54 exactly; the third enters when the first leaves."""
    _, plans = simulate("gpu-only", [(372, 60), (372, 60), (372, 60)], 54, 0)
    assert plans[0].rows == [(1, 0, 0)] and plans[1].rows == [(1, 1, 0)]           # one prompt of PACE tokens at a time
    assert max(sum(p.rows[0]) for p in plans) == 2 and len(plans) == 120


def test_neo_equals_gpu_only_when_everything_fits_or_the_cpu_is_useless():
    requests = [(100, 30)] * 12
    base = [p.rows for p in simulate("gpu-only", requests, 500, 0)[1]]
    assert [p.rows for p in simulate("neo", requests, 500, 500, FixedPerf())[1]] == base
    base = [p.rows for p in simulate("gpu-only", requests, 30, 0)[1]]
    assert [p.rows for p in simulate("neo", requests, 30, 500, FixedPerf(cpu=1e6))[1]] == base


def test_neo_pipelines_when_the_cpu_is_slow_enough_to_hide():
    s, plans = simulate("neo", [(100, 30)] * 40, 30, 500, FixedPerf(cpu=0.1))
    assert s.stats["pipelined_iterations"] > 5
    for p in plans:
        if len(p.rows) == 2:
            a, b = (batch.load(s.perf) for batch in p.batches)
            assert b.cpu <= a.linear + a.gpu + 1e-9 and not (p.batches[1].prefill or p.batches[1].gpu)


def test_a_request_longer_than_the_gpu_tier_is_served_by_neo_and_refused_by_gpu_only():
    assert simulate("neo", [(300, 20)], 4, 100, FixedPerf(cpu=1e6))[0].stats["cpu_prefills"] == 1
    with pytest.raises(ValueError, match="300 tokens.*limit is 64"):
        simulate("gpu-only", [(300, 20)], 4, 0)


def test_layer_formula():
    a, b = Load(4.0, 1.0, 2.0), Load(1.0, 0.0, 7.0)
    assert layer_ms(a) == 6.0 and layer_ms(a._replace(cpu=0.5)) == 5.0
    assert layer_ms(a, b) == 9.0                        # CPU: 2 + 7
    assert layer_ms(a, b._replace(cpu=1.0)) == 6.0      # GPU: 4 + 1 + 1
    assert layer_ms(a, Load(3.0, 0.0, 6.5)) == 9.5      # B's own chain


def test_profile_interpolates_fits_and_learns():
    p = Profile({"linear": [[1, 2.0], [4, 2.0], [8, 4.0]], "head": [[1, 1.0]],
                 "prefill": [[n, 1 + 0.1 * n + 0.01 * n * n] for n in (1, 10, 50, 100)],
                 "gpu_decode": [[100, 1.0], [200, 2.0]], "transfer": [[10, 1.0], [20, 1.5]],
                 "cpu_decode": [[n, kv, 0.5 + 0.1 * n + 0.02 * kv] for n in (1, 4) for kv in (100, 900)]}, 2, 64)
    assert [p.linear(n) for n in (1, 3, 6, 10)] == [2.0, 2.0, 3.0, 5.0]
    assert p.prefill([20]) == pytest.approx(7.0) and p.gpu_decode(150) == pytest.approx(1.5)
    assert p.cpu_decode(2, 500) == pytest.approx(10.7) and p.transfer(30) == pytest.approx(2.0)
    want = p.iteration([p.load(4)], [1])
    assert want == (5.0, 5.0, 0.0)
    for _ in range(100):
        p.observe(p.iteration([p.load(4)], [1]), Prediction(13.0, 10.0, 0.0))
    assert p.iteration([p.load(4)], [1]).total == pytest.approx(13.0, rel=0.02)


# ------------------------------------------------------------------------------------------------------------ the loop

@pytest.fixture(scope="module")
def tiny():
    return LLM("tiny", "neo", device="cpu", dtype="fp32", gpu_blocks=8, max_model_len=128)


def test_sampling_is_seeded_and_independent_of_the_batch(tiny):
    prompts = make_prompts(6, 512, 40, seed=3)
    params = [SamplingParams(max_tokens=12, temperature=1.5, top_p=0.9, seed=i) for i in range(6)]
    together = [o.token_ids for o in tiny.generate(prompts, params)]
    alone = [tiny.generate([p], s)[0].token_ids for p, s in zip(prompts, params)]
    assert together == alone
    assert tiny.generate([prompts[0]], dataclasses.replace(params[0], seed=99))[0].token_ids != alone[0]


def test_sampling_filters():
    class Out:
        def __init__(self, **kw):
            self.params, self.rng = SamplingParams(**kw), random.Random(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    draw = lambda n=4000, **kw: np.bincount(sample(logits.expand(n, 4), [Out(**kw)] * n), minlength=4) / n
    assert draw().tolist() == [1, 0, 0, 0] and draw(temperature=1.0, top_k=1)[0] == 1
    assert draw(temperature=1.0, top_p=0.1)[0] == 1
    probs = logits.exp()[0].numpy()
    assert np.abs(draw(temperature=1.0) - probs).max() < 0.03
    assert np.abs(draw(temperature=1.0, top_k=2) - probs * [1, 1, 0, 0] / probs[:2].sum()).max() < 0.03
    assert np.abs(draw(temperature=1.0, top_p=0.8) - probs * [1, 1, 0, 0] / probs[:2].sum()).max() < 0.03
    assert np.abs(draw(temperature=0.5) - probs ** 2 / (probs ** 2).sum()).max() < 0.03


def test_step_api_streams_and_aborts(tiny):
    assert tiny.step() == []
    a, b = (tiny.add_request([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True), request_id=x) for x in "ab")
    lengths = []
    while tiny.outputs:
        for out in tiny.step():
            lengths.append((out.request_id, len(out.token_ids)))
        if len(lengths) == 4:
            assert tiny.abort(b).finish_reason == "abort"
    assert [n for i, n in lengths if i == a] == [1, 2, 3, 4, 5] and [n for i, n in lengths if i == b] == [1, 2]
    assert tiny.abort(b) is None
    tiny.kv.check()


def test_bad_requests_are_refused_and_the_others_go_on(tiny):
    good = tiny.add_request([5, 6], SamplingParams(max_tokens=3, ignore_eos=True), request_id="good")
    out = tiny.outputs[good]
    for prompt, message in (([], "empty"), ("", "tokenizer"), ("text", "tokenizer"), ([1, 512], "512.*0..511"),
                            ([-1], "-1.*0..511"), (7, "got 7"), ([1] * 128, "128 tokens.*128")):
        with pytest.raises(ValueError, match=message):
            tiny.add_request(prompt)
    with pytest.raises(ValueError, match="'good' is in flight"):
        tiny.add_request([1], request_id="good")
    with pytest.raises(ValueError, match="prompt 1: .*empty"):
        tiny.generate([[1], []])
    with pytest.raises(RuntimeError, match="in flight"):
        tiny.reset("neo")
    for kwargs, message in ((dict(max_tokens=0), "max_tokens = 0"), (dict(temperature=-1), "temperature"),
                            (dict(top_p=0), "top_p"), (dict(top_k=-1), "top_k"), (dict(temperature=1e-9), "0.0001"), (dict(stop=""), "stop")):
        with pytest.raises(ValueError, match=message):
            SamplingParams(**kwargs)
    while tiny.outputs:
        tiny.step()
    assert out.finish_reason == "length" and len(out.token_ids) == 3
    # the length limit ends a request that asks for more
    assert len(tiny.generate([[1] * 120], SamplingParams(max_tokens=100, ignore_eos=True))[0].token_ids) == 8


@pytest.mark.parametrize("kwargs, message", [
    (dict(model="llama-9b"), "unknown model 'llama-9b'.*llama-8b"), (dict(strategy="nemo"), "unknown strategy.*neo"),
    (dict(dtype="int8"), "dtype 'int8'"), (dict(device="tpu"), "device 'tpu'"), (dict(model="llama-70b"), "do not fit"),
    (dict(gpu_mem=1e-6), "--gpu-mem"), (dict(gpu_blocks=10 ** 9), "GPU tier.*does not fit"),
    (dict(cpu_mem=10 ** 6), "CPU tier.*does not fit"), (dict(gpu_blocks=0), "gpu_blocks = 0"),
    (dict(max_model_len=1), "max_model_len = 1: must be above 1"),
    (dict(cpu_mem=-1), "cpu_mem"), (dict(max_model_len=10 ** 6), "512 positions"), (dict(cpu_threads=10 ** 4), "cpu_threads"),
    (dict(max_batch_tokens=1), "max_batch_tokens = 1: must be above 1"), (dict(cpu_mem=0), "CPU tier"),
    (dict(strategy="gpu-only", gpu_blocks=4, max_model_len=100), "holds 64"), (dict(simulate="t5"), "unknown testbed 't5'.*t4")])
def test_engine_errors_name_value_limit_and_way_out(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LLM(**({"model": "tiny", "device": "cpu"} | kwargs))


def test_gpu_blocks_are_what_weights_and_measured_activations_leave(monkeypatch):
    """The largest sub-batches really run; of memory the numbers are made up, as there is none to measure."""
    llm = LLM("tiny", "gpu-only", device="cpu", dtype="fp32", max_model_len=100, max_batch_tokens=250)
    llm.model.attn.padded = True
    seen, run, MIB, block = [], llm.model.run, 1 << 20, llm.budget.block_bytes

    def spy(batches, kv, depth):
        assert depth == 2                       # or the prompts' FFN, the largest of all, is not among them
        seen.append((batches[0].prefill_lens, batches[0].num_gpu, int(batches[0].gpu_lens.sum())))
        run(batches, kv, depth)
    llm.model.run = spy
    monkeypatch.setattr(startup.torch, "cuda", types.SimpleNamespace(
        memory_allocated=lambda: 7 * MIB, memory_reserved=lambda: 8 * MIB, max_memory_reserved=lambda: 11 * MIB,
        empty_cache=lambda: None, reset_peak_memory_stats=lambda: None, mem_get_info=lambda: (1000 * MIB, 0)))
    drawn = []
    count = lambda gib, eager=True: [setattr(llm.model, "eager", eager), startup.measure_gpu_blocks(llm, gib, drawn.append)][1]
    assert count(None) == (950 - 3) * MIB // block
    assert count(470 / 1024) == (470 - 7 - 3) * MIB // block               # as a GPU of 470 MiB, 7 of them weights
    assert count(470 / 1024, eager=False) == (470 - 7 - 3 - 3 - 256) * MIB // block     # captured decodes keep memory of their own
    assert seen[0] == ([100, 100, 50], 0, 0) and seen[1] == ([], MAX_RUNNING, MAX_RUNNING * 112) and len(drawn) == 6
    with pytest.raises(ValueError, match="0.01 GiB of activations.*--gpu-mem"):
        monkeypatch.setattr(startup.torch.cuda, "max_memory_reserved", lambda: 18 * MIB)
        count(16 / 1024)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_without_cuda():
    with pytest.raises(ValueError, match="--device cpu"):
        LLM("tiny", device="cuda")


def test_pipelining_overlaps_cpu_attention_with_gpu_work(tmp_path):
    """From the timeline's own records: while the CPU attends for one sub-batch, the GPU works on the other."""
    llm = LLM("llama-160m", "symmetric", device="cpu", max_model_len=512)
    records = []
    llm.on_iteration = lambda r, start, end: records.extend(("symmetric", *x) for x in r)
    llm.generate([[1] * 200] * 8, SamplingParams(max_tokens=4, ignore_eos=True))
    gpu = [r for r in records if r[1] == "gpu"]
    cpu = [r for r in records if r[1] == "cpu"]
    both = sum(max(0.0, min(c[6], g[6]) - max(c[5], g[5])) for c in cpu for g in gpu if c[4] != g[4])
    own = sum(max(0.0, min(c[6], g[6]) - max(c[5], g[5])) for c in cpu for g in gpu
              if c[4] == g[4] and c[3] == g[3] and g[2] == "linear")
    assert own == 0.0                                    # an attention never runs before its own q, k and v exist
    assert both > 0.3 * sum(c[6] - c[5] for c in cpu)    # scheduling noise aside it is nearly all of it
    bench.write_trace(tmp_path / "t.json", records)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} >= {"linear 0A", "attend 1B", "cpu_attend 3A", "linear 12B"}
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"GPU", "CPU"}


def test_a_strategy_of_ones_own():
    """What the README shows: a class with one method, registered by name."""
    from scheduler import strategy

    @strategy("test-cpu-only")
    class CpuOnly:
        tiers = ("cpu",)

        def form(self, s, plan):
            s.admit(plan, self.tiers)
            return [Batch(plan.prefill, (), s.decodes("cpu"))]
    try:
        prompts = make_prompts(4, 512, 40)
        run = lambda name: [o.token_ids for o in
                            LLM("tiny", name, device="cpu", dtype="fp32", max_model_len=128).generate(prompts, EXACT)]
        assert run("test-cpu-only") == run("gpu-only")
    finally:
        del STRATEGIES["test-cpu-only"]


# ---------------------------------------------------------------------------------------------------------------- text

@pytest.fixture(scope="module")
def text_models(tmp_path_factory):
    """Folders of tiny's geometry with a sentencepiece and with a tokenizers tokenizer, trained on the spot."""
    import sentencepiece
    from safetensors.torch import save_file
    source = LLM("tiny", device="cpu", dtype="fp32", max_model_len=64).model
    config = dict(architectures=["LlamaForCausalLM"], num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                  hidden_size=64, intermediate_size=128, vocab_size=512, max_position_embeddings=512, head_dim=16,
                  eos_token_id=2, rms_norm_eps=1e-5)
    text = Path(__file__).read_text() + Path(bench.__file__).read_text() + "naïve café 東京 \n"
    folders = {}
    for kind in ("sentencepiece", "tokenizers"):
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        (folder / "config.json").write_text(json.dumps(config))
        save_file({k: v.contiguous().clone() for k, v in source.slots().items()}, folder / "model.safetensors")
    (folders["sentencepiece"] / "corpus.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folders["sentencepiece"] / "corpus.txt"), model_prefix=str(folders["sentencepiece"] / "tokenizer"),
        vocab_size=512, byte_fallback=True, character_coverage=0.98, minloglevel=2)
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=512, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tok.save(str(folders["tokenizers"] / "tokenizer.json"))
    return folders


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_text_streams_and_stops(text_models, kind):
    folder = str(text_models[kind])
    llm = LLM(folder, device="cpu", dtype="fp32", max_model_len=200)
    tok = load_tokenizer(folder)
    long = SamplingParams(max_tokens=60, temperature=1.0, seed=1, ignore_eos=True)
    out = llm.outputs[llm.add_request("the scheduler", long)]
    pieces = [""]
    while llm.outputs:
        llm.step()
        assert out.text.startswith(pieces[-1])
        pieces.append(out.text)
    whole, prompt = tok.decode(out.prompt_token_ids + out.token_ids), tok.decode(out.prompt_token_ids)
    assert len(pieces) > 10 and out.text.replace("\ufffd", "").strip() in whole.replace("\ufffd", "")
    assert whole.startswith(prompt)

    start = len(out.text) // 2
    stop = next(out.text[i:i + 3] for i in range(start, len(out.text)) if "\ufffd" not in out.text[i:i + 3])
    cut = llm.generate(["the scheduler"], dataclasses.replace(long, stop=[stop]))[0]
    assert cut.text == out.text[:out.text.find(stop)] and cut.finish_reason == "stop"
    assert len(cut.token_ids) < 60 and out.token_ids[:len(cut.token_ids)] == cut.token_ids
    with pytest.raises(ValueError, match="empty"):
        llm.add_request("")


def test_tokenizers_package_missing_is_named(text_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer(str(text_models["tokenizers"]))


def run_script(*argv):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300,
                          cwd=Path(__file__).parent)


def test_command_line(text_models):
    argv = ["neo.py", "--model", str(text_models["sentencepiece"]), "--device", "cpu", "--dtype", "fp32", "--max-model-len",
            "200"]
    done = run_script(*argv, "--prompt", "the scheduler", "--max-tokens", "12", "--ignore-eos", "--verbose")
    want = LLM(argv[2], device="cpu", dtype="fp32", max_model_len=200).generate(
        ["the scheduler"], SamplingParams(max_tokens=12, ignore_eos=True))[0]
    assert done.returncode == 0 and done.stdout == want.text
    assert done.stderr.count("iteration ") == 12 and "predicted" in done.stderr and "KV budget" in done.stderr
    ids = run_script("neo.py", "--model", "tiny", "--device", "cpu", "--token-ids", "1 2 3 4 5", "--max-tokens", "4", "--ignore-eos",
                     "--max-batch-tokens", "2")
    assert len(ids.stdout.split()) == 4 and "random weights" in ids.stderr
    for extra, message in ((["--prompt", ""], "empty"), (["--prompt", "x", "--max-tokens", "0"], "max_tokens = 0"),
                           (["--prompt", "x", "--strategy", "none"], "unknown strategy"),
                           (["--prompt", "x", "--no-such-flag"], "no-such-flag")):
        done = run_script(*argv, *extra)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------- benchmark

VLLM_KEYS = ["duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
             "output_throughput", "total_token_throughput",
             *(f"{s}_{m}_ms" for m in ("ttft", "tpot", "itl", "e2el") for s in ("mean", "median", "p99"))]
OUR_KEYS = ["kv_budget_gpu_tokens", "kv_budget_cpu_tokens", "mean_batch_size", "gpu_busy", "cpu_busy", "iterations",
            "pipelined_iterations", "cpu_decode_tokens", "swapped_blocks", "preemptions", "per_token_latency_ms"]


def test_bench_end_to_end(tmp_path, capsys):
    files = {k: str(tmp_path / f"{k}.json") for k in ("result", "timeline")}
    bench.main(["--model", "tiny", "--device", "cpu", "--dtype", "fp32", "--strategies", "gpu-only,serial,symmetric,neo",
                "--num-prompts", "12", "--input-len", "60", "--output-len", "12", "--request-rate", "200",
                "--result-filename", files["result"], "--timeline", files["timeline"], "--repeats", "2"])
    text = capsys.readouterr().out
    saved = json.loads(Path(files["result"]).read_text())
    assert list(saved["results"]) == ["gpu-only", "serial", "symmetric", "neo"] and "config" in saved
    for r in saved["results"].values():
        assert not set(VLLM_KEYS + OUR_KEYS) - r.keys()
        assert r["completed"] == 12 and r["failed"] == 0 and r["rounds"] == 2
        assert r["duration"] > 0 and 0 < r["gpu_busy"] <= 1 and r["mean_ttft_ms"] <= r["mean_e2el_ms"]
        assert r["total_output_tokens"] == saved["results"]["neo"]["total_output_tokens"]
    assert saved["results"]["gpu-only"]["kv_budget_cpu_tokens"] == 0 < saved["results"]["neo"]["kv_budget_cpu_tokens"]
    assert "neo / gpu-only:" in text and "KV budget" in text and "fewer than 20" in text and "random weights" in text
    assert text.count("agree on 12 of 12 requests") == 3         # float32: exactly the same tokens
    assert json.loads(Path(files["timeline"]).read_text())["traceEvents"]


def test_cards(tmp_path, capsys):
    """The ceilings, and decode over its floor, measure the machine they run on and say what it is."""
    bench.main(["--card", "--device", "cpu", "--result-filename", str(tmp_path / "c.json")])
    limits = json.loads((tmp_path / "c.json").read_text())["limits"]
    assert min(limits[k] for k in ("copy_gb_s", "matrix_tflops", "host_read_gb_s")) > 0 and "to_gpu_gb_s" not in limits
    assert "would play the GPU" in capsys.readouterr().out
    gpu_card.main(["floor", "--model", "tiny", "--device", "cpu", "--batches", "1,3,900", "--input-len", "20", "--steps", "4",
                   "--gpu-blocks", "300", "--result-filename", str(tmp_path / "f.json")])
    found = json.loads((tmp_path / "f.json").read_text())
    assert [r["batch"] for r in found["rows"]] == [1, 3] and found["machine"]["gpu"] is None            # 900 do not fit
    for r in found["rows"]:
        assert r["over_floor"] == pytest.approx(r["ms"] / r["floor_ms"]) and r["ms"] > r["floor_ms"] > 0
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch sees none"):
            gpu_card.main(["all"])


def interrupt_at(monkeypatch, n):
    """Ctrl-C at the n-th iteration of any engine."""
    steps, step = [], LLM.step

    def interrupted(self):
        steps.append(1)
        if len(steps) == n:
            raise KeyboardInterrupt
        return step(self)
    monkeypatch.setattr(LLM, "step", interrupted)


def test_bench_survives_ctrl_c(tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 40)
    with pytest.raises(SystemExit, match="130"):
        bench.main(["--model", "tiny", "--device", "cpu", "--strategies", "gpu-only,neo", "--num-prompts", "30",
                    "--input-len", "40", "--output-len", "8", "--result-filename", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())["results"]
    assert list(result) == ["gpu-only"] and 0 < result["gpu-only"]["completed"] < 30 and result["gpu-only"]["interrupted"]
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("name", workload.FIGURES)
def test_drawn_lengths_meet_the_published_figures(name):
    for want in workload.FIGURES[name]:
        mean, p50, p90, p99, top, least = want
        x = np.array(workload.draw_lengths(want, 200_000, np.random.default_rng(0)))
        assert x.mean() == pytest.approx(mean, rel=0.02) and x.max() <= top and x.min() >= least
        for share, value in ((0.5, p50), (0.9, p90), (0.99, p99)):
            assert (x < value).mean() <= share + 0.005 and (x <= value).mean() >= share - 0.005


@pytest.mark.skipif(not DATA.is_dir(), reason="no traces here")
@pytest.mark.parametrize("file, name", [("osc_lengths.json", "osc"), ("azure_code.csv", "azure-code")])
def test_traces_have_the_published_figures(file, name):
    pairs = np.array(workload.read_lengths(DATA / file))
    for column, (mean, p50, _, _, top, least) in zip(pairs.T, workload.FIGURES[name]):
        assert column.mean() == pytest.approx(mean, rel=1e-3) and abs(np.median(column) - p50) <= 1
        assert column.max() == top and column.min() == least


def test_workload_files_and_clipping(tmp_path):
    (tmp_path / "a.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,100,7\ny,3,0\nz,20,90\n")
    assert workload.read_lengths(tmp_path / "a.csv") == [(100, 7), (20, 90)]
    for text in ("ContextTokens\n5\n", "[1, 2]", ""):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ValueError, match="bad: no"):
            workload.read_lengths(tmp_path / "bad")
    assert workload.fit_requests([100, 20, [1] * 100], [7, 90, 10], 64) == ([57, 20, [1] * 54], [7, 44, 10], 3)
    class Words:
        encode = staticmethod(lambda text: list(range(len(text.split()))))
    turn = lambda *texts: {"conversations": [{"value": t} for t in texts]}
    (tmp_path / "s.json").write_text(json.dumps([turn("a b c", "d e"), turn("alone"), turn("", "x")]))
    assert workload.read_sharegpt(tmp_path / "s.json", Words) == [([0, 1, 2], 2)]
    with pytest.raises(ValueError, match="tokenizer"):
        workload.read_sharegpt(tmp_path / "s.json", None)


def test_load_latency_curves(tmp_path, capsys):
    """Simulated, so that the rates found are exact: one below the limit was run, one just above it, for each strategy."""
    argv = ["--model", "llama-7b", "--simulate", "t4", "--gpu-blocks", "54", "--dataset-name", "osc", "--num-prompts", "150", "--rates",
            "0.2,2", "--at-latency", "0.4", "--goodput", "ttft:3000", "tpot:300", "--result-filename", str(tmp_path / "r.json")]
    bench.main(argv)
    saved, out = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    for s, points in saved["results"].items():
        took = {float(r): x["per_token_latency_ms"] / 1e3 for r, x in points.items()}
        found = saved["at_latency"][s]
        assert {0.2, 2.0} <= took.keys() and took[found] <= 0.4 and min(r for r, t in took.items() if t > 0.4 and r > found) < 1.03 * found
        assert all(x["request_goodput"] <= x["request_throughput"] for x in points.values())
        assert points["0.2"]["request_goodput"] > 0
    assert saved["at_latency"]["neo"] > 2 * saved["at_latency"]["gpu-only"] and "not measured" in out and "KV budget of 864" in out
    bench.main(["--model", "tiny", "--device", "cpu", "--rates", "50", "--num-prompts", "5", "--input-len", "20", "--output-len", "4"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("gpu-only", "neo"))]
    assert [float(row.split()[1]) for row in rows] == [50, 50]
    bench.main([*argv[:6], "--dataset-name", "osc", "--num-prompts", "3", "--strategies", "neo", "--at-latency", "60"])
    assert "any rate, even all at once" in capsys.readouterr().out


def test_load_latency_survives_ctrl_c(tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 150)
    with pytest.raises(SystemExit, match="130"):
        bench.main(["--model", "tiny", "--simulate", "t4", "--gpu-blocks", "20", "--rates", "1,2,3,4,5,6", "--num-prompts", "9", "--output-len",
                    "9", "--input-len", "30", "--strategies", "gpu-only", "--result-filename", str(tmp_path / "r.json")])
    assert 0 < len(json.loads((tmp_path / "r.json").read_text())["results"]["gpu-only"]) < 6
    assert "interrupted" in capsys.readouterr().err


def test_replay_of_a_trace(tmp_path, capsys):
    """By its time stamps, faster, in order, the first requests only."""
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,40,5\n2023-11-16 18:17:09.0319600,30,3\n"
                     "2023-11-16 18:17:05.9799600,20,4\n2023-11-16 18:18:05.9799600,20,4\n")
    ins, outs, arrivals, source = workload.replay(trace, 3, 4.0)
    assert (ins, outs) == ([40, 20, 30], [5, 4, 3]) and arrivals == pytest.approx([0, 0.5, 1.263], abs=1e-3) and "4 times" in source
    bench.main(["--model", "tiny", "--simulate", "t4", "--gpu-blocks", "20", "--dataset-name", "lengths", "--dataset-path", str(trace),
                "--replay", "--speed", "4", "--num-prompts", "3", "--strategies", "gpu-only", "--result-filename", str(tmp_path / "r.json")])
    r = json.loads((tmp_path / "r.json").read_text())["results"]["gpu-only"]
    assert r["completed"] == 3 and r["duration"] > 1.26
    with pytest.raises(ValueError, match="not a lengths file"):
        (tmp_path / "no.csv").write_text("ContextTokens,GeneratedTokens\n1,1\n")
        workload.replay(tmp_path / "no.csv", 3, 1)


def test_bench_rejects_bad_flags():
    for argv, message in ((["--model", "llama-9b"], "unknown model"), (["--strategies", "gpu-only,none"], "unknown strategy"),
                          (["--num-prompts", "0"], "--num-prompts"), (["--dataset-name", "lengths"], "--dataset-path"),
                          (["--frobnicate"], "frobnicate"), (["--rates", "1,0"], "--rates 0.0: must be above 0"),
                          (["--goodput", "itl:5"], "--goodput itl"), (["--goodput", "ttft"], "ttft:2000"), (["--replay"], "--dataset-path"), (["--rates", "1", "--repeats", "2"], "--repeats"), (["--speed", "2"], "--replay"), (["--dataset-name", "lengths", "--dataset-path", "/no"], "/no")):
        done = run_script("bench.py", *(argv if "--model" in argv else ["--model", "tiny", *argv]))
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------- simulation

def simulated(strategy, requests, bed="t4", model="llama-7b", **kwargs):
    """Serve (tokens in, out) requests, all at once, on a simulated testbed; (LLM, bench result)."""
    llm = LLM(model, strategy, simulate=find_testbed(bed) if isinstance(bed, str) else bed,
              **{"gpu_blocks": 54, "cpu_mem": 18.0, "max_model_len": 832, "max_batch_tokens": 832} | kwargs)
    ins, outs = zip(*requests)
    work = workload.Workload([[0] * n for n in ins], list(outs), [0.0] * len(ins), "test", 0)
    return llm, bench.serve(llm, strategy, work, quiet=True)[0]


def test_virtual_clock_by_hand():
    """One prompt of 100 tokens, then decodes, on round numbers: 1 TFLOP/s, 1 GB/s, no launches; 3 ms an iteration."""
    bed = dataclasses.replace(find_testbed("t4"), tflops=1, gpu_bw=1, compute_eff=1, memory_eff=1, launch_us=0, cpu_launch_us=0,
                              host_ms=3, pcie_bw=2, cpu_bw=4)
    cfg = PRESETS["tiny"]
    E, F, V, L, D = cfg.n_embd, cfg.n_ffn, cfg.vocab_size, cfg.n_layer, cfg.n_head * cfg.head_dim
    kv = 2 * cfg.n_kv_head * cfg.head_dim
    layer = E * (D + kv) + D * E + 3 * E * F + 2 * E                       # parameters of a layer; E: the last norm below
    layer += E / L
    bytes_ms, flops_ms = 1e-6, 1e-9
    head = max(2 * V * E * bytes_ms, 2 * V * E * flops_ms) + 3
    prompt = L * (max(2 * layer * bytes_ms, 2 * layer * 100 * flops_ms) + 2 * 100 * 100 * D * flops_ms) + head
    llm = LLM("tiny", "gpu-only", simulate=bed, gpu_blocks=20, cpu_mem=0.001)
    llm.add_request([0] * 100, SamplingParams(max_tokens=3, ignore_eos=True))
    times = []
    while llm.outputs:
        llm.step()
        times.append(1e3 * llm.clock())
    decode = [L * (2 * layer + 2 * kv * n) * bytes_ms + head for n in (101, 102)]
    np.testing.assert_allclose(np.diff([0, *times]), [prompt, *decode], rtol=1e-9)

    llm = LLM("tiny", "serial", simulate=bed, gpu_blocks=1, cpu_mem=0.001)  # in the CPU tier: nothing overlaps
    llm.add_request([0] * 100, SamplingParams(max_tokens=2, ignore_eos=True))
    llm.step()
    start = llm.clock()
    llm.step()
    cpu = 101 * 2 * kv * 0.25e-6 + (8 * D + 2 * kv) * 0.5e-6
    assert 1e3 * (llm.clock() - start) == pytest.approx(L * (2 * layer * bytes_ms + cpu) + head)


def test_simulated_swaps_cost_pcie_time():
    llm = LLM("tiny", "neo", simulate="t4", gpu_blocks=8, cpu_mem=0.01, max_model_len=64)
    llm.model.perf.bed = None                                              # linear() and head() are replaced just below
    llm.model.perf.linear = llm.model.perf.gpu_decode = lambda n: 0.0
    llm.model.perf.head, llm.model.perf.transfer = (lambda n: 0.0), (lambda n: 1e-3 * n)
    llm.kv.reserve("a", "gpu", 40)
    llm.kv.swap(["a"], "cpu")
    llm.kv.release("a")
    batch = llm.kv.bind(Batch(gpu=[Request("b", [0, 0], 1, tier="gpu", num_kv=1, output=[0])]))
    llm.model.run([batch], llm.kv)
    assert 1e3 * llm.clock() == pytest.approx(3 * 4 * 16 * llm.budget.token_bytes * 1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_simulation_conserves_tokens_and_stays_below_the_fluid_limit(strategy):
    rng = random.Random(1)
    requests = [(rng.randrange(50, 500), rng.randrange(2, 90)) for _ in range(60)]
    llm, result = simulated(strategy, requests)
    assert result["completed"] == 60 and result["failed"] == 0
    assert result["total_input_tokens"] == sum(i for i, _ in requests)
    assert result["total_output_tokens"] == sum(o for _, o in requests)
    stats = llm.stats()
    assert stats["gpu_decode_tokens"] + stats["cpu_decode_tokens"] == sum(o - 1 for _, o in requests)
    assert (stats["cpu_decode_tokens"] > 0) == (strategy != "gpu-only")
    assert 0.1 < result["fluid_share"] <= 1.0
    assert all(llm.scheduler.free[t] == llm.scheduler.num_blocks[t] for t in ("gpu", "cpu"))
    llm.kv.check()


def test_simulated_strategies_in_easy_corners():
    requests = [(300 + 7 * i % 100, 30 + i % 20) for i in range(80)]
    rate = lambda s, bed="t4", **kw: simulated(s, requests, bed, **kw)[1]["output_throughput"]
    base = rate("gpu-only")
    fast = find_testbed("t4", cpu_bw=1e6, pcie_bw=1e6, cpu_launch_us=0)
    assert rate("neo", fast) > 4 * base and rate("symmetric", fast) > 3 * base
    assert rate("neo", find_testbed("t4", cpu_bw=1e-6)) == pytest.approx(base, rel=1e-9)
    big, roomy = find_testbed("t4", gpu_gb=200), dict(gpu_blocks=3000)
    assert rate("neo", big, **roomy) == pytest.approx(rate("gpu-only", big, **roomy), rel=1e-9)


@pytest.mark.parametrize("bed, model, blocks, length", [
    ("t4", "llama-7b", 54, (372, 45)), ("g5.2xlarge", "llama-8b", 400, (1000, 100)), ("g5.4xlarge", "llama-8b", 400, (1000, 20)),
    ("a100", "llama-13b", 500, (1000, 300)), ("2xh100", "llama-70b", 700, (2000, 50))])
def test_neo_never_falls_below_gpu_only(bed, model, blocks, length):
    """However weak the CPU or short the outputs, beyond 2 % (the start, when nothing is known yet)."""
    rng = random.Random(2)
    requests = [tuple(round(n * rng.uniform(0.9, 1.1)) for n in length) for _ in range(150)]
    kwargs = dict(bed=bed, model=model, gpu_blocks=blocks, cpu_mem=None, max_model_len=min(2400, 16 * blocks),
                  max_batch_tokens=4096)
    neo, base = (simulated(s, requests, **kwargs)[1]["output_throughput"] for s in ("neo", "gpu-only"))
    assert neo >= 0.98 * base


def test_nobody_starves_in_the_cpu_tier_of_a_simulation():
    llm = LLM("llama-8b", "neo", simulate="g5.2xlarge", gpu_blocks=200, max_model_len=1200)
    for i in range(40):
        llm.add_request([0] * (700 + 5 * i), SamplingParams(max_tokens=100, ignore_eos=True))
    waited = 0
    while llm.outputs:
        llm.step()
        waits = [llm.scheduler.iteration - r.moved for r in llm.scheduler.running["cpu"].values() if r.num_kv]
        waited = max([waited, *waits])
    assert llm.stats()["cpu_decode_tokens"] and 1 < waited <= MAX_WAIT


def test_fluid_limit_by_hand():
    """Memory-bound, then compute-bound: numbers that a pencil checks."""
    perf = Roofline(find_testbed("t4", compute_eff=1, memory_eff=1), PRESETS["llama-7b"])
    t, W = perf.token_bytes * 32, (32 * perf.params + perf.embed) * 2 / 320e9
    rate, binds = fluid_limit(perf, [(400, 101)], 900, 0)
    K = 100 * 450.5                                                        # tokens x iterations of a request
    f = 1 / (W + 900 * t / 320e9)
    assert rate == pytest.approx(900 * f / K) and binds == ["GPU bandwidth", "GPU memory"]
    more, binds = fluid_limit(perf, [(400, 101)], 900, 10 ** 6)
    assert more == pytest.approx(900 / K / W * (1 - 900 * t / 320e9 / (W + 900 * t / 320e9)) + 33e9 / (K * t), rel=1e-2)
    assert "CPU bandwidth" in binds
    rate, binds = fluid_limit(perf, [(3000, 2)], 10 ** 6, 10 ** 6)
    ops = 32 * (2 * perf.params * 3001 + 2 * 3000 ** 2 * 4096) + 2 * 2 * perf.embed
    assert rate == pytest.approx(65e12 / ops) and binds == ["GPU compute"]
    assert fluid_limit(perf, [(100, 1)], 900, 0)[1] == ["GPU compute"]


def test_testbeds_hold_their_documented_numbers():
    for name, row in {"t4": (65, 16, 320, 12), "g5.4xlarge": (70, 24, 600, 25), "2xh100": (989, 80, 3350, 50)}.items():
        bed = TESTBEDS[name]
        assert (bed.tflops, bed.gpu_gb, bed.gpu_bw, bed.pcie_bw) == row
    assert [TESTBEDS[f"g5.{n}xlarge"].host_gb for n in (2, 4, 8, 16)] == [32, 64, 128, 256]
    assert TESTBEDS["2xh100"].tp == 2
    for name, low, high in (("t4", 31, 35), ("g5.2xlarge", 20, 23), ("g5.4xlarge", 21, 24), ("g5.8xlarge", 31, 40),
                            ("g5.16xlarge", 70, 90)):
        assert low <= TESTBEDS[name].cpu_bw <= high
    for kwargs, message in ((dict(cpu_bw=0), "cpu_bw = 0 must be positive"), (dict(memory_eff=1.2), "memory_eff = 1.2"),
                            (dict(launch_us=-1), "launch_us"), (dict(tp=0), "tp = 0")):
        with pytest.raises(ValueError, match=message):
            find_testbed("t4", **kwargs)


def test_bench_simulates_the_same_twice(tmp_path, capsys):
    argv = ["--model", "llama-7b", "--simulate", "t4", "--gpu-blocks", "54", "--max-batch-tokens", "832", "--dataset-name",
            "osc", "--num-prompts", "40", "--request-rate", "1", "--cpu-bw", "60"]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for f in files:
        bench.main([*argv, "--result-filename", str(f)])
    out = capsys.readouterr().out
    assert "simulated t4" in out and "Not a measurement" in out and "60 GB/s" in out and "fluid limit" in out
    a, b = (json.loads(f.read_text()) for f in files)
    assert a["results"] == b["results"] and a["results"]["neo"]["completed"] == 40


def test_a_simulation_from_a_measured_profile_follows_the_real_engine(capsys):
    """Not how well, which a noisy machine cannot tell, but that the same plans are made and the clock is of their kind."""
    bench.main(["--model", "tiny", "--device", "cpu", "--simulate", "self", "--num-prompts", "6", "--input-len", "40",
                "--output-len", "10"])
    out = capsys.readouterr().out
    assert "neo sim" in out and "simulated / real, neo: throughput" in out and "simulated / real, gpu-only" in out
    real = LLM("tiny", "neo", device="cpu", gpu_blocks=8, cpu_mem=0.01)
    twin = LLM("tiny", "neo", simulate=real)
    for llm in (real, twin):
        llm.generate([[1] * 30] * 3, SamplingParams(max_tokens=5, ignore_eos=True))
    for key in ("prefill_tokens", "preemptions"):
        assert real.stats()[key] == twin.stats()[key]
    assert 0 < twin.stats()["wall_s"] < 100 * real.stats()["wall_s"]


def test_figures(tmp_path, capsys):
    assert figures.rate_at({0.5: 0.1, 1.0: 0.2, 2.0: 1.2}, 0.7) == pytest.approx(1.5)
    assert figures.rate_at({0.5: 0.1, 1.0: 0.2}, 5) == 1.0
    assert figures.main(bench.parse_args(["--figure", "7"])) == 1 and "unknown figure '7'" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    files = tmp_path / "f.json", tmp_path / "f.png"
    with pytest.raises(SystemExit) as status:
        bench.main(["--figure", "6c", "--num-prompts", "40", "--result-filename", str(files[0]), "--plot", str(files[1])])
    assert not status.value.code and "gpu-only" in capsys.readouterr().out
    assert len(json.loads(files[0].read_text())["results"]) == 13 and files[1].stat().st_size > 1000

