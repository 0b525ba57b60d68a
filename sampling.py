"""Logits -> tokens: penalties, truncation, seeded draws, log-probabilities.

An output of the engine (request.RequestOutput) brings `params`, `rng`, its Request and the lists
that log-probabilities are appended to. Knows no model, no tiers and no policy.
"""
import torch

SAMPLED_AT_ONCE = 64    # rows: `draw` holds several tensors as large as their logits


def sample(logits, outs, best=None):
    """logits [S, V] float32, one row per output -> S token ids.

    best  a list of the tokens of the largest logits, if they are known

    Greedy rows take the largest logit. Each other row draws one number from its own generator, so
    neither the batch nor the order of requests changes what it draws. Log-probabilities, where
    asked for, are the model's own: before temperature, penalties and truncation.
    """
    tokens = logits.argmax(-1).tolist() if best is None else best
    for rows in _groups(i for i, out in enumerate(outs)
                        if out.params.temperature or out.params.changes_logits):
        chosen = _choose(logits[rows], [outs[i] for i in rows])
        for i, token in zip(rows, chosen, strict=True):
            tokens[i] = token
    for rows in _groups(i for i, out in enumerate(outs) if out.params.logprobs):
        _add_logprobs(logits[rows], [tokens[i] for i in rows], [outs[i] for i in rows])
    return tokens


def is_greedy(out):
    """Does an output need nothing but the largest of the logits as they are?"""
    p = out.params
    return not (p.temperature or p.logprobs or p.changes_logits)


def _groups(rows):
    rows = list(rows)
    return [rows[i:i + SAMPLED_AT_ONCE] for i in range(0, len(rows), SAMPLED_AT_ONCE)]


def _choose(logits, outs):
    """A token for each row; logits [R, V] may be changed."""
    for x, out in zip(logits, outs, strict=True):
        if out.params.changes_logits:
            change_logits(x, out)
    tokens = logits.argmax(-1).tolist()
    drawn = [i for i, out in enumerate(outs) if out.params.temperature]
    if drawn:
        params, numbers = [outs[i].params for i in drawn], [outs[i].rng.random() for i in drawn]
        for i, token in zip(drawn, draw(logits[drawn], params, numbers), strict=True):
            tokens[i] = token
    return tokens


def change_logits(x, out):
    """Penalties, then biases, then forbidden ends of one row x [V], in place."""
    p, r = out.params, out.request

    def index(ids):
        return torch.tensor(ids, dtype=torch.long, device=x.device)
    if p.repetition_penalty != 1:       # of every token seen, in the prompt too
        if out.prompt_index is None:
            out.prompt_index = index(list(set(r.prompt)))
        seen = torch.cat((out.prompt_index, index(r.output)))
        x[seen] = torch.where(x[seen] > 0, x[seen] / p.repetition_penalty,
                              x[seen] * p.repetition_penalty)
    if r.output and (p.presence_penalty or p.frequency_penalty):
        counts = torch.bincount(index(r.output), minlength=len(x))
        x -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    if p.logit_bias:
        x[index(list(p.logit_bias))] += torch.tensor(
            list(p.logit_bias.values()), dtype=x.dtype, device=x.device)
    if len(r.output) < p.min_tokens and r.stop_ids:
        x[index(list(r.stop_ids))] = float("-inf")


def draw(logits, params, numbers):
    """Invert the (truncated) distribution of each row at a number in [0, 1).

    Tokens stand in the order of their ids: in order of their logits, two that rounding lets swap
    places would change what a seed draws.

    logits [R, V]; params: R objects with temperature, top_p, top_k -> R token ids.
    """
    def column(values):
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]
    V = logits.shape[1]
    kept = (logits / column([p.temperature for p in params])).softmax(-1)
    if any(p.top_p < 1 or p.top_k for p in params):     # else a sort would cost ten times the rest
        top_p, top_k = column([p.top_p for p in params]), column([p.top_k or V for p in params])
        probs, order = kept.sort(descending=True, stable=True)          # likeliest first
        before = probs.cumsum(-1) - probs                               # mass of likelier tokens
        rank = torch.arange(V, device=logits.device)
        whole = (top_p >= 1) & (top_k >= V)     # by rounding, `before` may reach 1 too soon
        probs = probs * (whole | ((rank < top_k) & (before < top_p)))
        kept = torch.zeros_like(kept).scatter_(1, order, probs)         # in order of token ids
    mass = kept.cumsum(-1)
    # Not a search in `mass`: sums that a GPU makes in parallel may fall by a rounding error.
    hit = (mass > column(numbers) * mass[:, -1:]) & (kept > 0)
    first, last = hit.byte().argmax(-1), V - 1 - (kept > 0).flip(-1).byte().argmax(-1)
    return torch.where(hit.any(-1), first, last).tolist()       # no hit: a number rounded to 1


def _add_logprobs(logits, tokens, outs):
    """Append the log-probability of each row's token, and of its likeliest tokens if asked for."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    num_top = min(max(out.params.top_logprobs for out in outs), logits.shape[1])
    values, ids = (t.tolist() for t in logprobs.topk(num_top))
    for i, out in enumerate(outs):
        out.logprobs.append(chosen[i])
        n = out.params.top_logprobs
        out.top_logprobs.append(list(zip(ids[i][:n], values[i][:n], strict=True)))
