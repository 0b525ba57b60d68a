"""OpenAI's JSON: the bodies that clients send, strictly checked, and the answers that they get.

Refuses to know routes and how requests run. Test: pytest server
"""
import time
import uuid
from typing import Annotated

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field

from neo import SamplingParams

MAX_STOPS = 16          # stop strings of a request: each is searched for after every token
MAX_STOP_CHARS = 256    # characters of one stop string
NEUTRAL_ONLY = ("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty",
                "logit_bias")


class Strict(BaseModel):
    """Refuses unknown fields, and converts no value of another type."""
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False


class Common(Strict):
    """The fields of both bodies. `user` and `metadata` label a request and do nothing."""
    model: str
    max_tokens: int | None = None
    temperature: int | float | None = None
    top_p: int | float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list | None = None      # params() checks the elements
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = False
    user: str | None = None
    metadata: dict | None = None
    # NEUTRAL_ONLY: these values alone are accepted; they change nothing.
    n: int | None = 1
    best_of: int | None = 1
    presence_penalty: int | float | None = 0
    frequency_penalty: int | float | None = 0
    repetition_penalty: int | float | None = 1
    logit_bias: dict | None = None

    def params(self):
        """The engine's SamplingParams. Raises ValueError on what the engine cannot do."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or not all(
                isinstance(s, str) and len(s) <= MAX_STOP_CHARS for s in stops):
            raise ValueError("stop: must be a string or a list of strings, at most "
                             f"{MAX_STOPS} of {MAX_STOP_CHARS} characters")
        for name in NEUTRAL_ONLY:
            value = getattr(self, name)
            if value not in (type(self).model_fields[name].default, None, {}):
                raise ValueError(f"{name} = {value!r} is not supported: leave it out")
        names = {"max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos"}
        given = self.model_dump(include=names, exclude_none=True)
        return SamplingParams(**{"temperature": 1.0} | given, logprobs=self.wants_logprobs)


class Completion(Common):
    prompt: str | list                  # prompts() checks the elements
    logprobs: int | None = Field(None, ge=0, le=1)
    echo: bool | None = False
    suffix: str | None = None

    @property
    def wants_logprobs(self):
        return self.logprobs is not None

    def prompts(self, template=None):
        """A list of str or of lists of token ids, without use of the template (see Chat).

        Raises ValueError on anything else. Pydantic does not check this: on a long prompt it
        would block the event loop.
        """
        if self.echo or self.suffix:
            raise ValueError("echo and suffix are not supported: leave them out")
        is_one = isinstance(self.prompt, str) or (self.prompt and is_token_ids(self.prompt))
        prompts = [self.prompt] if is_one else self.prompt
        if not prompts or not all(isinstance(p, str) or is_token_ids(p) for p in prompts):
            raise ValueError("prompt: must be a string, a list of token ids, or a list of "
                             "either; and not empty")
        return prompts


class Message(Strict):
    role: str
    content: str | list | None
    name: str | None = None

    def text(self):
        """The content as one str. Raises ValueError on parts that are not text."""
        if not isinstance(self.content, list):
            return self.content or ""
        if not all(map(is_text_part, self.content)):
            raise ValueError("messages: content must be a string or a list of "
                             '{"type": "text", "text": ...}')
        return "".join(part["text"] for part in self.content)


class Chat(Common):
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=0)

    @property
    def wants_logprobs(self):
        return bool(self.logprobs)

    def prompts(self, template):
        """All messages as one prompt, [token ids]. template: see chat_template.py."""
        return [template([{"role": m.role, "content": m.text()} for m in self.messages])]


def is_token_ids(value):
    return isinstance(value, list) and all(type(t) is int for t in value)   # no bool


def is_text_part(part):
    return (isinstance(part, dict) and part.keys() == {"type", "text"}
            and part["type"] == "text" and isinstance(part["text"], str))


class Reply:
    """The JSON that answers one body.

    tokenizer  names the tokens beside their log-probabilities; None: their ids are the names
    """

    def __init__(self, body, tokenizer):
        self.body, self.tokenizer, self.is_chat = body, tokenizer, isinstance(body, Chat)
        self.wants_usage = body.stream_options and body.stream_options.include_usage
        self.begun = set()              # indices of the prompts whose chat has named its role
        prefix, kind = "cmpl", "text_completion"
        if self.is_chat:
            prefix, kind = "chatcmpl", "chat.completion"
            if body.stream:
                kind += ".chunk"
        self.header = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()),
                       "model": body.model, "object": kind}

    def whole(self, outs):
        """The answer that is not streamed, from RequestOutputs."""
        choices = [self.choice(i, out) for i, out in enumerate(outs)]
        return self.header | {"choices": choices, "usage": usage(outs)}

    def chunk(self, delta):
        return self.header | {"choices": [self.choice(delta.index, delta)]}

    def usage_chunk(self, outs):
        return self.header | {"choices": [], "usage": usage(outs)}

    def choice(self, index, part):
        """part: a RequestOutput, or a Delta of it, whose fields have the same names."""
        choice = {"index": index, "finish_reason": part.finish_reason,
                  "token_ids": part.token_ids, "logprobs": self.logprobs(part)}
        if not self.is_chat:
            return choice | {"text": part.text}
        role = {} if index in self.begun else {"role": "assistant"}
        self.begun.add(index)
        key = "delta" if self.body.stream else "message"
        return choice | {key: role | {"content": part.text}}

    def logprobs(self, part):
        if not self.body.wants_logprobs:
            return None
        names = [self.tokenizer.decode([t]) if self.tokenizer else str(t) for t in part.token_ids]
        if not self.is_chat:
            return {"tokens": names, "token_logprobs": part.logprobs, "top_logprobs": None,
                    "text_offset": None}
        return {"content": [{"token": name, "logprob": p, "bytes": None, "top_logprobs": []}
                            for name, p in zip(names, part.logprobs, strict=False)]}


def usage(outs):
    num_prompt = sum(len(out.prompt_token_ids) for out in outs)
    num_output = sum(len(out.token_ids) for out in outs)
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
