"""Replicas of the engine behind Ray Serve: one address, many engines, on one machine or a cluster.

    pip install -r requirements-extra.txt "ray[serve]"      # on every machine, in this folder
    ray start --head                                        # first machine; others: --address=...
    python -m lab.ray_serve --model llama-8b --replicas 1:8 --gpus 1 --cores 8

Each replica is serve.py's application, with its flags. Ray gives a request to the less loaded of
two replicas, and starts more, up to MAX, while more than --ongoing requests each are in flight. The
/metrics of each replica are also at a port of its own, the first free one from --metrics-port on.
Test: pytest lab -k ray
"""
import socket
import sys
import threading

import uvicorn

from options import Parser
from serve import application, parse_args


def serve_metrics(app, port):
    """Serve a replica's app at a port of its own, too: Ray's address leads to any replica."""
    listener = socket.socket()
    while True:
        try:
            listener.bind(("", port))
            break
        except OSError:
            port += 1
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    print(f"metrics of this replica: http://{socket.gethostname()}:{port}/metrics", flush=True)


def deployment(args):
    """Parsed flags -> what ray.serve.run takes."""
    from ray import serve
    if not args.gpus:                   # Ray counts cores; the engine has to keep to them
        half = max(1, args.cores // args.tensor_parallel_size // 2)
        args.gpu_threads, args.cpu_threads = args.gpu_threads or half, args.cpu_threads or half

    def build():                        # in the replica's process
        _, engine, app = application(args)
        app.state.engine = engine
        serve_metrics(app, args.metrics_port)
        return app

    low, _, high = args.replicas.partition(":")

    @serve.deployment(ray_actor_options={"num_cpus": args.cores, "num_gpus": args.gpus},
                      max_ongoing_requests=args.max_queue, autoscaling_config={
                          "min_replicas": int(low), "max_replicas": int(high or low),
                          "target_ongoing_requests": args.ongoing})
    @serve.ingress(build)
    class Replica:
        def check_health(self):         # Ray asks; if it raises, Ray starts a new replica
            if self.app.state.engine.dead:
                raise RuntimeError(self.app.state.engine.failure)
    return Replica.bind()


def main(argv=None):
    parser = Parser("Replicas of the engine behind Ray Serve.")
    for flag, default, text in (
            ("--replicas", "1", "N, or MIN:MAX to scale by load"), ("--gpus", 0, "per replica"),
            ("--ongoing", 64, "requests in flight per replica to scale towards"),
            ("--cores", 2, "per replica"), ("--metrics-port", 9100, "first one to try")):
        parser.add_argument(flag, type=type(default), default=default, help=text)
    try:
        args = parse_args(argv, parser)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from ray import serve
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(deployment(args), blocking=True)


if __name__ == "__main__":
    main()
