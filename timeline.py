"""The timeline of a benchmark: who worked on what, when, and who held which blocks.

    python bench.py --timeline t.html      one page without network: zoom, hover, blocks by request
    python bench.py --timeline t.png       one iteration for a slide (needs matplotlib)
    python bench.py --timeline t.json      a trace for ui.perfetto.dev

A `Recorder` writes every iteration down, and the suffix of the file chooses a writer. Of the engine
it reads counts and Spans, nothing of tensors or policy. The page is timeline.html, with the data in
place of a mark. Test: pytest -k timeline
"""
import argparse
import importlib.util
import json
import string
from pathlib import Path
from typing import NamedTuple

from options import output_file
from perfmodel import SimulatedModel, Span, busy_of_ranks, layer_spans

DETAILED = 200      # iterations of a page with all their stages: half of them the first ones, half
#                     from the middle. A stage takes about 25 bytes, an iteration of Llama-7B 4 kB.
RAMP = 10           # the first iterations, which the picture of a typical one leaves out
ZOOMED = 3          # layers in the lower half of the picture
LANES = {"gpu": "GPU", "cpu": "CPU", "copy": "copies", "move": "KV of prompts"}
STAGES = {          # stage: (label, colour of sub-batch A; those of B, C ... are lighter)
    "linear": ("linear layers", "#1769aa"), "attend": ("GPU attention", "#158466"),
    "cpu_attend": ("CPU attention", "#d3600f"), "head": ("head", "#808080"),
    "send": ("send k, v", "#8a6fd1"), "pass": ("all layers, one graph", "#1769aa"),
    "store": ("store KV", "#7d5a3c"), "fetch": ("fetch KV", "#3d8f98"),
    "swap": ("swap blocks", "#c9a400")}
ONCE = ("head", "pass", "swap")     # stages of all sub-batches together
LIGHTER = (0.0, 0.45, 0.7)      # share of white in the colours of A, B and of all later ones


def timeline_file(text):
    """An argparse type: a file of a kind that can be drawn here. It is asked before any work."""
    suffix = Path(text).suffix
    if suffix not in WRITERS:
        raise argparse.ArgumentTypeError(f"{text}: it must end in one of {', '.join(WRITERS)}")
    if suffix == ".png" and not importlib.util.find_spec("matplotlib"):
        raise argparse.ArgumentTypeError(f"{text} needs matplotlib: pip install matplotlib")
    return output_file(text)


# --------------------------------------------------------------------------------- recording

class Iteration(NamedTuple):
    """One iteration as it was when it was over."""
    start: float        # seconds of the engine's clock
    end: float
    spans: list         # perfmodel.Spans; of a simulation, one for each lane
    layout: tuple       # of a simulation: the arguments of layer_spans, else None
    rows: list          # of each sub-batch: (prompt rows, GPU decodes, CPU decodes)
    waiting: int        # requests without KV
    running: tuple      # requests with KV in the (GPU, CPU) tier

    def stages(self):
        """The Spans of all stages. Those of a simulation are laid out here, when they are drawn."""
        if self.layout is None:
            return self.spans
        spans, first = layer_spans(*self.layout), self.layout[-1]
        swap = [Span("copy", "swap", 0, 0, self.start, first)] if first > self.start else []
        return swap + spans


class Recorder:
    """Every iteration of an LLM under its present strategy, from now on.

    iterations  an Iteration each
    changes     [(iteration from 0, request, tier or None, blocks)]: what a request holds from the
                end of this iteration on. It is kept as changes, because a decode takes a new block
                only every block_size tokens.
    """

    def __init__(self, llm):
        self.llm, self.strategy, self.num_blocks = llm, llm.strategy, llm.scheduler.num_blocks
        self.iterations, self.changes, self.held = [], [], {}
        llm.watch(self.record)

    def record(self, plan, spans, start, end):
        """LLM.on_iteration: start and end in seconds."""
        model, s, i = self.llm.model, self.llm.scheduler, len(self.iterations)
        self.iterations.append(Iteration(
            start, end, spans, model.layout if isinstance(model, SimulatedModel) else None,
            plan.counts, len(s.waiting), tuple(len(s.running[tier]) for tier in ("gpu", "cpu"))))
        held = {request: (seq.tier, len(seq.blocks))
                for request, seq in self.llm.kv.sequences.items()}
        self.changes += [(i, request, None, 0) for request in self.held if request not in held]
        self.changes += [(i, request, *where) for request, where in held.items()
                         if self.held.get(request) != where]
        self.held = held


def write(path, runs, title, number=None):
    """Draw Recorders into a file, in the way that its suffix says.

    title   what ran, and on what
    number  of the iteration in a picture, from 1. Raises ValueError if there is no such iteration.
    """
    runs = [run for run in runs if run.iterations]
    if not runs:
        raise ValueError(f"{path} is not written: no iteration has ended")
    WRITERS[Path(path).suffix](path, runs, title, number)


def used_lanes(spans):
    """(rank, lane) in which somebody worked, from top to bottom."""
    used = {(span.rank, span.lane) for span in spans}
    num_ranks = 1 + max(rank for rank, _ in used)
    return [(rank, lane) for rank in range(num_ranks) for lane in LANES if (rank, lane) in used]


def lane_labels(lanes):
    """Names of lanes; with their rank, if there are several."""
    several = max(rank for rank, _ in lanes) > 0
    return [LANES[lane] + (f", rank {rank}" if several else "") for rank, lane in lanes]


def letter(sub_batch):
    """0 -> "A"."""
    return string.ascii_uppercase[sub_batch]


def colour(stage, sub_batch):
    """#rrggbb of a stage."""
    white, rgb = LIGHTER[min(sub_batch, len(LIGHTER) - 1)], STAGES[stage][1]
    parts = (int(rgb[i:i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + white * (255 - part)):02x}" for part in parts)


# ------------------------------------------------------------------------------------ .json

def write_trace(path, runs, title, number):
    """Chrome / Perfetto trace. A strategy is a process, and its lanes are threads: the GPU, the
    CPU, on CUDA the copies, and the prompts' KV on its way between the tiers."""
    spans = {run.strategy: [span for it in run.iterations for span in it.spans] for run in runs}
    lanes = used_lanes(span for some in spans.values() for span in some)
    zero, events = min(span.start for some in spans.values() for span in some), []
    for pid, strategy in enumerate(spans):
        meta = {"ph": "M", "pid": pid}
        events.append(meta | {"name": "process_name", "args": {"name": strategy}})
        events += [meta | {"name": "thread_name", "tid": tid, "args": {"name": label}}
                   for tid, label in enumerate(lane_labels(lanes))]
        events += [{"ph": "X", "name": f"{span.stage} {span.layer}{letter(span.sub_batch)}",
                    "pid": pid, "tid": lanes.index((span.rank, span.lane)),
                    "ts": 1e6 * (span.start - zero),
                    "dur": 1e6 * (span.end - span.start),
                    "args": {"layer": span.layer, "sub_batch": letter(span.sub_batch)}}
                   for span in spans[strategy]]
    Path(path).write_text(json.dumps({"traceEvents": events}))


# ------------------------------------------------------------------------------------ .html

def write_page(path, runs, title, number):
    """timeline.html with the data in it. "</" becomes "<\\/": no text in it ends the script."""
    # All lanes: the page hides the empty ones. A simulation is laid out later, once.
    num_ranks = 1 + max(span.rank for run in runs for it in run.iterations for span in it.spans)
    lanes = [(rank, lane) for rank in range(num_ranks) for lane in LANES]
    data = {"title": title, "lanes": lane_labels(lanes),
            "runs": [page_data(run, len(runs), lanes) for run in runs],
            "stages": {stage: {"label": label, "once": stage in ONCE,
                               "colours": [colour(stage, i) for i in range(len(LIGHTER))]}
                       for stage, (label, _) in STAGES.items()}}
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = Path(__file__).with_name("timeline.html").read_text(encoding="utf-8")
    Path(path).write_text(page.replace("/*DATA*/", text), encoding="utf-8")


def page_data(run, num_runs, lanes):
    """One Recorder as the page wants it; times in whole microseconds since the first iteration.

    A page of num_runs strategies shares DETAILED among them. lanes: (rank, lane) of each.
    """
    zero, n, half = run.iterations[0].start, len(run.iterations), DETAILED // num_runs // 2
    middle, chosen = max(half, (n - half) // 2), choose(run)
    detailed = {*range(half), *range(middle, middle + half), chosen}
    names, iterations, detail = list(STAGES), [], {}

    def us(seconds):
        return round(1e6 * (seconds - zero))
    for i, it in enumerate(run.iterations):
        spans = it.stages()
        busy = busy_of_ranks(spans)
        iterations.append({
            "start": us(it.start), "end": us(it.end), "rows": it.rows, "waiting": it.waiting,
            "running": it.running, "busy": [round(1e6 * busy[lane]) for lane in lanes]})
        if i in detailed:
            detail[i] = [[lanes.index((s.rank, s.lane)), names.index(s.stage), s.layer, s.sub_batch,
                          us(s.start), us(s.end)] for s in spans]
    return {"strategy": run.strategy, "num_blocks": run.num_blocks, "iterations": iterations,
            "detail": detail, "changes": run.changes, "chosen": chosen,
            "simulated": run.iterations[0].layout is not None}


# ------------------------------------------------------------------------------------- .png

def choose(run, number=None):
    """Index of the iteration to draw: number - 1, else the first with two sub-batches after the
    ramp, else the longest. Raises ValueError if there is no such number."""
    its = run.iterations
    if number is None:
        pipelined = (i for i in range(RAMP, len(its)) if len(its[i].rows) > 1)
        return next(pipelined, max(range(len(its)), key=lambda i: its[i].end - its[i].start))
    if number > len(its):
        raise ValueError(f"--timeline-iteration {number}: {run.strategy} ran {len(its)} iterations")
    return number - 1


def write_picture(path, runs, title, number):
    """One iteration of the last strategy: the whole of it, and below some layers of its middle."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    run = runs[-1]
    i = choose(run, number)
    it = run.iterations[i]
    spans = it.stages()
    lanes = used_lanes(spans)
    figure, axes = plt.subplots(2, figsize=(12, 2.6 + 0.8 * len(lanes)), layout="constrained")
    layer = max(0, max(s.layer for s in spans) // 2 - ZOOMED // 2)
    inside = [s for s in spans
              if layer <= s.layer < layer + ZOOMED and s.lane == "gpu" and not s.rank]
    window = (min(s.start for s in inside), max(s.end for s in inside))
    for ax, (start, end) in zip(axes, ((it.start, it.end), window), strict=True):
        draw_lanes(ax, spans, lanes, it.start, start, end)
    axes[0].axvspan(*(1e3 * (t - it.start) for t in window), fill=False, lw=1.2)
    axes[1].set_xlabel(f"ms since the iteration began; layers {layer} to {layer + ZOOMED - 1}")
    batches = "\n".join(f"sub-batch {letter(k)}: {p} prompt rows, {g} GPU decodes, {c} CPU decodes"
                        for k, (p, g, c) in enumerate(it.rows))
    figure.suptitle(f"{run.strategy}: {title}\niteration {i + 1} of {len(run.iterations)}, "
                    f"{1e3 * (it.end - it.start):.1f} ms\n{batches}", fontsize=11)

    def name(stage, k):
        return STAGES[stage][0] + ("" if stage in ONCE else f" {letter(k)}")
    found = sorted({(list(STAGES).index(s.stage), s.stage, s.sub_batch) for s in spans})
    figure.legend(handles=[Patch(color=colour(stage, k), label=name(stage, k))
                           for _, stage, k in found], loc="outside lower center",
                  ncols=min(len(found), 5), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_lanes(ax, spans, lanes, zero, start, end):
    """Spans between start and end, in seconds, on matplotlib axes; a wide one gets its name."""
    for s in spans:
        y = -lanes.index((s.rank, s.lane))
        left, width = 1e3 * (s.start - zero), 1e3 * (s.end - s.start)
        ax.barh(y, width, 0.8, left, color=colour(s.stage, s.sub_batch))
        middle = (s.start + s.end) / 2
        if start <= middle <= end and s.end - s.start > 0.06 * (end - start):
            ax.text(1e3 * (middle - zero), y, f"{s.stage} {s.layer}{letter(s.sub_batch)}",
                    ha="center", va="center", fontsize=8, color="black" if s.sub_batch else "white")
    ax.set_xlim(1e3 * (start - zero), 1e3 * (end - zero))
    ax.set_yticks([-i for i in range(len(lanes))], lane_labels(lanes))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


WRITERS = {".html": write_page, ".png": write_picture, ".json": write_trace}
