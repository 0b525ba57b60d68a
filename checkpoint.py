"""What is on disk: a model's geometry (or a preset's), its tensors one at a time, its tokenizer.

Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 are one model with two switches in its Config.
Reads Hugging Face folders (config.json, *.safetensors) and Meta's (params.json,
consolidated.*.pth). Every error names the file or the tensor. Knows no devices, merged weights or
requests. Glossary of symbols: model.py.
"""
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch

# ---------------------------------------------------------------------------------- geometry

ROPE_NUMBERS = {"default": (), "linear": ("factor",),       # that each kind of scaling needs
                "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                           "original_max_position_embeddings")}


def require_whole(name, value):
    """Raise ValueError unless value is a whole number, 1 or more."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r:.60}: must be a whole number, 1 or more")


def require_positive(name, value):
    """Raise ValueError unless value is a finite number above 0."""
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} = {value!r}: must be a number above 0")


@dataclass(frozen=True)
class Config:
    """Geometry of a model. Raises ValueError on what this engine cannot run."""
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
    qkv_bias: bool = False          # q, k and v have a bias (Qwen2)
    qk_norm: bool = False           # each head of q and k is normed before RoPE (Qwen3)
    sliding_window: int = None      # tokens that a token attends to, itself included; None: all
    eos_ids: tuple = (2,)
    dtype: str = "bf16"             # of the checkpoint

    def __post_init__(self):
        for name in ("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_ffn", "vocab_size",
                     "max_position"):
            require_whole(name, getattr(self, name))
        for name in ("rope_theta", "norm_eps"):
            require_positive(name, getattr(self, name))
        for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be true or false")
        if self.sliding_window is not None:
            require_whole("sliding_window", self.sliding_window)
        if not all(type(t) is int for t in self.eos_ids):
            raise ValueError(f"eos_ids = {self.eos_ids!r}: must be token ids")
        # A vocabulary that was cut does not have the ids of its family: they can never come.
        known = tuple(t for t in self.eos_ids if 0 <= t < self.vocab_size)
        object.__setattr__(self, "eos_ids", known)
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads are not a multiple of {self.n_kv_head} "
                             "KV heads")
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} is odd: RoPE needs pairs")
        rope_type = (self.rope_scaling or {}).get("rope_type", "default")
        if rope_type not in ("default", "linear", "llama3"):
            raise ValueError(f"RoPE scaling {rope_type!r} is not supported: use linear, llama3 or "
                             "none")
        for key in ROPE_NUMBERS[rope_type]:
            require_positive(f"RoPE scaling {rope_type!r}: {key}", self.rope_scaling.get(key))

    @property
    def num_params(self):
        E, D, num_qkv = self.n_embd, self.head_dim, self.n_head + 2 * self.n_kv_head
        attention = E * D * (num_qkv + self.n_head) + D * num_qkv * self.qkv_bias
        layer = attention + 3 * E * self.n_ffn + 2 * E + 2 * D * self.qk_norm
        vocab = self.vocab_size * E * (1 if self.tie_embeddings else 2)
        return self.n_layer * layer + vocab + E

    def shard(self, num_ranks):
        """The config of a layer's part in one of num_ranks ranks. Raises ValueError if heads or
        feed-forward size cannot be divided."""
        H, Hkv = self.n_head, self.n_kv_head
        if H % num_ranks or self.n_ffn % num_ranks or (Hkv % num_ranks and num_ranks % Hkv):
            raise ValueError(
                f"{num_ranks} ranks cannot share {H} query heads, {Hkv} key/value heads and a feed-"
                f"forward size of {self.n_ffn}: take a --tensor-parallel-size that divides them")
        return replace(self, n_head=H // num_ranks, n_kv_head=max(1, Hkv // num_ranks),
                       n_ffn=self.n_ffn // num_ranks)

    def vocab_rows(self, num_ranks):
        """Rows of lm_head in a rank; the last one fills up with zeros."""
        return -(-self.vocab_size // num_ranks)

    def whole_shape(self, name):
        """The shape of a tensor (Hugging Face's name) in a checkpoint."""
        E, D, F, V = self.n_embd, self.head_dim, self.n_ffn, self.vocab_size
        q, kv = self.n_head * D, self.n_kv_head * D
        kind, part = name.split(".")[-2:]
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": E, "gate_proj": F, "up_proj": F,
                "down_proj": E, "lm_head": V, "embed_tokens": V, "q_norm": D, "k_norm": D}
        if "norm" in kind or part == "bias":
            return (rows.get(kind, E),)
        return rows[kind], {"o_proj": q, "down_proj": F}.get(kind, E)

    def cut(self, name, whole, rank, num_ranks):
        """What one of num_ranks ranks holds of a whole tensor: q and its heads of k and v, which
        ranks share if they are few; rows of gate and up, columns of o and down; vocab_rows of
        lm_head, but what is left for the last rank."""
        kind, D = name.split(".")[-2], self.head_dim
        if kind in ("k_proj", "v_proj"):
            return whole.narrow(0, rank * self.n_kv_head // num_ranks * D,
                                max(1, self.n_kv_head // num_ranks) * D)
        if kind in ("q_proj", "gate_proj", "up_proj", "lm_head"):
            rows = self.vocab_rows(num_ranks) if kind == "lm_head" else len(whole) // num_ranks
            return whole[rank * rows:(rank + 1) * rows]
        return whole.chunk(num_ranks, 1)[rank] if kind in ("o_proj", "down_proj") else whole


LLAMA2_EOS, LLAMA3_EOS, QWEN_EOS = (2,), (128001, 128008, 128009), (151645, 151643)
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PRESETS = {  # L, H, Hkv, D, E, F, V, positions
    "tiny": Config(4, 4, 2, 16, 64, 128, 512, 512),
    "llama-160m": Config(12, 12, 12, 64, 768, 3072, 32000, 2048),
    "llama-1b": Config(16, 32, 8, 64, 2048, 8192, 128256, 131072, 5e5,
                       LLAMA3_ROPE | {"factor": 32.0}, tie_embeddings=True, eos_ids=LLAMA3_EOS),
    "llama-3b": Config(28, 24, 8, 128, 3072, 8192, 128256, 131072, 5e5,
                       LLAMA3_ROPE | {"factor": 32.0}, tie_embeddings=True, eos_ids=LLAMA3_EOS),
    "llama-7b": Config(32, 32, 32, 128, 4096, 11008, 32000, 4096),
    "llama-8b": Config(32, 32, 8, 128, 4096, 14336, 128256, 131072, 5e5, LLAMA3_ROPE,
                       eos_ids=LLAMA3_EOS),
    "llama-13b": Config(40, 40, 40, 128, 5120, 13824, 32000, 4096),
    "llama-70b": Config(80, 64, 8, 128, 8192, 28672, 128256, 131072, 5e5, LLAMA3_ROPE,
                        eos_ids=LLAMA3_EOS),
    "mistral-7b": Config(32, 32, 8, 128, 4096, 14336, 32768, 32768, 1e6),
    "qwen2.5-7b": Config(28, 28, 4, 128, 3584, 18944, 152064, 32768, 1e6, norm_eps=1e-6,
                         qkv_bias=True, eos_ids=QWEN_EOS),
    "qwen3-0.6b": Config(28, 16, 8, 128, 1024, 3072, 151936, 40960, 1e6, norm_eps=1e-6,
                         tie_embeddings=True, qk_norm=True, eos_ids=QWEN_EOS),
    "qwen3-8b": Config(36, 32, 8, 128, 4096, 12288, 151936, 40960, 1e6, norm_eps=1e-6,
                       qk_norm=True, eos_ids=QWEN_EOS),
}
# model_type of a Hugging Face config -> its architecture, and the switches of Config
FAMILIES = {"llama": ("LlamaForCausalLM", {}), "mistral": ("MistralForCausalLM", {}),
            "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
            "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True})}


def load_config(model):
    """A preset's name, a checkpoint folder (Hugging Face or Meta) or a bare config.json, which has
    no weights -> Config."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if path.is_file():
        return _read_config(path, _hf_config)
    for name, read in (("config.json", _hf_config), ("params.json", _meta_config)):
        if (path / name).is_file():
            return _read_config(path / name, read)
    if path.is_dir():
        raise ValueError(f"{model}: neither config.json (Hugging Face) nor params.json (Meta) in "
                         "this folder")
    raise ValueError(f"unknown model {model!r}: neither a preset ({', '.join(PRESETS)}) nor a "
                     "checkpoint folder")


def _read_config(file, read):
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: must be a JSON object, not a {type(values).__name__}")
    try:
        return read(values, file.parent)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: a value is missing or of the wrong type "
                         f"({type(error).__name__}: {error})") from None


def read_json(path):
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the file again") from None


def _hf_config(c, path):
    architectures, model_type = c.get("architectures"), c.get("model_type", "llama")
    name, switches = FAMILIES.get(str(model_type), (None, {}))
    if not name or architectures not in (None, [name]):
        raise ValueError(f"architecture {architectures} (model_type {model_type!r}) is not "
                         "supported: this engine runs "
                         + ", ".join(name for name, _ in FAMILIES.values()))
    for key, value in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if c.get(key, value) != value:
            raise ValueError(f"{key} = {c[key]!r} is not supported (only {value!r})")
    required = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
                "vocab_size")
    if missing := [key for key in required if c.get(key) is None]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    # Config checks this, too, but its messages would name its own fields.
    c = {key: value for key, value in c.items() if value is not None}
    for key in (*required, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        require_whole(key, c.get(key, 1))
    for key in ("rope_theta", "rms_norm_eps"):
        require_positive(key, c.get(key, 1))
    if type(c.get("tie_word_embeddings", True)) is not bool:
        raise ValueError(f"tie_word_embeddings = {c['tie_word_embeddings']!r:.60}: must be true or "
                         "false")
    kinds = {}      # of both spellings: transformers 5, and older
    for key in ("rope_parameters", "rope_scaling"):
        rope = c.get(key) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{key} = {rope!r:.60}: must be a JSON object")
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError(f"{key} differs from layer to layer: this is not supported")
        kinds[key] = rope.get("rope_type", rope.get("type", "default"))
    scaled = [key for key, kind in kinds.items() if kind != "default"]
    if len({kinds[key] for key in scaled}) > 1:
        raise ValueError(f"rope_parameters and rope_scaling contradict each other: {kinds}")
    key = scaled[0] if scaled else "rope_parameters"
    rope = {**(c.get("rope_parameters") or {}), **(c.get(key) or {}), "rope_type": kinds[key]}
    eos_ids = _generation_eos(path, c.get("eos_token_id", []))
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    if not all(type(t) is int for t in eos_ids):
        raise ValueError(f"eos_token_id = {eos_ids!r:.60}: must be token ids")
    dtype = c.get("dtype") or c.get("torch_dtype")
    H = c["num_attention_heads"]
    return Config(
        n_layer=c["num_hidden_layers"], n_head=H, n_kv_head=c.get("num_key_value_heads", H),
        head_dim=c.get("head_dim", c["hidden_size"] // H), n_embd=c["hidden_size"],
        n_ffn=c["intermediate_size"], vocab_size=c["vocab_size"],
        max_position=c.get("max_position_embeddings", 2048),
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)), rope_scaling=rope,
        norm_eps=c.get("rms_norm_eps", 1e-6), tie_embeddings=c.get("tie_word_embeddings", False),
        sliding_window=_sliding_window(c, model_type), **switches,
        eos_ids=tuple(eos_ids), dtype={"float16": "fp16", "float32": "fp32"}.get(dtype, "bf16"))


def _sliding_window(c, model_type):
    """Tokens of the window of any layer, None where all layers attend to everything."""
    if not c.get("use_sliding_window", model_type == "mistral") or model_type == "llama":
        return None
    if "sliding_attention" not in c.get("layer_types", ["sliding_attention"]):
        return None
    return c.get("sliding_window")


def _generation_eos(path, eos_ids):
    """The ends that generation_config.json names, as transformers has it, or those of config.json.
    Chat models have several."""
    file = path / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    named = found.get("eos_token_id") if isinstance(found, dict) else None
    return eos_ids if named is None else named


def _meta_config(p, path):
    E, H = p["dim"], p["n_heads"]
    if "hidden_dim" in p:           # Mistral's own files
        return Config(
            n_layer=p["n_layers"], n_head=H, n_kv_head=p["n_kv_heads"], head_dim=p["head_dim"],
            n_embd=E, n_ffn=p["hidden_dim"], vocab_size=p["vocab_size"],
            max_position=p.get("max_seq_len", 32768), rope_theta=p.get("rope_theta", 10000.0),
            norm_eps=p["norm_eps"], sliding_window=p.get("sliding_window"), eos_ids=LLAMA2_EOS)
    ffn = int(p.get("ffn_dim_multiplier", 1) * int(2 * 4 * E / 3))
    theta, scaled = p.get("rope_theta", 10000.0), p.get("use_scaled_rope", False)
    is_llama3 = theta > 10000
    vocab_size = p.get("vocab_size", -1)
    if vocab_size <= 0:             # Llama 1 and 2 leave it to the tokenizer; lm_head has it
        vocab_size = sum(s["output.weight"].shape[0] for s in _meta_shards(path))
    positions = 8192 if is_llama3 else 4096
    rope = LLAMA3_ROPE | {"factor": p.get("rope_scale_factor", 8.0)}
    return Config(
        n_layer=p["n_layers"], n_head=H, n_kv_head=p.get("n_kv_heads") or H, head_dim=E // H,
        n_embd=E, n_ffn=p["multiple_of"] * -(-ffn // p["multiple_of"]), vocab_size=vocab_size,
        max_position=p.get("max_seq_len", 131072 if scaled else positions), rope_theta=theta,
        rope_scaling=rope if scaled else None, norm_eps=p.get("norm_eps", 1e-5),
        eos_ids=LLAMA3_EOS if is_llama3 else LLAMA2_EOS)


# ------------------------------------------------------------------------ checkpoint formats

def read_tensors(path, cfg):
    """(Hugging Face name, tensor) of every tensor of a checkpoint folder, one at a time."""
    is_hf = (path / "config.json").is_file()
    return _hf_tensors(path) if is_hf else _meta_tensors(path, cfg)


def _hf_tensors(path):
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    if index.is_file():
        names = read_json(index)
        names = names.get("weight_map") if isinstance(names, dict) else None
        if not isinstance(names, dict) or not all(
                isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ValueError(f"{index}: its weight_map must give the name of a file in this folder "
                             "for every tensor")
        files = sorted({path / name for name in names.values()})
    if not files:
        raise ValueError(f"{path}: no *.safetensors here")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is named in {index.name} but missing: download it again")
        for name in _open(file).keys():
            # opened for each tensor, because what was read stays in memory until it is closed
            with _open(file) as shard:
                yield name, shard.get_tensor(name)


def _open(file):
    try:
        return safetensors.safe_open(file, framework="pt")
    except Exception as error:      # the package has its own error class, which names no file
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}): download it "
                         "again") from None


META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}


def _meta_shards(path):
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise ValueError(f"{path}: no consolidated.*.pth here")
    try:
        return [torch.load(f, map_location="cpu", mmap=True, weights_only=True) for f in files]
    except Exception as error:      # zip, pickle and torch each raise their own class
        raise ValueError(f"{path}: a consolidated.*.pth is truncated or corrupt ({error}): "
                         "download it again") from None


def _meta_tensors(path, cfg):
    """Shards are merged one tensor at a time."""
    for name in list(_meta_shards(path)[0]):
        if name == "rope.freqs":
            continue
        shards = [s[name] for s in _meta_shards(path)]          # opened again, as above
        key, prefix = name.removesuffix(".weight"), ""
        if key.startswith("layers."):
            _, layer, key = key.split(".", 2)
            prefix = f"model.layers.{layer}."
        # Llama 2 splits embeddings by input, Llama 3 by output
        split_by_input = key in ("attention.wo", "feed_forward.w2") or (
            key == "tok_embeddings" and shards[0].shape[0] == cfg.vocab_size)
        tensor = shards[0]                                      # a norm is the same in every shard
        if len(shards) > 1 and not key.endswith("norm"):
            tensor = torch.cat(shards, 1 if split_by_input else 0)
        if key in ("attention.wq", "attention.wk"):     # Meta rotates neighbours, HF halves
            pairs = tensor.view(-1, cfg.head_dim // 2, 2, cfg.n_embd)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        yield prefix + META_NAMES.get(key, key) + ".weight", tensor


# --------------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """`tokenizer.model` through sentencepiece, or `tokenizer.json` through tokenizers, which is an
    optional package."""

    def __init__(self, path):
        self.sp = self.hf = None
        if (path / "tokenizer.json").is_file():
            try:
                import tokenizers
            except ImportError:
                if not (path / "tokenizer.model").is_file():
                    raise ValueError(
                        f"{path}/tokenizer.json needs the package tokenizers: pip install "
                        "tokenizers (or give prompts as token ids)") from None
            else:
                self._load_hf(tokenizers, path / "tokenizer.json")
                return
        import sentencepiece
        model_file = str(path / "tokenizer.model")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=model_file)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{model_file} is not a sentencepiece model ({error})") from None
        self.longest = max(len(self.sp.id_to_piece(i)) for i in range(self.sp.vocab_size()))

    def _load_hf(self, tokenizers, file):
        try:
            self.hf = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:      # the package raises Exception itself, and names no file
            raise ValueError(f"{file} is truncated or no tokenizer ({error}): copy the file again"
                             ) from None
        self.longest = max(map(len, self.hf.get_vocab()), default=1)    # characters of a token

    def check_chars(self, text, max_tokens):
        """Raise ValueError on a text that must have more tokens, because of its characters: to
        tokenize megabytes takes seconds."""
        if len(text) > max_tokens * self.longest:
            raise ValueError(
                f"prompt of {len(text)} characters: it has at least "
                f"{-(-len(text) // self.longest)} tokens, and the limit is {max_tokens}")

    def encode(self, text, special=True):
        """Text -> token ids. Raises ValueError on text that is no Unicode.

        special  put the model's begin-of-text id first
        """
        text.encode()
        if self.hf:         # a batch, because that releases the GIL
            return self.hf.encode_batch([text], add_special_tokens=special)[0].ids
        return self.sp.encode(text, add_bos=special)

    def decode(self, ids):
        """Token ids -> text. A padded vocabulary has ids beyond the tokenizer's: they are dropped.
        """
        if self.hf:
            return self.hf.decode(ids)
        return self.sp.decode([t for t in ids if t < self.sp.vocab_size()])


def load_tokenizer(model):
    """The tokenizer beside a checkpoint, or None."""
    path = Path(model)
    files = (path / "tokenizer.json", path / "tokenizer.model")
    return Tokenizer(path) if any(f.is_file() for f in files) else None


@functools.cache
def token_name(tokenizer, token):
    """The text of one token; remembered, because answers with log-probabilities name thousands."""
    return tokenizer.decode([token])


class StreamDecoder:
    """Token ids -> text, piece by piece.

    It decodes the end of the text twice, without and with the new tokens, and returns the
    difference once that ends in a whole character.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.start, self.shown = tokenizer, 0, 0

    def __call__(self, ids, final=False):
        old = self.tokenizer.decode(ids[self.start:self.shown])
        new = self.tokenizer.decode(ids[self.start:])
        if len(new) <= len(old) or (new.endswith("\ufffd") and not final):
            return ""
        self.start, self.shown = self.shown, len(ids)
        return new[len(old):]
