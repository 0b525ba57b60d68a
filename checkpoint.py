"""What is on disk: the geometry of a model (or a preset's), its tensors one at a time, and its tokenizer.

Reads Hugging Face folders (config.json, *.safetensors) and Meta's (params.json, consolidated.*.pth). Every error names
the file or the tensor. Knows nothing of devices, merged weights or requests. Glossary of symbols: model.py.
"""
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import safetensors
import torch


# ---------------------------------------------------------------------------------------------------------- geometry

@dataclass(frozen=True)
class Config:
    """Geometry of a Llama model. Raises ValueError on what this engine cannot run."""
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    n_ffn: int
    vocab_size: int
    max_position: int
    rope_theta: float = 10000.0
    rope_scaling: dict = None       # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    eos_ids: tuple = (2,)
    dtype: str = "bf16"             # of the checkpoint

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads are not a multiple of {self.n_kv_head} KV heads")
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} is odd: RoPE needs pairs")
        rope_type = (self.rope_scaling or {}).get("rope_type", "default")
        if rope_type not in ("default", "linear", "llama3"):
            raise ValueError(f"RoPE scaling {rope_type!r} is not supported: use linear, llama3 or none")

    @property
    def num_params(self):
        E, D = self.n_embd, self.head_dim
        layer = E * D * (2 * self.n_head + 2 * self.n_kv_head) + 3 * E * self.n_ffn + 2 * E
        return self.n_layer * layer + self.vocab_size * E * (1 if self.tie_embeddings else 2) + E


LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
PRESETS = {  # L, H, Hkv, D, E, F, V, positions
    "tiny": Config(4, 4, 2, 16, 64, 128, 512, 512),
    "llama-160m": Config(12, 12, 12, 64, 768, 3072, 32000, 2048),
    "llama-1b": Config(16, 32, 8, 64, 2048, 8192, 128256, 131072, 5e5, {**LLAMA3_ROPE, "factor": 32.0},
                       tie_embeddings=True, eos_ids=(128001, 128008, 128009)),
    "llama-7b": Config(32, 32, 32, 128, 4096, 11008, 32000, 4096),
    "llama-8b": Config(32, 32, 8, 128, 4096, 14336, 128256, 131072, 5e5, LLAMA3_ROPE,
                       eos_ids=(128001, 128008, 128009)),
    "llama-13b": Config(40, 40, 40, 128, 5120, 13824, 32000, 4096),
    "llama-70b": Config(80, 64, 8, 128, 8192, 28672, 128256, 131072, 5e5, LLAMA3_ROPE,
                        eos_ids=(128001, 128008, 128009)),
}


def load_config(model):
    """A preset's name or a checkpoint folder (Hugging Face or Meta) -> Config."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if (path / "config.json").is_file():
        return _hf_config(_read_json(path / "config.json"))
    if (path / "params.json").is_file():
        return _meta_config(path)
    if path.is_dir():
        raise ValueError(f"{model}: neither config.json (Hugging Face) nor params.json (Meta) in this folder")
    raise ValueError(f"unknown model {model!r}: neither a preset ({', '.join(PRESETS)}) nor a checkpoint folder")


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the file again") from None


def _hf_config(c):
    if c.get("architectures", ["LlamaForCausalLM"]) != ["LlamaForCausalLM"] or c.get("model_type", "llama") != "llama":
        raise ValueError(f"architecture {c.get('architectures')} (model_type {c.get('model_type')!r}) is not supported: "
                         "this engine runs LlamaForCausalLM")
    for key, want in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if c.get(key, want) != want:
            raise ValueError(f"config.json: {key} = {c[key]!r} is not supported (only {want!r})")
    required = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")
    if missing := [key for key in required if key not in c]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})   # transformers 5 | older
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    eos = c.get("eos_token_id")
    dtype = {"float16": "fp16", "float32": "fp32"}.get(c.get("dtype") or c.get("torch_dtype"), "bf16")
    return Config(
        c["num_hidden_layers"], c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"],
        c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], c["hidden_size"], c["intermediate_size"],
        c["vocab_size"], c.get("max_position_embeddings", 2048), rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        rope, c.get("rms_norm_eps", 1e-6), c.get("tie_word_embeddings", False),
        tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,), dtype)


def _meta_config(path):
    p = _read_json(path / "params.json")
    E, H = p["dim"], p["n_heads"]
    F_ = int(p.get("ffn_dim_multiplier", 1) * int(2 * 4 * E / 3))
    F_ = p["multiple_of"] * -(-F_ // p["multiple_of"])
    theta, scaled = p.get("rope_theta", 10000.0), p.get("use_scaled_rope", False)
    V = p.get("vocab_size", -1)
    if V <= 0:                                  # Llama 1 and 2 leave it to the tokenizer; the output matrix knows
        V = sum(s["output.weight"].shape[0] for s in _meta_shards(path))
    return Config(
        p["n_layers"], H, p.get("n_kv_heads") or H, E // H, E, F_, V,
        p.get("max_seq_len", 131072 if scaled else 8192 if theta > 10000 else 4096), theta,
        {**LLAMA3_ROPE, "factor": p.get("rope_scale_factor", 8.0)} if scaled else None, p.get("norm_eps", 1e-5),
        eos_ids=(128001, 128008, 128009) if theta > 10000 else (2,))


# ------------------------------------------------------------------------------------------------ checkpoint formats

def read_tensors(path, cfg):
    """(Hugging Face name, tensor) of every tensor of a checkpoint folder, one at a time."""
    return _hf_tensors(path) if (path / "config.json").is_file() else _meta_tensors(path, cfg)


def _hf_tensors(path):
    """(name, tensor) of every tensor in a Hugging Face folder, one at a time."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / f for f in _read_json(index)["weight_map"].values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path}: no *.safetensors here")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is named in {index.name} but missing: download it again")
        for name in _open(file).keys():
            with _open(file) as shard:                          # anew for each: what has been read stays mapped until closed
                yield name, shard.get_tensor(name)


def _open(file):
    try:
        return safetensors.safe_open(file, framework="pt")
    except Exception as error:                                  # its own error class, and it names no file
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}): download it again") from None


META_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
              "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
              "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
              "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def _meta_shards(path):
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise ValueError(f"{path}: no consolidated.*.pth here")
    try:
        return [torch.load(f, map_location="cpu", mmap=True, weights_only=True) for f in files]
    except Exception as error:                                  # zip, pickle and torch each raise their own
        raise ValueError(f"{path}: a consolidated.*.pth is truncated or corrupt ({error}): download it again") from None


def _meta_tensors(path, cfg):
    """(Hugging Face name, tensor) of every tensor in a Meta folder, its shards merged one tensor at a time."""
    for name in list(_meta_shards(path)[0]):
        shards = _meta_shards(path)                             # anew for each, as above
        if name == "rope.freqs":
            continue
        key = name.removesuffix(".weight")
        prefix, _, rest = key.partition(".") if key.startswith("layers.") else ("", "", key)
        if prefix:
            layer, _, rest = rest.partition(".")
            prefix = f"model.layers.{layer}."
        parts = [s[name] for s in shards]
        if len(parts) == 1 or rest.endswith("norm"):
            tensor = parts[0]                                   # a norm is the same in every shard
        elif rest in ("attention.wo", "feed_forward.w2") or (rest == "tok_embeddings"
                                                             and parts[0].shape[0] == cfg.vocab_size):
            tensor = torch.cat(parts, 1)                        # split by input (Llama 2 splits embeddings so too)
        else:
            tensor = torch.cat(parts, 0)                        # split by output
        if rest in ("attention.wq", "attention.wk"):            # Meta rotates neighbours, Hugging Face halves
            tensor = tensor.view(-1, cfg.head_dim // 2, 2, cfg.n_embd).transpose(1, 2).reshape(tensor.shape)
        yield prefix + META_NAMES.get(rest, rest) + ".weight", tensor


# --------------------------------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """`tokenizer.model` through sentencepiece, or `tokenizer.json` through the optional package tokenizers."""

    def __init__(self, path):
        self.sp = self.hf = None
        if (path / "tokenizer.json").is_file():
            try:
                import tokenizers
                self.hf = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
                return
            except ImportError:
                if not (path / "tokenizer.model").is_file():
                    raise ValueError(f"{path}/tokenizer.json needs the package tokenizers: pip install tokenizers (or "
                                     "give prompts as token ids)") from None
        import sentencepiece
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}/tokenizer.model is not a sentencepiece model ({error})") from None

    def encode(self, text, special=True):
        """Text -> token ids; special: with the begin-of-text id the model was trained with, where the text brings none. Raises
        ValueError on text that is no Unicode."""
        text.encode()
        return self.hf.encode(text, add_special_tokens=special).ids if self.hf else self.sp.encode(text, add_bos=special)

    def decode(self, ids):
        """Token ids -> text; ids that a padded vocabulary has beyond the tokenizer's are nothing."""
        return self.hf.decode(ids) if self.hf else self.sp.decode([t for t in ids if t < self.sp.vocab_size()])


def load_tokenizer(model):
    """The tokenizer beside a checkpoint, or None."""
    path = Path(model)
    return Tokenizer(path) if any((path / f).is_file() for f in ("tokenizer.json", "tokenizer.model")) else None


def load_chat_template(model, tokenizer):
    """The checkpoint's chat template as a function, messages [{"role", "content"}] -> prompt token ids; None without one.
    Needs the package jinja2. The function raises ValueError on messages that the template does not take."""
    path = Path(model)
    config = _read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    source = config.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        source = (path / "chat_template.jinja").read_text()
    if isinstance(source, list):                                # several, by name
        source = next((t["template"] for t in source if t["name"] == "default"), None)
    if source is None or tokenizer is None:
        return None
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(f"{model}: its chat template needs the package jinja2: pip install jinja2") from None

    def refuse(message):
        raise TemplateError(message)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"{model}: its chat template is not one that jinja2 reads ({error})") from None
    text = lambda token: token.get("content") if isinstance(token, dict) else token or ""
    bos, eos = text(config.get("bos_token")), text(config.get("eos_token"))

    def render(messages):
        try:
            prompt = template.render(messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"messages: the chat template refuses them ({error})") from None
        brought = bool(bos) and prompt.startswith(bos)
        if brought and tokenizer.sp:                            # which knows it as an id, not as text
            prompt, brought = prompt[len(bos):], False
        return tokenizer.encode(prompt, special=not brought)
    return render
