"""What /metrics shows, in the text format of Prometheus.

Reads the scheduler's counts and finished requests. Refuses to know HTTP and threads.
"""
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
           1, 2.5, 5, 10, 30, 60, 120)      # seconds, of the histograms


class Metrics:
    """The metrics of one LLM."""

    def __init__(self, llm):
        self.llm, self.registry = llm, CollectorRegistry()

        def new(kind, name, text, *labels, **options):
            return kind(f"neo_{name}", text, labels, registry=self.registry, **options)

        self.waiting = new(
            Gauge, "requests_waiting", "Requests that wait for their prefill")
        self.running = new(
            Gauge, "requests_running", "Requests that hold KV, by tier", "tier")
        self.used = new(
            Gauge, "kv_blocks_used", "KV blocks in use, by tier", "tier")
        self.total = new(
            Gauge, "kv_blocks_total", "KV blocks, by tier", "tier")
        self.ttft = new(
            Histogram, "ttft_seconds", "Time to the first token", buckets=BUCKETS)
        self.tpot = new(
            Histogram, "tpot_seconds", "Time per output token after the first", buckets=BUCKETS)
        self.prompts = new(
            Counter, "prompt_tokens", "Prompt tokens of finished requests")
        self.tokens = new(
            Counter, "output_tokens", "Output tokens of finished requests")
        self.requests = new(
            Counter, "requests", "Finished requests, by reason", "reason")

    def finished(self, out, seconds):
        """Count a RequestOutput. seconds: from its first token to its last."""
        self.requests.labels(out.finish_reason).inc()
        self.prompts.inc(len(out.prompt_token_ids))
        self.tokens.inc(len(out.token_ids))
        if len(out.token_ids) > 1:
            self.tpot.observe(seconds / (len(out.token_ids) - 1))

    def text(self):
        """All metrics, as bytes."""
        scheduler = self.llm.scheduler
        self.waiting.set(len(scheduler.waiting))
        for tier, num_blocks in scheduler.num_blocks.items():
            self.running.labels(tier).set(len(scheduler.running[tier]))
            self.total.labels(tier).set(num_blocks)
            self.used.labels(tier).set(num_blocks - scheduler.num_free[tier])
        return generate_latest(self.registry)
