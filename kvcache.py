"""The KV cache in two tiers: block pools, block tables, the K and V tensors, and swaps between them.

A sequence's KV lies wholly in one tier at a time, in blocks of `block_size` tokens named by its block table:

    table[row of request] = [ 7, 2, 9, 0, ... ]      token t of the sequence: block table[t // bs], slot t % bs
    gpu.k, gpu.v   [L, num_gpu_blocks, Hkv, bs, D]   on the device
    cpu.k, cpu.v   [L, num_cpu_blocks, Hkv, bs, D]   ordinary host memory, touched only when first used

`bind` turns a sub-batch of requests into `Inputs`: the integers the model needs, as tensors. Of a request only `id`,
`num_kv`, `tier`, `rows` and its tokens are read. Running short of blocks here is a scheduler bug, hence asserts.
Knows nothing of text, policy or model maths. Glossary of symbols: model.py.
"""
import mmap
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import torch

HUGE_PAGE = 2 << 20
FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}   # a dtype's name, to users and to Numba
STAGE_BYTES = 64 << 20  # pinned staging buffer for swaps on CUDA: large enough for full PCIe speed, quick to pin


@dataclass
class Inputs:
    """One sub-batch as tensors. Rows are [prefill (CPU-bound prompts first) | GPU decode | CPU decode], each kind of decode
    rows followed by rows of padding, if any (token 0, slot -1, length 0).

    Set by KVCache.bind; the working tensors at the end by the model.
    """
    index: int                  # 0 or 1: which of the two sub-batches
    tokens: torch.Tensor        # [N] int32, device
    positions: torch.Tensor     # [N] int32, device
    last: torch.Tensor          # [S] int32, device: the rows that get sampled, one per request, in row order
    prefill_lens: list          # rows of each prompt, whole or a chunk
    prefill_past: list          # (tokens in the cache before those rows, their blocks: int32 tensor where they lie) of each
    num_stored: int             # the first rows, prompts bound for the CPU tier
    num_prefill: int            # all prompt rows
    num_gpu: int                # GPU decode rows, padding included
    num_cpu: int                # CPU decode rows, padding not included
    gpu_slots: torch.Tensor     # [prefill rows of the GPU tier + num_gpu] int32, device: block * bs + offset
    gpu_table: torch.Tensor     # [num_gpu, blocks] int32, device
    gpu_lens: torch.Tensor      # [num_gpu] int32, device, new token included
    cpu_slots: np.ndarray       # [num_stored + num_cpu] int64
    cpu_table: np.ndarray       # [num_cpu, blocks] int32
    cpu_lens: np.ndarray        # [num_cpu] int32, new token included
    x: torch.Tensor = None      # [N, E] hidden state
    qkv: torch.Tensor = None    # [N, H + 2 Hkv, D] queries, keys and values of the layer at hand
    o: torch.Tensor = None      # [N, H, D] attention output
    logits: torch.Tensor = None  # [S, V] float32, after the last layer

    @property
    def host_rows(self):
        """Rows whose k and v go to host memory."""
        return self.num_stored + self.num_cpu


@dataclass
class Sequence:
    row: int                    # its row of the block table
    tier: str                   # "gpu" or "cpu"
    blocks: list = field(default_factory=list)


class Tier:
    """One pool of blocks and its K and V: [L, num_blocks, Hkv, bs, D]."""

    def __init__(self, num_blocks, shape, dtype, device):
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))  # a stack: a block just freed is warm, and taken first
        L, *block = shape
        self.k, self.v = (zeros((L, num_blocks, *block), dtype, device) for _ in "kv")

    def take(self, n):
        assert n <= len(self.free), f"scheduler bug: {n} blocks wanted, {len(self.free)} of {self.num_blocks} free"
        return [self.free.pop() for _ in range(n)]


def zeros(shape, dtype, device):
    """Zeros; large ones on the host lie on huge pages where the system grants them (a first touch of 4 KB pages costs
    more than filling them), and take no memory until then."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def to_numpy(t):
    """A CPU tensor as NumPy, no copy; bf16 and fp16 as their uint16 bits (NumPy knows no bf16)."""
    return (t.view(torch.uint16) if t.element_size() == 2 else t).numpy()


class KVCache:
    """Blocks, tables and tensors of both tiers.

    geometry  (n_layer, n_kv_head, head_dim)
    empty     keep the books only: K and V are "meta" tensors without memory, for a simulation
    """

    def __init__(self, geometry, block_size, num_gpu_blocks, num_cpu_blocks, max_len, dtype, device, empty=False):
        L, Hkv, D = geometry
        shape = (L, Hkv, block_size, D)
        self.block_size, self.device = block_size, device
        gpu, cpu = ("meta", "meta") if empty else (device, "cpu")
        self.gpu = Tier(num_gpu_blocks, shape, dtype, torch.device(gpu))
        self.cpu = Tier(num_cpu_blocks, shape, dtype, torch.device(cpu))
        if not empty:
            self.cpu_k, self.cpu_v = to_numpy(self.cpu.k), to_numpy(self.cpu.v)  # the views Numba reads
        self.swapped_blocks = 0                                              # so far
        self.sequences = {}                                                  # request id -> Sequence
        self.table = np.zeros((16, -(-max_len // block_size)), np.int32)     # a row per resident request
        self.free_rows = list(range(15, -1, -1))
        self.mover = ThreadPoolExecutor(1, "mover", torch.set_num_threads, (1,))
        self.moves = []                                                      # (layer, its copy) of the swaps at hand
        self.stream = self.stage = None                                      # of the copies, on CUDA

    def reserve(self, request_id, tier, num_tokens):
        """Make the request's blocks, in `tier`, hold num_tokens."""
        seq = self.sequences.get(request_id)
        if seq is None:
            seq = self.sequences[request_id] = Sequence(self._new_row(), tier)
        assert seq.tier == tier, f"request {request_id} lies in the {seq.tier} tier, asked for in {tier}"
        have = len(seq.blocks)
        need = -(-num_tokens // self.block_size) - have
        if need > 0:
            seq.blocks += getattr(self, tier).take(need)
            self.table[seq.row, have:have + need] = seq.blocks[have:]

    def release(self, request_id):
        """Free a request's blocks, if it has any."""
        seq = self.sequences.pop(request_id, None)
        if seq:
            getattr(self, seq.tier).free += seq.blocks[::-1]
            self.table[seq.row] = 0             # a padded table must name blocks that exist in either tier
            self.free_rows.append(seq.row)

    def swap(self, request_ids, tier):
        """Move requests to `tier`. The books change now, the copies follow layer by layer on a thread of their own, hidden
        behind the layers before: see `ready`."""
        src_ids, dst_ids = [], []
        src, dst = (self.cpu, self.gpu) if tier == "gpu" else (self.gpu, self.cpu)
        for request_id in request_ids:
            seq = self.sequences[request_id]
            assert seq.tier != tier, f"request {request_id} is in the {tier} tier already"
            new = dst.take(len(seq.blocks))
            src_ids += seq.blocks
            dst_ids += new
            src.free += seq.blocks[::-1]
            seq.blocks, seq.tier = new, tier
            self.table[seq.row, :len(new)] = new
        self.swapped_blocks += len(src_ids)
        if src.k.is_meta:
            return
        if self.device.type == "cuda" and self.stream is None:
            self.stream = torch.cuda.Stream()
            self.stage = torch.empty(max(STAGE_BYTES, src.k[0, 0].nbytes), dtype=torch.uint8, pin_memory=True)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        ids = torch.tensor(src_ids), torch.tensor(dst_ids)
        for i in range(len(src.k)):
            self.moves.append((i, self.mover.submit(self._move, (src.k[i], src.v[i]), (dst.k[i], dst.v[i]), *ids)))

    def ready(self, layer):
        """Wait until the blocks of a layer that are being swapped have arrived: call it before touching the layer's KV, as
        others may own the blocks they left. Raises what went wrong with them."""
        for i, move in self.moves:
            if i <= layer:
                move.result()

    def settle(self):
        """Wait until nothing is being swapped, whatever came of it."""
        wait([move for _, move in self.moves])
        self.moves.clear()

    def _move(self, src, dst, src_ids, dst_ids):
        """Copy blocks of one layer's K and V, on the mover's thread; done when it returns. On CUDA through the pinned staging
        buffer, beside whatever the GPU computes."""
        if not self.stream:
            for a, b in zip(src, dst):
                b[dst_ids] = a[src_ids]
            return
        with torch.cuda.stream(self.stream):
            step = self.stage.nbytes // src[0][0].nbytes                     # blocks per trip through the buffer
            for i in range(0, len(src_ids), step):
                s, d = src_ids[i:i + step].to(src[0].device), dst_ids[i:i + step].to(dst[0].device)
                stage = self.stage[:len(s) * src[0][0].nbytes].view(src[0].dtype).view(len(s), *src[0].shape[1:])
                for a, b in zip(src, dst):
                    if a.is_cuda:
                        stage.copy_(a.index_select(0, s), non_blocking=True)
                        self.stream.synchronize()
                        b.index_copy_(0, d, stage)
                    else:
                        torch.index_select(a, 0, s, out=stage)
                        b.index_copy_(0, d, stage.to(b.device, non_blocking=True))
                        self.stream.synchronize()

    def bind(self, batch, index=0, bucket=lambda num_gpu, num_cpu: (num_gpu, num_cpu)):
        """Reserve the slots of a scheduler.Batch and return its Inputs. Of every request `num_kv` tokens are in the cache; the
        next `rows` of a prompt, the last one of a decode, are this iteration's rows.

        bucket  numbers of GPU and of CPU decode rows -> numbers they are padded to; asked where there are no prompts
        """
        bs, n_prompts, n_gpu, n_cpu = self.block_size, len(batch.prefill), len(batch.gpu), len(batch.cpu)
        requests = batch.prefill + batch.gpu + batch.cpu
        prefill_lens = [r.rows for r in batch.prefill]
        tokens = [t for r in batch.prefill for t in r.tokens(r.num_kv, r.num_kv + r.rows)]
        tokens += [r.last_token for r in batch.gpu + batch.cpu]
        for r in requests:
            self.reserve(r.id, r.tier, r.num_tokens)
        seq_rows = np.array([self.sequences[r.id].row for r in requests], np.int64)
        starts = np.array([r.num_kv for r in requests], np.int64)
        counts = np.array(prefill_lens + [1] * (n_gpu + n_cpu), np.int64)
        ends = counts.cumsum()                                               # rows of request j: ends[j] - counts[j] ..
        owner = np.repeat(np.arange(len(requests)), counts)                  # which request a row belongs to
        positions = np.arange(len(owner)) - (ends - counts)[owner] + starts[owner]
        slots = self.table[seq_rows[owner], positions // bs].astype(np.int64) * bs + positions % bs
        lens = (starts + counts).astype(np.int32)

        n_stored = sum(r.tier == "cpu" for r in batch.prefill)
        assert all(r.tier == "cpu" for r in batch.prefill[:n_stored]), "prompts bound for the CPU tier come first"
        stored, prompts, cpu_at = sum(prefill_lens[:n_stored]), sum(prefill_lens), len(tokens) - n_cpu
        gpu_to, cpu_to = (n_gpu, n_cpu) if prompts else bucket(n_gpu, n_cpu)

        def table(first, n):
            width = -(-int(lens[first:first + n].max(initial=0)) // bs)
            return self.table[seq_rows[first:first + n], :width]

        def padded(x, fill=0):                                               # rows -> rows with padding
            out = np.full(prompts + gpu_to + cpu_to, fill)
            out[:cpu_at] = x[:cpu_at]
            out[prompts + gpu_to:prompts + gpu_to + n_cpu] = x[cpu_at:]
            return out
        gpu_table = np.zeros((gpu_to, (used := table(n_prompts, n_gpu)).shape[1]), np.int32)
        gpu_table[:n_gpu] = used
        gpu_lens = np.zeros(gpu_to, np.int32)
        gpu_lens[:n_gpu] = lens[n_prompts:n_prompts + n_gpu]
        last = ends - 1
        last[n_prompts + n_gpu:] += gpu_to - n_gpu
        last = last[[r.ends_prefill for r in batch.prefill] + [True] * (n_gpu + n_cpu)]
        past = [(r.num_kv, self._past_blocks(r)) for r in batch.prefill]
        tokens, positions, last, gpu_slots, gpu_table, gpu_lens = self._to_device(
            padded(np.array(tokens)), padded(positions), last, padded(slots, -1)[stored:prompts + gpu_to], gpu_table, gpu_lens)
        return Inputs(index, tokens, positions, last, prefill_lens, past, stored, prompts, gpu_to, n_cpu, gpu_slots, gpu_table,
                      gpu_lens, np.concatenate([slots[:stored], slots[cpu_at:]]), table(n_prompts + n_gpu, n_cpu),
                      lens[n_prompts + n_gpu:])

    def _to_device(self, *arrays):
        """Integer arrays -> int32 tensors on the device, by one copy that nobody waits for. Each starts at a multiple of 16
        bytes: Triton compiles kernels anew for pointers that do not."""
        ends = np.cumsum([-(-a.size // 4) * 4 for a in arrays]).tolist()
        packed = torch.empty(ends[-1], dtype=torch.int32, pin_memory=self.device.type == "cuda")
        starts = [0, *ends[:-1]]
        for start, a in zip(starts, arrays):
            packed.numpy()[start:start + a.size] = a.ravel()
        there = packed.to(self.device, non_blocking=True)
        return [there[start:start + a.size].view(a.shape) for start, a in zip(starts, arrays)]

    def _past_blocks(self, r):
        """Where the earlier chunks of a prompt lie, int32, on the side of its tier."""
        blocks = np.array(self.sequences[r.id].blocks[:-(-r.num_kv // self.block_size)], np.int32)
        return self._to_device(blocks)[0] if r.tier == "gpu" and r.num_kv else torch.from_numpy(blocks)

    def with_past(self, layer, b, k, v):
        """Prompts whose first chunks are in the cache: k, v [prompt rows, Hkv, D] of this chunk -> lengths, and k and v, with
        what is cached before each. What lies in the CPU tier is brought to the device for it."""
        if not any(n for n, _ in b.prefill_past):
            return b.prefill_lens, k, v
        parts, at = ([], []), 0
        for rows, (past, blocks) in zip(b.prefill_lens, b.prefill_past):
            tier = self.cpu if at < b.num_stored else self.gpu
            for part, new, cache in zip(parts, (k, v), (tier.k[layer], tier.v[layer])):
                if past:
                    part.append(self._gather(cache, blocks)[:past])
                part.append(new[at:at + rows])
            at += rows
        return [rows + past for rows, (past, _) in zip(b.prefill_lens, b.prefill_past)], *(torch.cat(p) for p in parts)

    def _gather(self, cache, blocks):
        """Blocks of a cache [num_blocks, Hkv, bs, D] -> [tokens, Hkv, D] on the device."""
        if cache.device.type == self.device.type:                            # "cuda" is not equal to "cuda:0"
            found = cache[blocks]
        else:
            stage = torch.empty(len(blocks), *cache.shape[1:], dtype=cache.dtype, pin_memory=True)
            found = torch.index_select(cache, 0, blocks, out=stage).to(self.device, non_blocking=True)
        return found.transpose(1, 2).flatten(0, 1)

    def _new_row(self):
        if not self.free_rows:
            n = len(self.table)
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
            self.free_rows = list(range(2 * n - 1, n - 1, -1))
        return self.free_rows.pop()

    def check(self):
        """Assert that every block of both tiers is either free or owned by exactly one sequence."""
        for name in ("gpu", "cpu"):
            tier = getattr(self, name)
            owned = [b for s in self.sequences.values() if s.tier == name for b in s.blocks]
            assert sorted(owned + tier.free) == list(range(tier.num_blocks)), f"{name} tier: a block leaked or is shared"
        rows = [s.row for s in self.sequences.values()]
        assert sorted(rows + self.free_rows) == list(range(len(self.table))), "a row of the block table leaked"
        for s in self.sequences.values():
            assert self.table[s.row, :len(s.blocks)].tolist() == s.blocks, "block table and blocks differ"
