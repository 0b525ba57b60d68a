"""OpenAI's JSON: the requests that the server takes, checked strictly, and the shapes of what it answers."""
from typing import Annotated

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, FailFast, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from neo import SamplingParams

Number = StrictInt | StrictFloat
MOST_STOPS = 16, 256            # stop strings, and characters of one: they are searched for after every token


class Strict(BaseModel):
    """Unknown fields are refused, and nothing of another type is taken for what was meant."""
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: StrictBool = False


class Common(Strict):
    """What both kinds of request may say. `user` and `metadata` label a request and do nothing."""
    model: StrictStr
    max_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    seed: StrictInt | None = None
    stop: str | list | None = None                             # its elements: see params()
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool | None = False
    user: StrictStr | None = None
    metadata: dict | None = None
    # only these values, which change nothing
    n: StrictInt | None = 1
    best_of: StrictInt | None = 1
    presence_penalty: Number | None = 0
    frequency_penalty: Number | None = 0
    repetition_penalty: Number | None = 1
    logit_bias: dict | None = None

    def params(self, logprobs):
        """The engine's SamplingParams. Raises ValueError on what it cannot do."""
        many, long = MOST_STOPS
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > many or not all(isinstance(s, str) and len(s) <= long for s in stops):
            raise ValueError(f"stop: must be a string or a list of strings, at most {many} of {long} characters")
        for name in ("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"):
            value, neutral = getattr(self, name), type(self).model_fields[name].default
            if value not in (neutral, None, {}):
                raise ValueError(f"{name} = {value!r} is not supported: leave it out")
        given = {k: getattr(self, k) for k in ("max_tokens", "top_p", "top_k", "seed", "stop") if getattr(self, k) is not None}
        return SamplingParams(**given, temperature=1.0 if self.temperature is None else self.temperature,
                              ignore_eos=bool(self.ignore_eos), logprobs=logprobs)


class Completion(Common):
    prompt: str | list             # its elements: see prompts()
    logprobs: StrictInt | None = Field(None, ge=0, le=1)
    echo: StrictBool | None = False
    suffix: StrictStr | None = None

    def prompts(self):
        """A list of str or of lists of token ids. Raises ValueError on anything else; slow on long prompts, and so not
        left to the validation, which holds up the event loop."""
        if self.echo or self.suffix:
            raise ValueError("echo and suffix are not supported: leave them out")
        is_ids = lambda x: isinstance(x, list) and all(type(t) is int for t in x)
        prompts = [self.prompt] if isinstance(self.prompt, str) or (self.prompt and is_ids(self.prompt)) else self.prompt
        if not (prompts and all(isinstance(p, str) or is_ids(p) for p in prompts)):
            raise ValueError("prompt: must be a string, a list of token ids, or a list of either; and not empty")
        return prompts


class Message(Strict):
    role: StrictStr
    content: str | list | None
    name: StrictStr | None = None

    def text(self):
        """Its content in one piece. Raises ValueError on parts that are no text."""
        if not isinstance(self.content, list):
            return self.content or ""
        is_text = lambda part: (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
                                and isinstance(part["text"], str))
        if not all(map(is_text, self.content)):
            raise ValueError('messages: content must be a string or a list of {"type": "text", "text": ...}')
        return "".join(part["text"] for part in self.content)


class Chat(Common):
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=0)


def said_error(status, message, code=None):
    """An error in OpenAI's shape."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error")
    message = str(message).encode("ascii", "backslashreplace").decode()                # what clients sent may be no Unicode
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def problem(status, message, code=None, headers=None):
    """A response that is an error."""
    return JSONResponse(said_error(status, message, code), status, headers)


def choice(kind, piece, names, chunk, first=True):
    """One choice of a response, or of a chunk of a stream, from a door.Piece. names: its tokens in text, if their
    log-probabilities are wanted; first: is it the first of its choice?"""
    said = {"index": piece.index, "finish_reason": piece.finish_reason, "token_ids": piece.token_ids, "logprobs": None}
    if kind == "chat":
        said["delta" if chunk else "message"] = ({"role": "assistant"} if first else {}) | {"content": piece.text}
        if names is not None:
            said["logprobs"] = {"content": [{"token": t, "logprob": p, "bytes": None, "top_logprobs": []}
                                            for t, p in zip(names, piece.logprobs)]}
    else:
        said["text"] = piece.text
        if names is not None:
            said["logprobs"] = {"tokens": names, "token_logprobs": piece.logprobs, "top_logprobs": None, "text_offset": None}
    return said


def usage(outs):
    asked, made = sum(len(o.prompt_token_ids) for o in outs), sum(len(o.token_ids) for o in outs)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
