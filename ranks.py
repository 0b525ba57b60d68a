"""Tensor parallelism: several processes, the ranks, of which each holds some heads of every layer.

Rank 0 is the engine. Its plans depend on measured times, so they are made once; what it does with
its KV cache and its model it tells the others, which do the same with their share:

    rank 0      reserve, bind, swap ...  run ---- one message ----> rank 1   the same, again
                                          |                           |
                                          two sums a layer, one gather of logits

Rank 0 starts the others, or torchrun starts all of them, on several machines too: then each runs
the user's script, and in ranks 1, 2, ... LLM() does not return. Tensors go by NCCL between GPUs and
by gloo between CPUs, messages by gloo. A rank that fails leaves its traceback in the store that all
share, and ends; then the sums of the others fail, and rank 0 raises RankError.

Knows the calls that it repeats, and nothing of what they do. Test: pytest test_ranks.py
"""
import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from plan import pack, unpack
from startup import LOCAL_RANK, take_cores

SUM_TIMEOUT = timedelta(seconds=120)    # one rank may stop to compile a kernel
IDLE_TIMEOUT = timedelta(days=365)      # of messages: an idle engine sends none
FAILURE_SECONDS = 4                     # in which a rank that has failed leaves word
CHILD = """import pickle, sys, neo
model, strategy, options = pickle.load(sys.stdin.buffer)
neo.LLM(model, strategy, **options)     # it does not return
"""


class RankError(RuntimeError):
    """A rank has ended, and the engine with it. The message has its number and its traceback."""


class Ranks:
    """All ranks, as one of them sees them. size 1: this process is alone.

    cuda       do tensors lie on GPUs?
    arguments  (model, strategy, options) of the LLM in the ranks that this one starts; under
               torchrun it starts none
    """

    def __init__(self, size=1, cuda=False, arguments=None):
        self.rank, self.size, self.children = 0, size, []
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))     # ranks of this machine
        self.messages, self.repeating = [], False       # for the others; is bind running?
        self.ended, self.closed = None, threading.Event()   # why the engine has ended, if it has
        if size == 1:
            return
        if dist.is_initialized():
            raise RuntimeError("this process has an engine with ranks already: llm.close() ends it")
        self.cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        atexit.register(self.close)
        try:
            if "RANK" in os.environ:
                self.store, self.rank, _ = next(dist.rendezvous("env://", timeout=SUM_TIMEOUT))
                take_cores(LOCAL_RANK, self.local_size, self.cores)
            else:
                self._start_children(arguments)
            dist.init_process_group("nccl" if cuda else "gloo", timeout=SUM_TIMEOUT,
                                    store=self.store, rank=self.rank, world_size=size)
            self.talk = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        except BaseException as error:
            self.fail(error)
            raise
        if self.children:
            threading.Thread(target=self._watch, daemon=True).start()

    # ---- processes

    def _start_children(self, arguments):
        """Start ranks 1, 2, ..., with the variables that torchrun sets."""
        size = self.size
        self.store = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "TQDM_DISABLE": "1",
            "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "PYTHONPATH": str(Path(__file__).parent), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        for rank in range(1, size):
            take_cores(rank, size, self.cores)          # the child inherits them
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, start_new_session=True,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            self.children.append(child)
            with child.stdin:
                pickle.dump(arguments, child.stdin)
        take_cores(0, size, self.cores)

    def _watch(self):
        """A thread of rank 0: notice that a child has ended, also while nothing is sent."""
        while not self.closed.wait(0.5):
            if any(child.poll() is not None for child in self.children):
                self.ended = self.ended or self._cause() or "another rank has ended"
                if dist.get_backend() == "nccl":        # rank 0 may wait in a kernel
                    dist.distributed_c10d._abort_process_group()
                return

    def _cause(self):
        """Why another rank has ended, if there is word of it."""
        end = time.monotonic() + FAILURE_SECONDS
        while time.monotonic() < end:
            for rank, child in enumerate(self.children, 1):
                if (child.poll() or 0) < 0:
                    return f"rank {rank} was killed by signal {-child.returncode}"
            if self.store.check(["failed"]):
                return self.store.get("failed").decode()
            time.sleep(0.1)
        return None

    def fail(self, error):
        """After an error: the ranks have lost step, so all end. Raises RankError if another rank
        was the first to fail. Does not return in ranks 1, 2, ..."""
        if self.size == 1 or self.closed.is_set():
            return
        if self.rank:
            if "gloo" in str(error) or isinstance(error, dist.DistError):
                time.sleep(FAILURE_SECONDS / 2)         # it follows from another rank's failure
            text = "".join(traceback.format_exception(error))
            with contextlib.suppress(Exception):
                self.store.compare_set("failed", "", f"rank {self.rank} has failed:\n{text}")
            os._exit(1)                                 # other threads may wait for a sum
        cause = self.ended or (self._cause() if isinstance(error, RuntimeError) else None)
        self.ended = cause or f"rank 0 has failed: {error!r}"
        self.close()
        if cause:
            raise RankError(cause) from error

    def close(self):
        """End all ranks. Also called at exit."""
        if self.size == 1 or self.closed.is_set():
            return
        self.closed.set()
        atexit.unregister(self.close)
        patience = 0 if self.ended else 5               # seconds
        if not self.ended:
            self.ended = "it was closed"
            if self.rank == 0:
                with contextlib.suppress(Exception):
                    self._send("close")
        for child in self.children:
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    # ---- what they compute together

    def add_up(self, x):
        """x = the sum of all ranks' x."""
        if self.size > 1 and x.is_cuda:
            dist.all_reduce(x)
        elif self.size > 1:     # gloo's own sum takes twice as many trips, and no 16-bit numbers
            x.copy_(torch.stack(self._everyones(x)).sum(0, dtype=torch.float32))

    def gather(self, part):
        """Columns of all ranks, side by side: [S, n] -> [S, size n], on every rank."""
        return torch.cat(self._everyones(part), 1) if self.size > 1 else part

    def _everyones(self, x):
        """[x of rank 0, x of rank 1, ...]: bytes on their way."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather([part.view(torch.uint8) for part in parts], x.view(torch.uint8))
        return parts

    def least(self, number):
        """The least of all ranks' integers."""
        if self.size > 1:
            number = torch.tensor(int(number))
            dist.all_reduce(number, dist.ReduceOp.MIN, group=self.talk)
        return int(number)

    def all_spans(self, spans):
        """perfmodel.Spans of this rank -> in rank 0, those of all ranks."""
        if self.size == 1:
            return spans
        found = [None] * self.size if self.rank == 0 else None
        if self.rank == 0:
            self._send("spans")
        dist.gather_object((time.perf_counter(), spans), found, 0, self.talk)
        out = []
        for rank, (now, theirs) in enumerate(found or ()):
            ahead = found[0][0] - now
            shift = ahead if abs(ahead) > 1 else 0.0    # another machine's clock
            out += [s._replace(rank=rank, start=s.start + shift, end=s.end + shift) for s in theirs]
        return out

    # ---- rank 0 tells, the others follow

    def lead(self, model, kv):
        """From now on the other ranks repeat what this one does with its model and cache."""
        if self.size > 1:
            for name in ("reserve", "release", "swap", "keep", "check"):
                setattr(kv, name, partial(self._repeat, name, getattr(kv, name)))
            kv.bind = partial(self._bind, kv.bind)
            model.run = partial(self._run, model, model.run)

    def _repeat(self, name, method, *args):
        if not self.repeating:                          # else bind calls it, there too
            self.messages.append((name, *args))
        return method(*args)

    def _bind(self, bind, batch, index=0, pad=None, late=None):
        self.messages.append(("bind", pack(batch), index, late and late[1]))
        self.repeating = True
        try:
            return bind(batch, index, *([pad] if pad else []), late=late)
        finally:
            self.repeating = False

    def _run(self, model, run, sub_batches, kv, depth=None):
        if self.ended:
            raise RankError(f"the engine has ended: {self.ended}")
        try:
            self._send("run", kv.num_free, [b.index for b in sub_batches], depth, model.timed)
            return run(sub_batches, kv, depth)
        except BaseException as error:
            self.fail(error)
            raise

    def _send(self, *message):
        messages, self.messages = [*self.messages, message], []
        dist.broadcast_object_list([messages], 0, self.talk)

    def follow(self, model, kv):
        """In ranks 1, 2, ...: repeat what rank 0 does, and end with it."""
        bound, result = {}, None                        # sub-batch index -> SubBatch
        while True:
            heard = [None]
            dist.broadcast_object_list(heard, 0, self.talk)
            for name, *args in heard[0]:
                if name == "bind":
                    packed, index, late = args
                    bound[index] = kv.bind(unpack(packed), index, model.padded_rows,
                                           late and (result.best, late))
                elif name == "run":
                    num_free, indices, depth, model.timed = args
                    assert kv.num_free == num_free, f"free blocks {kv.num_free}, not {num_free}"
                    result = model.run([bound[i] for i in indices], kv, depth)
                elif name == "spans":
                    self.all_spans(model.own_spans)
                elif name == "close":
                    self.close()
                    sys.exit()
                else:
                    getattr(kv, name)(*args)
