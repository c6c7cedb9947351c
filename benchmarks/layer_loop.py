"""Scanned against unrolled layers: what each costs to compile and to run.

    python benchmarks/layer_loop.py                          # CPU: compile and run
    python benchmarks/layer_loop.py --target v6e --target h100   # compiled with no device

Targets need the packages of the extra `compile`. Their figures are read from the compiler's
output and measure nothing: bytes accessed is its own count of what the step reads and writes
(XLA:GPU gives none), copied weights are the matrices that the step writes anew before it multiplies
(GPUs only), and temporaries are what the step allocates beside its arguments.
"""

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import compiling

compiling.prepare_this_process()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.common import print_table, write_json  # noqa: E402
from benchmarks.model_step import MODELS, model_step  # noqa: E402
from jaxserve.layers.kernels import XLA  # noqa: E402
from jaxserve.runner.batch import Layout  # noqa: E402
from jaxserve.runner.executables import COMPILER_OPTIONS  # noqa: E402
from jaxserve.runner.row_state import RowShapes  # noqa: E402
from pallas_kernels import aot  # noqa: E402


def build(model: str, target: str, num_tokens: int, *, scan: bool) -> tuple[Callable, tuple]:
    """The step of one token bucket, and its abstract arguments."""
    dtype = jnp.float32 if target == "cpu" else jnp.bfloat16
    step, arguments, _ = model_step(model, num_tokens, backend=XLA, dtype=dtype, scan=scan)
    return step, arguments


def measure(model: str, target: str, num_tokens: int, *, scan: bool) -> dict[str, Any]:
    """Compiles, reads the compiler's figures, and on the CPU runs."""
    step, arguments = build(model, target, num_tokens, scan=scan)
    there = None if target == "cpu" else aot.target(target)  # None: this machine
    placed = there.abstract(arguments) if there else arguments
    start = time.perf_counter()
    with there.context() if there else contextlib.nullcontext():
        lowered = jax.jit(step, donate_argnums=1).lower(*placed)
        lowered_s = time.perf_counter() - start
        options = COMPILER_OPTIONS.get(there.chip.platform if there else target)
        compiled: Any = lowered.compile(compiler_options=options)
    row = {
        "model": model,
        "target": target,
        "tokens": num_tokens,
        "loop": "scan" if scan else "unrolled",
        "trace_s": lowered_s,
        "compile_s": time.perf_counter() - start - lowered_s,
        "accessed_mb": _accessed_mb(compiled),
        "copied_weights_mb": None,
        "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "run_ms": None,
    }
    if target in aot.GPUS:
        row["copied_weights_mb"] = _copied_weights_mb(
            compiled, trips=MODELS[model]["num_hidden_layers"] if scan else 1
        )
    if target == "cpu":
        row["run_ms"] = run_ms(compiled, arguments, num_tokens)
    return row


def _accessed_mb(compiled: Any) -> float | None:
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return cost["bytes accessed"] / 1e6 if cost and "bytes accessed" in cost else None


def _copied_weights_mb(compiled: Any, *, trips: int) -> float:
    """Weight-sized matrices that slices, copies and concatenations write, a step."""
    total = 0
    for line in compiled.as_text().splitlines():
        found = re.match(
            r"\s*%\S+ = bf16\[(?:1,)?(\d+),(\d+)\]\S* (?:fusion-done|fusion|copy)\(", line
        )
        if found and "kind=kCustom" not in line:
            size = int(found[1]) * int(found[2])
            total += size * 2 if size > 1_000_000 else 0
    return total * trips / 1e6


def run_ms(compiled: Any, arguments: tuple, num_tokens: int) -> float:
    """Median of a decode step with every row at 256 tokens of context."""
    weights, state, blob = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), arguments)
    shapes = RowShapes(max_num_seqs=64, max_model_len=1024, page_size=16, vocab_size=1)
    layout = Layout(num_tokens, shapes)
    upload = np.zeros(blob.shape, np.int32)
    views = layout.views(upload)
    rows = layout.num_rows
    views["counts"][:] = rows, rows
    views["query_starts"][:] = np.arange(rows + 1)
    views["rows"][:] = np.arange(rows)
    views["kv_lens"][:] = 256
    views["num_logprobs"][:] = -1
    views["samples"][:] = 1
    times = []
    for _ in range(12):
        start = time.perf_counter()
        state, sampled, _ = compiled(weights, state, jnp.asarray(upload))
        jax.block_until_ready(sampled)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=["cpu", *aot.TARGETS])
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    results = []
    for target in args.target or ["cpu"]:
        for tokens in args.tokens or [1, 64]:
            for scan in (True, False):
                results.append(measure(args.model, target, tokens, scan=scan))
                print(results[-1], file=sys.stderr, flush=True)
    columns = [name for name in results[0] if name != "model"]
    print_table(f"{args.model}: layer loop", columns, [[r[c] for c in columns] for r in results])
    if args.json:
        write_json(args.json, benchmark="layer_loop", model=args.model, results=results)


if __name__ == "__main__":
    main()
