"""The kernels of attention: what compilers say of them, and on a GPU their time beside others'.

    python -m benchmarks.kernels --static [TARGET ...]      no device: schedules, resources
    python -m benchmarks.kernels                            on a GPU: right results first, then time
    python -m benchmarks.kernels --smoke                    the same in tiny shapes, on any machine
    python -m benchmarks.kernels --write-budgets [PATTERN]  of the compile gate

Static figures rank variants on one chip; they are not timings (`benchmarks.tpu_static` says what
they leave out). `--json FILE` writes everything that was read or measured.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gate, gpu_static, tpu_static
from benchmarks.common import print_table, write_json
from benchmarks.compiling import CompileFailed, Job, Refused, why_not
from pallas_kernels.aot import GPUS

TPUS = ("v5e", "v6e", "v5p", "tpu7x")
NUM_WORKERS = 2  # compiles at a time


class Comparison(NamedTuple):
    """One batch, and the programs that attend to it; arguments of functions in `programs`."""

    name: str
    arguments: dict[str, Any]
    peers: dict[str, dict[str, Any]]  # function: arguments besides


_DECODE = {"num_rows": 64, "context": 2048}
_CHUNK = {"num_rows": 16, "num_tokens": 1024, "context": 4096}
_BUNDLED_DECODE = {"bundled_ragged": {"pages_per_block": 16, "queries_per_block": 16}}
_BUNDLED_PREFILL = {"bundled_ragged": {"pages_per_block": 16, "queries_per_block": 32}}
_FP8 = {"kv_dtype": "float8_e4m3fn"}


def comparisons() -> list[Comparison]:
    """What the static table shows of each chip."""
    return [
        Comparison("8B decode", {"case": "llama-3.1-8b", **_DECODE}, _BUNDLED_DECODE),
        Comparison("8B decode, fp8 KV", {"case": "llama-3.1-8b", **_DECODE, **_FP8}, {}),
        Comparison("8B prefill", {"case": "llama-3.1-8b", **_CHUNK}, _BUNDLED_PREFILL),
        Comparison("8B prefill, fp8 KV", {"case": "llama-3.1-8b", **_CHUNK, **_FP8}, {}),
        Comparison("Qwen3-0.6B decode", {"case": "qwen3-0.6b", **_DECODE}, _BUNDLED_DECODE),
        Comparison("1B decode", {"case": "llama-3.2-1b", **_DECODE}, {}),
        Comparison("gpt-oss decode", {"case": "gpt-oss-20b", **_DECODE}, {}),
        Comparison("DeepSeek-V3/tp8 decode", {"case": "deepseek-v3/tp8", **_DECODE}, {}),
    ]


def static(targets: list[str], batches: str = "") -> list[dict[str, Any]]:
    """Compiles comparisons, those whose names match `batches`, for every target.

    Prints tables and returns all figures.
    """
    jobs = [
        (comparison, label, Job.of(target, f"benchmarks.programs:{function}", **arguments))
        for target in targets
        for comparison in comparisons()
        if re.search(batches, comparison.name)
        for label, function, arguments in _programs(comparison, target)
    ]
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        measured = list(pool.map(lambda job: _static(*job), jobs))
    tpu = [result for result in measured if result["target"] not in GPUS]
    if tpu:
        columns = ["chip, batch, kernel", "block KiB", "cycles", "HBM", "ratio %", "text"]
        columns += ["MXU push %", "VALU %", "spills", "fills", "VMEM MiB", "SMEM KiB", "temp MiB"]
        rows = [row for result in tpu for row in _tpu_rows(result)]
        print_table("Cycles of a block of KV, by the compiler's schedule", columns, rows)
        print(
            "HBM: cycles to stream the block at full bandwidth; above 100 % the kernel is slower."
        )
    gpu = [kernel for result in measured for kernel in result.pop("gpu_kernels", [])]
    if gpu:
        gpu_static.show(gpu)
    for result in measured:
        result.pop("tpu_kernels", None)
        if "error" in result:
            print(f"{result['target']}, {result['batch']}, {result['by']}: {result['error']}")
    return measured


def _programs(comparison: Comparison, target: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield "ours", "attention", comparison.arguments
    if target not in GPUS:
        for function, more in comparison.peers.items():
            yield "jax's", function, {**comparison.arguments, **more}


def _static(comparison: Comparison, by: str, job: Job) -> dict[str, Any]:
    result: dict[str, Any] = {"target": job.target, "batch": comparison.name, "by": by}
    module: Any = gpu_static if job.target in GPUS else tpu_static
    try:
        kernels, figures = module.measure(job)
    except Refused as refusal:
        return {**result, "error": f"refused: {refusal}"}
    except CompileFailed as failure:
        return {**result, "error": str(failure)}
    kind = "gpu_kernels" if job.target in GPUS else "tpu_kernels"
    print(f"{job}: compiled in {figures['compile_s']:.1f} s", file=sys.stderr, flush=True)
    result |= {"job": str(job), "figures": figures, kind: kernels}
    if kind == "tpu_kernels":
        result["blocks"] = {kernel.name: block_figures(kernel, figures) for kernel in kernels}
    return {**result, "kernels": [kernel.record() for kernel in kernels]}


def block_figures(kernel: tpu_static.Kernel, figures: dict[str, Any]) -> dict[str, Any]:
    """A kernel's cycles for a block of KV beside those that HBM takes to bring it.

    The block's bytes are those of its tokens where the kernel's tile sizes are known; else of the
    buffer it lies in, padding included.
    """
    loop = kernel.block_loop
    tokens = figures["notes"].get("block_tokens") or block_tokens(kernel.name, figures["tiles"])
    size = tokens * figures["notes"]["kv_token_bytes"] if tokens else kernel.block_bytes
    hbm = tpu_static.hbm_cycles(kernel.target, size) if size else None
    cycles = loop.straight_cycles if loop else None
    return {
        "block_tokens": tokens,
        "block_bytes": size,
        "cycles": cycles,
        "hbm_cycles": hbm,
        "ratio": cycles / hbm if cycles and hbm else None,
    }


def block_tokens(kernel: str, tiles: dict[str, dict[str, int]]) -> int | None:
    """Tokens of a block, of the tile sizes that a program's kernels were given by operation.

    The operation is the one whose last word the kernel's name has: "tpu_decode", "paged_decode".
    """
    for op, fields in tiles.items():
        if op.rsplit("_", 1)[-1] in kernel:
            return fields.get("block") or fields.get("block_kv")
    return None


def _tpu_rows(result: dict[str, Any]) -> Iterator[list[object]]:
    label = f"{result['target']}, {result['batch']}, {result['by']}"
    for kernel in result.get("tpu_kernels", ()):
        block, loop = result["blocks"][kernel.name], kernel.block_loop
        size, ratio = block["block_bytes"], block["ratio"]
        yield [
            f"{label}: {kernel.name}",
            size and size / 1024,
            block["cycles"],
            block["hbm_cycles"] and round(block["hbm_cycles"]),
            ratio and 100 * ratio,
            kernel.whole.cycles,
            loop and 100 * loop.use["MATPUSH"],
            loop and 100 * loop.use["VALU"],
            kernel.num_spills,
            kernel.num_fills,
            kernel.vmem_bytes / 2**20,
            kernel.smem_bytes / 1024,
            result["figures"]["memory"]["temporaries"] / 2**20,
        ]


def write_budgets(pattern: str, *, slow: bool = True) -> int:
    """Measures the gates whose names match and writes their budgets; returns how many failed."""
    failed = 0
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        chosen = list(gate.select(pattern, slow=slow))
        results = pool.map(_measured, chosen)
        for each, budget in zip(chosen, results, strict=True):
            if isinstance(budget, CompileFailed):
                failed += 1
            else:
                gate.write({each.name: budget})  # one by one: nothing is lost when it is stopped
            print(f"{each.name}: {budget}", flush=True)
    return failed


def _measured(each: gate.Gate) -> gate.Budget | CompileFailed:
    try:
        return gate.measure(each)
    except CompileFailed as failure:
        return failure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--static", nargs="*", metavar="TARGET", help=f"default: {' '.join(TPUS)}")
    mode.add_argument("--write-budgets", nargs="?", const="", metavar="PATTERN")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any machine")
    mode.add_argument("--check", action="store_true", help="the results alone, nothing is timed")
    mode.add_argument("--checked", action="store_true", help="time alone: they were checked before")
    parser.add_argument("--batches", default="", metavar="PATTERN", help="of --static: which")
    parser.add_argument("--quick", action="store_true", help="budgets of quick gates only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--budget-s", type=float, help="leave out what does not fit")
    args = parser.parse_args()
    if args.write_budgets is not None:
        sys.exit(write_budgets(args.write_budgets, slow=not args.quick))
    if args.static is not None:
        targets = args.static or [*TPUS, "h100", "b200", "a100", "l4"]
        missing = {target: reason for target in targets if (reason := why_not(target))}
        if missing:
            sys.exit(f"cannot compile: {missing}")
        results = static(targets, args.batches)
        if args.json:
            write_json(args.json, benchmark="kernels, static", results=results)
        return
    from benchmarks import kernels_timed  # imports jax for the device that is here

    kernels_timed.run(
        smoke=args.smoke,
        json=args.json,
        budget_s=args.budget_s,
        only_check=args.check,
        checked=args.checked,
    )


if __name__ == "__main__":
    main()
