"""What HTTP costs: `jaxserve serve` against the offline engine, on the same work.

    python -m benchmarks.serving --json serving.json
    python -m benchmarks.serving --quick

The server and the offline engine are processes of their own, with the same settings, and take
turns. The load generator is the one of `jaxserve bench serve`, in this process, on the same CPUs,
and so part of what is measured.

(a) throughput  W1 of workload.py, all 64 requests at once: output tokens/s over HTTP and offline
(b) streams     gaps between the chunks of 64 streams at once, and of one
(c) health      GET /health every 50 ms while 64 streams run, on a connection of its own
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import workload
from benchmarks.common import median, print_table, write_json
from benchmarks.offline import Engine
from jaxserve.commands.load.run import Record, run_load
from jaxserve.commands.remote.api import COMPLETIONS, Api
from jaxserve.commands.remote.http_client import HttpClient

HERE = Path(__file__).parent
NUM_STREAMS = 64
PROMPT_TOKENS = 32  # of a stream
HEALTH_INTERVAL_S = 0.05
ENGINE = {
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 2048,
}
QUICK = {"layer_loop": "scan"}  # compiles in a fraction of the time
START_TIMEOUT_S = 400.0


class Server:
    """`jaxserve serve` on a free port."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    @classmethod
    def start(cls, model: str, settings: dict[str, Any]) -> Self:
        """Starts the server and waits until it says where it is.

        Raises:
            RuntimeError: It ended, or is not ready in time.
        """
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "jaxserve", "serve", model, "--port", "0", *flags]
        command += ["--dtype", "float32", "--disable-access-log"]
        process = subprocess.Popen(command, cwd=HERE.parent, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        end = time.monotonic() + START_TIMEOUT_S
        for line in process.stderr:
            sys.stderr.write(line)
            if ": serving " in line and " at http" in line:
                # So that the pipe never fills and holds the server up.
                threading.Thread(
                    target=shutil.copyfileobj, args=(process.stderr, sys.stderr), daemon=True
                ).start()
                return cls(process, line.partition(" at ")[2].split()[0])
            if time.monotonic() > end:
                break
        process.terminate()
        raise RuntimeError(f"the server did not start; exit status {process.wait()}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


async def send(url: str, work: workload.Workload) -> tuple[list[Record], float]:
    """All requests of a workload at once; checks that each answer is as long as asked for."""
    api = Api(url)
    try:
        model = await api.first_model()
        bodies = [
            json.dumps(
                {
                    "model": model,
                    "prompt": request.prompt_token_ids,
                    "max_tokens": request.max_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ).encode()
            for request in work.requests
        ]
        records, wall_s = await run_load(
            api,
            COMPLETIONS,
            bodies,
            [0.0] * len(bodies),
            max_concurrency=NUM_STREAMS,
            request_ids=[f"{work.name}-{work.salt}-{i}" for i in range(len(bodies))],
            on_done=lambda: None,
        )
    finally:
        api.close()
    wanted = [request.max_tokens for request in work.requests]
    came = [record.num_output for record in records]
    if came != wanted:
        errors = {record.error for record in records if record.error}
        raise RuntimeError(f"{work.name}: wanted {wanted} tokens, {came} came; {errors}")
    return records, wall_s


async def ask_health(url: str, times_s: list[float]) -> None:
    """Adds how long each GET /health took, until it is cancelled."""
    client = HttpClient(url)
    try:
        while True:
            start = time.perf_counter()
            answer = await client.get("/health")
            if answer.status != 200:
                raise RuntimeError(f"/health answered {answer.status}: {answer.body!r}")
            times_s.append(time.perf_counter() - start)
            await asyncio.sleep(HEALTH_INTERVAL_S)
    finally:
        client.close()


def streams(num: int, num_tokens: int, salt: int) -> workload.Workload:
    """`num` requests of the same shape, with token ids of their own."""
    made = workload.make("W2", salt=salt, num_requests=num).requests
    requests = [
        workload.WorkRequest(each.prompt_token_ids[:PROMPT_TOKENS], num_tokens) for each in made
    ]
    return workload.Workload("streams", salt, requests)


async def measure_streams(url: str, num_tokens: int, salt: int) -> dict[str, float]:
    """(b) and (c)."""
    alone, _ = await send(url, streams(1, num_tokens, salt))
    health_s: list[float] = []
    asking = asyncio.create_task(ask_health(url, health_s))
    together, _ = await send(url, streams(NUM_STREAMS, num_tokens, salt + 1))
    if asking.done():
        asking.result()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    gaps = [gap for record in together for gap in record.itls_s]
    return {
        "p50_itl_1_ms": percentile_ms(alone[0].itls_s, 50),
        "p99_itl_1_ms": percentile_ms(alone[0].itls_s, 99),
        "p50_itl_64_ms": percentile_ms(gaps, 50),
        "p99_itl_64_ms": percentile_ms(gaps, 99),
        "p50_health_ms": percentile_ms(health_s, 50),
        "p99_health_ms": percentile_ms(health_s, 99),
        "num_health": len(health_s),
    }


def percentile_ms(values_s: list[float], percent: float) -> float:
    return 1e3 * float(np.percentile(values_s, percent))


def measure(server: Server, offline: Engine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of figures a repeat; the two take turns."""
    rows = []
    num_tokens = 32 if args.quick else 128
    with tempfile.TemporaryDirectory() as folder:
        for salt in (99, 98):
            work = workload.make("WU", salt=salt)
            offline.run(work.write(Path(folder)))
            asyncio.run(send(server.url, work))
        for salt in range(args.repeat):
            work = workload.make("W1", salt=salt)
            alone = offline.run(work.write(Path(folder)))["output_tokens_per_s"]
            _, wall_s = asyncio.run(send(server.url, work))
            http = work.num_output_tokens / wall_s
            row = {"offline_tokens_per_s": alone, "http_tokens_per_s": http, "ratio": http / alone}
            row |= asyncio.run(measure_streams(server.url, num_tokens, 10 * salt))
            row["load_average"] = os.getloadavg()[0]
            rows.append(row)
            print(f"repeat {salt + 1}/{args.repeat}: {row}", file=sys.stderr, flush=True)
    return rows


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints the table of medians and writes the JSON file."""
    m = {key: median(row[key] for row in rows) for key in rows[0]}
    ratio = f"{m['ratio']:.3f}"
    print_table(
        f"{args.model}, float32, medians of {len(rows)}; load average {m['load_average']:.1f}",
        ["", "offline", "HTTP", "HTTP/offline"],
        [["W1, output tokens/s", m["offline_tokens_per_s"], m["http_tokens_per_s"], ratio]],
    )
    print_table(
        "times in ms",
        ["", "p50", "p99"],
        [
            ["gap between chunks, 1 stream", m["p50_itl_1_ms"], m["p99_itl_1_ms"]],
            ["gap between chunks, 64 streams", m["p50_itl_64_ms"], m["p99_itl_64_ms"]],
            ["GET /health under 64 streams", m["p50_health_ms"], m["p99_health_ms"]],
        ],
    )
    if args.json:
        write_json(
            args.json,
            benchmark="serving",
            model=args.model,
            quick=args.quick,
            engine=ENGINE | (QUICK if args.quick else {}),
            results=m,
            repeats=rows,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat, shorter streams")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    args.repeat = 1 if args.quick else args.repeat
    root = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    settings = ENGINE | (QUICK if args.quick else {})
    command = [sys.executable, str(HERE / "peers" / "jaxserve_llm.py"), "--model", args.model]
    command += ["--dtype", "float32", "--args", json.dumps(settings)]
    cpus = set(os.sched_getaffinity(0))
    offline = Engine.start("jaxserve", command, root, cpus)
    try:
        server = Server.start(args.model, settings)
        try:
            rows = measure(server, offline, args)
        finally:
            server.stop()
    finally:
        offline.stop()
    report(rows, args)


if __name__ == "__main__":
    main()
