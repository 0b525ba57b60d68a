"""What no schedule can exceed: `fluid_limit`. Knows the roofline, and no engine."""


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
    moved = sum(i * t + (o - 1) * perf.row_bytes * perf.n_layer for i, o in lengths) / n
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
