"""Tests of the experiments: load-latency curves, replay, figures, limits, the simulator's check.

    pip install -r requirements.txt -r requirements-extra.txt && pytest -q lab

Models are tiny or simulated. Nothing is asserted about how fast this machine is.
"""
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cpu_attn
import workload
from advice import PAYS, Forecast, advise
from checkpoint import load_config
from lab import (
    advise as advise_command,
)
from lab import (
    cpu_limits,
    exactness,
    figures,
    gpu_limits,
    kv_quality,
    load_latency,
    simulator_check,
)
from neo import LLM, SamplingParams
from perfmodel import Roofline, find_testbed
from scheduler import MAX_RUNNING

ROOT = Path(__file__).resolve().parent.parent
# One real engine for all tests here, so that its profile is measured once
SIZES = dict(gpu_blocks=8, cpu_mem=0.01, max_model_len=64)
TINY = ["--model", "tiny", "--device", "cpu", "--gpu-blocks", "8", "--cpu-mem", "0.01",
        "--max-model-len", "64"]


def test_exactness_finds_no_difference_and_would_find_one(capsys, monkeypatch):
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match="0"):
        exactness.main(["--num-tokens", "1", "--seed", "1"])
    out = capsys.readouterr().out
    assert "3200 tokens compared, 0 differ" in out and "preemptions 0" not in out
    generate = exactness.generate
    monkeypatch.setattr(exactness, "generate",
                        lambda *args: [t[:-1] + [-1] for t in generate(*args)])
    with pytest.raises(SystemExit, match="1"):
        exactness.main(["--num-tokens", "1", "--seed", "1"])
    assert "80 differ" in capsys.readouterr().out       # 16 prompts, 5 strategies


# ------------------------------------------------------------------------------ load-latency

def test_load_latency_curves(tmp_path, capsys):
    """Simulated, so that the rates found are exact: one below the limit was run, one just above it,
    for each strategy."""
    t4 = ["--model", "llama-7b", "--simulate", "t4", "--gpu-blocks", "54", "--dataset-name", "osc"]
    load_latency.main(
        [*t4, "--num-prompts", "30", "--rates", "0.2,2", "--at-latency", "0.2", "--goodput",
         "ttft:3000", "tpot:300", "--result-filename", str(tmp_path / "r.json")])
    saved, out = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    for s, points in saved["results"].items():
        took = {float(r): x["per_token_latency_ms"] / 1e3 for r, x in points.items()}
        found = saved["at_latency"][s]
        assert {0.2, 2.0} <= took.keys() and took[found] <= 0.2
        assert min(r for r, t in took.items() if t > 0.2 and r > found) < 1.03 * found
        assert all(x["request_goodput"] <= x["request_throughput"] for x in points.values())
        assert points["0.2"]["request_goodput"] > 0
    assert saved["at_latency"]["neo"] > 2 * saved["at_latency"]["gpu-only"]
    assert "not measured" in out and "KV budget of 864" in out and "at several rates" in out
    load_latency.main([*t4, "--num-prompts", "3", "--strategies", "neo", "--at-latency", "60"])
    assert "any rate, even all at once" in capsys.readouterr().out


def test_load_latency_on_the_real_clock(capsys):
    load_latency.main([*TINY, "--rates", "50", "--num-prompts", "5", "--input-len", "20",
                       "--output-len", "4"])
    lines = capsys.readouterr().out.splitlines()
    points = [line.split() for line in lines if line.startswith(("gpu-only", "neo"))]
    assert [float(point[1]) for point in points] == [50, 50]


def test_load_latency_survives_ctrl_c(tmp_path, interrupt_at, capsys):
    interrupt_at(150)
    with pytest.raises(SystemExit, match="130"):
        load_latency.main(
            ["--model", "tiny", "--simulate", "t4", "--gpu-blocks", "20", "--rates", "1,2,3,4,5,6",
             "--num-prompts", "9", "--output-len", "9", "--input-len", "30", "--strategies",
             "gpu-only", "--result-filename", str(tmp_path / "r.json")])
    assert 0 < len(json.loads((tmp_path / "r.json").read_text())["results"]["gpu-only"]) < 6
    assert "interrupted" in capsys.readouterr().err


def test_replay_of_a_trace(tmp_path, capsys):
    """By its time stamps, faster, in order, the first requests only."""
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n"
                     "2023-11-16 18:17:03.9799600,40,5\n2023-11-16 18:17:09.0319600,30,3\n"
                     "2023-11-16 18:17:05.9799600,20,4\n2023-11-16 18:18:05.9799600,20,4\n")
    ins, outs, arrivals, source = workload.read_arrivals(trace, 3, 4.0)
    assert (ins, outs) == ([40, 20, 30], [5, 4, 3]) and "4 times" in source
    assert arrivals == pytest.approx([0, 0.5, 1.263], abs=1e-3)
    load_latency.main(
        ["--model", "tiny", "--simulate", "t4", "--gpu-blocks", "20", "--dataset-name", "lengths",
         "--dataset-path", str(trace), "--replay", "--speed", "4", "--num-prompts", "3",
         "--strategies", "gpu-only", "--repeats", "2", "--goodput", "e2el:60000",
         "--result-filename", str(tmp_path / "r.json")])
    r = json.loads((tmp_path / "r.json").read_text())["results"]["gpu-only"]
    assert r["completed"] == 3 and r["duration"] > 1.26 and r["rounds"] == 2
    assert r["request_goodput"] == r["request_throughput"]
    out = capsys.readouterr().out
    assert "at their times" in out and "goodput, request/s" in out and "GPU busy" in out
    with pytest.raises(ValueError, match="not a lengths file"):
        (tmp_path / "no.csv").write_text("ContextTokens,GeneratedTokens\n1,1\n")
        workload.read_arrivals(tmp_path / "no.csv", 3, 1)


@pytest.mark.parametrize("argv, message", [
    (["--rates", "1,0"], "--rates 0.0: must be above 0"),
    (["--rates", "1", "--goodput", "itl:5"], "--goodput: itl:5"),
    (["--rates", "1", "--goodput", "ttft"], "ttft:2000"),
    (["--replay"], "--dataset-path"),
    (["--replay", "--dataset-path", "f", "--rates", "1"], "--rates"),
    (["--rates", "1", "--repeats", "2"], "--repeats"),
    (["--rates", "1", "--speed", "2"], "--replay"),
    ([], "give --rates"),
    (["--replay", "--dataset-path", "/no"], "error: /no"),
    (["--rates", "1", "--strategies", "none"], "unknown strategy")])
def test_bad_flags_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as status:
        load_latency.main(["--model", "tiny", *argv])
    assert status.value.code and message in f"{status.value.code}{capsys.readouterr().err}"


# ------------------------------------------------------------------- limits of this machine

def test_gpu_limits(tmp_path, monkeypatch, capsys):
    """The ceilings, and decode over its floor, measure the machine they run on and say what it is.
    """
    monkeypatch.setattr(gpu_limits, "MIN_SECONDS", 0.02)
    monkeypatch.setitem(gpu_limits.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(gpu_limits.MATRIX_SIZE, "cpu", 64)
    monkeypatch.setattr("kernels.cpu_bandwidth.DATA_BYTES", 1 << 22)
    files = [str(tmp_path / name) for name in ("c.json", "f.json")]
    gpu_limits.main(["ceilings", "--device", "cpu", "--result-filename", files[0]])
    limits = json.loads(Path(files[0]).read_text())["limits"]
    assert min(limits[k] for k in ("copy_gb_s", "matrix_tflops", "host_read_gb_s")) > 0
    assert "to_gpu_gb_s" not in limits
    assert "would play the GPU" in capsys.readouterr().out
    monkeypatch.setattr(gpu_limits, "ROWS", [1, 8])
    gpu_limits.main(["linear", "--model", "tiny", "--device", "cpu", "--result-filename", files[0]])
    rows = json.loads(Path(files[0]).read_text())["rows"]
    assert [r["rows"] for r in rows] == [1, 8] and all(r["over_roofline"] > 0 for r in rows)
    gpu_limits.main(["floor", "--model", "tiny", "--device", "cpu", "--batches", "1,3,900",
                     "--input-len", "20", "--steps", "4", "--gpu-blocks", "300", "--cpu-mem", "0",
                     "--result-filename", files[1]])
    found = json.loads(Path(files[1]).read_text())
    assert [r["batch"] for r in found["rows"]] == [1, 3]        # 900 do not fit
    assert found["machine"]["gpu"] is None
    for r in found["rows"]:
        assert r["over_floor"] == pytest.approx(r["ms"] / r["floor_ms"])
        assert r["ms"] > r["floor_ms"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_checks_need_a_gpu():
    done = subprocess.run(["bash", "lab/gpu_first.sh"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 1 and "torch sees none" in done.stderr


def test_cpu_limits(monkeypatch, capsys):
    """Every candidate computes, and its share is of the bandwidth around it."""
    monkeypatch.setattr(cpu_limits, "MIN_KV_BYTES", 1 << 20)
    monkeypatch.setattr(cpu_limits, "DATA_BYTES", 1 << 22)
    monkeypatch.setattr(cpu_limits, "MAX_DRIFT", float("inf"))
    monkeypatch.setattr(cpu_limits, "HEADS", {"GQA 32/8": (32, 8)})
    monkeypatch.setattr(cpu_limits, "LENGTHS", {"B=2 uneven": [97, 17]})
    cpu_limits.main(["--threads", "1", "--rounds", "1", "--peers"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    found, hot = printed["results"]["GQA 32/8 B=2 uneven"], printed["hot"]
    paths = [path for path in cpu_attn.PATHS if cpu_attn.serves(path, "bf16", 128, 16)]
    names = {f"{path} bf16" for path in paths}
    assert hot["multiply_adds_g"]["GQA 32/8"].keys() == names
    bandwidth = found.pop("bandwidth_gb_s")
    assert found.keys() == names | {"torch"} and bandwidth > 0
    for r in found.values():
        assert r["rounds"] == 1 and r["gb_s"] > 0 and r["share_min"] <= r["share"] <= r["share_max"]


# ------------------------------------------------------------------------------- simulations

def test_a_simulation_from_a_measured_profile_follows_the_real_engine(capsys):
    """Not how well, which a noisy machine cannot tell, but that the same plans are made and the
    clock is of their kind."""
    simulator_check.main([*TINY, "--num-prompts", "6", "--input-len", "40", "--output-len", "10"])
    out = capsys.readouterr().out
    assert "neo sim" in out and "simulated / real, neo: throughput" in out
    assert "simulated / real, gpu-only" in out
    real = LLM("tiny", "neo", device="cpu", **SIZES)
    simulated = LLM("tiny", "neo", simulate=real)
    for llm in (real, simulated):
        llm.generate([[1] * 30] * 3, SamplingParams(max_tokens=5, ignore_eos=True))
    for key in ("prefill_tokens", "preemptions"):
        assert real.stats()[key] == simulated.stats()[key]
    assert 0 < simulated.stats()["wall_s"] < 100 * real.stats()["wall_s"]


def test_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)     # one worker: importing torch takes longest
    assert figures.rate_at({0.5: 0.1, 1.0: 0.2, 2.0: 1.2}, 0.7) == pytest.approx(1.5)
    assert figures.rate_at({0.5: 0.1, 1.0: 0.2}, 5) == 1.0
    with pytest.raises(SystemExit):
        figures.main(["7"])
    assert "'7'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no number 'soft'"):
        figures.main(["8", "--testbed", "soft=1"])
    pytest.importorskip("matplotlib")
    files = tmp_path / "f.json", tmp_path / "f.png"
    figures.main(["6c", "--num-prompts", "10", "--result-filename", str(files[0]),
                  "--plot", str(files[1])])
    assert "gpu-only" in capsys.readouterr().out
    assert len(json.loads(files[0].read_text())["results"]) == 19
    assert files[1].stat().st_size > 1000


def test_quality_of_an_int8_tier(monkeypatch, capsys):
    """Both readers see the same text, and rounding changes little; the exact one's distributions
    are those of one prompt."""
    exact = kv_quality.Reader("tiny", "auto", 3, 40, "fp32")
    rounded = kv_quality.Reader("tiny", "int8", 3, 40, "fp32")
    assert rounded.llm.budget.kv_dtypes["cpu"] == torch.int8
    ids = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    far = 0.0
    for t in range(40):
        p, q = (reader.read(ids[:, t].tolist()) for reader in (exact, rounded))
        far = max(far, (p - q).abs().max().item())
    assert 0 < far < 0.1
    whole = LLM("tiny", "gpu-only", device="cpu", dtype="fp32", gpu_blocks=9)
    requests = [kv_quality.Request(i, row.tolist(), 1, tier="gpu", num_scheduled=40)
                for i, row in enumerate(ids)]
    logits = whole.model.run([whole.kv.bind(kv_quality.Batch(requests))], whole.kv).logits
    assert torch.allclose(p, logits.log_softmax(-1), atol=1e-4)
    with pytest.raises(SystemExit, match="tiny has no tokenizer"):
        kv_quality.main(["--model", "tiny", "--sequences", "1", "--length", "40"])
    with pytest.raises(SystemExit, match="--length 2 or more"):
        kv_quality.main(["--model", "tiny", "--length", "1"])


# ----------------------------------------------------------------------- will offloading pay

def test_the_advice_against_the_simulated_grid():
    """Forecasts of all 256 points of results/figure-grid.json. Where neo is within 2 % of gpu-only
    no advice is wrong; `strict` counts those points, too."""
    simulated = json.loads((ROOT / "results" / "figure-grid.json").read_text())["results"]
    right, strict, errors = [], [], []
    for bed, name in figures.GRID_BEDS.items():
        cfg = load_config(name)
        perf = Roofline(find_testbed(bed), cfg)
        for work in figures.GRID_WORK:
            source, means = ("random", work) if isinstance(work, tuple) else (work, (None, None))
            ins, outs, _ = workload.draw_requests(source, None, 500, *means,
                                                  np.random.default_rng(0))
            ins, outs, _ = workload.fit_requests(ins, outs, min(8000, cfg.max_position))
            for share in figures.GRID_BUDGETS:
                base, neo = (simulated[f"{bed}, {work}, {share}, {s}"] for s in ("gpu-only", "neo"))
                tokens = {tier: neo[f"kv_budget_{tier}_tokens"] for tier in ("gpu", "cpu")}
                gain = neo["output_throughput"] / base["output_throughput"]
                predicted = Forecast(perf, list(zip(ins, outs)), tokens, 8192, MAX_RUNNING).gain
                strict.append((predicted > PAYS) == (gain > PAYS))
                right.append(strict[-1] or 0.98 <= gain <= PAYS)
                errors.append(abs(predicted / gain - 1))
    assert len(right) == 256
    print(f"sign right {sum(right)}, strictly {sum(strict)}; gain within 15 % "
          f"{sum(e < 0.15 for e in errors)}, within 5 % {sum(e < 0.05 for e in errors)}")
    assert sum(right) >= 0.95 * 256 and sum(strict) >= 0.92 * 256
    assert sum(e < 0.15 for e in errors) >= 0.95 * 256
    assert sum(e < 0.05 for e in errors) >= 0.8 * 256


@pytest.mark.parametrize("argv, words", [
    (["llama-7b", "t4", "500", "200"],
     ["offloading pays here: 1.8", "with --cpu-kv int8 2.", "from 5 requests in flight on",
      "gpu-only 0.3", "bound by GPU memory", "bound by CPU bandwidth", "holds 5.4 requests",
      "224 GB/s on the GPU, 32", "6.9 : 1", "PCIe 1.00x"]),
    (["llama-7b", "t4", "500", "200", "--cpu-kv", "int8"],
     ["offloading pays here: 2.7", "without --cpu-kv int8 1.8", "not exact"]),
    (["llama-13b", "a100", "1000", "200"],
     ["offloading will not pay here: ", "with --cpu-kv int8 1.0", "bound by GPU compute"]),
    (["llama-70b", "h200", "1000", "200", "--gpu-mem", "138", "--num-prompts", "120"],
     ["offloading will not pay here: GPU memory binds", "the CPU can hide none",
      "with --cpu-kv int8 1.2", "which would pay"]),
    (["llama-70b", "h200", "1000", "200", "--gpu-mem", "138", "--num-prompts", "120",
      "--cpu-kv", "int8"],
     ["offloading pays here: 1.2", "without --cpu-kv int8 1.00x"])])
def test_the_advice_in_words(argv, words, capsys):
    model, bed, tokens_in, tokens_out, *more = argv
    advise_command.main(["--model", model, "--testbed", bed, "--input-len", tokens_in,
                         "--output-len", tokens_out, *more])
    out = capsys.readouterr().out
    assert [word for word in words if word not in out] == []


def test_advice_where_there_is_little_to_compare():
    """All requests fit; no CPU tier; a GPU tier without room for one; a measured profile."""
    llm = LLM("llama-7b", simulate="t4", gpu_blocks=40, max_model_len=900)
    assert "the GPU tier holds all 1 requests" in advise(llm, [(100, 20)]).describe()
    assert "does not hold even one such request" in advise(llm, [(700, 50)]).describe()
    alone = LLM("llama-7b", "gpu-only", simulate="t4", cpu_mem=0)
    assert "there is no CPU tier" in advise(alone, [(100, 20)] * 9).describe()
    found = advise(LLM("tiny", "neo", device="cpu", **SIZES), [(20, 9)] * 50)
    assert found.guessed == "int8" and found.gain > 0 and found.gb_s["cpu"] > 0
    assert "(guessed)" in found.describe()


def test_replicas_behind_ray_serve():
    """Two replicas of the tiny model: OpenAI's interface, a stream, metrics of each."""
    pytest.importorskip("ray.serve")
    httpx = pytest.importorskip("httpx")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.ray_serve", "--model", "tiny", "--device", "cpu",
         "--replicas", "2", "--cores", "1", "--port", str(port), "--metrics-port", str(port + 1)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").status_code == 200:
                    break
            time.sleep(0.5)
        body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}
        for _ in range(8):
            reply = httpx.post(url + "/v1/completions", json=body, timeout=60).json()
            assert reply["usage"]["completion_tokens"] == 5
        with httpx.stream("POST", url + "/v1/completions", json=body | {"stream": True}) as reply:
            lines = [line for line in reply.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) > 2
        texts = [httpx.get(f"http://127.0.0.1:{port + i}/metrics").text for i in (1, 2)]
        done = [sum(float(line.split()[-1]) for line in text.splitlines()
                    if line.startswith("neo_requests_total")) for text in texts]
        assert sum(done) == 9 and all(done)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
