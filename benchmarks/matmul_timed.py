"""Time of quantized and grouped matmuls on the device that is here, beside XLA's.

    python -m benchmarks.matmul_timed             on a GPU or TPU: right results first, then time
    python -m benchmarks.matmul_timed --check     the results alone
    python -m benchmarks.matmul_timed --smoke     the same in tiny shapes, on any machine

Results come first, each kind of weight beside the reference; nothing is timed if one is wrong (exit
status 3). Then a program of some calls in a row, each with weights of its own so that none is still
in the L2, each with the output of the last in its x. The same program without the matmuls is
subtracted; the figure is the median of the repeats.

- ours: the backend that is chosen, compiled as a step of jaxserve is.
- xla: XLA's path, compiled the same way. xla default: with XLA's own options, Triton matmuls among
  them, which a step cannot use.
- bf16: XLA with the weight in bfloat16 (not of experts): what quantization is measured against.

GB/s counts the weights as stored once (of experts: those that have rows).
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import print_table, versions, write_json
from benchmarks.kernels_timed import WRONG_STATUS, copy_bandwidth
from jaxserve.runner.executables import COMPILER_OPTIONS
from pallas_kernels import grouped_matmul, quantized_matmul
from pallas_kernels.backend import REFERENCE, XLA
from pallas_kernels.chips import Chip
from pallas_kernels.matmul_cases import MATMUL_CASES, MatmulCase
from pallas_kernels.quantized import QuantizedArray, quantize

WEIGHT_BYTES = 512 << 20  # of a program's weights, at least: ten times an H100's L2
MAX_CALLS = 16  # of a program
REPEATS = 9
TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-5}  # beside float32 arithmetic, x's type

CHECKED = {
    "int8": MatmulCase(1024, 512),
    "int8 blocks of 32": MatmulCase(1024, 512, "int8", (32, 1)),
    "fp8": MatmulCase(1024, 512, "float8_e4m3fn"),
    "fp8 blocks": MatmulCase(1024, 576, "float8_e4m3fn", (128, 128)),
    "int4": MatmulCase(1024, 512, "int4"),
    "int4 with zeros": MatmulCase(1024, 512, "int4", (128, 1), zeros=True),
    "experts bf16": MatmulCase(512, 256, None, num_experts=8, top_k=2),
    "experts int8": MatmulCase(512, 256, num_experts=8, top_k=2),
    "experts int4": MatmulCase(512, 256, "int4", (64, 1), num_experts=8, top_k=2),
    "experts fp8 blocks": MatmulCase(512, 256, "float8_e4m3fn", (128, 128), num_experts=8, top_k=2),
}
TIMED = (  # the most telling ones first: the time may not be enough for all
    ("llama-8b/gate-up", (16, 64, 1, 256)),
    ("llama-8b/down", (16, 64)),
    ("llama-8b/gate-up/fp8", (16, 64)),
    ("llama-8b/gate-up/int4", (16, 64)),
    ("qwen3-30b-a3b/gate-up/int8", (16, 64, 512)),
    ("llama-8b/gate-up/awq", (16, 64)),
    ("qwen3-30b-a3b/gate-up", (16, 64, 512)),
    ("deepseek-v3/q-b", (16, 64)),
    ("mixtral-8x7b/gate-up/int8", (16, 64)),
    ("llama-8b/qkv", (16, 64)),
)


class Inputs(NamedTuple):
    """What a matmul takes; group_sizes are None of a dense one."""

    x: Any  # [T, D]
    weight: Any
    group_sizes: Any  # [E] int32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any machine")
    parser.add_argument("--check", action="store_true", help="the results alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="leave out what is too much")
    args = parser.parse_args()
    end_s = time.monotonic() + args.budget_s
    chip = Chip.of(jax.devices()[0])
    record: dict[str, Any] = {"smoke": args.smoke, "chip": chip.kind, "versions": versions()}

    def write() -> None:
        if args.json:
            write_json(args.json, benchmark="matmuls, timed", **record)

    record["checks"] = check(chip, smoke=args.smoke)
    write()
    wrong = [each for each in record["checks"] if not each["passes"]]
    if wrong:
        print(f"not right, so nothing is timed: {wrong}")
        sys.exit(WRONG_STATUS)
    if args.check:
        return
    record["copy_bytes_per_s"] = copy_bandwidth(small=args.smoke)
    results = record["results"] = []
    timed = [("tiny", (4,))] if args.smoke else TIMED
    for name, rows in timed:
        for num_tokens in rows:
            for by in ("ours", "xla", "xla default", "bf16"):
                result = {"case": name, "tokens": num_tokens, "by": by}
                if time.monotonic() > end_s:
                    results.append({**result, "absent": "no time left"})
                    continue
                try:
                    figures = time_matmul(by, MATMUL_CASES[name], num_tokens, chip)
                except (ValueError, RuntimeError) as error:  # XLA's are RuntimeErrors
                    figures = {"absent": f"{type(error).__name__}: {str(error)[:500]}"}
                results.append({**result, **figures})
                write()
    report(results, record["copy_bytes_per_s"])


def check(chip: Chip, *, smoke: bool) -> list[dict[str, Any]]:
    """The chosen backend beside the reference, of each kind of weight."""
    found = []
    for name, case in CHECKED.items():
        for num_tokens in (3,) if smoke else (3, 40):
            inputs = make_inputs(case, num_tokens, seed=0)
            backend, refused = choose(inputs, chip)
            out = np.asarray(jax.jit(call(backend))(*inputs), np.float64)
            exact = inputs._replace(x=inputs.x.astype(jnp.float32))
            if not isinstance(inputs.weight, QuantizedArray):
                exact = exact._replace(weight=inputs.weight.astype(jnp.float32))
            expected = np.asarray(jax.jit(call(REFERENCE))(*exact), np.float64)
            error = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
            passes = bool(error <= TOLERANCE[inputs.x.dtype.name])  # NaN does not
            found.append(
                {
                    "case": name,
                    "tokens": num_tokens,
                    "backend": backend.name,
                    "refused": refused,
                    "error": error,
                    "passes": passes,
                }
            )
            print(f"check {name} by {num_tokens}, {backend.name}: {error:.2e}", flush=True)
    return found


def time_matmul(by: str, case: MatmulCase, num_tokens: int, chip: Chip) -> dict[str, Any]:
    """Figures of one way to multiply. Raises ValueError where there is no such way."""
    dense = case.num_experts is None
    if by == "bf16":
        if not dense or case.format is None:
            raise ValueError("of quantized dense weights only")
        case = case._replace(format=None)
    first = make_inputs(case, num_tokens, seed=0)
    backend, refused = (XLA, {}) if by != "ours" else choose(first, chip)
    if by == "bf16":
        multiply: Callable[..., Any] = lambda x, weight, _: x @ weight  # noqa: E731
    else:
        multiply = call(backend)
    num_bytes = used_bytes(first)
    small = jax.default_backend() == "cpu"
    num_calls = 2 if small else int(min(max(2, -(-WEIGHT_BYTES // num_bytes)), MAX_CALLS))
    weights = [make_inputs(case, num_tokens, seed=seed).weight for seed in range(num_calls)]
    options = None if by == "xla default" else COMPILER_OPTIONS.get(chip.platform)

    def chain(x: Any, weights: Any, group_sizes: Any, multiply: Any) -> Any:
        for weight in weights:
            # All of it: a slice could move into the matmul.
            out = jax.lax.optimization_barrier(multiply(x, weight, group_sizes))
            x = (x + 1e-6 * out[:, :1]).astype(x.dtype)
        return x

    def seconds(multiply: Any) -> list[float]:
        run = functools.partial(chain, multiply=multiply)
        lowered = jax.jit(run).lower(first.x, weights, first.group_sizes)
        compiled = lowered.compile(compiler_options=options)
        times, count = [], 2 if small else 20
        for _ in range(REPEATS + 2):
            x = first.x
            start = time.perf_counter()
            for _ in range(count):
                x = compiled(x, weights, first.group_sizes)
            x.block_until_ready()
            times.append((time.perf_counter() - start) / count)
        return times[2:]

    empty = median(seconds(lambda x, weight, group_sizes: x))
    each = [(taken - empty) / num_calls for taken in seconds(multiply)]
    taken = median(each)
    sample = np.asarray(jax.jit(multiply)(*first).astype(jnp.float32)).reshape(-1)
    return {
        "us": 1e6 * taken,
        "us_least": 1e6 * min(each),
        "us_most": 1e6 * max(each),
        "empty_us": 1e6 * empty / num_calls,
        "calls": num_calls,
        "weight_bytes": num_bytes,
        "gb_per_s": num_bytes / taken / 1e9,
        "backend": backend.name,
        "refused": refused,
        "sample": sample[:: max(1, sample.size // 4096)].tolist(),
    }


def make_inputs(case: MatmulCase, num_tokens: int, *, seed: int) -> Inputs:
    """Gaussian x and weights; tokens go to experts at random, so some have none."""
    keys = jax.random.split(jax.random.key(seed), 3)
    lead = () if case.num_experts is None else (case.num_experts,)

    def weight(key: Any) -> Any:
        shape = (*lead, case.in_dim, case.out_dim)
        values = jax.random.normal(key, shape, jnp.bfloat16) * case.in_dim**-0.5
        if case.format is None:
            return values
        return quantize(values, case.format, block=case.block, zeros=case.zeros)

    x = jax.random.normal(keys[0], (num_tokens * case.top_k, case.in_dim), jnp.bfloat16)
    group_sizes = None
    if case.num_experts is not None:
        experts = jax.random.randint(keys[2], (x.shape[0],), 0, case.num_experts)
        group_sizes = jnp.bincount(experts, length=case.num_experts).astype(jnp.int32)
    return Inputs(x, jax.jit(weight)(keys[1]), group_sizes)


def choose(inputs: Inputs, chip: Chip) -> tuple[Any, dict[str, str]]:
    """The backend that would be used, and why others are not."""
    if inputs.group_sizes is None:
        return quantized_matmul.choose_matmul_backend("auto", inputs.weight, chip=chip, x=inputs.x)
    return grouped_matmul.choose_grouped_backend("auto", inputs.weight, chip=chip, x=inputs.x)


def call(backend: Any) -> Callable[..., Any]:
    """The op by a backend, of the parts of `Inputs`."""

    def multiply(x: Any, weight: Any, group_sizes: Any) -> Any:
        if group_sizes is None:
            return quantized_matmul.quantized_matmul(x, weight, backend=backend)
        return grouped_matmul.grouped_matmul(x, weight, group_sizes, backend=backend)

    return multiply


def used_bytes(inputs: Inputs) -> int:
    """Bytes of weights that have to be read: those of experts with rows."""
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(inputs.weight))
    if inputs.group_sizes is None:
        return total
    return total * int((inputs.group_sizes > 0).sum()) // inputs.group_sizes.size


def report(results: list[dict[str, Any]], copy: float) -> None:
    """Prints a table, and what is absent with its reason."""
    print(f"copy bandwidth, measured: {copy / 1e12:.3f} TB/s read + written")
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for result in results:
        found.setdefault((result["case"], result["tokens"]), {})[result["by"]] = result
    rows = []
    for (case, tokens), by in found.items():
        ours = by["ours"]
        if "us" not in ours:
            continue
        row: list[object] = [f"{case} by {tokens}", ours["backend"]]
        row += [ours["us"], ours["us_least"], ours["us_most"], ours["gb_per_s"]]
        row += [100e9 * ours["gb_per_s"] / copy, off_by(ours, by["xla"])]
        for other in ("xla", "xla default", "bf16"):
            theirs = by[other].get("us")
            row += [theirs, f"{theirs / ours['us']:.2f}x" if theirs else None]
        rows.append(row)
    columns = ["weight", "backend", "us", "least", "most", "GB/s", "% of copy", "off by"]
    columns += [name for by in ("xla", "xla default", "bf16") for name in (f"{by} us", "ratio")]
    print_table("Matmuls; ratio: how many times as long the other takes", columns, rows)
    absent: dict[str, list[str]] = {}
    for result in results:
        if "absent" in result:
            reason = f"{result['by']}: {result['absent']}"
            absent.setdefault(reason, []).append(f"{result['case']} by {result['tokens']}")
    for reason, what in absent.items():
        print(f"absent, {reason} ({', '.join(what)})")


def off_by(ours: dict[str, Any], xla: dict[str, Any]) -> str | None:
    """||ours - xla|| / ||xla|| of a sample of the outputs for the same inputs."""
    if "sample" not in xla:
        return None
    out, expected = np.array(ours["sample"]), np.array(xla["sample"])
    return f"{float(np.linalg.norm(out - expected) / np.linalg.norm(expected)):.1e}"


if __name__ == "__main__":
    main()
