"""What the page at / shows: both tiers, the lanes of the last iterations, and some counts.

    engine's thread   LLM.on_iteration -> record -> latest = a new Snapshot, of tuples only
    HTTP's thread     GET /live -> report: arms the recording for ARMED seconds, reads `latest`

While nobody looks, an iteration costs one comparison and nothing is recorded. Refuses to know
routes and how a step works. Test: pytest server -k live
"""
import base64
import hashlib
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from timeline import LANES, LIGHTER, STAGES, colour

ARMED = 2.0             # seconds that iterations are recorded after a GET of /live
KEPT = 8                # iterations whose spans a Snapshot holds
MAX_SQUARES = 2000      # of a tier: above, one square stands for several blocks
SHOWN = ("gpu", "cpu")  # lanes, of rank 0
FREE = -1               # the owner of a square without KV


class Iteration(NamedTuple):
    """What one iteration did."""
    start: float        # seconds of the engine's clock
    end: float
    tokens: int         # that requests got
    rows: tuple         # of each sub-batch: (prompt rows, GPU decodes, CPU decodes)
    spans: tuple        # perfmodel.Spans


class Snapshot(NamedTuple):
    """The engine at the end of an iteration."""
    number: int         # of the iteration
    iterations: tuple   # the last KEPT Iterations
    owners: tuple       # of each request with KV: (its id, its tier, its blocks)


class LiveView:
    """Watches an LLM. name: of the model, for clients; has_chat: is there a chat template?"""

    def __init__(self, llm, name, has_chat):
        self.llm, self.latest, self.until = llm, None, 0.0
        self.fixed = {
            "model": name, "strategy": llm.strategy, "chat": has_chat,
            "vocabulary": llm.cfg.vocab_size, "max_len": llm.max_request_len,
            "block_size": llm.budget.block_size, "budget": llm.kv_budget,
            "lanes": [LANES[lane] for lane in SHOWN],
            "stages": [{"label": label, "colours": [colour(stage, i) for i in range(len(LIGHTER))]}
                       for stage, (label, _) in STAGES.items()]}
        llm.watch(self.record, always=False)

    # ---- the engine's thread

    def record(self, plan, spans, start, end):
        """LLM.on_iteration. An error here costs the picture, not the requests of the iteration."""
        self.llm.times_all = time.monotonic() <= self.until
        if not self.llm.times_all:
            return
        try:
            self.latest = self._snapshot(plan, spans, start, end)
        except Exception:
            traceback.print_exc()
            self.llm.watch(None)

    def _snapshot(self, plan, spans, start, end):
        iteration = Iteration(start, end, plan.num_sampled, tuple(plan.counts), tuple(spans))
        before = self.latest.iterations[1 - KEPT:] if self.latest else ()
        owners = tuple((request, seq.tier, tuple(seq.blocks))
                       for request, seq in self.llm.kv.sequences.items())
        return Snapshot(self.llm.scheduler.iteration, (*before, iteration), owners)

    # ---- HTTP

    def report(self):
        """What /live sends. `squares` are None while requests run and no iteration has been
        recorded yet."""
        now, llm = time.monotonic(), self.llm
        if now > self.until:
            self.latest = None          # nobody has looked since
        self.until = now + ARMED
        s, seen, busy = llm.scheduler, self.latest, bool(llm.outputs)
        tiers = {}
        for tier, n in s.num_blocks.items():
            # a client that leaves frees blocks between iterations: `owners` still has them
            owned = [(request, blocks) for request, where, blocks in (seen.owners if seen else ())
                     if where == tier and busy]
            size = max(1, -(-n // MAX_SQUARES))
            tiers[tier] = {"blocks": n, "used": sum(len(blocks) for _, blocks in owned),
                           "running": len(owned), "blocks_per_square": size,
                           "squares": squares(owned, n, size) if seen or not busy else None}
        its = seen.iterations if seen else ()
        seconds = its[-1].end - its[0].start if its else 1.0
        return self.fixed | {
            "iteration": seen.number if seen else None, "busy": busy, "tiers": tiers,
            "waiting": len(s.waiting), "preemptions": s.stats["preemptions"],
            "swapped_blocks": llm.kv.swapped_blocks - llm.swapped_before,
            "tokens_per_s": sum(it.tokens for it in its) / seconds if busy else 0.0,
            "iterations": [picture(it) for it in its]}


def squares(owned, num_blocks, size):
    """The owner of each square of `size` blocks: the last of [(request, blocks)], or FREE."""
    owners = [FREE] * -(-num_blocks // size)
    for request, blocks in owned:
        for block in blocks:
            owners[block // size] = request
    return owners


def picture(it):
    """An Iteration for the page, in whole microseconds since its start."""
    names = list(STAGES)
    return {"length": round(1e6 * (it.end - it.start)), "tokens": it.tokens, "rows": it.rows,
            "spans": [(SHOWN.index(s.lane), names.index(s.stage), s.sub_batch,
                       round(1e6 * (s.start - it.start)), round(1e6 * (s.end - it.start)))
                      for s in it.spans if s.lane in SHOWN and not s.rank]}


def load_page():
    """live.html and its headers. The policy allows its own script and style, and no other site."""
    html = Path(__file__).with_name("live.html").read_text(encoding="utf-8")
    allowed = {}
    for tag in ("script", "style"):
        text = html.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[tag] = f"'sha256-{digest}'"
    policy = (f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
              "frame-ancestors 'none'")
    return html, {"Content-Security-Policy": policy, "Cache-Control": "no-cache",
                  "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
