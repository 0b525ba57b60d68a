"""What all tests share: a profile cache of their own, Triton's interpreter, tiny text models."""
import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

# Threads that wait for work sleep: tests run side by side. Read when torch and Numba start theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import hub  # noqa: F401  before the next line: the demo model lies in the user's own cache

os.environ["XDG_CACHE_HOME"] = CACHE = tempfile.mkdtemp()   # read when measure.py is imported
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"    # read when Triton is imported: kernels run on the CPU

import measure  # noqa: E402  it reads XDG_CACHE_HOME

measure.PROFILE_SECONDS = 0.5       # tests need a profile, not a good one
ROOT = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def text_models(tmp_path_factory):
    """Folders of tiny's geometry, one with a sentencepiece tokenizer and one with a tokenizers
    tokenizer, trained on the spot."""
    import sentencepiece
    from safetensors.torch import save_file

    from neo import LLM
    source = LLM("tiny", device="cpu", dtype="fp32", max_model_len=64, gpu_attn="torch").model
    weights = {k: v.contiguous().clone() for k, v in source.weight_views().items()}
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
              "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 512,
              "head_dim": 16, "eos_token_id": 2, "rms_norm_eps": 1e-5}
    files = ROOT / "test_neo.py", ROOT / "bench.py"
    text = "".join(f.read_text() for f in files) + "naïve café 東京 \n"
    folders = {}
    for kind in ("sentencepiece", "tokenizers"):
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors")
    folder = folders["sentencepiece"]
    (folder / "corpus.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=512,
        byte_fallback=True, character_coverage=0.98, minloglevel=2)
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = byte_level(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=512, show_progress=False, initial_alphabet=byte_level.alphabet()))
    tok.save(str(folders["tokenizers"] / "tokenizer.json"))
    return folders


@pytest.fixture
def interrupt_at(monkeypatch):
    """interrupt_at(n): Ctrl-C at the n-th iteration of any engine."""
    from neo import LLM
    steps, step = [], LLM.step

    def interrupt(n):
        def interrupted(self):
            steps.append(1)
            if len(steps) == n:
                raise KeyboardInterrupt
            return step(self)
        monkeypatch.setattr(LLM, "step", interrupted)
    return interrupt
