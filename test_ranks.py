"""Tensor parallelism: two and four ranks on this machine's cores, by gloo.

Ranks take seconds to start, so each engine here serves several tests.
    python -m pytest test_ranks.py
"""
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ranks
from checkpoint import PRESETS
from neo import LLM, SamplingParams
from options import Options
from ranks import RankError, Ranks
from startup import check_num_ranks
from test_neo import EXACT, hf_generate, make_prompts, save_checkpoint

ROOT = Path(__file__).resolve().parent
STRATEGIES = "neo", "gpu-only", "gpu-whole", "serial", "symmetric"
STARVED = dict(device="cpu", dtype="fp32", gpu_threads=1, cpu_threads=1, gpu_blocks=14,
               cpu_mem=0.02, max_model_len=128, max_batch_tokens=32)
SECONDS = 10        # in which a failure must have ended everything


def bench_command(*flags):
    """bench.py with a profile that is measured quickly, and with Ctrl-C."""
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"import measure, bench; measure.PROFILE_SECONDS = 0.2; bench.main({flags!r})")
    return [sys.executable, "-u", "-c", code]


@pytest.fixture(scope="class")
def two():
    """An engine of two ranks, starved of GPU blocks."""
    llm = LLM("tiny", tensor_parallel_size=2, **STARVED)
    yield llm
    llm.close()


def workers_of(pid):
    """Processes that a process has started and that still run, as Linux tells."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return unused.getsockname()[1]


def gone(pids):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("name", "size", "strategies"), [
    ("mha-d64-linear", 2, STRATEGIES), ("gqa8-d80-tied", 2, STRATEGIES),
    ("gqa4-d128-llama3", 4, ("neo", "symmetric"))])
def test_tokens_are_those_of_transformers(tmp_path, name, size, strategies):
    """Prompts in chunks, swaps, both tiers: the same tokens under every strategy. With one KV head
    for two ranks, and two for four, ranks hold the same ones."""
    hf = save_checkpoint(name, tmp_path)
    prompts = make_prompts(12, hf.config.vocab_size, 60)
    expected = hf_generate(hf, prompts, 16)
    llm = LLM(str(tmp_path), tensor_parallel_size=size, **STARVED)
    try:
        for strategy in strategies:
            llm.reset(strategy)
            outs = llm.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
            assert [o.token_ids for o in outs] == expected, strategy
            llm.kv.check()
        assert llm.model.num_heads[1] == max(1, llm.cfg.n_kv_head // size)
    finally:
        llm.close()


class TestTwoRanks:
    def test_random_weights_are_the_same_model(self, two):
        """Tokens and logits are those of one rank; so are budgets in tokens, and a rank's bytes are
        those that its tensors take."""
        one = LLM("tiny", **STARVED)
        prompts = make_prompts(12, 512, 60)
        tokens = [[o.token_ids for o in llm.generate(prompts, EXACT)] for llm in (one, two)]
        assert tokens[0] == tokens[1]
        assert one.kv_budget == two.kv_budget
        assert two.stats()["cpu_decode_tokens"] and two.stats()["swapped_blocks"]
        held = sum(t.numel() for w in two.model.layers for t in vars(w).values() if t is not None)
        whole = sum(t.numel() for w in one.model.layers for t in vars(w).values() if t is not None)
        norms = 2 * 64 * 4
        assert held - norms == (whole - norms) / 2
        assert "ranks" in two.describe() and "ranks" not in one.describe()

    def test_random_traffic_leaves_every_cache_whole_and_equal(self, two):
        rng, ids = random.Random(1), []
        for strategy in ("neo", "gpu-only"):
            two.reset(strategy)
            for _ in range(60):
                if rng.random() < 0.3:
                    prompt = [rng.randrange(512) for _ in range(rng.randrange(1, 80))]
                    ids.append(two.add_request(prompt, SamplingParams(rng.randrange(1, 40))))
                if ids and rng.random() < 0.1:
                    two.abort(rng.choice(ids))
                two.step()
                two.kv.check()                  # in all ranks; `run` compares their free blocks
            for request in list(two.outputs):
                two.abort(request)
            assert two.generate([[1, 2]], EXACT)[0].finish_reason == "length"
            assert two.kv.tiers["gpu"].free_blocks and not two.kv.sequences

    def test_ctrl_c_takes_effect_between_iterations(self, two):
        """So that the ranks stay in step, and the engine goes on."""
        signal.signal(signal.SIGINT, signal.default_int_handler)    # background jobs ignore it
        before = two.generate([[1, 2, 3]], EXACT)[0].token_ids
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            two.generate([[1, 2, 3]] * 8, SamplingParams(100, ignore_eos=True))
        assert not two.outputs and not two.kv.sequences
        assert two.generate([[1, 2, 3]], EXACT)[0].token_ids == before
        two.kv.check()

    def test_sampling_and_spans_of_all_ranks(self, two):
        spans = []
        two.watch(lambda plan, found, start, end: spans.extend(found))
        params = SamplingParams(8, temperature=1.0, seed=3, logprobs=True)
        one = LLM("tiny", **STARVED)
        outs = [llm.generate([[5, 6, 7]], params)[0] for llm in (one, two)]
        two.watch(None)
        assert outs[0].token_ids == outs[1].token_ids
        assert outs[0].logprobs == pytest.approx(outs[1].logprobs, abs=1e-4)
        assert {s.rank for s in spans} == {0, 1}
        assert {s.stage for s in spans if s.rank} >= {"linear", "attend"}


@pytest.mark.parametrize("size", [0, 3])
def test_numbers_of_ranks_that_cannot_be(size):
    with pytest.raises(ValueError, match=f"{size}.*(must be 1 or more|divides)"):
        LLM("tiny", device="cpu", tensor_parallel_size=size)


def test_more_ranks_than_cores_must_be_asked_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(ValueError, match="2 ranks on 1 cores.*--gpu-threads 1"):
        LLM("tiny", device="cpu", tensor_parallel_size=2)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = Options.of("tiny", "neo", {"tensor_parallel_size": 2})
    with pytest.raises(ValueError, match="2 ranks on this machine, which has 1 GPUs"):
        check_num_ranks(options, PRESETS["tiny"], torch.device("cuda"))


def test_ranks_with_other_flags_are_refused(monkeypatch):
    def gather(everyones, facts, group):
        everyones[:] = facts, facts | {"dtype": "bf16"}
    monkeypatch.setattr(dist, "all_gather_object", gather)
    some = Ranks()
    some.size, some.talk = 2, None
    with pytest.raises(ValueError, match="dtype is fp32 in rank 0 and bf16 in rank 1"):
        some.check_same({"device": "cpu", "dtype": "fp32"})


def test_a_rank_without_signs_of_life_has_ended(monkeypatch):
    """What notices that another machine is gone."""
    monkeypatch.setattr(ranks, "LIFE_SECONDS", 1.2)
    some = Ranks()
    some.size, some.store = 2, dist.HashStore()
    some.store.set("alive 1", "once")
    watch = threading.Thread(target=some._watch)
    watch.start()
    watch.join(SECONDS)
    with pytest.raises(RankError, match="rank 1 gives no sign of life"):
        some.check()


def test_a_simulation_has_no_ranks():
    with pytest.raises(ValueError, match="--testbed tp=N"):
        LLM("llama-70b", simulate="2xh100", tensor_parallel_size=2)


def test_a_killed_rank_is_noticed_while_idle_and_ends_the_engine():
    llm = LLM("tiny", tensor_parallel_size=2, **STARVED)
    llm.generate([[1, 2, 3]])
    llm.ranks.children[0].kill()
    end = time.monotonic() + SECONDS
    with pytest.raises(RankError, match="rank 1 was killed by signal 9"):
        while time.monotonic() < end:
            llm.ranks.check()
            time.sleep(0.1)
    with pytest.raises(RankError, match="rank 1 was killed"):
        llm.generate([[1, 2, 3]])
    assert not workers_of(os.getpid()) or gone([c.pid for c in llm.ranks.children])
    llm.close()


def test_a_rank_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "CHILD", "raise SystemExit(3)")
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 has ended with exit code 3"):
        LLM("tiny", tensor_parallel_size=2, **STARVED)
    assert time.monotonic() - start < SECONDS and not workers_of(os.getpid())


def test_a_rank_that_raises_is_named_with_its_traceback():
    llm = LLM("tiny", tensor_parallel_size=2, **STARVED)
    llm.generate([[1, 2, 3]])
    child, start = llm.ranks.children[0], time.monotonic()
    llm.ranks.messages.append(("swap", ["nobody"], "cpu"))      # rank 1 alone hears it
    with pytest.raises(RankError, match=r"(?s)rank 1 has failed.*KeyError: 'nobody'"):
        llm.generate([[1, 2, 3]])
    assert time.monotonic() - start < SECONDS and child.poll() is not None
    again = LLM("tiny", tensor_parallel_size=2, **STARVED)      # nothing of the first is in the way
    assert again.generate([[1, 2, 3]], EXACT)[0].finish_reason == "length"
    again.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])     # SIGTERM: see the server
def test_nothing_is_left_behind(number):
    command = bench_command(
        "--model", "tiny", "--device", "cpu", "--gpu-threads", "1", "--cpu-threads", "1",
        "--tensor-parallel-size", "2", "--input-len", "40", "--output-len", "80",
        "--num-prompts", "4000")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        for line in process.stdout:
            if b"KV" in line:
                break
        time.sleep(1)
        pids = workers_of(process.pid)
        assert len(pids) == 1
        process.send_signal(number)
        assert process.wait(2 * SECONDS) != 0 and gone(pids)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("who", ["a rank dies", "SIGTERM"])
def test_the_server_ends_and_leaves_nothing_behind(who):
    """With a request in flight: when a rank dies it is answered with 503, and the server ends with
    an error; a signal ends all ranks after it."""
    port = free_port()
    flags = ("--model", "tiny", "--device", "cpu", "--port", str(port), "--gpu-threads", "1",
             "--cpu-threads", "1", "-tp", "2")
    command = [sys.executable, "-c", "import measure, serve; measure.PROFILE_SECONDS = 0.2; "
               f"serve.main({flags!r})"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        end, url = time.monotonic() + 120, f"http://127.0.0.1:{port}"
        while time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health") as reply:
                assert reply.status == 200
                break
            time.sleep(0.2)
        pids = workers_of(process.pid)
        body = {"prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True, "n": 4}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, url + "/v1/completions", body)
            time.sleep(0.5)
            process.terminate() if who == "SIGTERM" else os.kill(pids[0], signal.SIGKILL)
            status, code = answer.result(60), process.wait(60)
        assert (status, code) == ((200, 0) if who == "SIGTERM" else (503, 1))
        assert len(pids) == 1 and gone(pids)
        told = "one of its processes has ended" in process.stderr.read()
        assert told == (who != "SIGTERM")
    finally:
        process.kill()
        process.communicate()


def post(url, body):
    """The status of the answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_two_nodes_by_torchrun(tmp_path):
    """Two agents on loopback, one rank each: as on two machines."""
    pytest.importorskip("torch.distributed.run")
    script = tmp_path / "script.py"
    script.write_text(
        "from neo import LLM, SamplingParams\n"
        f"llm = LLM('tiny', tensor_parallel_size=2, **{STARVED!r})\n"
        f"outs = llm.generate({make_prompts(6, 512, 40)!r}, SamplingParams(12, ignore_eos=True))\n"
        "print('TOKENS', [o.token_ids for o in outs])\n"
        "llm.close()\n")
    port = free_port()
    agents = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
         "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port),
         str(script)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for node in (0, 1)]
    outs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    one = LLM("tiny", **STARVED)
    expected = one.generate(make_prompts(6, 512, 40), SamplingParams(12, ignore_eos=True))
    assert outs[0][0].split("TOKENS ")[1].strip() == str([o.token_ids for o in expected])
    assert "TOKENS" not in outs[1][0]
