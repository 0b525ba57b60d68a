"""The KV cache in two tiers: block pools, block tables, the K and V tensors, swaps between them.

A sequence's KV lies wholly in one tier at a time, in blocks of bs tokens that its block table
names:

    table[row of request] = [ 7, 2, 9, 0, ... ]    token t: slot t % bs of block table[t // bs]
    tiers["gpu"].k, .v   [L, num_blocks, Hkv, bs, D]    on the device
    tiers["cpu"].k, .v   [L, num_blocks, Hkv, bs, D]    ordinary host memory

A tier in int8 has D + 4 bytes in place of D numbers: see kv_format.py.

`bind` turns a scheduler's Batch into a `SubBatch`: the integers that the model needs, as tensors.
The scheduler counts blocks in order to plan; this file owns them, and asserts that the counts were
right: running short here is a scheduler bug. Knows no text, policy or model maths; of a request it
reads its id, tier, counts and tokens. Glossary of symbols: model.py.
"""
import mmap
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, chain

import numpy as np
import torch

import cpu_attn
from gpu_attn import as_numpy
from kv_format import NAMES, convert, row_width
from perfmodel import Span
from queues import host_tensor, mark, on_cuda

HUGE_PAGE = 2 << 20
STAGE_BYTES = 64 << 20  # pinned buffer for swaps on CUDA: halves large enough for full PCIe speed
MOVER_THREADS = 4       # that copy within the host on CUDA: PCIe takes what four of them copy


@dataclass(frozen=True)
class SubBatch:
    """One sub-batch as tensors. `KVCache.bind` makes it, and nobody changes it.

    Rows are [prefill (CPU-bound prompts first) | GPU decodes | CPU decodes]. Each kind of decodes
    may be followed by rows of padding (token 0, slot -1, length 0).
    """
    index: int                  # which sub-batch of the iteration
    tokens: torch.Tensor        # [N] int32, device
    positions: torch.Tensor     # [N] int32, device
    sampled_rows: torch.Tensor  # [S] int32, device: rows that get a token, in row order
    host_slots: torch.Tensor    # [N] int32, device: a CPU decode's row in host buffers; others -1
    prefill_lens: list          # rows of each prompt, whole or a chunk
    prefill_past: list          # of each prompt: (tokens cached before, their blocks [n] int32)
    num_stored: int             # the first rows: prompts bound for the CPU tier
    num_prefill: int            # all prompt rows
    num_gpu_rows: int           # GPU decodes and their padding
    num_cpu: int                # CPU decodes, without padding
    gpu_slots: torch.Tensor     # [prefill rows of the GPU tier + num_gpu_rows] int32, device
    gpu_table: torch.Tensor     # [num_gpu_rows, blocks] int32, device
    gpu_lens: torch.Tensor      # [num_gpu_rows] int32, device, new token included
    stored_slots: np.ndarray    # [num_stored] int64: block * bs + offset
    cpu_slots: np.ndarray       # [num_cpu] int64
    cpu_table: np.ndarray       # [num_cpu, blocks] int32
    cpu_lens: np.ndarray        # [num_cpu] int32, new token included

    @property
    def num_host_rows(self):
        """Rows whose k and v go to host memory."""
        return self.num_stored + self.num_cpu

    @cached_property            # every layer asks for it
    def stored_past(self):
        """prefill_past of the prompts bound for the CPU tier."""
        num_prompts = sum(end <= self.num_stored for end in accumulate(self.prefill_lens))
        return self.prefill_past[:num_prompts]


@dataclass
class Sequence:
    row: int                    # its row of the block table
    tier: str                   # "gpu" or "cpu"
    blocks: list = field(default_factory=list)


class Tier:
    """One pool of blocks and its K and V, of `dtype`; shape: (L, Hkv, bs, D)."""

    def __init__(self, num_blocks, shape, dtype, device):
        L, *block, D = shape
        self.num_blocks = num_blocks
        # a stack: a block that was just freed is still in the caches, so it is taken first
        self.free_blocks = list(range(num_blocks - 1, -1, -1))
        self.k, self.v = (zeros((L, num_blocks, *block, row_width(D, dtype)), dtype, device)
                          for _ in "kv")

    def take(self, n):
        num_free = len(self.free_blocks)
        assert n <= num_free, \
            f"scheduler bug: {n} blocks wanted, {num_free} of {self.num_blocks} free"
        return [self.free_blocks.pop() for _ in range(n)]


def zeros(shape, dtype, device):
    """Zeros on a device. Large ones on the host lie on huge pages where the system grants them (a
    first touch of 4 KB pages costs more than filling them) and take no memory until touched."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def as_bytes(blocks):
    """Blocks in host memory [n, ...] as NumPy's uint8 [n, bytes of a block], no copy."""
    return blocks.flatten(1).view(torch.uint8).numpy()


class KVCache:
    """Blocks, tables and tensors of both tiers.

    geometry    (L, Hkv, D) of the KV that this process holds
    num_blocks  {tier: blocks}
    dtypes      {tier: torch dtype of its K and V}; swaps and copies convert between them
    row_dtype   torch dtype of the rows k and v that are stored and fetched
    max_len     longest sequence, in tokens
    empty       keep the books only, for a simulation: K and V are "meta" tensors without memory
    """

    def __init__(self, geometry, block_size, num_blocks, max_len, dtypes, row_dtype, device,
                 empty=False):
        L, Hkv, D = geometry
        self.block_size, self.device = block_size, device
        self.row_dtype, self.row_format = row_dtype, NAMES[row_dtype]
        where = {"gpu": device, "cpu": torch.device("cpu")}
        if empty:
            where = dict.fromkeys(where, torch.device("meta"))
        self.tiers = {tier: Tier(num_blocks[tier], (L, Hkv, block_size, D), dtypes[tier], place)
                      for tier, place in where.items()}
        if not empty:               # the views that Numba reads
            cpu = self.tiers["cpu"]
            self.cpu_k, self.cpu_v = as_numpy(cpu.k), as_numpy(cpu.v)
        self.swapped_blocks = 0                                             # since the start
        self.sequences = {}                                                 # request id -> Sequence
        self.table = np.zeros((16, -(-max_len // block_size)), np.int32)    # a row per sequence
        self.free_rows = list(range(15, -1, -1))
        self.swaps = {}                 # layer -> Futures of the present swaps
        self.stream = self.stage = None     # of these copies, on CUDA
        if on_cuda(device) and not empty and num_blocks["cpu"]:
            self.stream = torch.cuda.Stream()
            nbytes = max(STAGE_BYTES // 2, cpu.k[0, 0].nbytes)
            self.stage = host_tensor((2, nbytes), torch.uint8, pinned=True)
        self.mover = ThreadPoolExecutor(1, "mover", self._start_mover)
        # KV of prompts on its way between the tiers, on a thread of its own
        self.porter = ThreadPoolExecutor(1, "porter", self._start_porter)
        self.fetches, self.stores = {}, {}              # (sub-batch, layer) -> its job
        self.spans = []                                 # of these jobs, of the present run

    # ---- blocks

    def reserve(self, request_id, tier, num_tokens):
        """Make the request's blocks, in `tier`, hold num_tokens."""
        seq = self.sequences.get(request_id)
        if seq is None:
            seq = self.sequences[request_id] = Sequence(self._new_row(), tier)
        assert seq.tier == tier, f"request {request_id} lies in the {seq.tier} tier, not in {tier}"
        have = len(seq.blocks)
        need = -(-num_tokens // self.block_size) - have
        if need > 0:
            seq.blocks += self.tiers[tier].take(need)
            self.table[seq.row, have:have + need] = seq.blocks[have:]

    def release(self, request_id):
        """Free a request's blocks, if it has any."""
        seq = self.sequences.pop(request_id, None)
        if seq:
            self.tiers[seq.tier].free_blocks += seq.blocks[::-1]
            self.table[seq.row] = 0         # a padded table must name blocks that exist
            self.free_rows.append(seq.row)

    def keep(self, request_ids):
        """Keep these requests alone, and make the lists of free blocks and rows anew: after an
        error, for which any of the methods here may have been left half done."""
        for pool in (self.mover, self.porter):
            pool.submit(int).result()           # each works in order: now nothing is copied
        self.sequences = {i: seq for i, seq in self.sequences.items() if i in request_ids}
        for name, tier in self.tiers.items():
            owned = {b for s in self.sequences.values() if s.tier == name for b in s.blocks}
            tier.free_blocks = [b for b in range(tier.num_blocks - 1, -1, -1) if b not in owned]
        rows = {s.row for s in self.sequences.values()}
        self.free_rows = [row for row in range(len(self.table) - 1, -1, -1) if row not in rows]
        self.table[self.free_rows] = 0

    @property
    def num_free(self):
        """{tier: free blocks}"""
        return {name: len(tier.free_blocks) for name, tier in self.tiers.items()}

    def _new_row(self):
        if not self.free_rows:
            n = len(self.table)
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
            self.free_rows = list(range(2 * n - 1, n - 1, -1))
        return self.free_rows.pop()

    def check(self):
        """Assert that every block of both tiers is either free or owned by one sequence."""
        for name, tier in self.tiers.items():
            owned = [b for s in self.sequences.values() if s.tier == name for b in s.blocks]
            every_block = list(range(tier.num_blocks))
            assert sorted(owned + tier.free_blocks) == every_block, \
                f"{name} tier: a block leaked or is shared"
        used_rows = [s.row for s in self.sequences.values()]
        every_row = list(range(len(self.table)))
        assert sorted(used_rows + self.free_rows) == every_row, "a row of the block table leaked"
        for s in self.sequences.values():
            named = self.table[s.row, :len(s.blocks)].tolist()
            assert named == s.blocks, "block table and blocks differ"

    # ---- swaps

    def swap(self, request_ids, tier):
        """Move requests to `tier`. The books change now. The copies follow layer by layer on their
        own thread, hidden behind the work on earlier layers: see `wait_swaps`."""
        src_ids, dst_ids = [], []
        src, dst = self.tiers["cpu" if tier == "gpu" else "gpu"], self.tiers[tier]
        for request_id in request_ids:
            seq = self.sequences[request_id]
            assert seq.tier != tier, f"request {request_id} is in the {tier} tier already"
            new = dst.take(len(seq.blocks))
            src_ids += seq.blocks
            dst_ids += new
            src.free_blocks += seq.blocks[::-1]
            seq.blocks, seq.tier = new, tier
            self.table[seq.row, :len(new)] = new
        self.swapped_blocks += len(src_ids)
        if src.k.is_meta:
            return
        done = [Future() for _ in src.k]
        for layer, job in enumerate(done):
            self.swaps.setdefault(layer, []).append(job)
        if self.stream:     # what the GPU has been told to do with these blocks comes first
            self.stream.wait_stream(torch.cuda.current_stream())
        job = self.mover.submit(self._move, src, dst, np.array(src_ids), np.array(dst_ids), done)
        job.add_done_callback(partial(self._moved, done))

    @property
    def is_swapping(self):
        """Are there copies that nobody has waited for yet?"""
        return bool(self.swaps)

    def wait_swaps(self, layer):
        """Wait until a layer's swapped blocks have arrived; raise what went wrong with them.

        A swapped request's old blocks may already belong to another request: wait before anyone
        writes to them.
        """
        for job in self.swaps.pop(layer, ()):
            job.result()

    def settle(self):
        """Wait until nothing is being copied, whether the copies succeeded or not -> Spans of the
        prompts' KV that was stored and fetched."""
        wait([*chain(*self.swaps.values()), *self.fetches.values(), *self.stores.values()])
        for jobs in (self.swaps, self.fetches, self.stores):
            jobs.clear()
        spans, self.spans = self.spans, []
        return spans

    def _start_mover(self):
        torch.set_num_threads(1)                    # thread-local, as is Numba's number
        cpu_attn.set_threads(self._copy_threads())
        if self.stream:
            torch.cuda.set_stream(self.stream)

    def _copy_threads(self):
        """Of the mover and of the porter. Where cores play the GPU, there is no PCIe to fill."""
        return min(MOVER_THREADS, cpu_attn.most_threads()) if on_cuda(self.device) else 1

    def _move(self, src, dst, src_ids, dst_ids, done):
        """Copy blocks of all layers from Tier src to Tier dst, on the mover's thread. Each layer's
        Future of `done` tells when it has arrived.

        The copies are made in trips. On CUDA a trip goes through one half of a pinned buffer: while
        the host works on that half, the other one is on its way.
        """
        start, per_trip = self._copy_at_once, len(src_ids)
        if self.stream:
            out = dst is self.tiers["cpu"]
            start = self._start_out if out else self._start_in
            per_trip = self.stage.shape[1] // self.tiers["cpu"].k[0, 0].nbytes
            ids = self._to_device(src=src_ids, dst=dst_ids)
            src_ids, dst_ids = (ids["src"], dst_ids) if out else (src_ids, ids["dst"])
        trips = [slice(i, i + per_trip) for i in range(0, len(src_ids), per_trip)]
        number, finish_last = 0, None
        for layer, job in enumerate(done):
            for a, b in ((src.k[layer], dst.k[layer]), (src.v[layer], dst.v[layer])):
                for trip in trips:
                    finish = start(number % 2, a, b, src_ids[trip], dst_ids[trip])
                    if finish_last:
                        finish_last()
                    number, finish_last = number + 1, finish
            finish_last = partial(self._finish_layer, finish_last, job)
        finish_last()

    @staticmethod
    def _moved(done, job):
        """After `_move`, whether it failed or not: nobody waits for ever."""
        for layer in done:
            if not layer.done():
                layer.set_exception(job.exception() or RuntimeError("blocks were not copied"))

    @staticmethod
    def _finish_layer(finish, job):
        finish()
        job.set_result(None)

    @staticmethod
    def _copy_at_once(half, src, dst, src_ids, dst_ids):
        """Without CUDA. Here and below: blocks of a cache -> a function that finishes the trip."""
        dst[dst_ids] = convert(src[src_ids], dst.dtype)
        return lambda: None

    def _start_out(self, half, src, dst, src_ids, dst_ids):
        """From the GPU: the copy is started here, and the host empties the half at the end."""
        half = self._half(half, dst, len(dst_ids))

        def copy():
            half.copy_(convert(src[src_ids], dst.dtype), non_blocking=True)
        self.launch(copy)
        copied = mark()

        def finish():
            copied.synchronize()                    # before the host reads the half
            cpu_attn.copy_blocks(as_bytes(half), np.arange(len(dst_ids)), as_bytes(dst), dst_ids)
        return finish

    def _start_in(self, half, src, dst, src_ids, dst_ids):
        """To the GPU: the host fills the half and starts the copy here."""
        half = self._half(half, src, len(src_ids))
        cpu_attn.copy_blocks(as_bytes(src), src_ids, as_bytes(half), np.arange(len(src_ids)))

        def copy():
            dst[dst_ids] = convert(half.to(dst.device, non_blocking=True), dst.dtype)
        self.launch(copy)
        return mark().synchronize             # before the host fills the half again

    def _half(self, half, cache, num_blocks):
        """Room for blocks of a host cache in one half of the pinned buffer."""
        nbytes = num_blocks * cache[0].nbytes
        return self.stage[half, :nbytes].view(cache.dtype).view(num_blocks, *cache.shape[1:])

    @staticmethod
    def launch(fn):
        """All that is put on a stream here goes through this: a test makes other orders of it."""
        fn()

    # ---- a sub-batch for the model

    def bind(self, batch, index=0, pad=None, late=None):
        """Reserve the slots of a Batch's rows and return it as a SubBatch.

        pad   None, or (GPU decodes, CPU decodes, prompt rows) -> rows to pad the decodes to
        late  (tokens [S] on the device, {request id: its row}), for decodes whose last token is
              pending: its value is copied there

        A prompt with 3 scheduled tokens, one GPU decode with 5 tokens and one CPU decode with 9
        give N = 5 rows: positions [0 1 2 | 4 | 8], sampled_rows [2, 3, 4].
        """
        # 1) rows: tokens, positions and slots, request by request
        requests = batch.requests
        for r in requests:
            self.reserve(r.id, r.tier, r.num_tokens)
        num_prompts = len(batch.prefill)
        num_gpu, num_cpu = len(batch.gpu_decodes), len(batch.cpu_decodes)
        prefill_lens = [r.num_scheduled for r in batch.prefill]
        tokens = [t for r, n in zip(batch.prefill, prefill_lens, strict=True)
                  for t in r.tokens(r.num_cached, r.num_cached + n)]
        tokens += [0 if r.num_pending else r.output[-1] for r in requests[num_prompts:]]
        starts = np.array([r.num_cached for r in requests], np.int64)
        counts = np.array(prefill_lens + [1] * (num_gpu + num_cpu), np.int64)
        owner = np.repeat(np.arange(len(requests)), counts)     # the request of each row
        positions = np.arange(len(owner)) - (counts.cumsum() - counts - starts)[owner]
        seq_rows = np.array([self.sequences[r.id].row for r in requests], np.int64)
        blocks = self.table[seq_rows[owner], positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        num_stored_prompts = sum(r.tier == "cpu" for r in batch.prefill)
        assert all(r.tier == "cpu" for r in batch.prefill[:num_stored_prompts]), \
            "prompts bound for the CPU tier come first"
        num_stored, num_prefill = sum(prefill_lens[:num_stored_prompts]), sum(prefill_lens)

        # 2) padding: where each row goes, and which rows are sampled
        gpu_rows, cpu_rows = pad(num_gpu, num_cpu, num_prefill) if pad else (num_gpu, num_cpu)
        first_cpu = num_prefill + gpu_rows
        place = np.arange(len(tokens))
        place[num_prefill + num_gpu:] += gpu_rows - num_gpu

        def padded(values, fill=0):
            out = np.full(first_cpu + cpu_rows, fill)
            out[place] = values
            return out
        gets_token = [r.ends_prefill for r in batch.prefill] + [True] * (num_gpu + num_cpu)
        sampled_rows = place[counts.cumsum() - 1][gets_token]

        # 3) tensors: block tables and lengths of the decodes, everything for the device in one copy
        lens = (starts + counts).astype(np.int32)
        gpu, cpu = slice(num_prompts, num_prompts + num_gpu), slice(num_prompts + num_gpu, None)
        gpu_table = self._table(seq_rows[gpu], lens[gpu], gpu_rows)
        gpu_lens = np.zeros(gpu_rows, np.int32)
        gpu_lens[:num_gpu] = lens[gpu]
        gpu_slots = padded(slots, -1)[num_stored:first_cpu]
        pending, late_from = [], []
        if late:
            pending = [i for i, r in enumerate(requests[num_prompts:], num_prefill)
                       if r.num_pending]
            late_from = [late[1][r.id] for r in requests[num_prompts:] if r.num_pending]
        host_slots = np.full(first_cpu + cpu_rows, -1)
        host_slots[first_cpu:first_cpu + num_cpu] = np.arange(num_cpu)
        on_device = self._to_device(tokens=padded(tokens), positions=padded(positions),
                                    sampled_rows=sampled_rows, host_slots=host_slots,
                                    gpu_slots=gpu_slots, gpu_table=gpu_table, gpu_lens=gpu_lens,
                                    late_from=np.array(late_from, np.int32),
                                    late_to=place[pending])
        late_to, late_from = on_device.pop("late_to"), on_device.pop("late_from")
        if pending:
            def copy():                 # on the stream: the last iteration is still computing them
                on_device["tokens"][late_to] = late[0][late_from].int()
            self.launch(copy)
        return SubBatch(index=index, prefill_lens=prefill_lens,
                        prefill_past=[(r.num_cached, self._past_blocks(r)) for r in batch.prefill],
                        num_stored=num_stored, num_prefill=num_prefill, num_gpu_rows=gpu_rows,
                        num_cpu=num_cpu, stored_slots=slots[:num_stored],
                        cpu_slots=slots[num_prefill + num_gpu:], cpu_lens=lens[cpu],
                        cpu_table=self._table(seq_rows[cpu], lens[cpu], num_cpu), **on_device)

    def _table(self, seq_rows, lens, num_rows):
        """Block table of sequences, as wide as the longest needs, with rows of padding."""
        width = -(-int(lens.max(initial=0)) // self.block_size)
        table = np.zeros((num_rows, width), np.int32)
        table[:len(seq_rows)] = self.table[seq_rows, :width]
        return table

    def _to_device(self, **arrays):
        """Integer arrays -> int32 tensors on the device, by one copy that nobody waits for.

        Each starts at a multiple of 16 bytes: Triton compiles kernels anew for other pointers.
        """
        ends = np.cumsum([-(-a.size // 4) * 4 for a in arrays.values()]).tolist()
        starts = [0, *ends[:-1]]
        packed = host_tensor((ends[-1],), torch.int32, pinned=on_cuda(self.device))
        for start, a in zip(starts, arrays.values(), strict=True):
            packed.numpy()[start:start + a.size] = a.ravel()
        there = packed.to(self.device, non_blocking=True)
        return {name: there[start:start + a.size].view(a.shape)
                for start, (name, a) in zip(starts, arrays.items(), strict=True)}

    # ---- KV of prompts that moves between the tiers while other work goes on

    def _start_porter(self):
        torch.set_num_threads(1)                            # thread-local, as is Numba's number
        cpu_attn.set_threads(self._copy_threads())
        if on_cuda(self.device):
            torch.cuda.set_stream(torch.cuda.Stream())

    def _carry(self, stage, b, layer, work):
        """Give the porter a job and return it; its time becomes a Span."""
        def job():
            start = time.perf_counter()
            with torch.inference_mode():
                result = work()
            if on_cuda(self.device):
                torch.cuda.current_stream().synchronize()   # the porter's own
            self.spans.append(Span("move", stage, layer, b.index, start, time.perf_counter()))
            return result
        return self.porter.submit(job)

    def store_prompts(self, b, layer, k, v):
        """Start to store k, v [num_stored, Hkv, D] (NumPy) of prompts bound for the CPU tier. They
        are read in later iterations only; until `wait_stored` k and v must not change."""
        self.stores[b.index, layer] = self._carry("store", b, layer, lambda: cpu_attn.store_kv(
            k, v, self.cpu_k[layer], self.cpu_v[layer], b.stored_slots, self.row_format))

    def wait_stored(self, b, layer):
        """Wait until a layer's prompts are stored; raise what went wrong with that."""
        if job := self.stores.pop((b.index, layer), None):
            job.result()

    def fetch_past(self, b, layer):
        """Start to bring a layer's earlier chunks from the CPU tier to the device, for
        `with_past`."""
        if any(past for past, _ in b.stored_past):
            self.fetches[b.index, layer] = self._carry(
                "fetch", b, layer, lambda: self._gather_past("cpu", layer, b.stored_past))

    def _gather_past(self, tier, layer, prefill_past):
        """[(k, v)] of the blocks that each prompt has in a tier, [tokens, Hkv, D] on the device."""
        caches = self.tiers[tier].k[layer], self.tiers[tier].v[layer]
        return [[self._gather(cache, blocks) for cache in caches] for _, blocks in prefill_past]

    def _past_blocks(self, r):
        """Where the earlier chunks of a prompt lie, [n] int32, on the side of its tier."""
        num_past = -(-r.num_cached // self.block_size)
        blocks = np.array(self.sequences[r.id].blocks[:num_past], np.int32)
        if r.tier == "gpu" and num_past:
            return self._to_device(blocks=blocks)["blocks"]
        return torch.from_numpy(blocks)

    def with_past(self, layer, b, k, v):
        """k and v of prompts, each with what is cached before it.

        k, v [prompt rows, Hkv, D] of this iteration's rows -> (lengths, k, v). What lies in the
        CPU tier was fetched (see `fetch_past`).
        """
        if not any(n for n, _ in b.prefill_past):
            return b.prefill_lens, k, v
        job = self.fetches.pop((b.index, layer), None)
        pairs = job.result() if job else [(k[:0], v[:0])] * len(b.stored_past)
        for pair in pairs:
            for t in pair:
                if t.is_cuda:           # it was allocated for the porter's stream
                    t.record_stream(torch.cuda.current_stream())
        pairs += self._gather_past("gpu", layer, b.prefill_past[len(pairs):])
        parts, start = ([], []), 0
        for rows, (past, _), pair in zip(b.prefill_lens, b.prefill_past, pairs, strict=True):
            for part, old, new in zip(parts, pair, (k, v), strict=True):
                part += old[:past].to(new.dtype), new[start:start + rows]
            start += rows
        lens = [rows + past for rows, (past, _) in zip(b.prefill_lens, b.prefill_past, strict=True)]
        return lens, torch.cat(parts[0]), torch.cat(parts[1])

    def _gather(self, cache, blocks):
        """Blocks of a cache [num_blocks, Hkv, bs, .] -> [tokens, Hkv, D] on the device."""
        if cache.device.type == self.device.type:                   # "cuda" is not "cuda:0"
            found = cache[blocks]
        else:
            shape = len(blocks), *cache.shape[1:]
            stage = host_tensor(shape, cache.dtype, pinned=True)
            cpu_attn.copy_blocks(as_bytes(cache), blocks.numpy(), as_bytes(stage),
                                 np.arange(len(blocks)))
            found = stage.to(self.device)       # waits for the porter's own stream alone
        return convert(found, self.row_dtype).transpose(1, 2).flatten(0, 1)
