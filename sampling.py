"""From logits to tokens: greedy rows together, the others each from its own generator, so that neither the batch nor the
order of requests changes what a request draws. An output brings `params` (neo.SamplingParams), `rng` and `logprobs`.
"""
import torch

DRAWN_AT_ONCE = 64      # rows sampled together: sorting a vocabulary takes 30 bytes of each row's every logit


def sample(logits, outs):
    """logits [S, V] float32, one row per output -> S token ids. Greedy rows take the largest; the others draw one
    uniform number from their own generator and invert the (truncated) distribution with it. Outputs that ask for
    log-probabilities get them."""
    best = logits.argmax(-1) if logits.is_cuda else logits.numpy().argmax(-1)      # NumPy's is ten times torch's on a CPU
    tokens = best.tolist()
    drawn = [i for i, out in enumerate(outs) if out.params.temperature]
    for at in range(0, len(drawn), DRAWN_AT_ONCE):
        rows = drawn[at:at + DRAWN_AT_ONCE]
        for i, token in zip(rows, _draw(logits[rows], [outs[i] for i in rows])):
            tokens[i] = token
    told = [i for i, out in enumerate(outs) if out.params.logprobs]
    for at in range(0, len(told), DRAWN_AT_ONCE):
        rows = told[at:at + DRAWN_AT_ONCE]
        chosen = torch.tensor([tokens[i] for i in rows], device=logits.device)[:, None]
        for i, value in zip(rows, logits[rows].log_softmax(-1).gather(1, chosen)[:, 0].tolist()):
            outs[i].logprobs.append(value)
    return tokens


def draw_some(logits, out):
    """Sample as many rows as are ever sampled together, all for `out`: for measuring what that takes."""
    return _draw(logits[:DRAWN_AT_ONCE], [out] * len(logits[:DRAWN_AT_ONCE]))


def _draw(logits, outs):
    """logits [R, V] -> R token ids, each by its output's own parameters and generator."""
    column = lambda values: torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]
    params = [out.params for out in outs]
    x, order = (logits / column([p.temperature for p in params])).sort(descending=True)          # [R, V] likeliest first
    probs = x.softmax(-1)
    rank = torch.arange(x.shape[1], device=x.device)
    before = probs.cumsum(-1) - probs                                                            # mass of likelier ones
    keep = (rank < column([p.top_k or x.shape[1] for p in params])) & (before < column([p.top_p for p in params]))
    mass = (probs * keep).cumsum(-1)
    u = column([out.rng.random() for out in outs]) * mass[:, -1:]
    pick = (mass <= u).sum(-1, keepdim=True).clamp(max=keep.sum(-1, keepdim=True).clamp(min=1) - 1)
    return order.gather(1, pick)[:, 0].tolist()
