"""The chat template that lies beside a checkpoint: messages -> token ids of a prompt.

Refuses to know the server and the engine. Test: pytest server -k template
"""
from datetime import datetime
from pathlib import Path

from checkpoint import read_json


def load_chat_template(model, tokenizer):
    """A function, ([{"role": str, "content": str}], max_tokens) -> token ids; None without a
    template.

    Raises ValueError without the package jinja2, and on a template that jinja2 cannot read. The
    function raises ValueError on messages that the template refuses, and on a prompt that has so
    many characters that it must exceed max_tokens.
    """
    config, source = read_template(Path(model))
    if source is None or tokenizer is None:
        return None
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(f"{model}: its chat template needs the package jinja2: "
                         "pip install jinja2") from None

    def refuse(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": refuse,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"{model}: its chat template is not one that jinja2 reads "
                         f"({error})") from None
    bos, eos = (token_text(config.get(key)) for key in ("bos_token", "eos_token"))

    def render(messages, max_tokens):
        try:
            prompt = template.render(messages=messages, add_generation_prompt=True,
                                     bos_token=bos, eos_token=eos)
        except Exception as error:      # whatever its expressions raise: it is the message's fault
            raise ValueError(f"messages: the chat template refuses them ({error!s:.200})"
                             ) from None
        tokenizer.check_chars(prompt, max_tokens)
        has_bos = bool(bos) and prompt.startswith(bos)
        if has_bos and tokenizer.sp:    # sentencepiece knows bos as an id, not as text
            return tokenizer.encode(prompt[len(bos):])
        return tokenizer.encode(prompt, special=not has_bos)
    return render


def read_template(folder):
    """(tokenizer_config.json or {}, text of the template or None)."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    source = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text()
    if isinstance(source, list):        # several templates, each with its name
        source = next((t["template"] for t in source if t["name"] == "default"), None)
    return config, source


def token_text(token):
    """token: as in tokenizer_config.json, a str, {"content": str} or None."""
    return token.get("content") if isinstance(token, dict) else token or ""
