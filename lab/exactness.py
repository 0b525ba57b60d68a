"""Tokens against transformers, on random tiny checkpoints or on a real one, until enough are equal.

    python -m lab.exactness --num-tokens 200000
    python -m lab.exactness --num-tokens 20000 --model CHECKPOINT

Greedy, float32, every strategy, in tiers so small that requests are swapped, preempted, prefilled
on the CPU tier and cut into chunks. Needs the package transformers.
"""
import random
import shutil
import sys
import tempfile
from collections import Counter

import torch
from tqdm import tqdm

from bench import errors_in_one_line
from neo import LLM, SamplingParams
from options import Parser
from strategies import STRATEGIES

NUM_PROMPTS, MAX_PROMPT, NUM_OUT = 16, 60, 40       # of each checkpoint
COUNTED = ("preemptions", "swapped_blocks", "cpu_prefills", "chunks", "pipelined_iterations")
ROPE = ({"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64})


def random_checkpoint(rng, folder):
    """A random tiny Llama, saved to the folder -> the transformers model."""
    import transformers
    Hkv, G, D = rng.choice((1, 2, 3)), rng.choice((1, 2, 4, 8)), rng.choice((8, 16, 32, 64))
    config = transformers.LlamaConfig(
        num_hidden_layers=rng.randrange(1, 5), num_attention_heads=Hkv * G,
        num_key_value_heads=Hkv, head_dim=D, hidden_size=Hkv * G * D,
        intermediate_size=rng.randrange(16, 200), vocab_size=rng.randrange(64, 1000),
        max_position_embeddings=512, tie_word_embeddings=rng.random() < 0.5, bos_token_id=None,
        eos_token_id=None, rope_parameters={"rope_theta": 1e4, **rng.choice(ROPE)},
        initializer_range=0.1)      # with smaller weights all logits are nearly equal
    torch.manual_seed(rng.randrange(2 ** 31))
    hf = transformers.LlamaForCausalLM(config).eval()
    hf.save_pretrained(folder)
    return hf


def load(folder):
    import transformers
    hf = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hf.generation_config.eos_token_id = None    # no end: min_new_tokens would forbid its id
    return hf


def generate(hf, prompts, n):
    """What transformers continues each prompt with, n tokens, one prompt at a time: padding would
    change its sums. Without the mask it would leave out the prompt's tokens of id 0, as padding."""
    return [hf.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=n,
                        do_sample=False, pad_token_id=0)[0, len(p):].tolist() for p in prompts]


def compare(folder, hf, rng, counts):
    """Every strategy against transformers on new prompts -> (tokens, wrong ones)."""
    V = hf.config.vocab_size
    prompts = [[rng.randrange(V) for _ in range(rng.randrange(1, MAX_PROMPT))]
               for _ in range(NUM_PROMPTS)]
    want, num_tokens, num_wrong = generate(hf, prompts, NUM_OUT), 0, 0
    kv_bytes = 2 * 4 * hf.config.num_hidden_layers * hf.config.num_key_value_heads * \
        (hf.config.head_dim or hf.config.hidden_size // hf.config.num_attention_heads)
    # An end that never comes: then no length is known, and requests outgrow a tier.
    unused = sorted(set(range(V)) - {t for tokens in want for t in tokens})[:1]
    params = SamplingParams(NUM_OUT, ignore_eos=True, stop_token_ids=unused)
    for strategy in STRATEGIES:
        blocks = rng.randrange(9, 20)
        llm = LLM(str(folder), strategy, device="cpu", dtype="fp32", gpu_blocks=blocks,
                  cpu_mem=1.02 * blocks * 16 * kv_bytes / 2 ** 30, max_model_len=112,
                  max_batch_tokens=rng.choice((16, 33, 64, 500)))
        outs = llm.generate(prompts, params)
        counts.update({name: llm.stats()[name] for name in COUNTED})
        for out, tokens in zip(outs, want, strict=True):
            num_tokens += len(tokens)
            num_wrong += sum(a != b for a, b in zip(out.token_ids, tokens, strict=True))
    return num_tokens, num_wrong


def main(argv=None):
    parser = Parser("Tokens against transformers.")
    add = parser.add_argument
    add("--num-tokens", type=int, default=200_000, metavar="N", help="compare at least so many")
    add("--model", metavar="PATH", help="a checkpoint folder, instead of random tiny ones")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, counts, num_tokens, num_wrong, num_models = random.Random(args.seed), Counter(), 0, 0, 0
    bar = tqdm(total=args.num_tokens, unit="tok", disable=None, leave=False)
    try:
        with errors_in_one_line():
            hf = load(args.model) if args.model else None
            while num_tokens < args.num_tokens:
                folder = args.model or tempfile.mkdtemp()
                model = hf or random_checkpoint(rng, folder)
                tokens, wrong = compare(folder, model, rng, counts)
                num_tokens, num_wrong = num_tokens + tokens, num_wrong + wrong
                num_models += not args.model
                bar.update(tokens)
                if not args.model:
                    shutil.rmtree(folder)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    bar.close()
    what = args.model or f"{num_models} random checkpoints"
    print(f"{what}: {num_tokens} tokens compared, {num_wrong} differ; "
          + ", ".join(f"{name} {counts[name]}" for name in COUNTED))
    sys.exit(1 if num_wrong else 0)


if __name__ == "__main__":
    main()
