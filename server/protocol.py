"""OpenAI's JSON: the bodies that clients send, and the answers that they get.

What the engine can do is checked strictly. What would change the answer's meaning and is not
supported is refused by name, unless its value is neutral. Unknown fields are ignored, with one
warning per name. Refuses to know routes and how requests run. Test: pytest server
"""
import contextlib
import json
import reprlib
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

# Fields that are not supported, and the values that change nothing. null always is one. A field
# that one of the two bodies supports stands here for the other.
NEUTRAL = {
    "echo": (False,), "top_logprobs": (0,), "max_completion_tokens": (),
    "suffix": ("",), "best_of": (1,), "response_format": ({"type": "text"},),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (),
    "web_search_options": (), "min_p": (0,), "length_penalty": (1,), "use_beam_search": (False,),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "structured_outputs": (), "prompt_logprobs": (), "prompt_embeds": (),
    "truncate_prompt_tokens": (), "add_special_tokens": (True,), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "allowed_token_ids": (), "bad_words": ([],),
    "logits_processors": ([],), "chat_template": (), "chat_template_kwargs": ({},),
    "documents": ([],), "add_generation_prompt": (True,), "continue_final_message": (False,)}
# Fields that label a request, or ask for what the answer does not depend on.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "reasoning_effort", "verbosity", "parallel_tool_calls", "priority", "prediction",
           "spaces_between_special_tokens", "detokenize", "request_id"}
# The same for each message of a chat. A reply of the openai package brings most of them.
NEUTRAL_IN_MESSAGE = {"function_call": (), "audio": ()}
IGNORED_IN_MESSAGE = {"refusal", "annotations", "reasoning", "reasoning_content",
                      "provider_specific_fields"}
_warned = set()         # names of unknown fields
_short = reprlib.Repr()     # looks at the first elements of a value alone, however large it is
_short.maxlevel = 2


class Strict(BaseModel):
    """Converts no value of another type; ignores unknown fields."""
    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = False              # in a chunk of its own, at the end
    continuous_usage_stats: bool | None = False     # in every chunk, of its choice so far


class Common(Strict):
    """The fields of both bodies."""
    model: str | None = None            # None: the one that is served
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None            # -1 or 0: all
    seed: int | None = Field(None, ge=-2 ** 63, lt=2 ** 63)
    n: int | None = Field(1, ge=1, le=MAX_SAMPLES)
    stop: str | list | None = None      # params() checks the elements
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_IDS)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_IDS)] | None = None
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
            raise ValueError(f"stop = {_short.repr(self.stop)}: must be a string or a list of "
                             f"strings, at most {MAX_STOPS} of {MAX_STOP_CHARS} characters")
        names = {"max_tokens", "min_tokens", "temperature", "top_p", "top_k", "seed", "stop",
                 "stop_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty",
                 "ignore_eos"}
        given = {"temperature": 1.0} | self.model_dump(include=names, exclude_none=True)
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if self.logit_bias and not all(key.isdecimal() for key in self.logit_bias):
            raise ValueError(f"logit_bias = {_short.repr(self.logit_bias)}: its keys must be token "
                             "ids")
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
            raise ValueError(f"echo = True with logprobs = {self.logprobs} is not supported: the "
                             "engine has no log-probabilities of prompts; leave one of them out")
        is_one = isinstance(self.prompt, str) or (self.prompt and is_token_ids(self.prompt))
        prompts = [self.prompt] if is_one else self.prompt
        if not prompts or not all(isinstance(p, str) or is_token_ids(p) for p in prompts):
            raise ValueError(f"prompt = {_short.repr(self.prompt)}: must be a string, a list of "
                             "token ids, or a list of either; and not empty")
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
        for part in parts:
            if not is_text_part(part):
                raise ValueError(f"messages: content part {_short.repr(part)} is not supported: "
                                 'send {"type": "text", "text": ...}')
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
            raise ValueError(f"top_logprobs = {self.top_logprobs}: needs logprobs = true")
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
                              ("messages", data.get("messages"), MAX_MESSAGES),
                              ("logit_bias", data.get("logit_bias"), MAX_IDS)):
        if isinstance(found, list | dict) and len(found) > most:
            raise ValueError(f"{name}: {len(found)} entries, at most {most} are allowed")
    check_fields(data, kind)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ValueError(what_is_wrong(error)) from None


def check_fields(data, kind):
    """Raise ValueError on a field that is not supported, unless its value is neutral. Warn of
    unknown names."""
    neutral = neutral_values(kind)
    if data.get("tool_choice") == "none":
        del neutral["tools"]                    # the model must not call any
    if data.get("function_call") == "none":
        del neutral["functions"]
    neutral["best_of"] += (data.get("n"),)      # all of the n answers are returned
    refuse_unless_neutral(data, neutral)
    warn_of_unknown("", data, kind.model_fields.keys() | NEUTRAL.keys() | IGNORED)
    options, messages = data.get("stream_options"), data.get("messages")
    if isinstance(options, dict):
        warn_of_unknown("stream_options.", options, StreamOptions.model_fields)
    known = Message.model_fields.keys() | NEUTRAL_IN_MESSAGE.keys() | IGNORED_IN_MESSAGE
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            refuse_unless_neutral(message, NEUTRAL_IN_MESSAGE, f"messages.{i}.")
            warn_of_unknown("messages.", message, known)


def neutral_values(kind):
    """{field: values that change nothing} of what a body of this kind does not support."""
    neutral = {name: values for name, values in NEUTRAL.items() if name not in kind.model_fields}
    if kind is Chat:                            # its template decides
        neutral["add_special_tokens"] = (True, False)
    return neutral


def refuse_unless_neutral(data, neutral, path=""):
    for name, values in neutral.items():
        value = data.get(name)
        if not (value is None or value in values):
            instead = f", or send {json.dumps(values[0])}" if values else ""
            raise ValueError(f"{path}{name} = {_short.repr(value)} is not supported: leave it out"
                             + instead)


def warn_of_unknown(path, data, known):
    """Warn of each unknown name once, and of MAX_WARNED at most: clients choose the names."""
    for name in data:
        if name not in known and len(_warned) < MAX_WARNED:
            name = f"{path}{name:.60}"
            if name not in _warned:
                _warned.add(name)
                with contextlib.suppress(OSError):      # a full disk hurts no client
                    print(f"warning: field {name!r} of a request is unknown, and ignored",
                          file=sys.stderr)


def what_is_wrong(error):
    """The first field that a ValidationError is about, its value, and what it must be."""
    first = error.errors(include_url=False)[0]
    path, must = first["loc"], first["msg"]
    if path[-1:] in (("str",), ("list[any]",)):     # pydantic tries all that a field may be
        path, must = path[:-1], "Input should be a string or a list"
    field = ".".join(map(str, path)) or "body"
    if first["type"] != "missing":
        field += f" = {_short.repr(first['input'])}"
    return f"{field}: {must}"


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
    prompts    token ids of the prompt of each output
    echo       texts that stand before the outputs, one for each; or none at all
    """

    def __init__(self, body, model, tokenizer, prompts, echo=()):
        self.body, self.tokenizer, self.is_chat = body, tokenizer, isinstance(body, Chat)
        options = body.stream_options or StreamOptions()
        self.wants_usage, self.wants_usage_so_far = (
            options.include_usage, options.continuous_usage_stats)
        self.prompt_lens, self.num_sent = [len(p) for p in prompts], [0] * len(prompts)
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
        chunk = self.header | {"choices": [self.choice(delta.index, delta)]}
        if self.wants_usage_so_far:
            self.num_sent[delta.index] += len(delta.token_ids)
            chunk["usage"] = usage_json(self.prompt_lens[delta.index], self.num_sent[delta.index])
        return chunk

    def usage_chunk(self, outs):
        return self.header | {"choices": [], "usage": self.usage(outs)}

    def usage(self, outs):
        """A prompt counts once, whatever the number of its answers."""
        return usage_json(sum(self.prompt_lens[::self.body.num_samples]),
                          sum(len(out.token_ids) for out in outs))

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


def usage_json(num_prompt, num_output):
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output}


def error_json(status, message, code=None):
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    # A message may quote a client's surrogates, which UTF-8 cannot encode.
    message = str(message).encode("ascii", "backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_response(status, message, code=None, headers=None):
    return JSONResponse(error_json(status, message, code), status, headers)
