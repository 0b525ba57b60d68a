"""Attention on the GPU tier. One signature, several back ends: plain torch, right on any device, and for a GPU that is
played by CPU cores the paged kernel of cpu_attn.py, on the GPU's own threads.

    store(k, v, k_cache, v_cache, slots)                           new rows into the paged cache
    prefill(q, k, v, lens, scale, out)                             causal, a ragged batch of whole prompts
    decode(q, k_cache, v_cache, block_table, seq_lens, scale, out) one new row per sequence over its blocks

A back end is a class with these three methods; model.py calls nothing else, so a faster one plugs in by its name in
BACKENDS, and is chosen in `choose`. Knows one layer and the GPU tier, nothing of schedulers or of the CPU tier.
Glossary of symbols: model.py.
"""
import torch
import torch.nn.functional as F

import cpu_attn
from kvcache import FORMATS, to_numpy


class TorchAttention:
    """Indexing and scaled_dot_product_attention. Decode gathers the paged KV into a padded copy: three times the
    memory traffic of a paged kernel."""

    def store(self, k, v, k_cache, v_cache, slots):
        """k, v [n, Hkv, D] into k_cache, v_cache [num_blocks, Hkv, bs, D] at slots [n] int64 (block * bs + offset)."""
        bs = k_cache.shape[2]
        block, offset = slots // bs, slots % bs
        k_cache[block, :, offset] = k
        v_cache[block, :, offset] = v

    def prefill(self, q, k, v, lens, scale, out):
        """q, out [n, H, D]; k, v [n, Hkv, D]; rows are the prompts end to end, lens their lengths."""
        start = 0
        for n in lens:
            qi, ki, vi = (t[start:start + n].transpose(0, 1)[None] for t in (q, k, v))      # [1, heads, n, D]
            o = F.scaled_dot_product_attention(qi, ki, vi, is_causal=True, scale=scale, enable_gqa=True)
            out[start:start + n] = o[0].transpose(0, 1)
            start += n

    def decode(self, q, k_cache, v_cache, block_table, seq_lens, scale, out):
        """q, out [B, H, D]; caches [num_blocks, Hkv, bs, D]; block_table [B, blocks], seq_lens [B] int32."""
        B, width = block_table.shape
        _, Hkv, bs, D = k_cache.shape

        def gather(cache):                                                                  # [B, Hkv, width * bs, D]
            return cache[block_table].transpose(1, 2).reshape(B, Hkv, width * bs, D)
        mask = torch.arange(width * bs, device=q.device) < seq_lens[:, None]                # [B, width * bs]
        o = F.scaled_dot_product_attention(q[:, :, None], gather(k_cache), gather(v_cache), mask[:, None, None],
                                           scale=scale, enable_gqa=True)                    # [B, H, 1, D]
        out.copy_(o[:, :, 0])


class NumbaAttention(TorchAttention):
    """Decode through cpu_attn's paged kernel, which reads the KV once, where it lies. CPU device only."""

    def decode(self, q, k_cache, v_cache, block_table, seq_lens, scale, out):
        result = torch.empty(q.shape, dtype=torch.float32)
        cpu_attn.paged_decode(q.float().contiguous().numpy(), to_numpy(k_cache), to_numpy(v_cache), block_table.numpy(),
                              seq_lens.numpy(), result.numpy(), scale, FORMATS[q.dtype])
        out.copy_(result)


BACKENDS = {"torch": TorchAttention, "numba": NumbaAttention}


def choose(device):
    """The fastest back end for a torch device."""
    return "numba" if device.type == "cpu" else "torch"
