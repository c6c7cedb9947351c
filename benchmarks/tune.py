"""Finds tile sizes for an operation, and writes them to pallas_kernels/tiles.json.

    python -m benchmarks.tune tpu_decode --target v5e v6e --case llama-3.1-8b     no device
    python -m benchmarks.tune gpu_decode --case llama-3.1-8b                      on the GPU here

With targets a TPU kernel's tile sizes are ranked by the cycles that the compiler schedules for a
token of context, or HBM's where those are more: bound by HBM, there is nothing to gain. Without, by
time on the device that is here. It starts from what the kernel has now and changes one field at a
time; a candidate that does not compile or does not run is passed over and said. An entry is written
only if it beats the start by more than noise: `--least` of it. Run it again when a kernel changes.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import kernels_timed, tpu_static
from benchmarks.compiling import CompileFailed, Job
from benchmarks.kernels import block_tokens
from pallas_kernels import tuning
from pallas_kernels.cases import CASES, attention_case

Fields = dict[str, int]


class Op(NamedTuple):
    """What can be tuned: the fields of its tile sizes and the values worth trying."""

    kernel: str  # what its name has
    space: dict[str, tuple[int, ...]]
    batch: dict[str, int]  # of `programs.attention`
    rows: tuple[tuple[int, int], ...]  # of `kernels_timed.Workload`
    fits: Callable[[Fields], bool] = lambda fields: True


def _decode_fits(fields: Fields) -> bool:
    return fields["block"] % fields["edge"] == 0 and fields["edge"] % fields["unit"] == 0


_DECODE = {"num_rows": 64, "context": 2048}
_PREFILL = {"num_rows": 16, "num_tokens": 1024, "context": 4096}
OPS = {
    "tpu_decode": Op(
        kernel="decode",
        space={
            "block": (256, 512, 1024, 2048),
            "unit": (128, 256, 512),
            "edge": (256, 512, 1024),
            "rows": (16, 32, 64),
        },
        batch=_DECODE,
        rows=((1, 2048),) * 64,
        fits=_decode_fits,
    ),
    "tpu_latent": Op(
        kernel="latent",
        space={
            "block": (512, 1024, 2048),
            "unit": (128, 256, 512),
            "groups": (1, 2, 4, 8),
            "depth": (2, 4, 8),
        },
        batch=_DECODE,
        rows=((1, 2048),) * 64,
        fits=lambda fields: fields["block"] % fields["unit"] == 0,
    ),
    "tpu_mixed": Op(
        kernel="mixed",
        space={"heads": (1, 2, 4), "block": (256, 512, 1024), "unit": (128, 256, 512)},
        # A wider tile costs more cycles a block and reads fewer blocks: not for this cost to judge.
        batch=_PREFILL,
        rows=((1024, 4096),),
    ),
    "gpu_decode": Op(
        kernel="decode",
        space={"block_kv": (64, 128, 256), "num_stages": (2, 3, 4, 6), "blocks_per_sm": (1, 2)},
        batch=_DECODE,
        rows=((1, 4096),) * 64,
    ),
    "gpu_prefill": Op(
        kernel="prefill",
        space={"block_kv": (64, 128, 192), "num_stages": (2, 3, 4), "num_slots": (1, 2)},
        batch=_PREFILL,
        rows=((1024, 4096),),
    ),
}


class Measured(NamedTuple):
    """One candidate: less is better, field by field."""

    cost: float
    then: float
    tiles: Fields
    unit: str


def static_cost(
    op: str, target: str, case: str, page_size: int, kv_dtype: str, tried: Fields | None
) -> tuple[Measured, Mapping[str, Any]]:
    """Cycles a token of context by the compiler's schedule. Raises CompileFailed."""
    what = OPS[op]
    job = Job.of(
        target,
        "benchmarks.programs:attention",
        case=case,
        page_size=page_size,
        kv_dtype=kv_dtype,
        tiles={op: tried} if tried else {},
        **what.batch,
    )
    kernels, figures = tpu_static.measure(job, only=what.kernel)
    used = figures["tiles"].get(op)
    if used is None or not kernels:
        raise CompileFailed(f"{job}: its kernels do not ask pallas_kernels.tuning for {op!r}")
    kernel = max(kernels, key=lambda each: each.whole.cycles)
    loop, tokens = kernel.block_loop, block_tokens(kernel.name, figures["tiles"])
    if loop is None or tokens is None:
        raise CompileFailed(f"{kernel.name}: no loop over blocks of KV was found")
    context = what.batch["context"]
    around = sum(
        each.straight_cycles
        for each in kernel.loops
        if each.depth == loop.depth - 1 and each.start <= loop.start and loop.end <= each.end
    )
    cycles = (-(-context // tokens) * loop.straight_cycles + around) / context
    queries = used.get("tile", 1)  # a tile of queries shares a block
    hbm = tpu_static.hbm_cycles(target, figures["notes"]["kv_token_bytes"])
    return Measured(max(cycles, hbm) / queries, cycles / queries, used, "cycles a token"), figures


def timed_cost(
    op: str, case: str, page_size: int, kv_dtype: str, tried: Fields | None
) -> tuple[Measured, Mapping[str, Any]]:
    """Microseconds of a layer on the device that is here. Raises CompileFailed."""
    spec = attention_case(case)
    workload = kernels_timed.Workload(
        name=op,
        case=case,
        rows=OPS[op].rows,
        page_size=page_size,
        dtype=kv_dtype,
        num_heads=spec.num_heads,
        num_kv_heads=spec.kv.num_kv_heads,
        head_dim=spec.kv.head_dim,
        value_dim=spec.kv.value_dim,
    )
    (result,) = kernels_timed.time_with_tiles(workload, {op: tried} if tried else {})
    if "us" not in result:
        raise CompileFailed(str(result.get("absent", result)))
    used = result["tiles"].get(op)
    if used is None:
        raise CompileFailed(f"the kernels of this device do not ask for {op!r}")
    return Measured(result["us"], result["us_least"], used, "us a layer"), result


def search(
    op: str, measure: Callable[[Fields | None], tuple[Measured, Mapping[str, Any]]]
) -> tuple[Measured, Measured, Mapping[str, Any]]:
    """The start, the best found, and the figures of the best: one field changed at a time."""
    start, about = measure(None)
    best, seen = start, [start.tiles]
    print(f"start: {start.tiles}: {start.cost:.3f} {start.unit}", flush=True)
    for field, values in OPS[op].space.items():
        if field not in start.tiles:
            raise CompileFailed(f"{op} has no field {field!r}: {sorted(start.tiles)}")
        for tried in _candidates(op, best.tiles, field, values):
            if tried in seen:
                continue
            seen.append(tried)
            try:
                found, figures = measure(tried)
            except CompileFailed as failure:
                last = str(failure).strip().splitlines()[-1]
                print(f"  {tried}: passed over, {last[:200]}", flush=True)
                continue
            print(f"  {tried}: {found.cost:.3f}, {found.then:.3f} {found.unit}", flush=True)
            if (found.cost, found.then) < (best.cost, best.then):
                best, about = found, figures
    return start, best, about


def _candidates(op: str, base: Fields, field: str, values: tuple[int, ...]) -> Iterator[Fields]:
    for value in values:
        candidate = {**base, field: value}
        if value != base[field] and OPS[op].fits(candidate):
            yield candidate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--target", nargs="*", choices=tpu_static.CHIPS, default=[])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["llama-3.1-8b"])
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--kv-dtype", default="bfloat16")
    parser.add_argument("--least", type=float, default=0.05, help="gain that is worth an entry")
    parser.add_argument("--table", type=Path, default=tuning.TABLE)
    args = parser.parse_args()
    if args.op.startswith("gpu") and args.target:
        sys.exit("a GPU's compiler gives no cycles: run this where the GPU is, without --target")
    page_size = args.page_size or (32 if args.op.startswith("tpu") else 16)
    for case in args.case:
        for target in args.target or [None]:
            print(f"{args.op}, {case}, {target or 'the device that is here'}", flush=True)

            def measure(tried: Fields | None, case: str = case, target: str | None = target):
                if target is None:
                    return timed_cost(args.op, case, page_size, args.kv_dtype, tried)
                return static_cost(args.op, target, case, page_size, args.kv_dtype, tried)

            try:
                start, best, about = search(args.op, measure)
            except CompileFailed as failure:
                sys.exit(str(failure))
            gain = 1 - best.cost / start.cost
            if gain < args.least:
                print(f"kept as it is: {100 * gain:.1f} % to gain")
                continue
            spec = attention_case(case, page_size=page_size, dtype=args.kv_dtype)
            chip = about["notes"]["chip"] if target else about["chip"]
            changed = {k: v for k, v in best.tiles.items() if v != start.tiles[k]}
            tuning.record(
                args.op,
                chip,
                tuning.attention_key(spec),
                changed,
                path=args.table,
                by="static cycles" if target else "time",
                figures={"before": _figures(start), "after": _figures(best)},
                versions=about["versions"],
            )
            print(f"written: {changed} for {chip}, {tuning.attention_key(spec)}")


def _figures(measured: Measured) -> dict[str, Any]:
    return {"cost": round(measured.cost, 4), "then": round(measured.then, 4), "of": measured.unit}


if __name__ == "__main__":
    main()
