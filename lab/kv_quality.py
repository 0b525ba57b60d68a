"""What an int8 CPU tier costs in quality: perplexity and KL divergence on real text.

    python -m lab.kv_quality --model smollm2 [--text FILE] [--sequences 16] [--length 1300]

Two engines read the same text token by token, every token a decode on the CPU tier: one whose tier
has the model's dtype, one in int8. Each token's k and v are stored, rounded, and read by all later
ones, as in serving. Compared are the distributions of the next token: perplexity of the text, the
mean of KL(exact || int8) in nats, and how often the likeliest token is the same. The text is by
default the language reference that Python carries as `pydoc_data`. The last line is JSON.
Test: pytest lab -k quality
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench import errors_in_one_line
from checkpoint import load_config
from hub import find_model
from kv_format import kv_bytes
from neo import LLM
from options import Parser
from plan import Batch
from request import Request
from startup import BLOCK_SIZE, GIB


class Reader:
    """An engine that reads given tokens, a decode of every sequence at a time."""

    def __init__(self, model, cpu_kv, sequences, length, dtype):
        cfg = load_config(find_model(model))
        tokens = sequences * (-(-length // BLOCK_SIZE) + 1) * BLOCK_SIZE
        token_bytes = cfg.n_layer * kv_bytes(cfg.n_kv_head, cfg.head_dim, torch.float32)
        self.llm = LLM(model, "symmetric", device="cpu", dtype=dtype, gpu_blocks=1, cpu_kv=cpu_kv,
                       max_model_len=length, cpu_mem=tokens * token_bytes / GIB)
        self.requests = [Request(i, [], length, tier="cpu") for i in range(sequences)]

    def read(self, tokens):
        """The next token of each sequence -> log-probabilities [sequences, V] of what follows."""
        kv, first = self.llm.kv, not self.requests[0].prompt
        for r, token in zip(self.requests, tokens, strict=True):
            if first:
                r.prompt, r.num_scheduled = [token], 1
            else:
                r.output.append(token)
                r.num_cached, r.num_scheduled = r.num_tokens - 1, 0
        batch = Batch(self.requests) if first else Batch(cpu_decodes=self.requests)
        with torch.inference_mode():
            return F.log_softmax(self.llm.model.run([kv.bind(batch)], kv).logits, -1)


def real_text():
    from pydoc_data.topics import topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def compare(model, text, sequences, length, dtype):
    """-> {"tokens", "perplexity", "perplexity_int8", "kl", "agree"}. Raises ValueError on a model
    without a tokenizer and on too short a text."""
    exact, rounded = (Reader(model, cpu_kv, sequences, length, dtype)
                      for cpu_kv in ("auto", "int8"))
    if exact.llm.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: take a checkpoint, such as smollm2")
    ids = exact.llm.tokenizer.encode(text, special=False)
    if len(ids) < sequences * length:
        raise ValueError(f"the text has {len(ids)} tokens, {sequences} sequences of {length} need "
                         f"{sequences * length}: give a longer one, or lower --sequences")
    ids = torch.tensor(ids[:sequences * length]).view(sequences, length)
    nll, kl, agree = torch.zeros(2, dtype=torch.float64), 0.0, 0
    for t in tqdm(range(length - 1), "reading", disable=None, leave=False):
        p, q = (reader.read(ids[:, t].tolist()) for reader in (exact, rounded))
        target = ids[:, t + 1:t + 2]
        nll += torch.stack([-x.gather(1, target).sum().double() for x in (p, q)])
        kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
    n = sequences * (length - 1)
    perplexity, perplexity_int8 = (nll / n).exp().tolist()
    return {"tokens": n, "perplexity": perplexity, "perplexity_int8": perplexity_int8,
            "kl": kl / n, "agree": agree / n}


def main(argv=None):
    parser = Parser("The quality of an int8 KV cache beside an exact one.")
    parser.add_argument("--model", default="smollm2", help="a checkpoint with a tokenizer")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--sequences", type=int, default=16, metavar="N")
    parser.add_argument("--length", type=int, default=1300, metavar="N", help="tokens of each")
    parser.add_argument("--dtype", default="fp32", help="of the model and of the exact tier")
    args = parser.parse_args(argv)
    try:
        with errors_in_one_line():
            if args.sequences < 1 or args.length < 2:
                raise ValueError("--sequences must be 1 or more, --length 2 or more")
            try:
                text = args.text.read_text("utf-8") if args.text else real_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--text {args.text}: {error}") from None
            found = compare(args.model, text, args.sequences, args.length, args.dtype)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    change = found["perplexity_int8"] / found["perplexity"] - 1
    print(f"{args.model}, {found['tokens']} tokens, {args.sequences} sequences of {args.length}: "
          f"perplexity {found['perplexity']:.4f}, int8 {found['perplexity_int8']:.4f} "
          f"({change:+.3%}); mean KL {found['kl']:.2e}; the likeliest token is the same for "
          f"{found['agree']:.2%}")
    print(json.dumps({"model": args.model, "dtype": args.dtype, "length": args.length, **found}))


if __name__ == "__main__":
    main()
