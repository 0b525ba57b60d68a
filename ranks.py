"""Tensor parallelism: several processes, the ranks, of which each holds some heads of every layer.

Rank 0 is the engine. Its plans depend on measured times, so they are made once; what it does with
its KV cache and its model it tells the others, which do the same with their share:

    rank 0      reserve, bind, swap ...  run ---- one message ----> rank 1   the same, again
                                          |                           |
                                          two sums a layer, one gather of logits

Rank 0 starts the others, or torchrun starts all of them, on several machines too: then each runs
the user's script, and in ranks 1, 2, ... LLM() does not return. Tensors go by NCCL between GPUs and
by gloo between CPUs, messages by gloo. All ranks share a store, in which each gives signs of life:
one that fails leaves its traceback there and ends, and rank 0 raises RankError.

Knows the calls that it repeats, and nothing of what they do. Test: pytest test_ranks.py
"""
import atexit
import contextlib
import os
import pickle
import signal
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
from startup import LOCAL_RANK, STARTED_AS_RANK, ranks_here, take_cores

SUM_TIMEOUT = timedelta(seconds=120)    # one rank may stop to compile a kernel
IDLE_TIMEOUT = timedelta(days=365)      # of messages: an idle engine sends none
WORD_SECONDS = 4                        # in which a rank that has failed leaves word
LIFE_SECONDS = 8                        # without a sign of life: a rank has ended, or its machine
CHILD = """import os, pickle, sys, threading, neo
model, strategy, options = pickle.load(sys.stdin.buffer)
def wait_for_rank_0():                  # the pipe ends with it, whatever ends it
    sys.stdin.buffer.read()
    os._exit(1)
threading.Thread(target=wait_for_rank_0, daemon=True).start()
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
        self.rank, self.size, self.cuda, self.children = 0, size, cuda, []
        self.local_size = ranks_here(size)
        self.messages, self.binding = [], False         # for the others; is bind running?
        self.why_ended, self.closed = None, threading.Event()
        self.drop_graphs = lambda: None                 # set by lead
        if size == 1:
            return
        if dist.is_initialized():
            raise RuntimeError("this process has an engine with ranks already: llm.close() ends it")
        self.cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        atexit.register(self.close)
        with self.ending_all():
            if STARTED_AS_RANK:
                self.store, self.rank, _ = next(dist.rendezvous("env://", timeout=SUM_TIMEOUT))
                take_cores(LOCAL_RANK, self.local_size, self.cores)
                self.store.set(f"started {self.rank}", "")
            else:
                self._start_children(arguments)
            dist.init_process_group("nccl" if cuda else "gloo", timeout=SUM_TIMEOUT,
                                    store=self.store, rank=self.rank, world_size=size)
            self.talk = dist.new_group(backend="gloo", timeout=SUM_TIMEOUT)     # to connect
            dist.distributed_c10d._set_pg_timeout(IDLE_TIMEOUT, self.talk)
        threading.Thread(target=self._watch, daemon=True).start()

    # ---- processes

    def _start_children(self, arguments):
        """Start ranks 1, 2, ..., with the variables that torchrun sets."""
        size, here = self.size, str(Path(__file__).parent)
        self.store = dist.TCPStore("127.0.0.1", 0, size, True, wait_for_workers=False)
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "TQDM_DISABLE": "1",
            "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
        for rank in range(1, size):
            take_cores(rank, size, self.cores)          # the child inherits them
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, start_new_session=True,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            self.children.append(child)
            pickle.dump(arguments, child.stdin)
            child.stdin.flush()
        take_cores(0, size, self.cores)
        while not self.store.check([f"started {rank}" for rank in range(1, size)]):
            if self._has_ended():
                raise RankError(self._cause())
            time.sleep(0.05)

    def _has_ended(self):
        return any(child.poll() is not None for child in self.children)

    def _watch(self):
        """A thread of each rank: notice that another one has ended, also while nothing is sent."""
        seen = {}                                       # rank -> (its last sign of life, when)
        while not self.closed.wait(0.5):
            now = time.monotonic()
            try:
                self.store.set(f"alive {self.rank}", str(now))
                for rank in range(self.size) if self.rank == 0 else (0,):
                    known = self.store.check([f"alive {rank}"])     # else get would wait
                    sign = self.store.get(f"alive {rank}") if known else None
                    if rank not in seen or seen[rank][0] != sign:
                        seen[rank] = sign, now
                silent = [rank for rank in seen if now - seen[rank][1] > LIFE_SECONDS]
                if not (silent or self._has_ended() or self.store.check(["failed"])):
                    continue
                why = f"rank {silent[0]} gives no sign of life" if silent else self._cause()
            except RuntimeError as error:
                why = f"the store of the ranks cannot be reached: {error}"
            if self.closed.is_set():
                return
            if self.rank:
                os._exit(1)
            self.why_ended = self.why_ended or why
            if self.cuda:                               # this process may wait in a kernel
                dist.distributed_c10d._abort_process_group()
            return

    def _cause(self):
        """Why another rank has ended; None if none has. It may take a while to leave word."""
        end = time.monotonic() + WORD_SECONDS
        while time.monotonic() < end:
            for rank, child in enumerate(self.children, 1):
                if (child.poll() or 0) < 0:
                    return f"rank {rank} was killed by signal {-child.returncode}"
            if self.store.check(["failed"]):
                return self.store.get("failed").decode()
            time.sleep(0.1)
        codes = ((rank, child.poll()) for rank, child in enumerate(self.children, 1))
        return next((f"rank {rank} has ended with exit code {code}, see its messages above"
                     for rank, code in codes if code is not None), None)

    @contextlib.contextmanager
    def ending_all(self):
        """After an error inside, sums do not match any more, so all ranks end. Raises RankError if
        another rank was the first to fail. Ranks 1, 2, ... end here."""
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not self.closed.is_set():
                self._end(error)
            raise

    def _end(self, error):
        if self.rank:
            if "gloo" in str(error) or isinstance(error, dist.DistError):
                time.sleep(WORD_SECONDS / 2)            # it follows from another rank's failure
            text = f"rank {self.rank} has failed:\n{''.join(traceback.format_exception(error))}"
            with contextlib.suppress(Exception):
                self.store.compare_set("failed", "", text)
            os._exit(1)                                 # other threads may wait for a sum
        why = str(error) if isinstance(error, RankError) else self.why_ended
        if not why and isinstance(error, RuntimeError):
            why = self._cause()
        self.why_ended = why or f"rank 0 has failed: {error!r}"
        self.close()
        if why:
            raise RankError(why) from error

    def close(self):
        """End all ranks. Also called at exit."""
        if self.size == 1 or self.closed.is_set():
            return
        self.closed.set()
        atexit.unregister(self.close)
        in_step = not self.why_ended
        self.why_ended = self.why_ended or "it was closed"
        if in_step and self.rank == 0:
            with contextlib.suppress(Exception):
                self._send("close")
        for child in self.children:
            try:
                child.wait(5 if in_step else 0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            child.stdin.close()
        self.drop_graphs()                              # NCCL waits until they are gone
        if self.cuda and not in_step:                   # and for sums that never come
            threading.Thread(target=dist.distributed_c10d._abort_process_group, daemon=True).start()
        else:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    # ---- what they compute together

    def add_up(self, x):
        """x = the sum of all ranks' x."""
        if self.size > 1 and self.cuda:
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

    def wait_for_all(self):
        """Until all ranks have come here."""
        self.least(0)

    def check_same(self, facts):
        """Raise ValueError unless all ranks have the same facts, a dict."""
        everyones = [facts] * self.size
        if self.size > 1:
            dist.all_gather_object(everyones, facts, self.talk)
        for rank, theirs in enumerate(everyones):
            for name, fact in theirs.items():
                if fact != everyones[0][name]:
                    raise ValueError(f"{name} is {everyones[0][name]} in rank 0 and {fact} in rank "
                                     f"{rank}: start all ranks with the same flags, and name it")

    def all_spans(self, spans):
        """perfmodel.Spans of this rank -> in rank 0, those of all ranks."""
        if self.size == 1:
            return spans
        found = [None] * self.size if self.rank == 0 else None
        with self._holding_interrupts(), self.ending_all():
            if self.rank == 0:
                self._send("spans")
            dist.gather_object((time.perf_counter(), spans), found, 0, self.talk)
        out = []
        for rank, (now, theirs) in enumerate(found or ()):
            ahead = found[0][0] - now
            shift = ahead if abs(ahead) > 1 else 0.0    # another machine's clock
            out += [s._replace(rank=rank, start=s.start + shift, end=s.end + shift) for s in theirs]
        return out

    # ---- rank 0 tells, the others repeat

    def lead(self, model, kv):
        """From now on the other ranks repeat what this one does with its model and cache."""
        if self.size > 1:
            for name in ("reserve", "release", "swap", "keep", "check"):
                setattr(kv, name, partial(self._tell, name, getattr(kv, name)))
            kv.bind = partial(self._bind, kv.bind)
            model.run = partial(self._run, model, model.run)
            self.drop_graphs = model.drop_captures

    def _tell(self, name, method, *args):
        if not self.binding:                            # else bind calls it, in all ranks
            self.messages.append((name, *args))
        return method(*args)

    def _bind(self, bind, batch, index=0, pad=None, late=None):
        self.messages.append(("bind", pack(batch), index, late and late[1]))
        self.binding = True
        try:
            return bind(batch, index, pad, late)
        finally:
            self.binding = False

    def _run(self, model, run, sub_batches, kv, depth=None):
        self.check()
        with self._holding_interrupts(), self.ending_all():
            self._send("run", kv.num_free, [b.index for b in sub_batches], depth, model.timed)
            return run(sub_batches, kv, depth)

    def check(self):
        """Raise RankError if the engine has ended."""
        if self.why_ended:
            raise RankError(f"the engine has ended: {self.why_ended}")

    @contextlib.contextmanager
    def _holding_interrupts(self):
        """Ctrl-C takes effect behind what is inside, so that the ranks stay in step; a second one
        at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        held, before = [], signal.getsignal(signal.SIGINT)

        def hold(number, frame):
            if held:
                before(number, frame)
            held.append(number)
        if callable(before):
            signal.signal(signal.SIGINT, hold)
        try:
            yield
        finally:
            if callable(before):
                signal.signal(signal.SIGINT, before)
        if held:
            before(signal.SIGINT, None)

    def _send(self, *message):
        messages, self.messages = [*self.messages, message], []
        dist.broadcast_object_list([messages], 0, self.talk)

    def repeat(self, model, kv):
        """In ranks 1, 2, ...: do what rank 0 does, and end with it."""
        bound, best = {}, None                          # sub-batch index -> SubBatch
        while True:
            heard = [None]
            dist.broadcast_object_list(heard, 0, self.talk)
            for name, *args in heard[0]:
                if name == "bind":
                    packed, index, late = args
                    bound[index] = kv.bind(unpack(packed), index, model.padded_rows,
                                           late and (best, late))
                elif name == "run":
                    num_free, indices, depth, model.timed = args
                    assert kv.num_free == num_free, f"free blocks {kv.num_free}, not {num_free}"
                    best = model.run([bound[i] for i in indices], kv, depth).best
                elif name == "spans":
                    self.all_spans(model.own_spans)
                elif name == "close":
                    sys.stdout.flush()
                    os._exit(0)                         # NCCL would wait for captured graphs
                else:
                    getattr(kv, name)(*args)
