"""A storm on the server: many clients, faults in the engine, readers that leave or stall.

    python -m lab.soak --minutes 15

Starts serve.py with the tiny model in a process of its own, in which some steps fail, and prints
once a minute what it answered and what it holds: memory, descriptors, threads, KV blocks. At the
end nothing may be held, and no request may have waited for ever.
"""
import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

import serve
from options import Parser

STEP_FAULTS = 1 / 400       # share of steps that fail in the middle
TOKEN_FAULTS = 1 / 4000     # share of tokens after whose commit their step fails
HANG_SECONDS = 120.0        # a request that takes longer hangs
SERVER = ["--model", "tiny", "--device", "cpu", "--dtype", "fp32", "--gpu-blocks", "60",
          "--cpu-mem", "0.02", "--max-model-len", "400", "--max-queue", "100"]
KINDS = (MemoryError, RuntimeError, ValueError)


def faulty_server(port):
    """serve.py, but some steps fail, before or after their work."""
    class FaultyLLM(serve.LLM):
        rng = random.Random(0)

        def _grow(self, out):
            if self.rng.random() < TOKEN_FAULTS:
                raise self.rng.choice(KINDS)("a fault after commit")
            super()._grow(out)

        def step(self):
            if self.outputs and self.rng.random() < STEP_FAULTS:
                self.kv.bind = None                     # this step fails in the middle
            try:
                return super().step()
            finally:
                self.kv.__dict__.pop("bind", None)
    serve.LLM = FaultyLLM
    serve.main([*SERVER, "--port", str(port)])


class Storm:
    """Clients of one server, and what they got."""

    def __init__(self, url, pid, num_clients, end):
        self.url, self.pid, self.num_clients, self.end = url, pid, num_clients, end
        self.rng, self.got = random.Random(0), Counter()

    async def client(self, http):
        while time.monotonic() < self.end:
            try:
                await asyncio.wait_for(self.request(http), HANG_SECONDS)
            except asyncio.TimeoutError:
                self.got["hang"] += 1
            except httpx.TransportError as error:
                self.got[type(error).__name__] += 1

    async def request(self, http):
        rng = self.rng
        way = rng.choice(("whole", "stream", "stream", "leave", "slow", "bad"))
        body = {"prompt": [rng.randrange(512) for _ in range(rng.randrange(1, 200))],
                "max_tokens": rng.randrange(1, 120), "ignore_eos": True, "n": rng.choice((1, 1, 2)),
                "stream": way in ("stream", "leave", "slow"), "temperature": rng.choice((0, 1))}
        if way == "bad":
            body |= rng.choice(({"prompt": "text"}, {"max_tokens": -1}, {"model": "x"},
                                {"tools": [1]}, {"prompt": [9999]}))
        stop = rng.randrange(1, 20)
        async with http.stream("POST", self.url + "/v1/completions", json=body) as reply:
            num_lines, text, failed = 0, "", False
            async for line in reply.aiter_lines():
                num_lines, text = num_lines + bool(line), line or text
                failed |= line.startswith('data: {"error"')
                if way == "slow":
                    await asyncio.sleep(0.05)
                if way == "leave" and num_lines == stop:
                    self.got["left"] += 1
                    return
            cut = reply.status_code == 200 and body["stream"] and (failed or "[DONE]" not in text)
            self.got[f"{reply.status_code}{', cut by an error' if cut else ''}"] += 1

    async def half_a_header(self):
        """A connection that sends nothing more, now and then."""
        while time.monotonic() < self.end:
            host, port = self.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
            await asyncio.sleep(0.5)
            self.got["half header"] += 1
            asyncio.get_running_loop().call_later(30, writer.close)

    async def report(self, http, every, start):
        while (now := time.monotonic()) < self.end:
            await asyncio.sleep(min(every, self.end - now))
            print(f"{(time.monotonic() - start) / 60:5.1f} min  {await self.state(http)}  "
                  f"{dict(sorted(self.got.items()))}", flush=True)

    async def state(self, http):
        """What the server's process holds."""
        proc = Path(f"/proc/{self.pid}")
        status = (proc / "status").read_text()
        rss = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
        threads = re.search(r"Threads:\s+(\d+)", status)[1]
        text = (await http.get(self.url + "/metrics")).text
        blocks = re.findall(r'^neo_kv_blocks_used\{tier="(\w+)"\} ([\d.]+)', text, re.M)
        waiting = re.search(r"^neo_requests_waiting ([\d.]+)", text, re.M)[1]
        return (f"RSS {rss:.0f} MB, {len(os.listdir(proc / 'fd'))} descriptors, {threads} threads, "
                f"blocks used {dict(blocks)}, waiting {waiting}")

    async def run(self, every):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        start = time.monotonic()
        async with httpx.AsyncClient(timeout=HANG_SECONDS, limits=limits) as http:
            while True:
                try:
                    await http.get(self.url + "/health")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.2)
            print(f"start      {await self.state(http)}", flush=True)
            await asyncio.gather(self.report(http, every, start), self.half_a_header(),
                                 *(self.client(http) for _ in range(self.num_clients)))
            await asyncio.sleep(2)
            end = await self.state(http)
            print(f"quiet      {end}", flush=True)
            return end


def main(argv=None):
    parser = Parser("A storm on the server, with faults in its engine.")
    add = parser.add_argument
    add("--minutes", type=float, default=15.0)
    add("--clients", type=int, default=100, metavar="N")
    add("--serve", type=int, metavar="PORT", help="be the faulty server (used by this command)")
    args = parser.parse_args(argv)
    if args.serve:
        return faulty_server(args.serve)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    log = Path("soak-server.log")
    with log.open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-m", "lab.soak", "--serve", str(port)], stderr=errors)
    storm = Storm(f"http://127.0.0.1:{port}", server.pid, args.clients,
                  time.monotonic() + 60 * args.minutes)
    try:
        end = asyncio.run(storm.run(every=min(60.0, 20 * args.minutes)))
    except KeyboardInterrupt:
        end = "interrupted"
    finally:                        # also if the storm itself fails: no server stays behind
        server.send_signal(signal.SIGTERM)
        try:
            code = server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            code = server.wait()
    hangs, held = storm.got["hang"], re.findall(r"'(?:gpu|cpu)': '([\d.]+)'", end)
    print(f"exit code {code}, {hangs} hangs, blocks held at the end: {', '.join(held)}; "
          f"the server's errors are in {log}")
    sys.exit(1 if code or hangs or any(float(n) for n in held) else 0)


if __name__ == "__main__":
    main()
