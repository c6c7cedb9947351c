"""How a benchmark talks to an engine in a process of its own (standard library only).

The process takes workload files, named on its command line or else one per line of its input, and
prints one JSON line each. Before the first it prints one that says what it is ("ready").
Lines that are not JSON objects are somebody else's and are ignored.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Requests = list[dict[str, Any]]  # {"prompt_token_ids": [...], "max_tokens": n}


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every runner takes."""
    p = argparse.ArgumentParser(description=doc)
    p.add_argument("workloads", nargs="*", help="workload files; default: one per line of stdin")
    p.add_argument("--model", required=True, help="Hugging Face folder")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--args", type=json.loads, default={}, help="the engine's arguments, as JSON")
    return p


def serve(
    about: dict[str, Any], paths: list[str], run: Callable[[Requests], dict[str, Any]]
) -> None:
    """Runs each workload through `run` and prints what it returns, with the figures of all.

    `run` returns `token_ids`, one list per request in order, and whatever else the engine knows.
    """
    say({"ready": True, **about})
    for path in paths or iter(sys.stdin.readline, ""):
        work = json.loads(Path(path.strip()).read_text())
        requests = work["requests"]
        start = time.perf_counter()
        result = run(requests)
        wall_s = result.setdefault("wall_s", time.perf_counter() - start)
        wanted = [r["max_tokens"] for r in requests]
        came = [len(ids) for ids in result["token_ids"]]
        if came != wanted:
            raise SystemExit(f"{work['name']}: wanted {wanted} tokens, {came} came")
        num_prompt = sum(len(r["prompt_token_ids"]) for r in requests)
        say(
            {
                "workload": work["name"],
                "salt": work["salt"],
                "num_requests": len(requests),
                "output_tokens_per_s": sum(came) / wall_s,
                "total_tokens_per_s": (num_prompt + sum(came)) / wall_s,
                "peak_memory_mb": peak_memory_mb(),
                **result,
            }
        )


def say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def latency(times: list[tuple[float, float, int]], start_s: float) -> dict[str, float]:
    """Mean TTFT and TPOT in ms, from each request's (first token, last token, tokens).

    TPOT is (last - first) / (tokens - 1); requests of one token have none.
    """
    ttft = [first - start_s for first, _, _ in times]
    tpot = [(last - first) / (count - 1) for first, last, count in times if count > 1]
    result = {"ttft_ms": 1e3 * sum(ttft) / len(ttft)}
    if tpot:
        result["tpot_ms"] = 1e3 * sum(tpot) / len(tpot)
    return result


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process and its living descendants (Linux; else None)."""
    try:
        return sum(_status_kb(pid, "VmHWM") for pid in _family(os.getpid())) / 1024
    except OSError:
        return None


def _family(pid: int) -> list[int]:
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += _family(int(child))
    return found


def _status_kb(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    return 0
