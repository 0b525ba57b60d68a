"""One prompt on its way: what its user asked, what the scheduler keeps, what the user sees.

Knows no torch, no tiers' memory and no policy.
"""
import random
from dataclasses import dataclass, field

MAX_TOP_LOGPROBS = 20
GREEDY_BELOW = 1e-4     # temperature

@dataclass(eq=False, repr=False)
class Request:
    """One prompt on its way. The first five fields are set by whoever adds it."""
    id: object
    prompt: list                       # token ids
    max_tokens: int
    stop_ids: frozenset = frozenset()  # token ids that end it
    exact_length: bool = False         # it will produce exactly max_tokens (ignore_eos)
    # the scheduler sets the rest
    output: list = field(default_factory=list)  # token ids so far; Scheduler.arrive appends
    num_pending: int = 0               # tokens behind them that the GPU still computes
    arrival: int = 0                   # order of arrival
    tier: str = None                   # "gpu" or "cpu" while its KV lies there
    num_cached: int = 0                # tokens in the cache: 0, then chunks, then all but the last
    num_scheduled: int = 0             # prompt tokens to prefill in this iteration
    num_blocks: int = 0                # blocks counted for it
    last_run: int = 0                  # iteration in which it last got a token or a chunk
    finish_reason: str = None          # "stop", "length" or "abort"

    def __repr__(self):
        return (f"request {self.id!r} ({len(self.prompt)} + {len(self.output)} tokens, "
                f"tier {self.tier}, {self.num_cached} cached)")

    @property
    def num_tokens(self):
        return len(self.prompt) + len(self.output) + self.num_pending

    @property
    def num_output(self):
        return len(self.output) + self.num_pending

    @property
    def is_decoding(self):
        """Its prefill is over: each iteration that it is part of gives it one token."""
        num_output = len(self.output) + self.num_pending    # this is asked most often of all
        return num_output > 0 and self.num_cached == len(self.prompt) + num_output - 1

    @property
    def ends_prefill(self):
        """This iteration completes its prefill, so it gets a token."""
        return self.num_cached + self.num_scheduled == self.num_tokens

    def tokens(self, start, end):
        """Tokens to prefill, none of them pending. After a preemption the output is computed again
        with the prompt."""
        if end > len(self.prompt):
            return (self.prompt + self.output)[start:end]
        return self.prompt[start:end]


@dataclass
class SamplingParams:
    """How to continue one prompt. Raises ValueError on values out of range."""
    max_tokens: int = 16
    temperature: float = 0.0       # 0: greedy
    top_p: float = 1.0             # keep the likeliest tokens up to this probability
    top_k: int = 0                 # keep this number of the likeliest tokens; 0: all
    seed: int = None               # None: drawn from the engine's seed and the request's number
    ignore_eos: bool = False       # always produce max_tokens
    stop: list = None              # strings that end the text (one or a list); not part of it
    logprobs: bool = False         # also the log-probability of every token
    top_logprobs: int = 0          # and those of this number of the likeliest tokens
    presence_penalty: float = 0.0  # taken from the logit of every token in the output
    frequency_penalty: float = 0.0     # taken from it for each time that it is there
    repetition_penalty: float = 1.0    # divides positive logits of tokens in prompt and output
    logit_bias: dict = None        # {token id: added to its logit}
    min_tokens: int = 0            # nothing ends the output before
    stop_token_ids: list = None    # token ids that end it, beside the model's own

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.logit_bias, self.stop_token_ids = self.logit_bias or {}, self.stop_token_ids or []
        biases_ok = all(-100 <= bias <= 100 for bias in self.logit_bias.values())
        for name, ok, limits in (
                ("max_tokens", self.max_tokens >= 1, "1 or more"),
                ("temperature", 0 <= self.temperature <= 1e4, "from 0 to 10000"),
                ("top_p", 1e-6 <= self.top_p <= 1, "from 0.000001 to 1"),
                ("top_k", 0 <= self.top_k < 2 ** 31, "0 or more, below 2^31"),
                ("stop", all(self.stop), "strings that are not empty"),
                ("top_logprobs", 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
                 f"from 0 to {MAX_TOP_LOGPROBS}"),
                ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
                ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
                ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
                ("logit_bias", biases_ok, "numbers from -100 to 100"),
                ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens")):
            if not ok:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {limits}")
        if self.temperature < GREEDY_BELOW:
            self.temperature = 0.0      # dividing logits by it would overflow

    @property
    def changes_logits(self):
        """Are logits changed before a token is chosen?"""
        return bool(self.presence_penalty or self.frequency_penalty or self.min_tokens
                    or self.repetition_penalty != 1 or self.logit_bias)


@dataclass
class RequestOutput:
    """A request as its user sees it. Its tokens and its end are those of its Request."""
    request: Request = field(repr=False)
    params: SamplingParams
    text: str = ""                 # grows by whole characters; empty without a tokenizer
    logprobs: list = field(default_factory=list)            # natural; empty unless asked for
    top_logprobs: list = field(default_factory=list)        # of each token: [(id, logprob)]
    num_exempt: int = 0            # characters that stop strings are not searched in (min_tokens)
    rng: random.Random = field(default=None, repr=False)    # its own, if it samples
    prompt_index: object = field(default=None, repr=False)  # ids of the prompt, once sampling asks
    decoder: object = field(default=None, repr=False)       # tokens -> text, with a tokenizer

    @property
    def request_id(self):
        return self.request.id

    @property
    def prompt_token_ids(self):
        return self.request.prompt

    @property
    def token_ids(self):
        """Grows with every token (Scheduler.arrive appends them); an end-of-text id is the last."""
        return self.request.output

    @property
    def finish_reason(self):
        """"stop", "length" or "abort" once finished, before that None."""
        return self.request.finish_reason

    def decode_more(self):
        """Add the text of new tokens, up to a stop string. Returns whether one was found."""
        reason, stops = self.finish_reason, self.params.stop
        if not self.decoder:
            return False
        exempt = len(self.token_ids) <= self.params.min_tokens
        # an end-of-text id is no text
        ids = self.token_ids[:-1] if reason == "stop" else self.token_ids
        searched = max(self.num_exempt, len(self.text) - max(map(len, stops), default=0))
        self.text += self.decoder(ids, final=reason is not None)
        if exempt:
            self.num_exempt = len(self.text)
            return False
        found = [i for i in (self.text.find(s, searched) for s in stops) if i >= 0]
        if found:
            self.text = self.text[:min(found)]
            if reason:
                self.request.finish_reason = "stop"
        return bool(found)

    def settled_text(self):
        """The text that cannot change any more: its end may yet turn out to begin a stop string."""
        if self.finish_reason:
            return self.text
        longest_stop = max(map(len, self.params.stop), default=1)
        return self.text[:max(0, len(self.text) - longest_stop + 1)]
