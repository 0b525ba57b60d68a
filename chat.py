"""Chat: the template beside a checkpoint (messages -> token ids), a conversation in the terminal.

The server uses the template, `python neo.py --chat` both. Of the engine it knows what a user of LLM
knows. Test: pytest server -k template, pytest test_neo.py -k chat
"""
import sys
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
    if tokenizer is None:
        return None
    config, source = read_template(Path(model))
    if source is None:
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
    path, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object, not a {type(config).__name__}")
    source = config.get("chat_template")
    if jinja.is_file():
        try:
            source = jinja.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{jinja} is not UTF-8 ({error}): copy the file again") from None
    if isinstance(source, list):        # several templates, each with its name
        named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not isinstance(source, str | None):
        raise ValueError(f"{path}: chat_template must be a text, not a {type(source).__name__}")
    return config, source


def token_text(token):
    """token: as in tokenizer_config.json, a str, {"content": str} or None -> str."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


# ---- in the terminal

def follow(llm, out):
    """Step until a request ends; print its text as it comes, or token ids where there is no
    tokenizer. Ctrl-C aborts it."""
    shown = 0                           # characters, or token ids
    try:
        while out.finish_reason is None:
            llm.step()
            new = out.settled_text() if llm.tokenizer else [f"{t} " for t in out.token_ids]
            print("".join(new[shown:]), end="", flush=True)
            shown = max(shown, len(new))
    except KeyboardInterrupt:
        llm.abort(out.request_id)


def converse(llm, params):
    """Questions from the terminal, answers to it, until Ctrl-D, or Ctrl-C where no answer runs.

    An answer that Ctrl-C stopped stays part of the conversation. Where it outgrows the model, its
    oldest question and answer are left out. Raises ValueError for a model without a template.
    """
    template = load_chat_template(llm.path, llm.tokenizer)
    if template is None:
        raise ValueError(f"{llm.name} comes without a chat template: use --prompt")
    print("Ctrl-C stops an answer, a second one leaves.", file=sys.stderr)
    messages = []
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        try:
            ids = template(messages, 10 ** 9)
            while len(ids) + params.max_tokens > llm.max_request_len and len(messages) > 1:
                print("[the oldest question and answer are left out: the conversation exceeds "
                      f"{llm.max_request_len} tokens]", file=sys.stderr)
                del messages[:2]
                ids = template(messages, 10 ** 9)
            out = llm.outputs[llm.add_request(ids, params)]
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        follow(llm, out)
        print()
        messages.append({"role": "assistant", "content": out.text})
