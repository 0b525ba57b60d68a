"""OpenAI's JSON: the requests that the server takes, checked strictly, and the shapes of what it answers."""
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from neo import SamplingParams

Number = StrictInt | StrictFloat


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class Common(BaseModel):
    """What both kinds of request may say. Unknown fields are refused, but for those that only label a request."""
    model_config = ConfigDict(extra="forbid")
    model: StrictStr
    max_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
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
        for name in ("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"):
            value, neutral = getattr(self, name), type(self).model_fields[name].default
            if value not in (neutral, None, {}):
                raise ValueError(f"{name} = {value!r} is not supported: leave it out")
        given = {k: getattr(self, k) for k in ("max_tokens", "top_p", "top_k", "seed", "stop") if getattr(self, k) is not None}
        return SamplingParams(**given, temperature=1.0 if self.temperature is None else self.temperature,
                              ignore_eos=bool(self.ignore_eos), logprobs=logprobs)


class Completion(Common):
    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    logprobs: StrictInt | None = Field(None, ge=0, le=5)
    echo: StrictBool | None = False
    suffix: StrictStr | None = None

    def prompts(self):
        """A list of str or of lists of token ids."""
        if self.echo or self.suffix:
            raise ValueError("echo and suffix are not supported: leave them out")
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else self.prompt


class Part(BaseModel):
    type: StrictStr
    text: StrictStr


class Message(BaseModel):
    role: StrictStr
    content: StrictStr | list[Part]
    name: StrictStr | None = None


class Chat(Common):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=0)


def problem(status, message, code=None, headers=None):
    """An error in OpenAI's shape."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error")
    message = str(message).encode("ascii", "backslashreplace").decode()                # what clients sent may be no Unicode
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)


def choice(kind, piece, with_logprobs, chunk):
    """One choice of a response, or of a chunk of a stream, from a door.Piece."""
    said = {"index": piece.index, "finish_reason": piece.finish_reason, "token_ids": piece.token_ids, "logprobs": None}
    names = [str(t) for t in piece.token_ids]
    if kind == "chat":
        said["delta" if chunk else "message"] = {"role": "assistant", "content": piece.text}
        if with_logprobs:
            said["logprobs"] = {"content": [{"token": t, "logprob": p, "bytes": None, "top_logprobs": []}
                                            for t, p in zip(names, piece.logprobs)]}
    else:
        said["text"] = piece.text
        if with_logprobs:
            said["logprobs"] = {"tokens": names, "token_logprobs": piece.logprobs, "top_logprobs": None, "text_offset": None}
    return said


def usage(outs):
    asked, made = sum(len(o.prompt_token_ids) for o in outs), sum(len(o.token_ids) for o in outs)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
