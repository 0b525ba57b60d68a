"""How long things take: predicted milliseconds per layer, from a measured profile, corrected online.

    linear(n_tokens)  prefill(lengths)  gpu_decode(n_kv_tokens)  cpu_decode(n_requests, n_kv_tokens)  transfer(n_bytes)
    head(n_rows)      embedding, output matrix and what else an iteration does once

With l, g, c = one layer's linear, GPU-attention and CPU-attention time of sub-batches A and B, a layer takes

    max(lA + gA + lB + gB,  cA + cB,  lA + cA,  lB + cB)            (NEO, section 3.2)
        the GPU's work      the CPU's  A's own chain  B's own chain

and one sub-batch alone is the case B = 0: l + max(g, c). Knows nothing of torch tensors or queues: plain numbers.
"""
import json
from bisect import bisect_left
from typing import NamedTuple

import numpy as np


class Load(NamedTuple):
    """One sub-batch's work per layer, in ms."""
    linear: float
    gpu: float      # attention of prefill and GPU-decode rows
    cpu: float      # attention and KV store of CPU rows


class Prediction(NamedTuple):
    """One iteration, in ms."""
    total: float
    gpu: float      # busy time of the GPU
    cpu: float      # busy time of CPU attention


IDLE = Load(0.0, 0.0, 0.0)


def layer_ms(a, b=IDLE):
    """One layer of two sub-batches taking turns, or of one alone: the formula above."""
    return max(a.linear + a.gpu + b.linear + b.gpu, a.cpu + b.cpu, a.linear + a.cpu, b.linear + b.cpu)


class PerfModel:
    """What the scheduler asks. Subclasses give the six times of the module's docstring.

    n_layer    layers of the model;  token_bytes  one token's K and V in one layer
    """
    gpu_scale = cpu_scale = 1.0     # measured / predicted, moving averages
    overhead = 0.0                  # ms an iteration spends outside the layers and the head

    def __init__(self, n_layer, token_bytes):
        self.n_layer, self.token_bytes = n_layer, token_bytes

    def load(self, n_tokens, prompts=(), n_stored=0, gpu_kv=0, n_cpu=0, cpu_kv=0):
        """Work of a sub-batch of n_tokens rows: whole prompts of the given lengths, n_stored of their tokens bound for
        the CPU tier; GPU decodes over gpu_kv cached tokens; n_cpu CPU decodes over cpu_kv."""
        gpu = (self.prefill(prompts) if prompts else 0.0) + (self.gpu_decode(gpu_kv) if gpu_kv else 0.0)
        cpu = self.cpu_time(n_cpu, cpu_kv) + (self.transfer(n_stored * self.token_bytes) * self.cpu_scale if n_stored
                                              else 0.0)
        return Load(self.linear(n_tokens) * self.gpu_scale if n_tokens else 0.0, gpu * self.gpu_scale, cpu)

    def cpu_time(self, n_cpu, cpu_kv):
        """CPU attention of n_cpu decodes over cpu_kv tokens, corrected; 0 for none."""
        return self.cpu_decode(n_cpu, cpu_kv) * self.cpu_scale if n_cpu else 0.0

    def iteration(self, loads, samples):
        """Loads and sampled rows of one or two sub-batches -> Prediction."""
        head = sum(self.head(s) for s in samples if s) * self.gpu_scale
        return Prediction(self.n_layer * layer_ms(*loads) + head + self.overhead,
                          self.n_layer * sum(x.linear + x.gpu for x in loads) + head,
                          self.n_layer * sum(x.cpu for x in loads))

    def observe(self, predicted, measured):
        """Correct later predictions by one iteration's measured times (both Prediction). A single odd measurement
        moves them little: one part in ten, of a ratio within 2."""
        def drift(scale, want, got):
            return scale * min(max(got / want, 0.5), 2.0) ** 0.1 if want > 0 and got > 0 else scale
        self.gpu_scale = drift(self.gpu_scale, predicted.gpu, measured.gpu)
        self.cpu_scale = drift(self.cpu_scale, predicted.cpu, measured.cpu)
        self.overhead += 0.1 * (max(0.0, measured.total - predicted.total + self.overhead) - self.overhead)


class Profile(PerfModel):
    """Times interpolated from `samples`, measured on the real model (see neo.measure_profile):

    {"linear": [[n_tokens, ms], ...], "head": [[n_rows, ms], ...], "prefill": [[n_tokens, ms], ...],
     "gpu_decode": [[n_kv_tokens, ms], ...], "cpu_decode": [[n_requests, n_kv_tokens, ms], ...],
     "transfer": [[n_bytes, ms], ...]}
    """

    def __init__(self, samples, n_layer, token_bytes):
        super().__init__(n_layer, token_bytes)
        self._linear, self._head = _curve(samples["linear"]), _curve(samples["head"])
        self._prefill = _fit([[1, n, n * n] for n, _ in samples["prefill"]], samples["prefill"])
        self._gpu_decode = _fit([[1, kv] for kv, _ in samples["gpu_decode"]], samples["gpu_decode"])
        self._cpu_decode = _fit([[1, n, kv] for n, kv, _ in samples["cpu_decode"]], samples["cpu_decode"])
        self._transfer = _fit([[1, size] for size, _ in samples["transfer"]], samples["transfer"])

    def linear(self, n_tokens):
        return _interpolate(self._linear, n_tokens)

    def head(self, n_rows):
        return _interpolate(self._head, n_rows)

    def prefill(self, lengths):
        a, b, c = self._prefill
        return sum(a + b * n + c * n * n for n in lengths)

    def gpu_decode(self, n_kv_tokens):
        a, b = self._gpu_decode
        return a + b * n_kv_tokens

    def cpu_decode(self, n_requests, n_kv_tokens):
        a, b, c = self._cpu_decode
        return a + b * n_requests + c * n_kv_tokens

    def transfer(self, n_bytes):
        a, b = self._transfer
        return a + b * n_bytes


def load_profile(path, key):
    """Samples saved under exactly this key (a dict), or None."""
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    return saved["samples"] if saved["key"] == key else None


def save_profile(path, key, samples):
    """Write samples and the key that tells when they hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": key, "samples": samples}))


def _curve(points):
    """[[n, ms], ...] -> sorted (ns, ms), one median each, ms never falling: more rows never take less time, whatever
    noise says."""
    ns = sorted({n for n, _ in points})
    ms = [np.median([t for m, t in points if m == n]) for n in ns]
    return ns, np.maximum.accumulate(ms).tolist()


def _interpolate(curve, n):
    """Linear between measured points, constant below the first, the last slope beyond the last."""
    ns, ms = curve
    i = bisect_left(ns, n)
    if i == 0 or len(ns) == 1:
        return ms[0]
    i = min(i, len(ns) - 1)
    return ms[i - 1] + (ms[i] - ms[i - 1]) * (n - ns[i - 1]) / (ns[i] - ns[i - 1])


def _fit(columns, samples):
    """Least squares on relative errors with no negative coefficient: columns [points][terms], samples [..., ms]."""
    y = np.array([s[-1] for s in samples])
    X = np.array(columns, float) / y[:, None]
    live, coef = list(range(X.shape[1])), np.zeros(X.shape[1])
    while live:
        solution = np.linalg.lstsq(X[:, live], np.ones(len(y)), rcond=None)[0]
        if (solution >= 0).all():
            coef[live] = solution
            break
        live.pop(int(solution.argmin()))
    return coef.tolist()
