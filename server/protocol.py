"""OpenAI's JSON: the bodies that clients send, and the answers that they get.

What the engine can do is checked strictly. What would change the answer's meaning and is not
supported is refused by name, unless its value is neutral. Unknown fields are ignored, those at the
top of a body with one warning per name. Refuses to know routes and how requests run.
Test: pytest server
"""
import contextlib
import json
import sys
import time
import uuid
from dataclasses import replace
from typing import Annotated

import numpy as np
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from checkpoint import token_name
from neo import SamplingParams
from request import MAX_TOP_LOGPROBS

LARGE = 100_000         # bytes of a body, from which on its keys and values are counted
MAX_KEYS = 25_000       # of a large body
MAX_VALUES = 250_000    # of a large body; token ids of prompts are values, too
MAX_FIELDS = 200        # at the top of a body
MAX_MESSAGES = 4096     # of a chat
MAX_SAMPLES = 16        # n: answers to one prompt
MAX_STOPS = 16          # stop strings of a request: each is searched for after every token
MAX_STOP_CHARS = 256    # characters of one stop string
MAX_IDS = 1024          # of logit_bias and stop_token_ids
MAX_WARNED = 1000       # names of unknown fields that are remembered

# Fields that are not supported, and the values that change nothing. null always is one.
NEUTRAL = {
    "suffix": ("",), "best_of": (1,), "response_format": ({"type": "text"},),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "web_search_options": (), "min_p": (0,), "length_penalty": (1,), "use_beam_search": (False,),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "structured_outputs": (), "prompt_logprobs": (0,), "prompt_embeds": (),
    "truncate_prompt_tokens": (), "add_special_tokens": (True,), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "allowed_token_ids": (), "bad_words": ([],),
    "logits_processors": ([],), "chat_template": (), "chat_template_kwargs": ({},),
    "documents": ([],), "add_generation_prompt": (True,), "continue_final_message": (False,)}
# Fields that label a request, or ask for what the answer does not depend on.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "reasoning_effort", "verbosity", "parallel_tool_calls", "priority", "prediction",
           "spaces_between_special_tokens", "detokenize", "request_id"}
_warned = set()         # names of unknown fields


class Strict(BaseModel):
    """Converts no value of another type; ignores unknown fields."""
    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = False


Number = int | float


class Common(Strict):
    """The fields of both bodies."""
    model: str | None = None            # None: the one that is served
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None            # -1 or 0: all
    seed: int | None = Field(None, ge=-2 ** 63, lt=2 ** 63)
    n: int | None = Field(1, ge=1, le=MAX_SAMPLES)
    stop: str | list | None = None      # params() checks the elements
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_IDS)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=MAX_IDS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def num_samples(self):
        return self.n or 1

    def params(self):
        """One SamplingParams for each of the num_samples answers to a prompt. Raises ValueError on
        what the engine cannot do."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or not all(
                isinstance(s, str) and len(s) <= MAX_STOP_CHARS for s in stops):
            raise ValueError("stop: must be a string or a list of strings, at most "
                             f"{MAX_STOPS} of {MAX_STOP_CHARS} characters")
        names = {"max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "stop",
                 "stop_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty",
                 "ignore_eos"}
        given = {"temperature": 1.0} | self.model_dump(include=names, exclude_none=True)
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if self.logit_bias and not all(key.isdecimal() for key in self.logit_bias):
            raise ValueError("logit_bias: its keys must be token ids")
        biases = {int(key): bias for key, bias in (self.logit_bias or {}).items()}
        params = SamplingParams(**given, **self.wanted_logprobs, logit_bias=biases)
        if params.seed is None:
            return [params] * self.num_samples
        return [replace(params, seed=params.seed + i) for i in range(self.num_samples)]


class Completion(Common):
    prompt: str | list                  # prompts() checks the elements
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = False

    @property
    def wanted_logprobs(self):
        return {"logprobs": self.logprobs is not None, "top_logprobs": self.logprobs or 0}

    def prompts(self, template=None):
        """A list of str or of lists of token ids, without use of the template (see Chat).

        Raises ValueError on anything else. Pydantic does not check this: on a long prompt it
        would take too long.
        """
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: the engine has no "
                             "log-probabilities of prompts")
        is_one = isinstance(self.prompt, str) or (self.prompt and is_token_ids(self.prompt))
        prompts = [self.prompt] if is_one else self.prompt
        if not prompts or not all(isinstance(p, str) or is_token_ids(p) for p in prompts):
            raise ValueError("prompt: must be a string, a list of token ids, or a list of "
                             "either; and not empty")
        return prompts


class Message(Strict):
    """`tool_calls`, `tool_call_id` and `name` are for the chat template."""
    role: str
    content: str | list | None = None
    name: str | None = None
    tool_calls: list | None = None
    tool_call_id: str | None = None

    def for_template(self):
        """A dict without nulls; the content as one str. Raises ValueError on parts that are not
        text."""
        parts = self.content if isinstance(self.content, list) else []
        if not all(map(is_text_part, parts)):
            raise ValueError("messages: content must be a string or a list of "
                             '{"type": "text", "text": ...}')
        text = "".join(part["text"] for part in parts) if parts else self.content or ""
        message = self.model_dump(exclude_none=True, exclude={"tool_calls"}) | {"content": text}
        if self.tool_calls:                 # templates ask whether the key is there
            message["tool_calls"] = [with_parsed_arguments(call) for call in self.tool_calls]
        return message


class Chat(Common):
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def wanted_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs = true")
        return {"logprobs": bool(self.logprobs), "top_logprobs": self.top_logprobs or 0}

    def prompts(self, template):
        """All messages as one prompt, [token ids]. template: see chat_template.py."""
        return [template([m.for_template() for m in self.messages])]


def with_parsed_arguments(call):
    """A tool call whose arguments are a dict, as templates expect them; clients send JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return call | {"function": function | {"arguments": from_json(function["arguments"])}}
    except ValueError:                      # a model wrote it: it stays a text
        return call


def is_token_ids(value):
    return isinstance(value, list) and all(type(t) is int for t in value)   # no bool


def is_text_part(part):
    return (isinstance(part, dict) and part.get("type") == "text"
            and isinstance(part.get("text"), str))


def parse_body(raw, kind):
    """The bytes of a body -> a Completion or a Chat (`kind`). Raises ValueError.

    Called on one thread for all clients: to parse holds the GIL, which the engine needs, too. So
    what would take longer than some 20 ms is refused first.
    """
    if len(raw) > LARGE:
        num_keys, num_values = count_structure(raw)
        for found, most, what in ((num_keys, MAX_KEYS, "keys"), (num_values, MAX_VALUES, "values")):
            if found > most:
                raise ValueError(f"body: {found} {what}, at most {most} are allowed")
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"body: not JSON ({error!s:.200})") from None
    if not isinstance(data, dict):
        raise ValueError("body: must be a JSON object")
    for name, found, most in (("body", data, MAX_FIELDS),
                              ("messages", data.get("messages"), MAX_MESSAGES)):
        if isinstance(found, list | dict) and len(found) > most:
            raise ValueError(f"{name}: {len(found)} entries, at most {most} are allowed")
    for name, neutral in NEUTRAL.items():
        value = data.get(name)
        all_samples = name == "best_of" and value == data.get("n")
        if not (value is None or value in neutral or all_samples):
            raise ValueError(f"{name} = {value!r:.60} is not supported: leave it out")
    unknown = data.keys() - kind.model_fields.keys() - NEUTRAL.keys() - IGNORED
    unknown = {name[:60] for name in unknown} - _warned
    for name in sorted(unknown) if len(_warned) < MAX_WARNED else ():
        _warned.add(name)
        with contextlib.suppress(OSError):      # a log that cannot be written hurts no client
            print(f"warning: field {name!r} of a request is unknown, and ignored", file=sys.stderr)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "body"
        raise ValueError(f"{field}: {first['msg']}") from None


def count_structure(raw):
    """(keys, values) of JSON: its colons and commas outside of strings. NumPy works without the
    GIL."""
    flat = raw.replace(b"\\\\", b"__").replace(b'\\"', b"__")       # no escaped quotes
    x = np.frombuffer(flat, np.uint8)
    outside = np.cumsum(x == ord('"'), dtype=np.uint8) & 1 == 0     # wraps, but stays odd or even
    return tuple(int((outside & (x == ord(sign))).sum()) for sign in ":,")


class Reply:
    """The JSON that answers one body.

    tokenizer  names the tokens beside their log-probabilities; None: their ids are the names
    echo       texts that stand before the outputs, one for each; or none at all
    """

    def __init__(self, body, model, tokenizer, echo=()):
        self.body, self.tokenizer, self.is_chat = body, tokenizer, isinstance(body, Chat)
        self.wants_usage = body.stream_options and body.stream_options.include_usage
        self.begun = set()              # indices of the outputs whose chat has named its role
        self.echo = dict(enumerate(echo))     # what has not been sent of it
        prefix, kind = "cmpl", "text_completion"
        if self.is_chat:
            prefix, kind = "chatcmpl", "chat.completion"
            if body.stream:
                kind += ".chunk"
        self.header = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()),
                       "model": model, "object": kind}

    def whole(self, outs):
        """The answer that is not streamed, from RequestOutputs, as JSON text.

        Log-probabilities make it megabytes, so a thread of its own calls this. `iterencode` is
        Python, which lets the engine have the GIL in between; `json.dumps` does not.
        """
        choices = [self.choice(i, out) for i, out in enumerate(outs)]
        answer = self.header | {"choices": choices, "usage": self.usage(outs)}
        return "".join(json.JSONEncoder().iterencode(answer))

    def chunk(self, delta):
        return self.header | {"choices": [self.choice(delta.index, delta)]}

    def usage_chunk(self, outs):
        return self.header | {"choices": [], "usage": self.usage(outs)}

    def usage(self, outs):
        """A prompt counts once, whatever the number of its answers."""
        num_prompt = sum(len(out.prompt_token_ids) for out in outs[::self.body.num_samples])
        num_output = sum(len(out.token_ids) for out in outs)
        return {"prompt_tokens": num_prompt, "completion_tokens": num_output,
                "total_tokens": num_prompt + num_output}

    def choice(self, index, part):
        """part: a RequestOutput, or a Delta of it, whose fields have the same names."""
        choice = {"index": index, "finish_reason": part.finish_reason,
                  "token_ids": part.token_ids, "logprobs": self.logprobs(part)}
        if not self.is_chat:
            return choice | {"text": self.echo.pop(index, "") + part.text}
        role = {} if index in self.begun else {"role": "assistant"}
        self.begun.add(index)
        key = "delta" if self.body.stream else "message"
        return choice | {key: role | {"content": part.text}}

    def logprobs(self, part):
        if self.body.logprobs is None or self.body.logprobs is False:      # 0 asks for some
            return None
        names, tops = [self.name(t) for t in part.token_ids], part.top_logprobs
        if not self.is_chat:
            # reversed, so that of two tokens with the same text the likelier one stays;
            # the chosen token is always among them
            likeliest = [{name: p} | {self.name(t): q for t, q in reversed(top)}
                         for name, p, top in zip(names, part.logprobs, tops, strict=False)] or None
            return {"tokens": names, "token_logprobs": part.logprobs,
                    "top_logprobs": likeliest if self.body.logprobs else None,
                    "text_offset": None}

        def entry(name, p):
            return {"token": name, "logprob": p, "bytes": list(name.encode())}
        return {"content": [
            entry(name, p) | {"top_logprobs": [entry(self.name(t), q) for t, q in top]}
            for name, p, top in zip(names, part.logprobs, tops, strict=False)]}

    def name(self, token):
        return token_name(self.tokenizer, token) if self.tokenizer else str(token)


def error_json(status, message, code=None):
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    # A message may quote a client's surrogates, which UTF-8 cannot encode.
    message = str(message).encode("ascii", "backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_response(status, message, code=None, headers=None):
    return JSONResponse(error_json(status, message, code), status, headers)
