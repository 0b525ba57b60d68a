"""Tests of the engine: exact tokens against transformers, every fast path against its slow
reference, invariants, bad input. The kernels have their tests in
kernels/, the server in server/, the experiments in lab/.

    pip install -r requirements.txt -r requirements-extra.txt && pytest -q

Models are tiny and made on the spot; nothing is downloaded. What is slow or random is asserted on
tokens, invariants and overlap, never on time.
"""
import ast
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bench
import chat
import cpu_attn
import gpu_attn
import hub
import measure
import neo
import startup
import strategies
import timeline
import workload
from aim import best_aim
from bounds import fluid_limit, pipelining_bound
from captures import Captures
from checkpoint import PRESETS, load_config, load_tokenizer
from kernels.products import Packed, Plain, can_pack
from kvcache import KVCache
from measure import POINT_KINDS, load_profile, save_profile
from model import rope_table
from neo import LLM, SamplingParams
from options import Options
from perfmodel import (
    TESTBEDS,
    Load,
    PerfModel,
    Prediction,
    Profile,
    Roofline,
    Work,
    find_testbed,
    layer_ms,
    layer_spans,
)
from plan import Plan
from request import RequestOutput
from sampling import change_logits, draw, sample
from scheduler import MAX_RUNNING, Batch, Request, Scheduler, StrategyError
from strategies import STRATEGIES, strategy

DEVICE = os.environ.get("NEO_TEST_DEVICE", "cpu")  # cuda: the exactness tests on a GPU
ROOT = Path(__file__).resolve().parent
DATA = ROOT.parent / "shared" / "data"
EXACT = SamplingParams(max_tokens=24, ignore_eos=True)
KV32 = {"gpu": torch.float32, "cpu": torch.float32}


class FixedPerf(PerfModel):
    """A performance model for tests: weights take 1 ms whatever the rows, a CPU decode `cpu` ms,
    nothing is learnt."""

    def __init__(self, cpu=0.2, n_layer=4):
        super().__init__(n_layer, {"gpu": 128, "cpu": 128})
        self.cpu = cpu

    def linear(self, n_tokens):
        return 1.0 + 0.01 * n_tokens

    def lm_head(self, n_rows):
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
    return blocks * 2 * c.n_layer * c.n_kv_head * block_size * c.head_dim * itemsize / 2**30


def make_prompts(n, vocab, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randrange(1, longest))] for _ in range(n)]


# ---------------------------------------------------------- exact tokens, against transformers

GEOMETRIES = {
    "mha-d64-linear": dict(
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        hidden_size=256,
        vocab_size=503,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
    ),
    "gqa4-d128-llama3": dict(
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        hidden_size=192,
        vocab_size=512,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "gqa8-d80-tied": dict(
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=80,
        hidden_size=320,
        vocab_size=331,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
    "mistral-gqa2": dict(
        model_type="mistral",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        hidden_size=96,
        vocab_size=311,
        sliding_window=128,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
    "qwen2-bias": dict(
        model_type="qwen2",
        num_attention_heads=7,
        num_key_value_heads=1,
        hidden_size=224,
        vocab_size=307,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
    "qwen3-norms": dict(
        model_type="qwen3",
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        hidden_size=128,
        vocab_size=401,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    ),
}


def save_checkpoint(name, folder):
    """A random checkpoint of a geometry, saved by transformers -> its model there."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    geometry = dict(GEOMETRIES[name])
    cfg = transformers.AutoConfig.for_model(
        geometry.pop("model_type", "llama"),
        num_hidden_layers=3,
        intermediate_size=416,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        **geometry,
    )
    hf = transformers.AutoModelForCausalLM.from_config(cfg).eval()
    with torch.no_grad():                   # they start as zeros and ones
        for key, w in hf.named_parameters():
            if key.endswith((".bias", "q_norm.weight", "k_norm.weight")):
                w.add_(0.3 * torch.randn(w.shape))
    hf.save_pretrained(folder)
    return hf


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (folder, transformers model)."""
    folders = {name: tmp_path_factory.mktemp(name) for name in GEOMETRIES}
    return {name: (folder, save_checkpoint(name, folder)) for name, folder in folders.items()}


def hf_generate(hf, prompts, n, **kwargs):
    """Greedy tokens of a left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = hf.generate(
        ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0, **kwargs
    )
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
    """float32 greedy tokens, in tiers so small that swaps, preemptions and CPU prefills happen."""
    folder, _ = checkpoints[name]
    prompts, want = reference[name]
    cfg = load_config(str(folder))
    cpu_blocks = {"gpu-only": 20, "gpu-whole": 20, "symmetric": 18}.get(strategy, 11)
    llm = LLM(
        str(folder),
        strategy,
        device=DEVICE,
        dtype="fp32",
        gpu_blocks=10,
        cpu_mem=blocks_to_gib(cfg, cpu_blocks),
        max_model_len=110,
    )
    outs = llm.generate(prompts, SamplingParams(max_tokens=40))
    stats = llm.stats()
    llm.kv.check()
    assert [o.token_ids for o in outs] == want
    assert stats["preemptions"] + stats["swapped_blocks"] > 0
    if strategy in ("serial", "neo"):
        assert (
            stats["swapped_blocks"] > 0
            and stats["cpu_prefills"] > 0
            and stats["cpu_decode_tokens"] > 0
        )
    if strategy == "symmetric":
        assert stats["pipelined_iterations"] > 0 and stats["gpu_decode_tokens"] == 0
    assert (
        stats["gpu_blocks_free"] == stats["gpu_blocks"]
        and stats["cpu_blocks_free"] == stats["cpu_blocks"]
    )


QUESTIONS = ("What is the capital of", "Write a poem about", "How do I cook", "Explain why",
             "Translate to French:")
THINGS = ("France", "rain", "rice", "the sky", "a cat", "42 trains", "naïve café", "def f(x):")


@pytest.mark.real_weights
def test_a_real_chat_model():
    """SmolLM2: 40 chat prompts under every strategy in a starved GPU tier, float32 tokens equal
    transformers'. Its template and its tokenizer give what transformers' give."""
    transformers = pytest.importorskip("transformers")
    if not (hub.DEMO_FOLDER / "config.json").is_file():
        pytest.skip("no demo model: python -m lab.demo_model makes it")
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub.DEMO_FOLDER)
    hf = transformers.AutoModelForCausalLM.from_pretrained(hub.DEMO_FOLDER, dtype=torch.float32)
    llm = LLM("smollm2", device="cpu", dtype="fp32", gpu_blocks=12, max_model_len=96, cpu_mem=0.02)
    render = chat.load_chat_template(llm.path, llm.tokenizer)
    prompts = []
    for question, thing in itertools.product(QUESTIONS, THINGS):
        messages = [{"role": "user", "content": f"{question} {thing}"}]
        prompts.append(render(messages, 96))
        assert prompts[-1] == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False)
    hf.generation_config.eos_token_id = None    # min_new_tokens would forbid its id
    want = hf_generate(hf, prompts, 8)
    assert "Paris" in tokenizer.decode(want[0])
    for name in STRATEGIES:
        llm.reset(name)
        outs = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        assert [o.token_ids for o in outs] == want, name
        assert name.startswith("gpu-") or llm.stats()["cpu_decode_tokens"] > 0
        llm.kv.check()
        assert outs[0].text == tokenizer.decode(want[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_tokens_equal_transformers_when_neo_pipelines(checkpoints, reference, name):
    """neo with a performance model under which two sub-batches pay: GPU and CPU rows together."""
    folder, _ = checkpoints[name]
    prompts, want = reference[name]
    llm = LLM(str(folder), "neo", device=DEVICE, dtype="fp32", gpu_blocks=14, max_model_len=110)
    llm.perf = llm.scheduler.perf = FixedPerf(cpu=0.3, n_layer=3)
    outs = llm.generate(prompts, SamplingParams(max_tokens=40))
    stats = llm.stats()
    assert [o.token_ids for o in outs] == want
    assert (
        stats["pipelined_iterations"] > 0
        and stats["gpu_decode_tokens"] > 0
        and stats["cpu_decode_tokens"] > 0
    )


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 5e-2), ("fp16", 6e-3)])
def test_logits_within_tolerance(checkpoints, dtype, tolerance):
    """Prompt and decode logits of a pipelined pass over both tiers, against transformers in
    float32: |a - b| / |b|."""
    folder, hf = checkpoints["gqa4-d128-llama3"]
    llm = LLM(str(folder), device=DEVICE, dtype=dtype, gpu_blocks=20, max_model_len=110)
    kv, prompts = llm.kv, make_prompts(6, 512, 60, seed=2)
    with torch.no_grad():
        want = [hf(torch.tensor([p])).logits[0] for p in prompts]

    def check(batches):
        logits = llm.model.run([kv.bind(b, i) for i, b in enumerate(batches)], kv).logits
        requests = [r for b in batches for r in b.requests]
        for r, got in zip(requests, logits.cpu(), strict=True):
            ref = want[r.id][r.num_tokens - 1]
            assert (got - ref).norm() / ref.norm() < tolerance

    # all but the last token as prompts of either tier, then the last one as a decode
    requests = [
        Request(i, p[:-1] or p, 1, tier="gpu" if i % 2 else "cpu", num_scheduled=len(p[:-1] or p))
        for i, p in enumerate(prompts)
    ]
    check([Batch(requests[:3]), Batch(requests[3:])])
    for r, p in zip(requests, prompts):
        r.num_cached, r.output = len(r.prompt), [p[-1]]
    check(
        [
            Batch(gpu_decodes=[r for r in requests if r.tier == "gpu"], cpu_decodes=requests[:1]),
            Batch(cpu_decodes=[r for r in requests[1:] if r.tier == "cpu"]),
        ]
    )


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("chunk", [7, 16, 33])
def test_chunked_prefill_gives_the_same_tokens(checkpoints, reference, strategy, chunk):
    """Prompts longer than an iteration's prompt tokens, into either tier, recomputed after
    preemptions, too."""
    folder, _ = checkpoints["gqa4-d128-llama3"]
    prompts, want = reference["gqa4-d128-llama3"]
    cfg = load_config(str(folder))
    llm = LLM(
        str(folder),
        strategy,
        device=DEVICE,
        dtype="fp32",
        gpu_blocks=10,
        max_model_len=110,
        max_batch_tokens=chunk,
        cpu_mem=blocks_to_gib(cfg, 18 if strategy == "symmetric" else 11),
    )
    seen, run = [], llm.model.run

    def spy(batches, kv):
        seen.extend(
            (sum(b.prefill_lens), b.num_stored > 0 and any(n for n, _ in b.prefill_past))
            for b in batches
        )
        return run(batches, kv)

    llm.model.run = spy
    assert [o.token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=40))] == want
    stats = llm.stats()
    assert (
        max(rows for rows, _ in seen) <= chunk
        and stats["chunks"] > 10
        and stats["prefill_tokens"] >= sum(map(len, prompts))
    )
    # later chunks over what lies in host memory
    assert any(fetched for _, fetched in seen) == (not strategy.startswith("gpu-"))
    llm.kv.check()


def test_a_chunk_costs_the_attention_that_it_adds():
    perf = FixedPerf()
    perf.prefill = lambda lengths: sum(1.0 + n + n * n for n in lengths)
    whole = perf.load(Work(10, [(0, 10)]))
    parts = [perf.load(Work(4, [(0, 4)])), perf.load(Work(6, [(4, 10)]))]
    assert parts[0].gpu_ms + parts[1].gpu_ms == pytest.approx(whole.gpu_ms)
    fetched = perf.load(Work(6, [(4, 10)], num_fetched=4))
    # fetching goes on beside everything else
    assert fetched == parts[1]._replace(move_ms=perf.transfer(4 * 128))


def test_long_prompts_do_not_freeze_the_others():
    """Decodes go on in every iteration while a long prompt is prefilled; iterations are short."""

    def iterations(budget):
        llm = LLM(
            "llama-7b",
            "gpu-whole",
            simulate="a100",
            gpu_blocks=2000,
            max_model_len=4000,
            max_batch_tokens=budget,
        )
        short = [
            llm.outputs[llm.add_request([0] * 50, SamplingParams(max_tokens=60, ignore_eos=True))]
            for _ in range(4)
        ]
        for _ in range(10):
            llm.step()
        long = llm.outputs[
            llm.add_request([0] * 3900, SamplingParams(max_tokens=2, ignore_eos=True))
        ]
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
    outs = LLM(
        str(tmp_path), device="cpu", dtype="fp32", gpu_blocks=20, max_model_len=110
    ).generate(prompts, SamplingParams(max_tokens=40))
    for out, want in zip(outs, tokens):
        end = next((i + 1 for i, t in enumerate(want) if t in eos), 40)
        assert out.token_ids == want[:end]
        assert out.finish_reason == ("stop" if want[end - 1] in eos else "length")
    assert {o.finish_reason for o in outs} == {"stop", "length"} or len(outs[0].token_ids) <= 6


# --------------------------------------------------------------------------------- checkpoints


def as_meta(folder, hf, shards):
    """Write a transformers model the way Meta ships one: their names, RoPE layout and split."""
    c, sd = hf.config, hf.state_dict()

    def neighbours(w):  # halves of a head -> neighbours
        return w.view(-1, 2, c.head_dim // 2, c.hidden_size).transpose(1, 2).reshape(w.shape)

    full = {
        "tok_embeddings.weight": (sd["model.embed_tokens.weight"], 1),
        "norm.weight": (sd["model.norm.weight"], None),
        "output.weight": (sd["lm_head.weight"], 0),
    }
    for i in range(c.num_hidden_layers):
        a, b = f"model.layers.{i}.", f"layers.{i}."
        full |= {
            b + "attention.wq.weight": (neighbours(sd[a + "self_attn.q_proj.weight"]), 0),
            b + "attention.wk.weight": (neighbours(sd[a + "self_attn.k_proj.weight"]), 0),
            b + "attention.wv.weight": (sd[a + "self_attn.v_proj.weight"], 0),
            b + "attention.wo.weight": (sd[a + "self_attn.o_proj.weight"], 1),
            b + "feed_forward.w1.weight": (sd[a + "mlp.gate_proj.weight"], 0),
            b + "feed_forward.w2.weight": (sd[a + "mlp.down_proj.weight"], 1),
            b + "feed_forward.w3.weight": (sd[a + "mlp.up_proj.weight"], 0),
            b + "attention_norm.weight": (sd[a + "input_layernorm.weight"], None),
            b + "ffn_norm.weight": (sd[a + "post_attention_layernorm.weight"], None),
        }
    for s in range(shards):
        part = {
            k: (w if dim is None else w.chunk(shards, dim)[s]).clone()
            for k, (w, dim) in full.items()
        }
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{s:02d}.pth")
    (folder / "params.json").write_text(
        json.dumps(
            dict(
                dim=c.hidden_size,
                n_layers=c.num_hidden_layers,
                n_heads=c.num_attention_heads,
                n_kv_heads=c.num_key_value_heads,
                multiple_of=32,
                norm_eps=c.rms_norm_eps,
                vocab_size=-1,
                max_seq_len=256,
            )
        )
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_meta_checkpoint(tmp_path, shards):
    transformers = pytest.importorskip("transformers")
    cfg = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=352,
        vocab_size=96,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
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
    one, many = (
        LLM(str(f), device="cpu", dtype="fp32", max_model_len=64, gpu_attn="torch")
        for f in (folder, tmp_path)
    )
    a, b = one.model.weight_views(), many.model.weight_views()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_broken_checkpoints(checkpoints, tmp_path):
    """Each error names the tensor or the file."""
    from safetensors.torch import load_file, save_file

    folder, _ = checkpoints["mha-d64-linear"]
    good = load_file(folder / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    cases = {
        "lacks.*" + norm: {k: v for k, v in good.items() if k != norm},
        "unexpected.*model.extra": good | {"model.extra": torch.ones(2)},
        norm + r" has shape \[5\].*\[256\]": good | {norm: torch.ones(5)},
    }
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    load = lambda: LLM(str(tmp_path), device="cpu", dtype="fp32", max_model_len=64)
    with pytest.raises(ValueError, match="no .*safetensors"):
        load()
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load()
    whole = (folder / "model.safetensors").read_bytes()
    for data in (whole[: len(whole) // 2], b"not tensors at all"):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="model.safetensors is truncated"):
            load()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {norm: "gone.safetensors"}})
    )
    with pytest.raises(ValueError, match="gone.safetensors .*missing"):
        load()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load()


LLAMAS = [geometry for geometry in GEOMETRIES.values() if "model_type" not in geometry]


@pytest.mark.parametrize("rope", LLAMAS)
def test_rope_config_of_older_transformers(rope, tmp_path):
    """rope_theta + rope_scaling read like rope_parameters."""
    base = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=128,
        **{k: v for k, v in rope.items() if k != "rope_parameters"},
    )
    new = dict(rope["rope_parameters"])
    old = dict(new)
    theta = old.pop("rope_theta")
    tables = []
    for extra in (
        dict(rope_parameters=new),
        dict(rope_theta=theta, rope_scaling=old if len(old) > 1 else None),
        dict(
            rope_theta=theta,
            rope_scaling={"type": old["rope_type"], "factor": 1.0}
            | {k: v for k, v in old.items() if k != "rope_type"}
            if len(old) > 1
            else None,
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(base | extra))
        tables.append(rope_table(load_config(str(tmp_path)), 32))
    assert all(torch.equal(a, b) for t in tables[1:] for a, b in zip(tables[0], t))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(architectures=["GemmaForCausalLM"], model_type="gemma"),
            "GemmaForCausalLM.*not supported: this engine runs Llama.*Mistral.*Qwen2.*Qwen3",
        ),
        (dict(attention_bias=True), "attention_bias"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
        (dict(rope_scaling={"type": "yarn"}, rope_parameters={"rope_type": "default"}), "yarn"),
        (dict(rope_scaling={"type": "linear"}), "config.json: .*linear.*factor = None"),
        (dict(rope_scaling={"type": "linear", "factor": 0}), "factor = 0"),
        (dict(rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor = None"),
        (dict(rope_theta=0), "config.json: rope_theta = 0"),
        (dict(rope_parameters={"full": {"rope_type": "default"}}), "layer to layer"),
        (dict(rope_scaling="llama3"), "rope_scaling = 'llama3': must be a JSON object"),
        (dict(num_hidden_layers="4"), "config.json: num_hidden_layers = '4'"),
        (dict(hidden_size=None), "config.json: it lacks hidden_size"),
        (dict(num_attention_heads=0), "config.json: num_attention_heads = 0"),
        (dict(num_key_value_heads=0), "config.json: num_key_value_heads = 0"),
        (dict(rms_norm_eps="small"), "config.json: rms_norm_eps = 'small'"),
        (dict(vocab_size=3.5), "vocab_size = 3.5"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings = 'false'"),
        (dict(eos_token_id="2"), "eos_token_id"),
        (dict(num_key_value_heads=3), "multiple of 3"),
    ],
)
def test_unsupported_configs(change, message, tmp_path):
    base = dict(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=1,
        num_attention_heads=4,
        hidden_size=64,
        intermediate_size=32,
        vocab_size=32,
    )
    (tmp_path / "config.json").write_text(json.dumps(base | change))
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path))


def test_windows_and_ends_of_the_families(tmp_path):
    """A window that can matter is refused with the flag that helps; the ends of a chat model are
    those of generation_config.json."""
    base = dict(num_hidden_layers=1, num_attention_heads=4, hidden_size=64, intermediate_size=32,
                vocab_size=99, max_position_embeddings=4000, eos_token_id=5)

    def read(**values):
        (tmp_path / "config.json").write_text(json.dumps(base | values))
        return load_config(str(tmp_path))
    assert read(model_type="mistral", sliding_window=64).sliding_window == 64
    assert read(model_type="mistral", sliding_window=None).sliding_window is None
    assert read(model_type="qwen2", sliding_window=64, use_sliding_window=False,
                layer_types=["full_attention"]).sliding_window is None
    assert read(model_type="qwen3", sliding_window=64, use_sliding_window=True).sliding_window == 64
    assert read(model_type="llama", sliding_window=64).sliding_window is None
    read(model_type="mistral", sliding_window=64)
    with pytest.raises(ValueError, match="sliding window of 64 .*--max-model-len 64"):
        LLM(str(tmp_path), simulate="t4")
    LLM(str(tmp_path), simulate="t4", max_model_len=64)
    bare = LLM(str(tmp_path / "config.json"), simulate="t4", max_model_len=64)
    assert bare.cfg == load_config(str(tmp_path))
    with pytest.raises(ValueError, match="config.json has no weights.*--simulate"):
        LLM(str(tmp_path / "config.json"), device="cpu", max_model_len=64)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read(model_type="qwen2").eos_ids == (7, 9)
    with pytest.raises(ValueError, match="'int4': must be auto, .*half"):
        LLM("tiny", device="cpu", dtype="int4")
    assert LLM("tiny", simulate="t4", dtype="half").dtype == torch.float16


def test_names_of_the_hub(monkeypatch, tmp_path):
    """Only what is needed is asked for; every failure is one line with the way out."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find_model("Qwen/Qwen3-0.6B@main", weights=False) == str(tmp_path)
    assert hub.find_model("Qwen/Qwen3-0.6B") == str(tmp_path)
    (_, light), (repository, whole) = asked
    assert repository == "Qwen/Qwen3-0.6B" and light["revision"] == "main"
    assert "*.safetensors" in whole["allow_patterns"] and whole["revision"] is None
    assert not any("safetensors" in pattern for pattern in light["allow_patterns"])
    for name in ("llama-7b", str(tmp_path), "no such/name here", "nothing"):
        assert hub.find_model(name) == name
    errors = huggingface_hub.errors
    for kind, message in ((errors.GatedRepoError, "gated: accept.*HF_TOKEN"),
                          (errors.RepositoryNotFoundError, "no such folder here, and no such"),
                          (errors.RevisionNotFoundError, "the hub has .*not this rev"),
                          (errors.LocalEntryNotFoundError, "the hub cannot be.*give a folder")):
        error = kind.__new__(kind)          # how it is made differs between versions

        def fail(*args, error=error, **options):
            raise error
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match=f"a/b: {message}"):
            LLM("a/b", device="cpu")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="a/b is no folder.*pip install huggingface_hub"):
        LLM("a/b", device="cpu")
    monkeypatch.setattr(hub, "DEMO_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="smollm2: .*python -m lab.demo_model"):
        LLM("smollm2", device="cpu")


def test_a_conversation_in_the_terminal(text_models, tmp_path, monkeypatch, capsys):
    """Each answer continues the whole conversation; Ctrl-C stops an answer, and leaves where none
    runs; what outgrows the model loses its oldest exchange."""
    folder = tmp_path / "chat"
    shutil.copytree(text_models["tokenizers"], folder)
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    llm, prompts = LLM(str(folder), device="cpu", dtype="fp32", max_model_len=100), []
    add, step = llm.add_request, llm.step

    def spy(ids, params):
        prompts.append(llm.tokenizer.decode(ids))
        return add(ids, params)
    monkeypatch.setattr(llm, "add_request", spy)

    def talk(*lines):
        lines = iter(lines)

        def ask(prompt):
            line = next(lines)
            if isinstance(line, type):
                raise line
            return line
        monkeypatch.setattr("builtins.input", ask)
        chat.converse(llm, SamplingParams(max_tokens=10, ignore_eos=True))
        return capsys.readouterr()
    talk("the cache", "", "the blocks", EOFError)
    assert "cache" in prompts[0] and prompts[1].startswith(prompts[0]) and "blocks" in prompts[1]
    assert not llm.outputs

    def interrupted():
        if len(llm.outputs) and next(iter(llm.outputs.values())).token_ids:
            monkeypatch.setattr(llm, "step", step)
            raise KeyboardInterrupt
        return step()
    monkeypatch.setattr(llm, "step", interrupted)
    prompts.clear()
    talk("one", "two", KeyboardInterrupt)
    assert len(prompts) == 2 and not llm.outputs
    llm.kv.check()
    prompts.clear()
    shown = talk(*["the scheduler plans the cache"] * 9, EOFError)
    assert "oldest question and answer are left out" in shown.err and len(prompts) == 9
    with pytest.raises(ValueError, match="tiny comes without a chat template"):
        chat.converse(LLM("tiny", device="cpu"), SamplingParams())


def test_a_benchmark_of_a_name(text_models, monkeypatch, capsys):
    """--model takes every name that LLM takes."""
    monkeypatch.setattr(hub, "DEMO_FOLDER", text_models["tokenizers"])
    argv = ["--model", "smollm2", "--device", "cpu", "--dtype", "fp32", "--num-prompts", "2",
            "--input-len", "5", "--output-len", "3", "--strategies", "gpu-only"]
    status, out, _ = run_main(bench.main, argv, capsys)
    assert not status and "smollm2" in out


CONVERSATIONS = (
    ("What is the capital of France?", "Paris."), ("Name a colour.", "Red, of course."),
    ("Write a haiku about rain.", "Rain on an old roof;\nthe garden drinks in silence.\nTea."),
    ("naïve café, 東京?", "Three words: two are French and one is a city."))


@pytest.mark.parametrize("model", [
    "tokenizers", pytest.param("smollm2", marks=pytest.mark.real_weights)])
def test_a_benchmark_of_conversations(model, text_models, tmp_path, capsys):
    """ShareGPT's JSON: the model's tokenizer counts the first turns and the answers, and the
    strategies that use the CPU tier agree with gpu-only on every token."""
    if model == "smollm2" and not (hub.DEMO_FOLDER / "config.json").is_file():
        pytest.skip("no demo model: python -m lab.demo_model makes it")
    chats, result = tmp_path / "chats.json", tmp_path / "result.json"
    alone = [{"from": "human", "value": "no answer"}]       # left out
    chats.write_text(json.dumps([{"id": "0", "conversations": alone}] + [
        {"id": str(i), "conversations": [{"from": "human", "value": ask},
                                         {"from": "gpt", "value": answer}, *alone]}
        for i, (ask, answer) in enumerate(CONVERSATIONS, 1)]))
    path = text_models.get(model, model)
    argv = ["--model", str(path), "--dataset-name", "sharegpt", "--dataset-path", str(chats),
            "--device", "cpu", "--dtype", "fp32", "--num-prompts", str(len(CONVERSATIONS)),
            "--strategies", "gpu-only,symmetric,neo", "--result-filename", str(result)]
    status, out, err = run_main(bench.main, argv, capsys)
    assert not status, err
    count = load_tokenizer(str(hub.find_model(str(path)))).encode
    for r in json.loads(result.read_text())["results"].values():
        assert r["completed"] == len(CONVERSATIONS) and r["failed"] == 0
        assert r["total_input_tokens"] == sum(len(count(ask)) for ask, _ in CONVERSATIONS)
        assert r["total_output_tokens"] == sum(len(count(answer)) for _, answer in CONVERSATIONS)
    assert f"sharegpt, 4 of 4 in {chats}" in out
    assert out.count("agree on 4 of 4 requests") == 2


def test_mistrals_own_files(tmp_path):
    """params.json with hidden_dim: another spelling of the Meta layout."""
    (tmp_path / "params.json").write_text(json.dumps(dict(
        dim=64, n_layers=2, head_dim=16, hidden_dim=96, n_heads=4, n_kv_heads=2, norm_eps=1e-5,
        sliding_window=4096, vocab_size=99)))
    cfg = load_config(str(tmp_path))
    assert (cfg.n_ffn, cfg.head_dim, cfg.n_kv_head, cfg.sliding_window) == (96, 16, 2, 4096)


def test_values_and_files_that_would_be_wrong_in_silence(text_models, tmp_path):
    """NaN weights, integer weights, a list for a config, files outside the folder, half a
    tokenizer: each error names the file or the tensor."""
    from safetensors.torch import load_file, save_file

    folder = text_models["tokenizers"]
    good, config = load_file(folder / "model.safetensors"), (folder / "config.json").read_text()
    load = lambda: LLM(str(tmp_path), device="cpu", dtype="fp32", max_model_len=64)
    (tmp_path / "config.json").write_text(config)
    name = "model.layers.2.mlp.down_proj.weight"
    for bad, message in (
        (torch.full_like(good[name], float("nan")), name + " has NaN"),
        (good[name].to(torch.int64), name + " has dtype torch.int64"),
    ):
        save_file(good | {name: bad}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load()
    save_file(good, tmp_path / "model.safetensors")
    whole = (folder / "tokenizer.json").read_text()
    for text in ("", "{}", whole[: len(whole) // 2]):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="tokenizer.json is truncated or no tokenizer"):
            load()
    (tmp_path / "tokenizer.json").unlink()
    for index in ({}, [], {"weight_map": {name: "../model.safetensors"}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="index.json: its weight_map"):
            load()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: must be a JSON object"):
        load()


def test_a_model_of_one_layer_starts(checkpoints, tmp_path):
    """Its profile has no layer in the middle."""
    config = json.loads((checkpoints["mha-d64-linear"][0] / "config.json").read_text())
    transformers = pytest.importorskip("transformers")
    cfg = transformers.LlamaConfig(**config | {"num_hidden_layers": 1, "eos_token_id": None})
    hf = transformers.LlamaForCausalLM(cfg).eval()
    hf.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), device="cpu", dtype="fp32", max_model_len=64, gpu_blocks=8)
    prompts = make_prompts(4, cfg.vocab_size, 20)
    outs = llm.generate(prompts, SamplingParams(max_tokens=6))
    assert [out.token_ids for out in outs] == hf_generate(hf, prompts, 6)


def test_a_damaged_or_unwritable_profile_is_measured_again(tmp_path, monkeypatch):
    path, key = tmp_path / "neo" / "profile.json", {"device": "x"}
    points = {kind: [[1] * (width - 1) + [2.0]] for kind, width in POINT_KINDS.items()}
    save_profile(path, key, points)
    assert load_profile(path, key) == points and load_profile(path, {"device": "y"}) is None
    whole = path.read_bytes()
    for damaged in (b"", b"\xff\xfe", b"[]", b"{}", whole[: len(whole) // 2], b"[" * 100_000,
                    whole.replace(b"lm_head", b"lm_hand"), whole.replace(b"[1, 2.0]", b"[]"),
                    whole.replace(b"2.0", b'"x"'), whole.replace(b"2.0", b"NaN"),
                    whole.replace(b"2.0", b"0"), whole.replace(b"[[1, 2.0]]", b"[]"),
                    whole.replace(b"[[1, 2.0]]", b"[3]")):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="profile.json cannot be used"):
            assert load_profile(path, key) is None
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="profile.json cannot be used"):
        assert load_profile(path, key) is None
    with pytest.warns(UserWarning, match="profile.json"):
        save_profile(path, key, points)             # a folder stands there
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be saved"):
        save_profile(tmp_path / "file" / "neo" / "p.json", key, points)
    full = tmp_path / "full.json"
    save_profile(full, key, points)

    def half(self, text):
        with self.open("w") as f:
            f.write(text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.warns(UserWarning, match="no space left"):
        save_profile(full, {"device": "z"}, points)
    assert load_profile(full, key) == points        # what was there is whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full.json", "neo"]


def test_presets_have_the_published_sizes():
    billions = {
        "llama-160m": 0.162,
        "llama-1b": 1.236,
        "llama-7b": 6.738,
        "llama-8b": 8.030,
        "llama-13b": 13.016,
        "llama-70b": 70.554,
        "llama-3b": 3.213,
        "mistral-7b": 7.248,
        "qwen2.5-7b": 7.616,
        "qwen3-0.6b": 0.596,
        "qwen3-8b": 8.191,
    }
    for name, size in billions.items():
        assert PRESETS[name].num_params / 1e9 == pytest.approx(size, abs=0.001)


def test_random_weights_are_seeded_and_varied():
    a, b, c = (
        LLM("tiny", device="cpu", dtype="fp32", seed=s, max_model_len=64, gpu_attn="torch").model
        for s in (3, 3, 4)
    )
    assert torch.equal(a.layers[2].w_down, b.layers[2].w_down) and not torch.equal(a.embed, c.embed)
    w = torch.cat([x.flatten() for x in a.weight_views().values() if x.ndim == 2])
    assert abs(w.mean()) < 1e-3 and w.std() == pytest.approx(0.02, rel=0.05)
    assert len(torch.unique(a.embed, dim=0)) == len(a.embed)


# ----------------------------------------------------------------------------------- attention


GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # CPU: Triton's interpreter


@pytest.mark.parametrize("strategy", ["gpu-only", "symmetric", "neo"])
def test_padded_and_captured_decodes_give_the_same_tokens(strategy, monkeypatch):
    """What CUDA graphs need, without CUDA: decodes padded to a few sizes, in memory that stays, by
    kernels that skip padding. Prompts come and go in between."""
    pytest.importorskip("triton")
    prompts = make_prompts(6, 512, 40, seed=4)
    params = [SamplingParams(max_tokens=2 + i, ignore_eos=True) for i in range(6)]

    def make(**kw):
        return LLM("tiny", strategy, device=GPU.type, dtype="fp32", max_model_len=80,
                   gpu_blocks=8 if strategy == "neo" else 24, **kw)
    def fours(n):  # true sizes are exact up to 8, and more rows than that are slow here
        return -(-n // 4) * 4
    monkeypatch.setattr(Captures, "padded_rows",
                        lambda self, num_gpu, num_cpu, num_prefill:
                        (fours(num_gpu), fours(num_cpu)))
    eager = make(eager=True)
    want = [o.token_ids for o in eager.generate(prompts, params)]
    # the interpreter is slow: do not measure a profile with it
    monkeypatch.setattr("neo.profile_points", lambda *args: eager.points)
    llm = make(gpu_attn="triton")
    captures = llm.model.captures
    captures.stages.clear()  # those of the warm-up
    if strategy == "neo":
        llm.perf = llm.scheduler.perf = FixedPerf(cpu=0.3)
    shapes, made, capture = [], [], llm.model.queue.capture
    llm.model.queue.capture = lambda calls: made.append(calls) or capture(calls)

    def spy_on(name):
        find = getattr(captures, name)

        def spy(b, kv):
            found = find(b, kv)
            num_padding = len(b.tokens) - len(b.sampled_rows)
            if found or name == "stages_of":
                shapes.append((num_padding, b.num_prefill, found is not None, b.num_gpu_rows,
                               b.num_cpu))
            return found
        setattr(captures, name, spy)
    spy_on("whole_pass")
    spy_on("stages_of")
    assert [o.token_ids for o in llm.generate(prompts, params)] == want
    assert all(captured for _, prompts, captured, _, _ in shapes if not prompts)
    num_captures = len(captures.passes) + len(captures.stages)
    assert len(made) == num_captures > 0  # each size once
    assert strategy != "gpu-only" or (captures.passes and not captures.stages)
    if strategy == "neo":  # and padding beside GPU and CPU rows
        assert any(padding and gpu and cpu for padding, _, _, gpu, cpu in shapes), shapes
    llm.kv.check()


def test_sampled_rows_stand_behind_padding():
    """Each request's sampled row holds its last token, whatever is padded around it."""
    kv = KVCache((1, 1, 8), 4, {"gpu": 20, "cpu": 20}, 64, KV32, torch.float32,
                 torch.device("cpu"))

    def decode(i, tier):
        return Request(i, [0] * i, 9, tier=tier, num_cached=i, output=[100 + i])
    gpu, cpu = [decode(i, "gpu") for i in (3, 5, 6)], [decode(i, "cpu") for i in (2, 4, 7)]
    b = kv.bind(Batch([], gpu, cpu), pad=lambda num_gpu, num_cpu, _: (num_gpu + 5, num_cpu + 2))
    assert len(b.tokens) == 13 and (b.num_gpu_rows, b.num_cpu) == (8, 3)
    assert b.tokens[b.sampled_rows].tolist() == [103, 105, 106, 102, 104, 107]
    assert b.positions[b.sampled_rows].tolist() == [3, 5, 6, 2, 4, 7]
    assert b.tokens.count_nonzero() == 6 and (b.gpu_slots[3:] == -1).all()
    assert b.gpu_lens.tolist() == [4, 6, 7, 0, 0, 0, 0, 0] and b.cpu_lens.tolist() == [3, 5, 8]
    prompt = Request(8, [1, 2, 3, 4], 1, tier="cpu", num_scheduled=4)
    chunk = Request(9, [5, 6, 7, 8], 1, tier="gpu", num_scheduled=2)
    b = kv.bind(Batch([chunk, prompt], gpu, cpu))
    assert b.tokens[b.sampled_rows].tolist() == [4, 103, 105, 106, 102, 104, 107]
    assert (b.num_stored, b.num_prefill, b.num_host_rows) == (4, 6, 7)


def test_padded_sizes():
    """Never fewer rows, of GPU rows alone few more, few sizes; no padding without captures."""
    model = LLM("tiny", device="cpu", dtype="fp32", max_model_len=64).model
    assert model.captures is None and model.padded_rows(5, 3) == (5, 3)
    model.may_capture = True
    model.allow_captures(4, 512)
    padded_rows = model.padded_rows
    rows = [padded_rows(n, 0)[0] for n in range(513)]
    assert all(n <= r <= n * 1.25 for n, r in enumerate(rows)) and len(set(rows)) <= 34
    assert padded_rows(5, 3) == (5, 3) and padded_rows(0, 9) == (0, 10)
    assert padded_rows(600, 1) == (600, 1)
    assert padded_rows(3, 2, 40) == (3, 5) and padded_rows(3, 0, 600) == (3, 0)
    for gpu, cpu in ((3, 6), (13, 1), (100, 30), (512, 512)):   # beside CPU rows, sizes add
        more_gpu, more_cpu = padded_rows(gpu, cpu)
        assert more_gpu == rows[gpu] and more_cpu >= cpu
        assert more_gpu + more_cpu in {*rows, *(2 * r for r in rows)}


# ------------------------------------------------------------------------- cache and scheduler


def test_cache_accounting_catches_a_leak_and_a_shared_block():
    kv = KVCache((1, 1, 8), 4, {"gpu": 6, "cpu": 6}, 64, KV32, torch.float32,
                 torch.device("cpu"))
    kv.reserve("a", "gpu", 9)
    kv.reserve("b", "cpu", 4)
    kv.check()
    kv.sequences["a"].blocks.append(kv.sequences["a"].blocks[0])
    with pytest.raises(AssertionError, match="gpu tier"):
        kv.check()
    kv.sequences["a"].blocks.pop()
    kv.tiers["cpu"].free_blocks.pop()
    with pytest.raises(AssertionError, match="cpu tier"):
        kv.check()
    with pytest.raises(AssertionError, match="scheduler bug"):
        kv.reserve("a", "gpu", 400)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swap_moves_the_bits(dtype):
    kv = KVCache((2, 3, 8), 4, {"gpu": 8, "cpu": 8}, 64, {"gpu": dtype, "cpu": dtype}, dtype,
                 torch.device(DEVICE))
    gpu, cpu = kv.tiers["gpu"], kv.tiers["cpu"]
    kv.reserve("x", "cpu", 3)  # so that block numbers differ between the tiers
    kv.reserve("a", "gpu", 9)
    gpu.k.copy_(torch.randn(gpu.k.shape))
    gpu.v.copy_(torch.randn(gpu.v.shape))

    def stored(tier):
        return [t[:, kv.sequences["a"].blocks].cpu().clone() for t in (tier.k, tier.v)]
    before = stored(gpu)
    kv.swap(["a"], "cpu")
    assert kv.swapped_blocks == 3
    kv.check()
    kv.settle()
    assert all(map(torch.equal, stored(cpu), before))
    gpu.k.zero_()
    gpu.v.zero_()
    kv.swap(["a"], "gpu")
    kv.check()
    kv.settle()
    assert all(map(torch.equal, stored(gpu), before))


@pytest.fixture(scope="module")
def tiny_llms():
    """strategy -> an LLM so small in memory that random traffic fills both tiers."""
    return {
        s: LLM(
            "tiny",
            s,
            device="cpu",
            dtype="fp32",
            gpu_blocks=10,
            max_model_len=150,
            max_batch_tokens=48,
            cpu_mem=blocks_to_gib(PRESETS["tiny"], 14),
        )
        for s in STRATEGIES
    }


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@settings(
    max_examples=int(os.environ.get("NEO_EXAMPLES", 15)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_traffic_keeps_the_invariants(tiny_llms, strategy, data):
    """add, step, abort, a failing step, in any order: no block lost or shared, every request ends,
    no CPU decode waits longer than neo's bound, GPU decodes get a token in each iteration."""
    llm = tiny_llms[strategy]
    for i in list(llm.outputs):  # left by an example that failed
        llm.abort(i)
    llm.reset(strategy)
    if strategy == "neo":
        llm.perf = llm.scheduler.perf = FixedPerf(cpu=data.draw(st.sampled_from([0.01, 0.3, 5.0])))
    seen, bound = {}, watch_waits(llm)

    def step():
        running = {t: {r.id for r in llm.scheduler.decodes(t)} for t in ("gpu", "cpu")}
        moved = {o.request_id for o in llm.step()}
        for i in running["gpu"] & set(llm.outputs):
            r = llm.outputs[i].request
            assert i in moved or r.tier != "gpu"  # preempted, or swapped out and waiting its turn
        for r in llm.scheduler.decodes("cpu"):
            assert llm.scheduler.iteration - r.last_run <= bound()

    def invariants():
        llm.kv.check()
        for tier in ("gpu", "cpu"):
            total = llm.scheduler.num_blocks[tier]
            held = sum(len(s.blocks) for s in llm.kv.sequences.values() if s.tier == tier)
            assert total - llm.scheduler.num_free[tier] == held

    for op in data.draw(
        st.lists(
            st.sampled_from(["add", "add", "step", "step", "step", "abort", "fail"]), max_size=40
        )
    ):
        if op == "add":
            n = data.draw(st.integers(1, 140))
            p = SamplingParams(
                max_tokens=data.draw(st.integers(1, 60)), ignore_eos=data.draw(st.booleans())
            )
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
    ids = [
        llm.add_request([1] * 30, SamplingParams(max_tokens=20, ignore_eos=True)) for _ in range(3)
    ]
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


def watch_waits(llm_or_scheduler):
    """-> a function: iterations that a CPU decode may have waited by now, as Neo's docstring says:
    M + w (t - 1), from what was planned so far."""
    s, most = getattr(llm_or_scheduler, "scheduler", llm_or_scheduler), [1, 0.0]
    plan_once = s.plan

    def plan():
        plan = plan_once()
        gpu, cpu = s.decodes("gpu"), s.decodes("cpu")
        most[0] = max(most[0], len(cpu))
        if cpu and not any(b.cpu_decodes for b in plan.batches):
            shapes = strategies.Shapes(s.perf, plan.prefill, [], gpu, cpu)
            tokens = sum(r.num_scheduled / r.num_tokens for r in plan.prefill) + len(gpu)
            t = shapes.ms(0, len(cpu)) / plan.predicted.total_ms
            most[1] = max(most[1], tokens * (t - 1))
        return plan

    s.plan = plan
    return lambda: sum(most) + 1


def simulate(strategy, requests, gpu_blocks, cpu_blocks, perf=None, limit=10**5):
    """Run a scheduler alone, without a model: every row gets token 7. Returns it, and its plans."""
    blocks = {"gpu": gpu_blocks, "cpu": cpu_blocks}
    s = Scheduler(STRATEGIES[strategy](), blocks, 16, 2048, 2048, perf or FixedPerf())
    for i, (n, out) in enumerate(requests):
        s.add(Request(i, [0] * n, out, exact_length=True))
    plans = []
    while s.waiting or not s.nothing_runs:
        plans.append(s.plan())
        assert plans[-1].requests, "an iteration without rows"
        rows = [(len(b.prefill), len(b.gpu_decodes), len(b.cpu_decodes)) for b in plans[-1].batches]
        plans[-1].rows = rows
        s.commit(plans[-1], [7] * len(plans[-1].sampled))
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
    """Preempted from a CPU tier smaller than the GPU's, with nobody else there: no iteration
    without rows."""
    blocks = {"gpu": 6, "cpu": 5}
    s = Scheduler(STRATEGIES[strategy](), blocks, 16, 400, 2048, FixedPerf())
    s.refill_gpu = lambda plan: None  # as if others had held the GPU tier until just now
    s.add(Request(0, [0] * 50, 46))
    plan = s.plan()
    s.commit(plan, [7])
    r = s.running["gpu"][0]
    assert s.swap_out(Plan(), r)  # put it where it will not fit
    while not r.finish_reason:
        plan = s.plan()
        assert plan.requests
        s.commit(plan, [7] * len(plan.sampled))
    assert s.stats["preemptions"] == 1 and r.tier is None


def test_who_asks_for_everything_is_not_expected_to_use_it():
    """Chats that leave max_tokens open and end early, among short completions that use theirs up:
    the open ones reserve about what such requests have used, not their share of everything, and
    run side by side."""
    s = Scheduler(STRATEGIES["gpu-whole"](), {"gpu": 100, "cpu": 0}, 16, 1600, 2048)
    for i in range(120):
        s.add(Request(i, [0] * 30, 1500 if i % 2 else 21, stop_ids=frozenset([9])))
    rows = []
    while s.waiting or not s.nothing_runs:
        plan = s.plan()
        rows.append(len(plan.requests))
        s.commit(plan, [9 if len(r.output) == 20 else 7 for r in plan.sampled])
    assert len(rows) < 200  # 1,239 when each is expected to use a share of its max_tokens


def test_running_requests_are_bounded():
    _, plans = simulate("gpu-whole", [(1, 3000)] * (MAX_RUNNING + 5), 10**6, 0)
    assert max(len(p.requests) for p in plans) == MAX_RUNNING


def test_gpu_only_admits_all_that_fits():
    """Two requests of 27 blocks at their longest fill 54 exactly; the third enters when the first
    leaves."""
    _, plans = simulate("gpu-whole", [(372, 60), (372, 60), (372, 60)], 54, 0)
    # one prompt of PACE tokens at a time
    assert plans[0].rows == [(1, 0, 0)] and plans[1].rows == [(1, 1, 0)]
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
            a, b = (s.perf.load(batch.work()) for batch in p.batches)
            assert not p.batches[1].gpu_decodes
            assert layer_ms(a, b) < layer_ms(a) + layer_ms(b)   # something is hidden
    both = [p for p in plans if len(p.batches) == 2 and all(b.prefill for b in p.batches)]
    assert both  # prompts in both sub-batches


def test_a_request_longer_than_the_gpu_tier_is_served_by_neo_and_refused_by_gpu_only():
    assert simulate("neo", [(300, 20)], 4, 100, FixedPerf(cpu=1e6))[0].stats["cpu_prefills"] == 1
    with pytest.raises(ValueError, match="300 tokens.*limit is 64"):
        simulate("gpu-only", [(300, 20)], 4, 0)


def test_layer_formula():
    a, b = Load(4.0, 1.0, 2.0), Load(1.0, 0.0, 7.0)
    assert layer_ms(a) == 6.0 and layer_ms(a._replace(cpu_ms=0.5)) == 5.0
    assert layer_ms(a, b) == 9.0  # CPU: 2 + 7
    assert layer_ms(a, b._replace(cpu_ms=1.0)) == 6.0  # GPU: 4 + 1 + 1
    assert layer_ms(a, Load(3.0, 0.0, 6.5)) == 9.5  # B's own chain


def test_profile_interpolates_fits_and_learns():
    p = Profile(
        {
            "linear": [[1, 2.0], [4, 2.0], [8, 3.0]],
            "lm_head": [[1, 1.0]],
            "prefill": [[n, 1 + 0.1 * n + 0.01 * n * n] for n in (1, 10, 50, 100)],
            "gpu_decode": [[100, 1.0], [200, 2.0]],
            "transfer": [[10, 1.0], [20, 1.5]],
            "cpu_decode": [[n, kv, 0.5 + 0.1 * n + 0.02 * kv] for n in (1, 4) for kv in (100, 900)],
        },
        2,
        {"gpu": 64, "cpu": 64},
    )
    # beyond the last point in proportion, not along a slope that noise may have made too low
    assert [p.linear(n) for n in (1, 3, 6, 16)] == [2.0, 2.0, 2.5, 6.0]
    assert p.prefill([20]) == pytest.approx(7.0) and p.gpu_decode(150) == pytest.approx(1.5)
    assert p.cpu_decode(2, 500) == pytest.approx(10.7) and p.transfer(30) == pytest.approx(2.0)
    want = p.iteration([p.load(Work(4))], 1)
    assert want == (5.0, 5.0, 0.0)
    for _ in range(100):
        p.observe(p.iteration([p.load(Work(4))], 1), Prediction(13.0, 10.0, 0.0))
    assert p.iteration([p.load(Work(4))], 1).total_ms == pytest.approx(13.0, rel=0.02)


def test_profile_measures_as_many_rows_as_an_iteration_may_have(tiny):
    budget = dataclasses.replace(tiny.budget, max_batch_tokens=500)     # max_model_len is 128
    lengths = list(measure.prompt_lengths(budget, 1000))
    assert [sum(x) for x in lengths] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert lengths[-1] == [128, 128]
    assert sum(list(measure.prompt_lengths(budget, 8))[-1]) == 128      # what 8 blocks of 16 hold


# ------------------------------------------------------------------------------------ the loop


@pytest.fixture(scope="module")
def tiny():
    return LLM("tiny", "neo", device="cpu", dtype="fp32", gpu_blocks=8, max_model_len=128)


def test_sampling_is_seeded_and_independent_of_the_batch(tiny):
    prompts = make_prompts(6, 512, 40, seed=3)
    params = [SamplingParams(max_tokens=12, temperature=1.5, top_p=0.9, seed=i) for i in range(6)]
    together = [o.token_ids for o in tiny.generate(prompts, params)]
    alone = [tiny.generate([p], s)[0].token_ids for p, s in zip(prompts, params)]
    assert together == alone
    assert (
        tiny.generate([prompts[0]], dataclasses.replace(params[0], seed=99))[0].token_ids
        != alone[0]
    )


def test_a_seed_draws_the_same_where_rounding_swaps_two_logits(tiny):
    """Tokens are drawn in the order of their ids, so near ties may swap places."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(0, 0.01, (200, 300)).astype(np.float32))
    swapped = rows + 1e-6 * torch.from_numpy(rng.normal(0, 1, rows.shape).astype(np.float32))
    assert (rows.argsort(-1) != swapped.argsort(-1)).any()
    params = [SamplingParams(temperature=1.0)] * len(rows)
    numbers = [(i + 0.5) / len(rows) for i in range(len(rows))]
    a, b = draw(rows, params, numbers), draw(swapped, params, numbers)
    assert sum(x != y for x, y in zip(a, b)) <= 1       # a number may lie on a token's edge


def test_the_smallest_and_the_largest_number_draw_tokens_that_are_kept():
    logits = torch.tensor([[-9e9, 2.0, 1.0, 0.0, -9e9]]).expand(3, 5)
    params = [SamplingParams(temperature=1.0, top_k=k) for k in (2, 0, 2)]
    assert draw(logits, params, [0.0, 1 - 2**-53, 1 - 2**-53]) == [1, 3, 2]


def test_penalties_against_plain_python():
    rng = random.Random(0)
    params = SamplingParams(8, temperature=1.0, repetition_penalty=1.7, presence_penalty=0.5,
                            frequency_penalty=0.25, logit_bias={3: 2.0}, min_tokens=5,
                            stop_token_ids=[4])
    request = Request(0, [1, 2, 2, 5], 8, frozenset([4]))
    out = RequestOutput(request, params)
    for token in (5, 6, 5):                 # the output grows, the prompt does not
        row = [rng.gauss(0, 1) for _ in range(9)]
        x, output = torch.tensor(row), request.output
        change_logits(x, out)
        for t in range(9):
            if t in request.prompt or t in output:
                row[t] = row[t] / 1.7 if row[t] > 0 else row[t] * 1.7
            row[t] -= 0.25 * output.count(t) + 0.5 * (t in output) - 2.0 * (t == 3)
        row[4] = float("-inf")
        assert x.tolist() == pytest.approx(row, rel=1e-5)
        output.append(token)


def test_sampling_filters():
    class Out:
        def __init__(self, **kw):
            self.params, self.rng = SamplingParams(**kw), random.Random(0)

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)

    def draw(n=4000, **kw):
        return np.bincount(sample(logits.expand(n, 4), [Out(**kw)] * n), minlength=4) / n

    assert draw().tolist() == [1, 0, 0, 0] and draw(temperature=1.0, top_k=1)[0] == 1
    assert draw(temperature=1.0, top_p=0.1)[0] == 1
    probs = logits.exp()[0].numpy()
    assert np.abs(draw(temperature=1.0) - probs).max() < 0.03
    assert (
        np.abs(draw(temperature=1.0, top_k=2) - probs * [1, 1, 0, 0] / probs[:2].sum()).max() < 0.03
    )
    assert (
        np.abs(draw(temperature=1.0, top_p=0.8) - probs * [1, 1, 0, 0] / probs[:2].sum()).max()
        < 0.03
    )
    assert np.abs(draw(temperature=0.5) - probs**2 / (probs**2).sum()).max() < 0.03


def test_step_api_streams_and_aborts(tiny):
    assert tiny.step() == []
    a, b = (
        tiny.add_request([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True), request_id=x)
        for x in "ab"
    )
    lengths = []
    while tiny.outputs:
        for out in tiny.step():
            lengths.append((out.request_id, len(out.token_ids)))
        if len(lengths) == 4:
            assert tiny.abort(b).finish_reason == "abort"
    assert [n for i, n in lengths if i == a] == [1, 2, 3, 4, 5] and [
        n for i, n in lengths if i == b
    ] == [1, 2]
    assert tiny.abort(b) is None
    tiny.kv.check()


def test_bad_requests_are_refused_and_the_others_go_on(tiny):
    good = tiny.add_request(
        [5, 6], SamplingParams(max_tokens=3, ignore_eos=True), request_id="good"
    )
    out = tiny.outputs[good]
    for prompt, message in (
        ([], "empty"),
        ("", "tokenizer"),
        ("text", "tokenizer"),
        ([1, 512], "512.*0..511"),
        ([-1], "-1.*0..511"),
        (7, "got 7"),
        ([1] * 128, "128 tokens.*128"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.add_request(prompt)
    with pytest.raises(ValueError, match="'good' is in flight"):
        tiny.add_request([1], request_id="good")
    with pytest.raises(ValueError, match="prompt 1: .*empty"):
        tiny.generate([[1], []])
    with pytest.raises(RuntimeError, match="in flight"):
        tiny.reset("neo")
    for kwargs, message in (
        (dict(max_tokens=0), "max_tokens = 0"),
        (dict(temperature=-1), "temperature"),
        (dict(top_p=0), "top_p"),
        (dict(top_k=-1), "top_k"),
        (dict(stop=""), "stop"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingParams(**kwargs)
    while tiny.outputs:
        tiny.step()
    assert out.finish_reason == "length" and len(out.token_ids) == 3
    # the length limit ends a request that asks for more
    assert (
        len(
            tiny.generate([[1] * 120], SamplingParams(max_tokens=100, ignore_eos=True))[0].token_ids
        )
        == 8
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(model="llama-9b"), "unknown model 'llama-9b'.*llama-8b"),
        (dict(strategy="nemo"), "unknown strategy.*neo"),
        (dict(dtype="int8"), "dtype 'int8'"),
        (dict(device="tpu"), "device 'tpu'"),
        (dict(model="llama-70b"), "do not fit"),
        (dict(gpu_mem=1e-6), "--gpu-mem"),
        (dict(gpu_blocks=10**9), "GPU tier.*does not fit"),
        (dict(cpu_mem=10**6), "CPU tier.*does not fit"),
        (dict(gpu_blocks=0), "gpu_blocks = 0"),
        (dict(max_model_len=1), "max_model_len = 1: must be above 1"),
        (dict(cpu_mem=-1), "cpu_mem"),
        (dict(max_model_len=10**6), "512 positions"),
        (dict(cpu_threads=10**4), "cpu_threads"),
        (dict(max_batch_tokens=1), "max_batch_tokens = 1: must be above 1"),
        (dict(cpu_mem=0), "CPU tier"),
        (dict(strategy="gpu-only", gpu_blocks=4, max_model_len=100), "holds 64"),
        (dict(simulate="t5"), "unknown testbed 't5'.*t4"),
    ],
)
def test_engine_errors_name_value_limit_and_way_out(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LLM(**({"model": "tiny", "device": "cpu"} | kwargs))


def test_gpu_blocks_are_what_weights_and_measured_activations_leave(monkeypatch):
    """The largest sub-batches really run; the numbers of memory are made up, as there is no GPU."""
    llm = LLM(
        "tiny", "gpu-only", device="cpu", dtype="fp32", max_model_len=100, max_batch_tokens=250
    )
    llm.model.attn.padded = True
    seen, run, MIB, block = [], llm.model.run, 1 << 20, llm.budget.block_bytes["gpu"]

    def spy(batches, kv, depth):
        assert depth == 2  # or the prompts' FFN, the largest of all, is not among them
        b = batches[0]
        seen.append((b.prefill_lens, b.num_gpu_rows, int(b.gpu_lens.sum())))
        return run(batches, kv, depth)

    llm.model.run = spy
    for name, value in {
        "memory_allocated": 7 * MIB,
        "memory_reserved": 8 * MIB,
        "max_memory_reserved": 11 * MIB,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "mem_get_info": (1000 * MIB, 1013 * MIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    drawn, draw_some = [], measure.draw_some
    monkeypatch.setattr(measure, "draw_some",
                        lambda logits: (drawn.append(logits), draw_some(logits)))

    def count(gib, captures=None):
        llm.model.captures = captures
        found = measure.measure_gpu_blocks(llm.model, llm.budget, gib)
        assert llm.model.captures is captures
        return found

    swaps = measure.STAGE_BYTES // MIB
    assert count(None) == (950 - 3 - swaps) * MIB // block
    # as a card of 500 MiB, which shows 460: 7 of them weights, 5 the context
    left = 460 - 5 - 7 - 3 - swaps
    assert count(500 / 1024) == left * MIB // block
    assert "0.45 GiB usable, 0.00 GiB of it" in llm.budget.describe()
    # captured decodes keep temporaries of their own, and graphs take some
    captures = types.SimpleNamespace(budget=None)
    found = count(500 / 1024, captures)
    graphs = int(measure.GRAPH_SHARE * left * MIB)
    assert captures.budget == 3 * MIB + graphs
    assert found == (left * MIB - captures.budget) // block
    assert seen[0] == ([100, 100, 50], MAX_RUNNING, 2 * MAX_RUNNING)
    assert seen[1] == ([], MAX_RUNNING, MAX_RUNNING * 112) and len(drawn) == 6
    with pytest.raises(ValueError, match="0.07 GiB of activations.*--gpu-mem"):
        monkeypatch.setattr(measure.torch.cuda, "max_memory_reserved", lambda: 18 * MIB)
        count(16 / 1024)


def test_what_a_gpu_cannot_do_is_said_at_start(monkeypatch):
    """bf16 on a T4, and a torch that is too old for the kernels."""
    cuda, cfg = torch.device("cuda"), PRESETS["llama-7b"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "Tesla T4")
    assert startup.resolve_dtype("auto", cfg, cuda) == torch.float16
    for dtype in ("bf16", "bfloat16"):
        with pytest.raises(ValueError, match="Tesla T4 has no bf16.*--dtype fp16"):
            startup.resolve_dtype(dtype, cfg, cuda)
    pytest.importorskip("triton")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ValueError, match="torch 2.9.1.*torch>=2.10.*--gpu-attn torch"):
        gpu_attn.choose("triton", cuda, torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_without_cuda():
    with pytest.raises(ValueError, match="--device cpu"):
        LLM("tiny", device="cuda")


def test_pipelining_overlaps_cpu_attention_with_gpu_work(tmp_path):
    """From the timeline's own spans: while the CPU attends for one sub-batch, the GPU works on the
    other."""
    llm = LLM("llama-160m", "symmetric", device="cpu", max_model_len=512)

    def overlap(a, b):
        return max(0.0, min(a.end, b.end) - max(a.start, b.start))

    for _ in range(4):  # other tests may run beside this one
        recorder = timeline.Recorder(llm)
        llm.generate([[1] * 200] * 8, SamplingParams(max_tokens=4, ignore_eos=True))
        spans = [s for it in recorder.iterations for s in it.spans]
        gpu = [s for s in spans if s.lane == "gpu"]
        cpu = [s for s in spans if s.lane == "cpu"]
        both = sum(overlap(c, g) for c in cpu for g in gpu if c.sub_batch != g.sub_batch)
        if both > 0.3 * sum(c.end - c.start for c in cpu):
            break
    own = sum(
        overlap(c, g)
        for c in cpu
        for g in gpu
        if c.sub_batch == g.sub_batch and c.layer == g.layer and g.stage == "linear"
    )
    assert own == 0.0  # an attention never runs before its own q, k and v exist
    # It is nearly all of it, but for other processes that take the cores. Without turns it is 0.
    assert both > 0.1 * sum(c.end - c.start for c in cpu)
    timeline.write(tmp_path / "t.json", [recorder], "")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} >= {
        "linear 0A",
        "attend 1B",
        "cpu_attend 3A",
        "linear 12B",
    }
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {
        "GPU", "CPU", "KV of prompts"}


# ------------------------------------------------------------------- strategies of one's own


def python_blocks(file):
    """The Python code blocks of a document, so that what it shows is what is tested."""
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.S)


@pytest.fixture
def registry():
    """Strategies that a test registers are gone after it."""
    before = dict(STRATEGIES)
    yield STRATEGIES
    STRATEGIES.clear()
    STRATEGIES.update(before)


@functools.cache
def small_llm(kind, cpu_blocks):
    """The tiny model, "real" or "simulated", in tiers that 16 requests overflow."""
    cpu_mem = blocks_to_gib(PRESETS["tiny"], cpu_blocks)
    where = dict(simulate="t4") if kind == "simulated" else dict(device="cpu")
    return LLM("tiny", dtype="fp32", gpu_blocks=10, cpu_mem=cpu_mem, max_model_len=110, **where)


DOCUMENTED = {"cpu-only": "README.md", "shortest-first": "EXPERIMENTS.md",
              "preempt-longest": "EXPERIMENTS.md"}


@pytest.mark.parametrize("kind", ["real", "simulated"])
@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_strategies_give_the_right_tokens(registry, name, kind):
    """The strategies that the documents show: short, nothing private, the same tokens as gpu-only;
    in tight tiers, so that requests are evicted, swapped and preempted."""
    code = next(c for c in python_blocks(DOCUMENTED[name]) if f'@strategy("{name}")' in c)
    body = code[code.index("@strategy") :].strip().splitlines()
    assert len(body) <= 25 and not re.search(r"\b(s|plan|r|self)\._", code)
    exec(code, {})
    llm, prompts = small_llm(kind, 8), make_prompts(16, 512, 60)
    lengths = [40] * 8 + [4, 11] * 4  # the long ones come first

    def run(strategy):
        llm.reset(strategy)
        outs = []
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
            params = SamplingParams(max_tokens=n, ignore_eos=True)
            outs.append(llm.outputs[llm.add_request(prompt, params)])
            for _ in range(6 * (i == 7)):
                llm.step()
        while llm.outputs:
            llm.step()
            llm.kv.check()
        return [o.token_ids for o in outs]

    assert run("gpu-only") == run(name)
    stats = llm.stats()
    if name == "preempt-longest":
        assert stats["swapped_blocks"] > 0 and stats["preemptions"] > 0


def test_an_order_serves_admission_eviction_and_swap_in(registry):
    """Under shortest-first the short requests enter first and are never the ones to leave."""
    code = next(c for c in python_blocks("EXPERIMENTS.md") if '@strategy("shortest-first")' in c)
    exec(code, {})
    rng = random.Random(1)
    requests = [(rng.randrange(20, 60), rng.choice((4, 60))) for _ in range(40)]

    def run(name):
        """-> (mean iteration in which a short request ends, requests that left the GPU tier)"""
        blocks = {"gpu": 24, "cpu": 20}
        s = Scheduler(STRATEGIES[name](), blocks, 16, 400, 2048, FixedPerf())
        for i, (n, out) in enumerate(requests):
            s.add(Request(i, [0] * n, out))  # expected to produce half of `out`
        ends, left = {}, []
        while s.waiting or not s.nothing_runs:
            plan = s.plan()
            left += plan.swap_out + plan.preempted
            ends |= {r.id: s.iteration for r in plan.sampled}
            s.commit(plan, [7] * len(plan.sampled))
        return np.mean([n for i, n in ends.items() if requests[i][1] == 4]), left

    (first_come, _), (shortest_first, left) = run("serial"), run("shortest-first")
    assert shortest_first < first_come / 2
    assert left and all(r.max_tokens == 60 for r in left)


class Faulty:
    """A strategy whose form() a test gives."""

    tiers = ("gpu", "cpu")

    def form(self, s, plan):
        return self.do(s, plan)


def everybody(s, plan):
    return [Batch(plan.prefill, s.decodes("gpu"), s.decodes("cpu"))]


def newest(s, tier="gpu"):
    return max(s.decodes(tier), key=lambda r: r.arrival, default=None)


def by_hand(s, plan, tell=True):
    """Preempt through public fields, and forget that nothing is cached any more."""
    r = newest(s)
    if r:
        del s.running["gpu"][r.id]
        s.num_free["gpu"] += r.num_blocks
        r.tier, r.num_blocks = None, 0
        s.waiting.appendleft(r)
        if tell:
            plan.preempted.append(r)


def without_telling(s, plan):
    by_hand(s, plan, tell=False)


def stale_lists(s, plan):
    gpu = s.decodes("gpu")
    if gpu:
        s.swap_out(plan, gpu[0])
    return [Batch(plan.prefill, gpu, s.decodes("cpu"))]


def thrashing(s, plan):
    r = newest(s)
    if r:
        s.preempt(plan, r)


def one_at_a_time(s, plan):
    cpu = sorted(s.decodes("cpu"), key=lambda r: r.last_run)
    return [Batch(plan.prefill, s.decodes("gpu"), cpu[:1])]


def there_and_back(s, plan):
    r = newest(s)
    if r and s.swap_out(plan, r):
        s.swap_in(plan, r)


def forget(s, plan):
    if s.waiting:
        s.waiting.pop()


def unbooked(s, plan):
    s.num_free["gpu"] += 1


def swap_a_prompt(s, plan):
    if plan.prefill:
        s.swap_in(plan, plan.prefill[0])


FAULTS = {  # what goes wrong -> (what form() does after or in place of a Batch of everybody, error)
    "preempts by hand": (by_hand, "request .* was preempted by hand: call s.preempt"),
    "drops a running request": (without_telling, "left the gpu tier without s.preempt"),
    "swaps the two lists": (
        lambda s, plan: [Batch(plan.prefill, s.decodes("cpu"), s.decodes("gpu"))],
        "is no decode of that tier",
    ),
    "moves after reading the lists": (stale_lists, "after all moves, not before"),
    "forgets GPU decodes": (
        lambda s, plan: [Batch(plan.prefill)],
        "no rows, although .* requests run",
    ),
    "forgets its prompts": (
        lambda s, plan: [Batch((), s.decodes("gpu"), s.decodes("cpu"))],
        "s.admit gave rows to request .*, but no Batch has it",
    ),
    "takes a prompt twice": (
        lambda s, plan: [Batch(plan.prefill), Batch(plan.prefill, s.decodes("gpu"))],
        "is in the sub-batches twice",
    ),
    "makes prompts up": (
        lambda s, plan: [Batch([*s.waiting][:1])],
        "s.admit gave it no rows",
    ),
    "loses a waiting request": (forget, "waited or ran before form"),
    "breaks the books": (unbooked, "blocks used .* are not"),
    "swaps a request twice": (there_and_back, "swapped twice in one iteration"),
    "swaps a prompt": (swap_a_prompt, "cannot move to the gpu tier"),
    "preempts in every iteration": (thrashing, "it thrashes"),
    "one CPU decode an iteration": (one_at_a_time, "it left decodes out"),
    "returns nothing": (lambda s, plan: [None], "form.. or order.. failed with AttributeError"),
    "raises": (lambda s, plan: s.runing, "form.. or order.. failed with AttributeError"),
    "admits to another tier": (lambda s, plan: s.admit(plan, ("host",)), "admits to ..host.."),
}


@pytest.mark.parametrize("kind", ["real", "simulated"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_strategy_is_stopped_and_named(registry, fault, kind):
    """In a simulation and for real: an error that names the strategy and the fault, no prompt in
    it, every block free afterwards, and the engine goes on under another strategy."""
    do, message = FAULTS[fault]
    llm, prompts = small_llm(kind, 20), make_prompts(16, 512, 60)

    @strategy("faulty")
    class Toy(Faulty):
        def do(self, s, plan):
            to_cpu = fault == "one CPU decode an iteration"
            s.admit(plan, ("cpu",) if to_cpu else self.tiers)
            return do(s, plan) or everybody(s, plan)

    llm.reset("faulty")
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with pytest.raises(StrategyError, match=f"strategy faulty: .*{message}") as error:
        llm.generate(prompts, params)
    assert len(str(error.value)) < 300
    assert not llm.outputs and not llm.kv.sequences
    llm.kv.check()
    llm.reset("gpu-only")
    assert len(llm.generate([[1, 2]], EXACT)[0].token_ids) == 24


def test_a_request_that_is_left_out_for_long_is_an_error(registry, monkeypatch):
    monkeypatch.setattr("plan.MAX_LEFT_OUT", 20)

    @strategy("faulty")
    class Toy:
        tiers = ("gpu",)

        def form(self, s, plan):
            s.admit(plan, self.tiers)
            return [Batch(plan.prefill, [r for r in s.decodes("gpu") if r.id])]

    with pytest.raises(StrategyError, match="faulty: request 0 .* had no rows for 20 iterations"):
        simulate("faulty", [(10, 50)] * 10, 100, 0)


@pytest.mark.parametrize(
    "tiers, form, message",
    [
        ("cpu", True, "tiers = 'cpu' must be a tuple"),
        (("gpu", "disk"), True, "'disk'"),
        (None, True, "tiers = None"),
        (("gpu",), False, "no method form"),
    ],
)
def test_a_strategy_without_tiers_or_form_is_refused(registry, tiers, form, message):
    members = {"tiers": tiers} | ({"form": lambda self, s, plan: []} if form else {})
    with pytest.raises(StrategyError, match=f"strategy odd.*{message}"):
        strategy("odd")(type("Odd", (), members))
    assert "odd" not in STRATEGIES


def test_eviction_swaps_out_while_the_cpu_tier_has_room():
    """Two requests that outgrow the GPU tier: the newer moves to the CPU tier, and is recomputed
    only where that tier has no room."""
    for cpu_blocks, swapped in ((10, True), (1, False)):
        s = Scheduler(STRATEGIES["serial"](), {"gpu": 4, "cpu": cpu_blocks}, 16, 64, 2048)
        s.refill_gpu = lambda plan: None
        for i in range(2):
            s.add(Request(i, [0] * 20, 40, stop_ids=frozenset([9])))
        s.output_ratio = 0.01  # it expects short outputs, so both are admitted
        moved, preempted = [], []
        for _ in range(30):
            plan = s.plan()
            moved += plan.swap_out
            preempted += plan.preempted
            s.commit(plan, [7] * len(plan.sampled))
        assert [r.id for r in moved] == ([1] if swapped else [])
        assert (s.stats["preemptions"] > 0) == (not swapped) == bool(preempted)


def test_verbs_keep_the_slack_right():
    """slack = blocks of the tier - blocks that its requests need after their next token."""
    rng = random.Random(0)
    s = Scheduler(STRATEGIES["serial"](), {"gpu": 30, "cpu": 30}, 16, 400, 2048)

    def check():
        for tier in ("gpu", "cpu"):
            needed = sum(-(-r.num_tokens // 16) for r in s.running[tier].values())
            assert s.slack[tier] == s.num_blocks[tier] - needed

    class Mover:
        name, tiers = "mover", ("gpu", "cpu")

        def form(self, s, plan):
            check()
            s.admit(plan, self.tiers)
            check()
            for verb in (s.swap_in, s.swap_out, s.preempt):
                moved = plan.swap_in + plan.swap_out + plan.preempted
                tier = "cpu" if verb == s.swap_in else "gpu"
                decodes = [r for r in s.decodes(tier) if r not in moved]
                if len(decodes) > 1 and rng.random() < 0.3:
                    verb(plan, rng.choice(decodes))
                    check()
            return everybody(s, plan)

    s.strategy = Mover()
    for i in range(60):
        s.add(Request(i, [0] * rng.randrange(1, 90), rng.randrange(1, 60), exact_length=True))
    while s.waiting or not s.nothing_runs:
        plan = s.plan()
        s.commit(plan, [7] * len(plan.sampled))
    assert s.num_free == s.num_blocks and s.stats["preemptions"] > 5


# ---------------------------------------------------------------- seams for what comes next


def test_each_tier_has_a_dtype_of_its_own(monkeypatch):
    """A float32 CPU tier under a bf16 model holds the same values in twice the bytes: the tokens
    are the same, through prefill, decode, chunks and swaps either way."""
    monkeypatch.setattr(cpu_attn, "fastest_path", lambda *args: "portable")
    points = LLM("tiny", "serial", device="cpu").points
    monkeypatch.setattr("neo.profile_points", lambda *args: points)     # serial does not ask

    def run(**cpu_mem):
        llm = LLM("tiny", "serial", device="cpu", dtype="bf16", gpu_blocks=10, max_model_len=110,
                  max_batch_tokens=16, gpu_attn="torch", **cpu_mem)
        outs = llm.generate(make_prompts(12, 512, 60), SamplingParams(max_tokens=40))
        return llm, [o.token_ids for o in outs]

    same, want = run(cpu_mem=blocks_to_gib(PRESETS["tiny"], 11, itemsize=2))
    dtypes = {"gpu": torch.bfloat16, "cpu": torch.float32}
    monkeypatch.setattr(startup, "tier_dtypes", lambda *args: dtypes)
    wide, tokens = run(cpu_mem=blocks_to_gib(PRESETS["tiny"], 11, itemsize=4))
    assert tokens == want and wide.stats()["swapped_blocks"] == same.stats()["swapped_blocks"] > 0
    assert wide.budget.token_bytes["cpu"] == 2 * wide.budget.token_bytes["gpu"]
    assert wide.kv.tiers["cpu"].k.dtype == torch.float32 and wide.kv.tiers["cpu"].num_blocks == 11


@pytest.mark.parametrize("tiers", [("cpu",), ("gpu",), ("cpu", "gpu")])
@pytest.mark.parametrize("strategy", ["gpu-only", "neo", "symmetric"])
def test_int8_tiers(strategy, tiers):
    """Through chunks, swaps and preemption: nothing leaks, a token takes D + 4 bytes where it took
    4 D, it is said at start, and most tokens are those of an exact cache."""
    def run(**options):
        llm = LLM("tiny", strategy, device="cpu", dtype="fp32", gpu_blocks=8, max_model_len=110,
                  max_batch_tokens=24, cpu_mem=blocks_to_gib(PRESETS["tiny"], 20), **options)
        outs = llm.generate(make_prompts(14, 512, 60), SamplingParams(max_tokens=30))
        llm.kv.check()
        assert all(tier.num_blocks == len(tier.free_blocks) for tier in llm.kv.tiers.values())
        return llm, [t for o in outs for t in o.token_ids]
    llm, tokens = run(**{f"{tier}_kv": "int8" for tier in tiers})
    exact, want = run()
    for tier in ("gpu", "cpu"):
        width = (16 + 4) * 1 if tier in tiers else 16 * 4
        assert llm.budget.token_bytes[tier] == 2 * 2 * width
        assert llm.kv.tiers[tier].k.shape[3:] == (16, 20 if tier in tiers else 16)
        assert exact.budget.token_bytes[tier] == 2 * 2 * 16 * 4
    assert "not exact" in llm.describe() and "not exact" not in exact.describe()
    agree = sum(a == b for a, b in zip(tokens, want, strict=True)) / len(want)
    used = {*tiers} & {*STRATEGIES[strategy].tiers}
    assert agree > 0.7 if used else agree == 1
    if strategy == "neo":
        assert exact.stats()["swapped_blocks"] > 0


def test_a_swap_rounds_once():
    """To int8 and back: an error of at most half a step of each row's scale, and a second trip
    changes nothing."""
    for dtypes in ({"gpu": torch.float32, "cpu": torch.int8},
                   {"gpu": torch.int8, "cpu": torch.float32}):
        kv = KVCache((2, 3, 8), 4, {"gpu": 8, "cpu": 8}, 64, dtypes, torch.float32,
                     torch.device("cpu"))
        kv.reserve("a", "cpu", 9)
        wide = kv.tiers[next(tier for tier, dtype in dtypes.items() if dtype != torch.int8)]
        if dtypes["gpu"] == torch.float32:
            kv.swap(["a"], "gpu")
            kv.settle()
        wide.k.copy_(torch.randn(wide.k.shape))

        def trip(kv=kv, wide=wide):
            for _ in range(2):
                kv.swap(["a"], "cpu" if kv.sequences["a"].tier == "gpu" else "gpu")
                kv.settle()
            return wide.k[:, kv.sequences["a"].blocks].clone()
        before = wide.k[:, kv.sequences["a"].blocks].clone()
        once = trip()
        step = before.abs().amax(-1, keepdim=True) / 127
        assert ((once - before).abs() <= 0.501 * step).all() and not torch.equal(once, before)
        assert torch.allclose(trip(), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options, message", [
    (dict(cpu_kv="int4"), "cpu_kv 'int4': must be auto or int8"),
    (dict(gpu_kv="fp8"), "gpu_kv 'fp8'"),
    (dict(cpu_kv="int8", cpu_attn="fma"), "does not serve int8|must be auto")])
def test_a_tier_of_another_format_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LLM("tiny", device="cpu", **options)


def test_a_simulated_int8_tier_reads_half_the_bytes():
    """A token of head size 128 takes 132 bytes for 256: the CPU's time is 1.94 times shorter, and
    the tier holds 1.94 times the tokens in the same memory."""
    wide, narrow = (LLM("llama-7b", simulate="t4", cpu_mem=8, gpu_blocks=54, cpu_kv=name)
                    for name in ("auto", "int8"))
    ratio = 256 / 132
    blocks = [llm.budget.num_blocks["cpu"] for llm in (wide, narrow)]
    assert blocks[1] / blocks[0] == pytest.approx(ratio, rel=0.01)
    times = [llm.perf.cpu_decode(1, 10 ** 6) - llm.perf.cpu_decode(1, 0) for llm in (wide, narrow)]
    assert times[0] / times[1] == pytest.approx(ratio)
    assert narrow.perf.gpu_decode(100) == wide.perf.gpu_decode(100)


@pytest.mark.parametrize("rows", [1, 5, 24, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_products_agree_with_plain_ones(dtype, rows):
    if not can_pack(torch.device("cpu"), dtype):
        pytest.skip(f"this processor packs no {dtype}")
    rng = torch.Generator().manual_seed(rows)
    x, w, bias, old = (
        torch.randn(shape, generator=rng).to(dtype)
        for shape in ((rows, 96), (200, 96), (200,), (rows, 200))
    )
    packed = Packed.pack(w)
    eps = torch.finfo(dtype).eps
    close = partial(torch.allclose, rtol=16 * eps, atol=max(1e-4, 16 * eps))
    for b in (None, bias):
        out = torch.empty(rows, 200, dtype=dtype)
        assert Packed.linear(x, packed, b, out) is out
        assert close(out, Plain.linear(x, w, b)) and close(Packed.linear(x, packed, b), out)
    added = old.clone()
    Packed.add_linear_(added, x, packed)
    Plain.add_linear_(old, x, w)
    assert close(added, old)


def test_packed_and_plain_engines_agree():
    """`--gpu-attn torch` leaves weights as they lie: the reference of packed ones."""
    prompts = make_prompts(6, 512, 40)
    make = dict(device="cpu", dtype="fp32", max_model_len=128)
    a, b = (LLM("tiny", gpu_attn=name, **make) for name in ("torch", "auto"))
    assert a.model.products is Plain and "packed" not in a.describe()
    if can_pack(a.device, a.dtype):
        assert b.model.products is Packed and "packed weights" in b.describe()
    tokens = [[o.token_ids for o in llm.generate(prompts, EXACT)] for llm in (a, b)]
    assert tokens[0] == tokens[1]


def test_a_shard_of_a_model_runs():
    """Heads and widths come from the tensors of this process: a model whose layers are cut to half
    their heads and half their FFN computes what a model of that geometry computes."""
    half = dataclasses.replace(PRESETS["tiny"], n_head=2, n_kv_head=1, n_ffn=64)
    make = dict(device="cpu", dtype="fp32", gpu_blocks=20, max_model_len=64, gpu_attn="torch")
    whole = LLM("tiny", **make).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "half", half)
        llm = LLM("half", **make)
    for shard, w in zip(llm.model.layers, whole.layers, strict=True):
        q, k, v = w.wqkv.split([64, 32, 32])
        gate, up = w.w_gate_up.chunk(2)
        shard.wqkv.copy_(torch.cat([q[:32], k[:16], v[:16]]))
        shard.wo.copy_(w.wo[:, :32])
        shard.w_gate_up.copy_(torch.cat([gate[:64], up[:64]]))
        shard.w_down.copy_(w.w_down[:, :64])
        for name in ("wqkv", "wo", "w_gate_up", "w_down"):
            setattr(w, name, getattr(shard, name))
    assert whole.num_heads == (2, 1) and whole.kv_geometry == (4, 1, 16)
    whole.host.clear()  # buffers that the warm-up made for all heads
    whole.embed, whole.lm_head, whole.norm = llm.model.embed, llm.model.lm_head, llm.model.norm
    prompts = make_prompts(3, 512, 30)
    logits = []
    for model in (llm.model, whole):  # the second has the config of all heads, and half of them
        kv = KVCache(model.kv_geometry, 16, {"gpu": 9, "cpu": 9}, 64, KV32, torch.float32,
                     torch.device("cpu"))
        requests = [
            Request(i, p, 1, tier="cpu" if i else "gpu", num_scheduled=len(p))
            for i, p in enumerate(prompts)
        ]
        logits.append(model.run([kv.bind(Batch(requests))], kv).logits)
    assert torch.equal(*logits)


def test_three_sub_batches_take_turns(registry):
    """The number of sub-batches is the strategy's: a third one is pipelined and exact, too."""

    @strategy("three")
    class Three:
        tiers = ("cpu",)

        def form(self, s, plan):
            s.admit(plan, self.tiers)
            cpu = s.decodes("cpu")
            return [Batch(plan.prefill[i::3], (), cpu[i::3]) for i in range(3)]

    prompts, seen = make_prompts(9, 512, 40), []
    llm = LLM("tiny", "three", device="cpu", dtype="fp32", max_model_len=128)
    llm.on_iteration = lambda plan, spans, start, end: seen.extend(spans)
    tokens = [o.token_ids for o in llm.generate(prompts, EXACT)]
    assert {s.sub_batch for s in seen} == {0, 1, 2} and llm.stats()["pipelined_iterations"] > 9
    llm.reset("gpu-only")
    assert tokens == [o.token_ids for o in llm.generate(prompts, EXACT)]
    loads = [Load(1.0, 1.0, 2.0), Load(1.0, 0.0, 5.0), Load(1.0, 0.0, 1.5)]
    assert layer_ms(*loads) == 8.5 and layer_ms(*loads[::2]) == 3.5


def test_a_strategy_needs_its_tiers_at_reset():
    llm = LLM("tiny", "gpu-only", device="cpu", dtype="fp32", cpu_mem=0, max_model_len=64)
    with pytest.raises(ValueError, match="strategy neo keeps KV in host memory.*--cpu-mem"):
        llm.reset("neo")
    assert llm.generate([[1]], EXACT)[0].finish_reason == "length"


# --------------------------------------------------------------------------------- structure

LAYERS = (  # imports go from a layer to a layer below it, never up and never sideways
    {"lab"},
    {"serve"},
    {"bench", "server"},
    {"neo", "report", "timeline"},
    {"measure", "workload", "advice", "ranks"},
    {"model", "strategies", "startup", "bounds"},
    {"captures", "scheduler", "options", "aim", "hub", "chat"},
    {"kvcache", "plan", "checkpoint"},
    {"queues", "gpu_attn"},
    {"kv_format"},
    {"cpu_attn", "perfmodel", "request", "sampling"},
    {"kernels"},
)
FOLDERS = ("kernels", "server", "lab")


def test_imports_go_one_way():
    """The picture of the README: read from every file, imports inside functions included."""
    rank = {name: len(LAYERS) - i for i, layer in enumerate(LAYERS) for name in layer}
    files = [f for f in ROOT.glob("*.py") if not f.name.startswith(("test_", "conftest"))]
    files += [f for folder in FOLDERS for f in (ROOT / folder).glob("*.py")]
    files = [f for f in files if not f.name.startswith("test_")]
    assert {f.stem for f in files if f.parent == ROOT} | set(FOLDERS) == rank.keys()
    for file in files:
        own = file.stem if file.parent == ROOT else file.parent.name
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in (n.split(".")[0] for n in names):
                if name not in rank or (name == own and file.parent != ROOT):
                    continue
                assert rank[name] < rank[own], f"{file.name} imports {name}"
                assert name != "server" or own == "serve", f"{file.name} imports server"
        imports = [n.lineno for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        code = [n.lineno for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert not (imports and code) or max(imports) < min(code), f"{file.name}: late import"


def test_what_vllm_calls_the_same():
    """Its spelling of a flag, the limit of running requests, a share of the GPU's memory."""
    from options import Parser, add_engine_flags, engine_options
    parser = Parser("")
    add_engine_flags(parser)
    args = parser.parse_args(["--max-num-batched-tokens", "77", "--max-num-seqs", "3",
                              "--gpu-memory-utilization", "0.5", "--simulate", "t4"])
    options = engine_options(args)
    llm = LLM("llama-1b", **options)
    assert llm.budget.max_batch_tokens == 77
    half, whole = (LLM("llama-1b", simulate="t4", gpu_memory_utilization=share)
                   for share in (0.5, 1.0))
    gap = (whole.budget.num_blocks["gpu"] - half.budget.num_blocks["gpu"])
    bed = find_testbed("t4")
    assert gap * half.budget.block_bytes["gpu"] == pytest.approx(
        0.5 * bed.gpu_gb * 2 ** 30, rel=0.01)
    for _ in range(8):
        llm.add_request([0] * 9, SamplingParams(max_tokens=9, ignore_eos=True))
    most = 0
    while llm.outputs:
        llm.step()
        most = max(most, llm.scheduler.num_running)
    assert most == 3
    for bad, message in ((dict(gpu_memory_utilization=1.5), "at most 1"),
                         (dict(gpu_memory_utilization=0.5, gpu_mem=3), "one of them"),
                         (dict(max_num_seqs=0), "max_num_seqs = 0"),
                         (dict(max_num_seqs=10 ** 6), "at most 512")):
        with pytest.raises(ValueError, match=message):
            LLM("llama-1b", simulate="t4", **bad)
    with pytest.raises(ValueError, match="emulated GPU has no memory"):
        LLM("tiny", device="cpu", gpu_memory_utilization=0.5)


def test_every_option_is_an_argument_and_a_flag_of_all_doors(capsys):
    """One field of Options, one keyword of LLM, one flag of each door."""
    names = [f.name for f in dataclasses.fields(Options)]
    with pytest.raises(TypeError, match="no option 'gpu_block'.*gpu_blocks"):
        LLM("tiny", gpu_block=3)
    serve = pytest.importorskip("serve")
    for door, left_out in ((neo, ()), (bench, ("strategy",)), (serve, ("simulate",))):
        _, text, _ = run_main(door.main, ["--help"], capsys)
        for name in names:
            assert (f"--{name.replace('_', '-')} " in text) == (name not in left_out), (door, name)
        assert ("--testbed" in text) == ("simulate" not in left_out)


# ---------------------------------------------------------------------------------------- text


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
    whole, prompt = (
        tok.decode(out.prompt_token_ids + out.token_ids),
        tok.decode(out.prompt_token_ids),
    )
    assert len(pieces) > 10 and out.text.replace("\ufffd", "").strip() in whole.replace(
        "\ufffd", ""
    )
    assert whole.startswith(prompt)

    start = len(out.text) // 2
    stop = next(
        out.text[i : i + 3]
        for i in range(start, len(out.text))
        if "\ufffd" not in out.text[i : i + 3]
    )
    cut = llm.generate(["the scheduler"], dataclasses.replace(long, stop=[stop]))[0]
    assert cut.text == out.text[: out.text.find(stop)] and cut.finish_reason == "stop"
    assert len(cut.token_ids) < 60 and out.token_ids[: len(cut.token_ids)] == cut.token_ids
    with pytest.raises(ValueError, match="empty"):
        llm.add_request("")


def test_tokenizers_package_missing_is_named(text_models, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer(str(text_models["tokenizers"]))


def run_script(*argv):
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=300, cwd=ROOT
    )


def run_main(main, argv, capsys):
    """A door's main() in this process -> (exit status, stdout, stderr). Starting Python with torch
    takes seconds, so one test starts the script itself and the others call this."""
    capsys.readouterr()
    status = 0
    try:
        main(argv)
    except SystemExit as stopped:
        status = stopped.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    out, err = capsys.readouterr()
    return status, out, err


def test_command_line(text_models, capsys):
    folder = str(text_models["sentencepiece"])
    argv = ["--model", folder, "--device", "cpu", "--dtype", "fp32", "--max-model-len", "200"]
    more = ["--prompt", "the scheduler", "--max-tokens", "12", "--ignore-eos", "--verbose"]
    done = run_script("neo.py", *argv, *more)
    want = LLM(folder, device="cpu", dtype="fp32", max_model_len=200).generate(
        ["the scheduler"], SamplingParams(max_tokens=12, ignore_eos=True)
    )[0]
    assert done.returncode == 0 and done.stdout == want.text
    assert done.stderr.count("iteration ") == 12
    assert "predicted" in done.stderr and "KV budget" in done.stderr
    ids = ["--model", "tiny", "--device", "cpu", "--token-ids", "1 2 3 4 5", "--max-tokens", "4",
           "--ignore-eos", "--max-batch-tokens", "2"]
    status, out, err = run_main(neo.main, ids, capsys)
    assert status == 0 and len(out.split()) == 4 and "random weights" in err
    for extra, message in (
        (["--prompt", ""], "empty"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens = 0"),
        (["--prompt", "x", "--strategy", "none"], "unknown strategy"),
        (["--prompt", "x", "--no-such-flag"], "no-such-flag"),
    ):
        status, _, err = run_main(neo.main, [*argv, *extra], capsys)
        assert status and message in err


# ----------------------------------------------------------------------------------- benchmark

VLLM_KEYS = [
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "output_throughput",
    "total_token_throughput",
    *(f"{s}_{m}_ms" for m in ("ttft", "tpot", "itl", "e2el") for s in ("mean", "median", "p99")),
]
OUR_KEYS = [
    "kv_budget_gpu_tokens",
    "kv_budget_cpu_tokens",
    "mean_batch_size",
    "gpu_busy",
    "cpu_busy",
    "iterations",
    "pipelined_iterations",
    "cpu_decode_tokens",
    "swapped_blocks",
    "preemptions",
    "per_token_latency_ms",
]


def test_bench_end_to_end(tmp_path, capsys):
    files = {k: str(tmp_path / f"{k}.json") for k in ("result", "timeline")}
    bench.main(
        [
            "--model",
            "tiny",
            "--device",
            "cpu",
            "--dtype",
            "fp32",
            "--strategies",
            "gpu-only,serial,symmetric,neo",
            "--num-prompts",
            "12",
            "--input-len",
            "60",
            "--output-len",
            "12",
            "--request-rate",
            "200",
            "--result-filename",
            files["result"],
            "--timeline",
            files["timeline"],
            "--repeats",
            "2",
        ]
    )
    text = capsys.readouterr().out
    saved = json.loads(Path(files["result"]).read_text())
    assert (
        list(saved["results"]) == ["gpu-only", "serial", "symmetric", "neo"] and "config" in saved
    )
    for r in saved["results"].values():
        assert not set(VLLM_KEYS + OUR_KEYS) - r.keys()
        assert r["completed"] == 12 and r["failed"] == 0 and r["rounds"] == 2
        assert (
            r["duration"] > 0 and 0 < r["gpu_busy"] <= 1 and r["mean_ttft_ms"] <= r["mean_e2el_ms"]
        )
        assert r["total_output_tokens"] == saved["results"]["neo"]["total_output_tokens"]
    assert (
        saved["results"]["gpu-only"]["kv_budget_cpu_tokens"]
        == 0
        < saved["results"]["neo"]["kv_budget_cpu_tokens"]
    )
    assert (
        "neo / gpu-only:" in text
        and "KV budget" in text
        and "fewer than 20" in text
        and "random weights" in text
    )
    assert text.count("agree on 12 of 12 requests") == 3  # float32: exactly the same tokens
    assert json.loads(Path(files["timeline"]).read_text())["traceEvents"]


def test_bench_survives_ctrl_c(tmp_path, interrupt_at, capsys):
    interrupt_at(40)
    with pytest.raises(SystemExit, match="130"):
        bench.main(
            [
                "--model",
                "tiny",
                "--device",
                "cpu",
                "--strategies",
                "gpu-only,neo",
                "--num-prompts",
                "30",
                "--input-len",
                "40",
                "--output-len",
                "8",
                "--result-filename",
                str(tmp_path / "r.json"),
            ]
        )
    result = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (
        list(result) == ["gpu-only"]
        and 0 < result["gpu-only"]["completed"] < 30
        and result["gpu-only"]["interrupted"]
    )
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("name", workload.LENGTH_STATISTICS)
def test_drawn_lengths_meet_the_published_figures(name):
    for want in workload.LENGTH_STATISTICS[name]:
        mean, p50, p90, p99, top, least = want
        x = np.array(workload.draw_lengths(want, 200_000, np.random.default_rng(0)))
        assert x.mean() == pytest.approx(mean, rel=0.02) and x.max() <= top and x.min() >= least
        for share, value in ((0.5, p50), (0.9, p90), (0.99, p99)):
            assert (x < value).mean() <= share + 0.005 and (x <= value).mean() >= share - 0.005


@pytest.mark.skipif(not DATA.is_dir(), reason="no traces here")
@pytest.mark.parametrize(
    "file, name", [("osc_lengths.json", "osc"), ("azure_code.csv", "azure-code")]
)
def test_traces_have_the_published_figures(file, name):
    pairs = np.array(workload.read_lengths(DATA / file))
    for column, (mean, p50, _, _, top, least) in zip(pairs.T, workload.LENGTH_STATISTICS[name]):
        assert column.mean() == pytest.approx(mean, rel=1e-3) and abs(np.median(column) - p50) <= 1
        assert column.max() == top and column.min() == least


def test_workload_files_and_clipping(tmp_path):
    (tmp_path / "a.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\nx,100,7\ny,3,0\nz,20,90\n"
    )
    assert workload.read_lengths(tmp_path / "a.csv") == [(100, 7), (20, 90)]
    for text in ("ContextTokens\n5\n", "[1, 2]", ""):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ValueError, match="bad: no"):
            workload.read_lengths(tmp_path / "bad")
    assert workload.fit_requests([100, 20, [1] * 100], [7, 90, 10], 64) == (
        [57, 20, [1] * 54],
        [7, 44, 10],
        3,
    )

    class Words:
        encode = staticmethod(lambda text: list(range(len(text.split()))))

    turn = lambda *texts: {"conversations": [{"value": t} for t in texts]}
    (tmp_path / "s.json").write_text(
        json.dumps([turn("a b c", "d e"), turn("alone"), turn("", "x")])
    )
    assert workload.read_sharegpt(tmp_path / "s.json", Words) == [([0, 1, 2], 2)]
    with pytest.raises(ValueError, match="tokenizer"):
        workload.read_sharegpt(tmp_path / "s.json", None)


def test_bench_rejects_bad_flags(capsys):
    for argv, message in (
        (["--model", "llama-9b"], "unknown model"),
        (["--strategies", "gpu-only,none"], "unknown strategy"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--dataset-name", "lengths"], "--dataset-path"),
        (["--frobnicate"], "frobnicate"),
        (["--rates", "1,2"], "Now: python -m lab.load_latency --rates"),
        (["--goodput", "ttft:5"], "Now: python -m lab.load_latency --goodput"),
        (["--figure", "10a"], "Now: python -m lab.figures"),
        (["--card"], "Now: python -m lab.gpu_limits"),
        (["--cpu-bw=60", "--simulate", "t4"], "Now: --testbed cpu_bw=X"),
        (["--simulate", "self"], "python -m lab.simulator_check"),
        (["--simulate", "t4", "--testbed", "cpu_speed=1"], "no number 'cpu_speed'.*cpu_bw"),
        (["--simulate", "t4", "--testbed", "cpu_bw=fast"], "cpu_bw = 'fast' is not a number"),
        (["--testbed", "cpu_bw=1"], "add --simulate"),
        (["--dataset-name", "lengths", "--dataset-path", "/no"], "/no"),
        (["--timeline", "t.svg"], r"t.svg: it must end in one of .html, .png, .json"),
        (["--timeline", "/no/t.html"], "its folder does not exist"),
        (["--timeline-iteration", "3"], "add --timeline F.png"),
        (["--timeline", "t.png", "--timeline-iteration", "0"], "must be above 0"),
    ):
        status, _, err = run_main(bench.main, ["--model", "tiny", *argv], capsys)
        assert status and re.search(message, err), err


# ------------------------------------------------------------------------------------ timeline

T4 = ("--model llama-7b --simulate t4 --gpu-blocks 54 --cpu-mem 18.6 --max-batch-tokens 832 "
      "--input-len 200 --output-len 40 --num-prompts").split()


def assert_turns(spans, tolerance):
    """Nobody does two things at once. spans: (lane, start, end)"""
    for lane in {lane for lane, _, _ in spans}:
        own = sorted(span[1:] for span in spans if span[0] == lane)
        assert all(before[1] <= after[0] + tolerance for before, after in zip(own, own[1:]))


@given(st.lists(st.builds(Load, *[st.floats(0.1, 9)] * 4), min_size=1, max_size=3),
       st.integers(1, 5), st.floats(0, 9))
def test_timeline_layers_add_up_to_the_prediction(loads, n_layer, once_ms):
    """The layers of a simulation: each takes layer_ms, and they keep the rules of the formula."""
    spans = layer_spans(loads, n_layer, once_ms, start=3.0)
    period, total = layer_ms(*loads) / 1e3, (n_layer * layer_ms(*loads) + once_ms) / 1e3
    assert_turns([(s.lane, s.start, s.end) for s in spans], 1e-9)
    assert max(s.end for s in spans) <= 3 + total + 1e-9
    stages = {(s.stage, s.layer, s.sub_batch): s for s in spans}
    gpu = sum(s.end - s.start for s in spans if s.lane == "gpu")
    assert 1e3 * gpu == pytest.approx(
        n_layer * sum(x.linear_ms + x.gpu_ms for x in loads) + once_ms)
    if once_ms:
        assert stages["head", n_layer, 0].start == pytest.approx(3 + n_layer * period)
        assert stages["head", n_layer, 0].end == pytest.approx(3 + total)
    for k, load in enumerate(loads):
        linear = [stages["linear", i, k] for i in range(n_layer)]
        for i, (before, after) in enumerate(zip(linear, linear[1:])):
            attention = stages["cpu_attend", i, k]
            assert after.start - before.start == pytest.approx(period)
            assert before.end <= attention.start + 1e-9 and attention.end <= after.start + 1e-9
            assert 1e3 * (attention.end - attention.start) == pytest.approx(load.cpu_ms)
            assert stages["attend", i, k].start >= before.end - 1e-9


def test_timeline_page_agrees_with_the_run(tmp_path, monkeypatch):
    """One page without network. Its data are the run's: iterations, rows, blocks, stages."""
    monkeypatch.setattr(timeline, "DETAILED", 40)
    page, result = tmp_path / "t.html", tmp_path / "r.json"
    bench.main([*T4, "60", "--timeline", str(page), "--result-filename", str(result)])
    text = page.read_text()
    for loaded in ("http:", "https:", "src=", "href=", "url(", "@import", "fetch(", "import("):
        assert loaded not in text.replace("fetch KV", "")
    data = json.loads(re.search('<script type="application/json".*?>(.*?)</script>', text)[1])
    results = json.loads(result.read_text())["results"]
    assert [run["strategy"] for run in data["runs"]] == ["gpu-only", "neo"] == list(results)
    for run, want in zip(data["runs"], results.values()):
        its = run["iterations"]
        assert len(its) == want["iterations"] and its[0]["waiting"] > 0 == its[-1]["waiting"]
        assert sum(len(it["rows"]) > 1 for it in its) == want["pipelined_iterations"]
        assert sum(rows[2] for it in its for rows in it["rows"]) == want["cpu_decode_tokens"]
        changes, held = iter([*run["changes"], None]), {}
        change = next(changes)
        for i, it in enumerate(its):
            while change and change[0] == i:
                held[change[1]] = change[2:]
                change = next(changes)
            for tier, running in zip(("gpu", "cpu"), it["running"]):
                blocks = [n for name, n in held.values() if name == tier]
                assert len(blocks) == running and sum(blocks) <= run["num_blocks"][tier]
        assert not change and not any(blocks for _, blocks in held.values())
        assert 20 <= len(run["detail"]) <= 21 < len(its)
        for i, spans in run["detail"].items():
            it = its[int(i)]
            assert_turns([(lane, *span) for lane, _, _, _, *span in spans], 1)
            assert {s[2] for s in spans if data["lanes"][s[0]] == "GPU"} == set(range(33))
            assert {s[3] for s in spans} == set(range(len(it["rows"])))
            assert all(it["start"] <= s[4] <= s[5] <= it["end"] + 1 for s in spans)


def test_timeline_picture_of_one_iteration(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    argv = [*T4, "6", "--strategies", "neo", "--timeline", str(tmp_path / "t.png")]
    bench.main([*argv, "--timeline-iteration", "3"])
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = run_main(bench.main, [*argv, "--timeline-iteration", "9999"], capsys)
    assert status == 1 and re.search("--timeline-iteration 9999: neo ran [0-9]+ iterations", err)
    assert "request/s" in out
    monkeypatch.setattr(timeline.importlib.util, "find_spec", lambda name: None)
    _, _, err = run_main(bench.main, argv, capsys)
    assert "needs matplotlib: pip install matplotlib" in err
    its = [timeline.Iteration(0, 1 + (i == 5), [], None, [(1, 0, 0)] * (1 + (i in (2, 12))), 0, ())
           for i in range(20)]
    run = types.SimpleNamespace(iterations=its)
    assert timeline.choose(run) == 12 and timeline.choose(run, 3) == 2
    run.iterations = its[:12]
    assert timeline.choose(run) == 5


# ---------------------------------------------------------------------------------- simulation


def simulated(strategy, requests, bed="t4", model="llama-7b", **kwargs):
    """Serve (tokens in, out) requests, all at once, on a simulated testbed; (LLM, bench result)."""
    llm = LLM(
        model,
        strategy,
        simulate=find_testbed(bed) if isinstance(bed, str) else bed,
        **{"gpu_blocks": 54, "cpu_mem": 18.0, "max_model_len": 832, "max_batch_tokens": 832}
        | kwargs,
    )
    ins, outs = zip(*requests)
    work = workload.Workload([[0] * n for n in ins], list(outs), [0.0] * len(ins), "test", 0)
    return llm, bench.run_workload(llm, strategy, work, quiet=True)[0]


def test_virtual_clock_by_hand():
    """One prompt of 100 tokens, then decodes, on round numbers: 1 TFLOP/s, 1 GB/s, no launches,
    3 ms an iteration."""
    bed = dataclasses.replace(
        find_testbed("t4"),
        tflops=1,
        gpu_bw=1,
        compute_eff=1,
        memory_eff=1,
        launch_us=0,
        cpu_launch_us=0,
        host_ms=3,
        pcie_bw=2,
        cpu_bw=4,
    )
    cfg = PRESETS["tiny"]
    E, F, V, L, D = cfg.n_embd, cfg.n_ffn, cfg.vocab_size, cfg.n_layer, cfg.n_head * cfg.head_dim
    kv = 2 * cfg.n_kv_head * cfg.head_dim
    layer = (
        E * (D + kv) + D * E + 3 * E * F + 2 * E
    )  # parameters of a layer; E: the last norm below
    layer += E / L
    bytes_ms, flops_ms = 1e-6, 1e-9
    head = max(2 * V * E * bytes_ms, 2 * V * E * flops_ms) + 3
    prompt = (
        L * (max(2 * layer * bytes_ms, 2 * layer * 100 * flops_ms) + 2 * 100 * 100 * D * flops_ms)
        + head
    )
    llm = LLM("tiny", "gpu-only", simulate=bed, gpu_blocks=20, cpu_mem=0.001)
    llm.add_request([0] * 100, SamplingParams(max_tokens=3, ignore_eos=True))
    times = []
    while llm.outputs:
        llm.step()
        times.append(1e3 * llm.clock())
    decode = [L * (2 * layer + 2 * kv * n) * bytes_ms + head for n in (101, 102)]
    np.testing.assert_allclose(np.diff([0, *times]), [prompt, *decode], rtol=1e-9)

    llm = LLM(
        "tiny", "serial", simulate=bed, gpu_blocks=1, cpu_mem=0.001
    )  # in the CPU tier: nothing overlaps
    llm.add_request([0] * 100, SamplingParams(max_tokens=2, ignore_eos=True))
    llm.step()
    start = llm.clock()
    llm.step()
    cpu = 101 * 2 * kv * 0.25e-6 + (8 * D + 2 * kv) * 0.5e-6
    assert 1e3 * (llm.clock() - start) == pytest.approx(L * (2 * layer * bytes_ms + cpu) + head)


def test_simulated_swaps_cost_pcie_time():
    llm = LLM("tiny", "neo", simulate="t4", gpu_blocks=8, cpu_mem=0.01, max_model_len=64)
    llm.model.perf.bed = None  # linear() and lm_head() are replaced just below
    llm.model.perf.linear = llm.model.perf.gpu_decode = lambda n: 0.0
    llm.model.perf.lm_head = lambda n: 0.0
    llm.model.perf.transfer = lambda n: 1e-3 * n
    llm.kv.reserve("a", "gpu", 40)
    llm.kv.swap(["a"], "cpu")
    llm.kv.release("a")
    batch = llm.kv.bind(
        Batch(gpu_decodes=[Request("b", [0, 0], 1, tier="gpu", num_cached=1, output=[0])])
    )
    llm.model.run([batch], llm.kv)
    assert 1e3 * llm.clock() == pytest.approx(3 * 4 * 16 * llm.budget.token_bytes["cpu"] * 1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_simulation_conserves_tokens_and_stays_below_the_fluid_limit(strategy):
    rng = random.Random(1)
    requests = [(rng.randrange(50, 500), rng.randrange(2, 90)) for _ in range(60)]
    llm, result = simulated(strategy, requests)
    assert result["completed"] == 60 and result["failed"] == 0
    assert result["total_input_tokens"] == sum(i for i, _ in requests)
    assert result["total_output_tokens"] == sum(o for _, o in requests)
    stats = llm.stats()
    assert stats["gpu_decode_tokens"] + stats["cpu_decode_tokens"] == sum(
        o - 1 for _, o in requests
    )
    assert (stats["cpu_decode_tokens"] > 0) == (not strategy.startswith("gpu-"))
    assert 0.1 < result["fluid_share"] <= 1.0
    assert all(llm.scheduler.num_free[t] == llm.scheduler.num_blocks[t] for t in ("gpu", "cpu"))
    llm.kv.check()


def test_simulated_strategies_in_easy_corners():
    requests = [(300 + 7 * i % 100, 30 + i % 20) for i in range(80)]
    rate = lambda s, bed="t4", **kw: simulated(s, requests, bed, **kw)[1]["output_throughput"]
    base = rate("gpu-only")
    fast = find_testbed("t4", cpu_bw=1e6, pcie_bw=1e6, cpu_launch_us=0)
    assert rate("neo", fast) > 4 * base and rate("symmetric", fast) > 3 * base
    assert rate("neo", find_testbed("t4", cpu_bw=1e-6)) == pytest.approx(base, rel=1e-3)
    big, roomy = find_testbed("t4", gpu_gb=200), dict(gpu_blocks=3000)
    assert rate("neo", big, **roomy) >= 0.99 * rate("gpu-only", big, **roomy)


@pytest.mark.parametrize(
    "bed, model, blocks, length",
    [
        ("t4", "llama-7b", 54, (372, 45)),
        ("g5.2xlarge", "llama-8b", 400, (1000, 100)),
        ("g5.4xlarge", "llama-8b", 400, (1000, 20)),
        ("a100", "llama-13b", 500, (1000, 300)),
        ("2xh100", "llama-70b", 700, (2000, 50)),
    ],
)
def test_neo_never_falls_below_gpu_only(bed, model, blocks, length):
    """However weak the CPU or short the outputs, by more than 2 % (the start, when nothing is known
    yet)."""
    rng = random.Random(2)
    requests = [tuple(round(n * rng.uniform(0.9, 1.1)) for n in length) for _ in range(150)]
    kwargs = dict(
        bed=bed,
        model=model,
        gpu_blocks=blocks,
        cpu_mem=None,
        max_model_len=min(2400, 16 * blocks),
        max_batch_tokens=4096,
    )
    neo, base = (
        simulated(s, requests, **kwargs)[1]["output_throughput"] for s in ("neo", "gpu-only")
    )
    assert neo >= 0.98 * base


def test_nobody_starves_in_the_cpu_tier_of_a_simulation():
    llm = LLM("llama-8b", "neo", simulate="g5.2xlarge", gpu_blocks=200, max_model_len=1200)
    for i in range(40):
        llm.add_request([0] * (700 + 5 * i), SamplingParams(max_tokens=100, ignore_eos=True))
    waited, bound = 0, watch_waits(llm)
    while llm.outputs:
        llm.step()
        waits = [
            llm.scheduler.iteration - r.last_run
            for r in llm.scheduler.running["cpu"].values()
            if r.num_cached
        ]
        waited = max([waited, *waits])
    assert llm.stats()["cpu_decode_tokens"] and waited <= bound()


def test_fluid_limit_by_hand():
    """Memory-bound, then compute-bound: numbers that a pencil checks."""
    perf = Roofline(find_testbed("t4", compute_eff=1, memory_eff=1), PRESETS["llama-7b"])
    t, W = perf.token_bytes["cpu"] * 32, (32 * perf.layer_params + perf.vocab_params) * 2 / 320e9
    rate, binds = fluid_limit(perf, [(400, 101)], 900, 0)
    K = 100 * 450.5  # tokens x iterations of a request
    f = 1 / (W + 900 * t / 320e9)
    assert rate == pytest.approx(900 * f / K) and binds == ["GPU bandwidth", "GPU memory"]
    more, binds = fluid_limit(perf, [(400, 101)], 900, 10**6)
    assert more == pytest.approx(
        900 / K / W * (1 - 900 * t / 320e9 / (W + 900 * t / 320e9)) + 33e9 / (K * t), rel=1e-2
    )
    assert "CPU bandwidth" in binds
    rate, binds = fluid_limit(perf, [(3000, 2)], 10**6, 10**6)
    ops = 32 * (2 * perf.layer_params * 3001 + 2 * 3000**2 * 4096) + 2 * 2 * perf.vocab_params
    assert rate == pytest.approx(65e12 / ops) and binds == ["GPU compute"]
    assert fluid_limit(perf, [(100, 1)], 900, 0)[1] == ["GPU compute"]


@pytest.mark.parametrize(
    "bed, model, lengths, tokens",
    [
        ("t4", "llama-7b", (300, 32), (864, 37248)),
        ("g5.8xlarge", "llama-8b", (1000, 200), (26400, 500000)),
        ("g5.16xlarge", "llama-8b", (1000, 400), (26400, 1000000)),
        ("g5.8xlarge", "llama-8b", (1000, 200), (26400, 0)),
    ],
)
def test_the_aim_comes_near_the_pipelining_bound_and_stays_below(bed, model, lengths, tokens):
    """The search of a strategy against a linear programme, which knows nothing of it."""
    pytest.importorskip("scipy")
    perf = Roofline(find_testbed(bed), PRESETS[model])
    bound = pipelining_bound(perf, [lengths], *tokens)
    aim = best_aim(perf, [lengths], dict(zip(("gpu", "cpu"), tokens)), 2048)
    assert 0.93 * bound < 1e3 * aim.rate <= 1.005 * bound
    assert (aim.cpu_decodes > 0) == (tokens[1] > 0)
    limit, _ = fluid_limit(perf, [lengths], *tokens)
    assert bound < limit


def test_testbeds_hold_their_documented_numbers():
    for name, row in {
        "t4": (65, 16, 320, 12),
        "g5.4xlarge": (70, 24, 600, 25),
        "2xh100": (989, 80, 3350, 50),
    }.items():
        bed = TESTBEDS[name]
        assert (bed.tflops, bed.gpu_gb, bed.gpu_bw, bed.pcie_bw) == row
    assert [TESTBEDS[f"g5.{n}xlarge"].host_gb for n in (2, 4, 8, 16)] == [32, 64, 128, 256]
    assert TESTBEDS["2xh100"].tp == 2
    for name, low, high in (
        ("t4", 31, 35),
        ("g5.2xlarge", 20, 23),
        ("g5.4xlarge", 21, 24),
        ("g5.8xlarge", 31, 40),
        ("g5.16xlarge", 70, 90),
    ):
        assert low <= TESTBEDS[name].cpu_bw <= high
    for kwargs, message in (
        (dict(cpu_bw=0), "cpu_bw = 0 must be positive"),
        (dict(memory_eff=1.2), "memory_eff = 1.2"),
        (dict(launch_us=-1), "launch_us"),
        (dict(tp=0), "tp = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            find_testbed("t4", **kwargs)


def test_bench_simulates_the_same_twice(tmp_path, capsys):
    argv = [
        "--model",
        "llama-7b",
        "--simulate",
        "t4",
        "--gpu-blocks",
        "54",
        "--max-batch-tokens",
        "832",
        "--dataset-name",
        "osc",
        "--num-prompts",
        "40",
        "--request-rate",
        "1",
        "--testbed",
        "cpu_bw=60",
    ]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for f in files:
        bench.main([*argv, "--result-filename", str(f)])
    out = capsys.readouterr().out
    assert (
        "simulated t4" in out
        and "Not a measurement" in out
        and "60 GB/s" in out
        and "fluid limit" in out
    )
    a, b = (json.loads(f.read_text()) for f in files)
    assert a["results"] == b["results"] and a["results"]["neo"]["completed"] == 40
