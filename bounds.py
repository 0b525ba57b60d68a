"""What no schedule can exceed: the fluid limit, and the bound of pipelining.

`fluid_limit` lets all resources be used at once, by any schedule. `pipelining_bound` lets an
iteration read the weights once or twice, as the strategies here do: what remains below it is the
scheduler's, what lies above it needs a faster scan of the KV, or fewer bytes. Knows no engine.
"""
import numpy as np

from aim import MeanRequest, SteadyState

PROMPT_TOKENS = (0, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 2048)
SPLITS = [(x, y / 10) for x in (0, 0.2, 0.35, 0.5) for y in range(4, 11)]


def fluid_limit(perf, lengths, gpu_tokens, cpu_tokens):
    """The best request rate that any schedule could sustain, and what binds it.

    perf                    a Roofline
    lengths                 [(tokens in, tokens out)]
    gpu_tokens, cpu_tokens  KV budget of each tier

    Returns (requests per s, [resources]). Requests flow like water: g per second decode in the GPU
    tier, c in the CPU tier, at f iterations per second. With means over the workload, per request:
    R rows pass the linear layers; K = the sum of cached tokens over its decode steps, which is also
    its memory in tokens times its stay in iterations. Then all use is linear in (g, c, f):

        GPU compute     (g + c) C       <= 1     C: seconds of matrix products, prompt attention
        GPU bandwidth   f W + g K t/bw  <= 1     W: seconds to read the weights; t: a token's bytes
        CPU bandwidth   c K t/cpu       <= 1
        PCIe            c X/pcie        <= 1     X: bytes of the prompt's KV, and q k v o of steps
        GPU memory      g K <= gpu_tokens f      Little's law: residents times their size
        CPU memory      c K <= cpu_tokens f

    For a given f the largest g + c follows directly. It is concave and piecewise linear in f, so
    one of its corners is best. Launches, block rounding and everything discrete are left out: each
    of them only lowers what is possible.
    """
    n = len(lengths)
    t = perf.token_bytes["cpu"] * perf.n_layer
    R = sum(i + o - 1 for i, o in lengths) / n
    K = sum((o - 1) * (i + o / 2) for i, o in lengths) / n
    lm_head = 2 * perf.vocab_params * sum(o for _, o in lengths) / n / perf.flops
    attention = perf.prefill([i for i, _ in lengths]) / n
    C = (perf.n_layer * (2 * perf.layer_params * R / perf.flops + attention) + lm_head) / 1e3
    if not K:                                  # one token each: nothing is ever decoded
        return 1 / C, ["GPU compute"]
    params = perf.n_layer * perf.layer_params + perf.vocab_params
    W = params * perf.itemsize / perf.bandwidth / 1e3
    gpu_s = perf.n_layer * perf.gpu_decode(K) / 1e3                # of a request's decodes
    cpu_s = K * t / (perf.bed.cpu_bw * 1e9)
    moved = perf.n_layer * sum(i * perf.sent_bytes + (o - 1) * perf.row_bytes
                               for i, o in lengths) / n
    X = perf.transfer(moved) / 1e3

    def rates(f):
        g = min(gpu_tokens * f / K, max(0.0, 1 - f * W) / gpu_s)
        return g, min(cpu_tokens * f / K, 1 / cpu_s, 1 / X)

    # corners: the weights take all GPU bandwidth; GPU memory meets GPU bandwidth; the CPU tier
    corners = [1 / W, 1 / (W + gpu_tokens * gpu_s / K)]
    if cpu_tokens:
        corners.append(min(1 / W, min(1 / cpu_s, 1 / X) * K / cpu_tokens))
    f = max(corners, key=lambda f: sum(rates(f)))
    g, c = rates(f)
    if (g + c) * C >= 1:
        return 1 / C, ["GPU compute"]
    use = {"GPU bandwidth": f * W + g * gpu_s,
           "GPU memory": g * K / gpu_tokens / f if gpu_tokens else 0.0,
           "CPU bandwidth": c * cpu_s,
           "CPU memory": c * K / cpu_tokens / f if cpu_tokens else 0.0,
           "PCIe": c * X}
    return g + c, [name for name, share in use.items() if share > 1 - 1e-9]


def pipelining_bound(perf, lengths, gpu_tokens, cpu_tokens):
    """Requests per second that no mix of iterations can exceed, if each is one sub-batch or two.

    An iteration of a kind j takes t_j seconds and has p_j prompt tokens, g_j GPU decodes and c_j
    CPU decodes. A linear programme chooses how often each kind runs, x_j per second:

        maximise  G + C                             requests per second that decode in either tier
        so that   sum x_j t_j <= 1,                 sum x_j p_j = i (G + C)
                  sum x_j g_j = (o - 1) G,          sum x_j c_j = (o - 1) C

    with i, o = mean tokens in and out. KV that prompts in progress hold, block rounding and the
    ramps of a run are left out. Arguments as of fluid_limit. Needs scipy.
    """
    from scipy.optimize import linprog
    mean = MeanRequest.of([(i, max(o, 2)) for i, o in lengths])
    steady, (i, o, kv, _) = SteadyState(perf, mean), mean
    most_cpu = cpu_tokens / kv
    cpu_decodes = [0, *(1.1 ** k for k in range(100) if 1.1 ** k < most_cpu), most_cpu]
    kinds = [(p, g, c) for p in PROMPT_TOKENS for g in (0, gpu_tokens / kv) for c in cpu_decodes
             if p + g + c]
    stored = 0.5                        # share of the prompts that go to the CPU tier: settles
    for _ in range(2):
        seconds = [steady.ms(p, g, c, stored if most_cpu else 0, SPLITS) / 1e3
                   for p, g, c in kinds]
        flows = np.array(kinds).T
        rates = np.array([[-i, -i], [1 - o, 0], [0, 1 - o]])
        done = linprog([0] * len(kinds) + [-1, -1], [seconds + [0, 0]], [1],
                       np.hstack([flows, rates]), [0, 0, 0])
        gpu_rate, cpu_rate = done.x[-2:]
        stored = cpu_rate / (gpu_rate + cpu_rate)
    return gpu_rate + cpu_rate
