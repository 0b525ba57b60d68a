"""From the name that a user types to a folder: presets, paths, the demo model, names of the hub.

    tiny, llama-7b, ...             a preset of checkpoint.py: the name stays
    models/llama                    a folder, or a bare config.json: the path stays
    smollm2                         the folder that `python -m lab.demo_model` makes
    Qwen/Qwen3-0.6B[@revision]      the package huggingface_hub loads it, once, into its own cache

Knows no engine. Tested in test_neo.py.
"""
import os
import re
import tempfile
from pathlib import Path

from checkpoint import PRESETS

# What the engine reads of a repository; Mistral's and Meta's own files repeat the weights.
METADATA = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
            "tokenizer_config.json", "chat_template.jinja"]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
REPEATED = ["consolidated*", "original/*"]


def cache_folder():
    """Where profiles and the demo model are kept. A user without a home has them in the folder of
    temporary files."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neo"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "neo"


DEMO_MODEL = "smollm2"
DEMO_FOLDER = cache_folder() / DEMO_MODEL


def find_model(name, weights=True):
    """The name of a model -> a preset's name or a path, as str.

    weights: False loads only what describes it, for a simulation. Raises ValueError, with the way
    out, on a name of the hub that cannot be loaded. Unknown names come back as they are.
    """
    if name in PRESETS or Path(name).exists():
        return name
    if name == DEMO_MODEL:
        if not (DEMO_FOLDER / "config.json").is_file():
            raise ValueError(f"model {name}: not on this machine yet: python -m lab.demo_model "
                             "makes it")
        return str(DEMO_FOLDER)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return name
    repository, _, revision = name.partition("@")
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{name} is no folder here. If it is a name of the Hugging Face hub, it "
                         "needs: pip install huggingface_hub") from None
    try:
        return huggingface_hub.snapshot_download(
            repository, revision=revision or None, ignore_patterns=REPEATED,
            allow_patterns=METADATA + WEIGHTS * weights)
    except (OSError, ValueError) as error:      # all errors of the package are one of them
        raise ValueError(f"{name}: {_explain(error, repository)}") from None


def _explain(error, repository):
    """What went wrong on the hub, and what to do, in one line."""
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return (f"gated: accept its terms on https://huggingface.co/{repository}, then `hf auth "
                "login`, or set HF_TOKEN")
    if kind == "RepositoryNotFoundError":
        return ("no such folder here, and no such model on the Hugging Face hub (or it is private: "
                "`hf auth login`)")
    if kind == "RevisionNotFoundError":
        return "the hub has this model, but not this revision (after the @)"
    if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled") or "Connect" in kind:
        return ("the hub cannot be reached and the cache lacks it: load it once with a network, or "
                "give a folder")
    return f"the hub could not load it: {kind}: {str(error).splitlines()[0] if str(error) else ''}"
