"""Time of a layer's attention on the device that is here, beside others' kernels.

`python -m benchmarks.kernels` runs this. Results come first: the kernels beside the XLA path on
small ragged batches, and nothing is timed if one is wrong. Then each implementation runs the
workloads in a process of its own: a peer that fails, or is not there, costs only its column.

How time is taken: one jitted loop makes many calls, each with the output of the last in its
queries, over the layers of a cache that is larger than the device's L2; the same loop without the
attention is subtracted. The figure is the median of the repeats. "ours" and "xla" write the step's
keys and values in that time, peers do not. Bandwidth counts each row's keys and values once;
copy is a copy of `COPY_BYTES`, read and written, in the same process as "ours".
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import print_table, versions, write_json

ROOT = Path(__file__).parent.parent
IMPLEMENTATIONS = ("ours", "xla", "triton", "torch")
FP8 = "float8_e4m3fn"
CHECKED = (  # the case, and the cache's type
    ("llama-3.1-8b", "bfloat16"),
    ("llama-3.2-1b", "bfloat16"),
    ("gpt-oss-20b/window", "bfloat16"),
    ("gemma-3-4b", "bfloat16"),
    ("llama-3.1-8b", FP8),
    ("gemma-3-4b", FP8),
    ("llama-3.1-8b", "int8"),
    ("deepseek-v3/tp8", "bfloat16"),
    ("deepseek-v3", FP8),
)
COPY_BYTES = 4 << 30
CACHE_BYTES = 256 << 20  # at least this much is read before any of it is read again
LOOP_S = 0.02  # what a timed call should take
REPEATS = 9
WRONG = 0.03  # ||out - xla|| / ||xla|| of bfloat16 outputs: above it something is wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch: each row's (query tokens, kv tokens those included), decode rows first."""

    name: str
    case: str
    rows: tuple[tuple[int, int], ...]
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str | None = None  # of the cache; None: dtype
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    value_dim: int | None = None  # of a latent cache, whose values lie within its keys

    @property
    def cache_dtype(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, the next power of two: what the server would run."""
        return 1 << (sum(queries for queries, _ in self.rows) - 1).bit_length()

    @property
    def is_decode(self) -> bool:
        return all(queries == 1 for queries, _ in self.rows)

    @property
    def kv_bytes(self) -> int:
        """Of keys and values that attention must read, once each."""
        width = {"float32": 4, "bfloat16": 2, "float16": 2}.get(self.cache_dtype, 1)
        pair = self.head_dim if self.value_dim else 2 * self.head_dim
        token = self.num_kv_heads * pair * width
        return token * sum(kv_len for _, kv_len in self.rows)

    @property
    def flops(self) -> int:
        """Of the two products, for the positions that are seen."""
        seen = sum(n * kv_len - n * (n - 1) // 2 for n, kv_len in self.rows)
        widths = self.head_dim + (self.value_dim or self.head_dim)
        return 2 * self.num_heads * widths * seen


def workloads(*, smoke: bool) -> list[Workload]:
    """The most telling ones first: the time may not be enough for all."""
    from pallas_kernels.cases import attention_case

    def add(
        name: str, case: str, rows: list[tuple[int, int]], kv_dtype: str | None = None
    ) -> Workload:
        spec = attention_case(case)
        return Workload(
            name=name,
            case=case,
            rows=tuple(rows),
            dtype="float32" if smoke else "bfloat16",
            kv_dtype=kv_dtype,
            num_heads=spec.num_heads,
            num_kv_heads=spec.kv.num_kv_heads,
            head_dim=spec.kv.head_dim,
            value_dim=spec.kv.value_dim,
        )

    if smoke:
        rows = [(1, 40), (1, 100)]
        return [
            add("decode 2", "tiny", rows),
            add("mixed", "tiny", [*rows, (30, 50)]),
            add("mixed, fp8 KV", "tiny", [*rows, (30, 50)], FP8),
            add("mixed", "tiny-latent", [*rows, (30, 50)]),
        ]
    batches = {
        "decode 64 x 4k": [(1, 4096)] * 64,
        "prefill 8k": [(8192, 8192)],
        "decode 1 x 32k": [(1, 32768)],
        "chunk 2k after 6k": [(2048, 8192)],
        "mixed 48 + 2k": [(1, 4096)] * 48 + [(2000, 4000)],
        "decode 256 x 1k": [(1, 1024)] * 256,
        "decode 8 x 8k": [(1, 8192)] * 8,
    }
    cases = ("llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b")
    chosen = [add(name, case, rows) for case in cases for name, rows in batches.items()]
    narrow = ("decode 64 x 4k", "prefill 8k", "mixed 48 + 2k")
    eight_bits = [add(f"{name}, fp8 KV", cases[0], batches[name], FP8) for name in narrow]
    latent = [
        add(name, case, batches[name])
        for case in ("deepseek-v3/tp8", "deepseek-v3")
        for name in ("decode 64 x 4k", "decode 1 x 32k", "chunk 2k after 6k")
    ]
    return [*chosen[:4], *eight_bits, *latent[:2], *chosen[4:], *latent[2:]]


# What a child process does.


def check(*, smoke: bool) -> list[dict[str, Any]]:
    """The chosen backend beside the XLA path over cases, and that beside the reference."""
    import jax

    from pallas_kernels.backend import REFERENCE, choose_backend
    from pallas_kernels.cases import attention_case
    from pallas_kernels.chips import Chip
    from pallas_kernels.self_check import TOLERANCE, self_check

    chip = Chip.of(jax.devices()[0])
    found = []
    for case, kv_dtype in (("tiny", "float32"), ("tiny", FP8)) if smoke else CHECKED:
        dtype = "float32" if smoke else "bfloat16"
        spec = attention_case(case, page_size=16, dtype=kv_dtype)
        backend, refused = choose_backend("auto", spec, chip=chip)
        backends = [dataclasses.replace(REFERENCE, chip=chip)] if not found else []
        for each in [*backends, backend]:
            error = self_check(spec, each, dtype=dtype)
            found.append(
                {
                    "case": case,
                    "kv_dtype": kv_dtype,
                    "backend": each.name,
                    "refused": refused,
                    "error": error,
                    "passes": bool(error <= TOLERANCE[dtype]),
                }
            )
            print(f"check {case}, {kv_dtype} KV, {each.name}: {error:.2e}", flush=True)
    return found


def time_workloads(
    by: str,
    chosen: list[Workload],
    *,
    end_s: float,
    add: Callable[[dict[str, Any]], None],
    tiles: dict[str, dict[str, int]] | None = None,
) -> None:
    """Times an implementation that runs in JAX, and for "ours" the device's copy first."""
    import jax

    from pallas_kernels import tuning

    if by == "ours" and tiles is None:
        add({"copy_bytes_per_s": copy_bandwidth(small=jax.default_backend() == "cpu")})
    for workload in chosen:
        result: dict[str, Any] = {"workload": workload.name, "case": workload.case, "by": by}
        if time.monotonic() > end_s:
            add({**result, "absent": "no time left"})
            continue
        try:
            with tuning.trying(tiles or {}) as used:
                figures = _time(by, workload)
            chip = jax.devices()[0].device_kind
            add({**result, **figures, "tiles": used, "chip": chip, "versions": versions()})
        except (ValueError, NotImplementedError, RuntimeError) as error:  # XLA's are RuntimeErrors
            add({**result, "absent": f"{type(error).__name__}: {str(error)[:500]}"})


def copy_bandwidth(*, small: bool) -> float:
    """Bytes a second of a copy, read and written."""
    import jax
    import jax.numpy as jnp

    size = COPY_BYTES >> 8 if small else COPY_BYTES
    x = jnp.zeros(size // 2, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    times = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        copy(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size / median(times[2:])


def _time(by: str, workload: Workload) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    attend, state, about = _TAKES[by](workload)
    floor_s = max(workload.kv_bytes / 3e12, workload.flops / 6e14)
    count = 2 if on_cpu else int(min(max(LOOP_S / floor_s, 4), 1000))
    if by == "xla" and not on_cpu:
        count = max(2, count // 8)  # it is slower

    first = jax.jit(lambda state: attend(state["q"], state, jnp.int32(0))[0])(state)
    sample = np.asarray(first.astype(jnp.float32)).reshape(-1)
    empty, state = _loop_seconds(lambda x, state, index: (x, state), state, count)
    full, state = _loop_seconds(attend, state, count)
    each = [(taken - median(empty)) / count for taken in full]
    seconds = median(each)
    return {
        "us": 1e6 * seconds,
        "us_least": 1e6 * min(each),
        "us_most": 1e6 * max(each),
        "calls": count,
        "loop_us": 1e6 * median(empty) / count,
        "gb_per_s": workload.kv_bytes / seconds / 1e9,
        "tflops": workload.flops / seconds / 1e12,
        "sample": sample[:: max(1, sample.size // 4096)].tolist(),
        **about,
    }


def _loop_seconds(attend: Callable[..., Any], state: Any, count: int) -> tuple[list[float], Any]:
    """Seconds of `count` calls in one jitted loop, some times over, and the state at the end."""
    import jax
    from jax import lax

    def body(index: Any, carry: Any) -> Any:
        x, state = carry
        out, state = attend(x, state, index)
        return (state["q"] + 1e-6 * out).astype(x.dtype), state

    run = jax.jit(lambda carry: lax.fori_loop(0, count, body, carry), donate_argnums=0)
    carry, times = (state["q"] + 0, state), []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        carry = jax.block_until_ready(run(carry))
        times.append(time.perf_counter() - start)
    return times[2:], carry[1]


def _paged(by: str, workload: Workload) -> tuple[Callable[..., Any], dict[str, Any], dict]:
    """Our paged attention by the chosen backend, or by XLA: (call, state, what to say of it)."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.attention import paged_attention
    from pallas_kernels.backend import choose_backend
    from pallas_kernels.cases import attention_case
    from pallas_kernels.chips import Chip

    chip = Chip.of(jax.devices()[0])
    spec = attention_case(workload.case, page_size=workload.page_size, dtype=workload.cache_dtype)
    backend, refused = choose_backend("auto" if by == "ours" else "xla", spec, chip=chip)
    state, num_layers = _inputs(workload, spec, backend)

    def attend(x: Any, state: Any, index: Any) -> Any:
        out, kv_pages = paged_attention(
            x,
            state["k"],
            state["v"],
            state["kv_pages"],
            state["pages"],
            index % num_layers,
            spec=spec,
            backend=backend,
            sinks=state["sinks"],
        )
        # A loop puts it into the queries: where a value is narrower than a key, with zeros behind.
        out = jnp.pad(out, ((0, 0), (0, 0), (0, x.shape[2] - out.shape[2])))
        return out, {**state, "kv_pages": kv_pages}

    return attend, state, {"backend": backend.name, "refused": refused}


def _triton(workload: Workload) -> tuple[Callable[..., Any], dict[str, Any], dict]:
    """JAX's paged attention in Pallas Triton, on pages of its own layout: decode only."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "gpu":
        raise NotImplementedError("Pallas Triton needs a GPU")
    if not workload.is_decode:
        raise NotImplementedError("it only decodes")
    if workload.kv_dtype is not None:
        raise NotImplementedError("here it reads the queries' type only")
    if workload.value_dim is not None:
        raise NotImplementedError("it knows no latent cache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as triton

    from pallas_kernels.backend import XLA
    from pallas_kernels.cases import attention_case
    from pallas_kernels.kv_write import write_kv

    spec = attention_case(workload.case, page_size=workload.page_size, dtype=workload.dtype)
    state, num_layers = _inputs(workload, spec, XLA)
    pages, kv_pages = state["pages"], state.pop("kv_pages")
    kv_pages = jax.jit(write_kv, static_argnames=("spec", "backend"), donate_argnums=0)(
        kv_pages, state["k"], state["v"], pages, 0, spec=spec.kv, backend=XLA
    )
    part = jax.jit(lambda x, start: x[:, :, start::2].transpose(2, 0, 1, 3), static_argnums=1)
    state["keys"], state["values"] = part(kv_pages, 0), part(kv_pages, 1)  # [K, pages, size, H]
    kv_pages.delete()
    table_pages = pages.page_table.shape[1]
    block = 8
    while table_pages % (16 * block) and block > 1:  # it wants whole blocks in each of 16 splits
        block //= 2
    splits = 16
    while table_pages % (splits * block) and splits > 1:
        splits //= 2

    def attend(x: Any, state: Any, index: Any) -> Any:
        pages = state["pages"]
        table = pages.page_table + (index % num_layers) * pages.num_pages
        num_rows = x.shape[0]
        out = triton(
            x * jnp.asarray(spec.scale, x.dtype),
            state["keys"],
            state["values"],
            table[:num_rows],
            pages.kv_lens[:num_rows],
            pages_per_compute_block=block,
            k_splits=splits,
        )
        return out, state

    return attend, state, {"pages_per_compute_block": block, "k_splits": splits}


_TAKES: dict[str, Callable[..., Any]] = {
    "ours": functools.partial(_paged, "ours"),
    "xla": functools.partial(_paged, "xla"),
    "triton": _triton,
}


def _inputs(workload: Workload, spec: Any, backend: Any) -> tuple[dict[str, Any], int]:
    """Random queries, new keys and values, and a cache; the same for every implementation."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.kv_write import kv_pages_shape
    from pallas_kernels.ragged import RaggedShape, scatter_pages

    longest = max(kv_len for _, kv_len in workload.rows)
    num_rows = 1 << (len(workload.rows) - 1).bit_length()
    shape = RaggedShape(
        rows=workload.rows,
        num_tokens=workload.num_tokens,
        max_rows=min(num_rows, workload.num_tokens),
        table_pages=-(-longest // workload.page_size),
    )
    pages, _ = scatter_pages(shape, page_size=workload.page_size)
    on_cpu = jax.default_backend() == "cpu"
    num_layers = 2 if on_cpu else max(2, -(-CACHE_BYTES // workload.kv_bytes))
    cache = kv_pages_shape(spec.kv, num_layers, pages.num_pages, backend=backend)
    keys = iter(jax.random.split(jax.random.key(0), 5))

    dtype = jnp.dtype(workload.dtype)

    def normal(shape: tuple[int, ...], stored: Any) -> Any:
        draw = jax.jit(lambda key: jax.random.normal(key, shape, dtype).astype(stored))
        return draw(next(keys))

    tokens = workload.num_tokens
    state = {
        "q": normal((tokens, spec.num_heads, spec.kv.head_dim), dtype),
        "k": normal((tokens, spec.kv.num_kv_heads, spec.kv.head_dim), dtype),
        "v": normal((tokens, spec.kv.num_kv_heads, spec.kv.head_dim), dtype)
        if spec.kv.kind == "heads"
        else None,
        "kv_pages": normal(cache.shape, cache.dtype),
        "pages": pages,
        "sinks": normal((spec.num_heads,), jnp.float32) if spec.sinks else None,
    }
    return state, num_layers


# What the parent does.


WRONG_STATUS = 3  # exit status if a kernel's results are wrong


def run(
    *,
    smoke: bool,
    json: Path | None,
    budget_s: float | None,
    only_check: bool = False,
    checked: bool = False,
) -> None:
    """Checks, times every implementation in a process of its own, and prints the tables.

    Exits with WRONG_STATUS if a kernel is wrong, with 1 if the check fails; then nothing is timed.
    `checked` says that it was checked before.
    """
    end_s = time.monotonic() + (budget_s or 3600.0)
    checks = [] if checked else _child("check", [], smoke=smoke, end_s=end_s)
    record: dict[str, Any] = {"smoke": smoke, "checks": checks, "results": []}
    if json:
        write_json(json, benchmark="kernels, timed", **record)
    wrong = [each for each in checks if not each.get("passes")]
    if wrong:
        print(f"not right, so nothing is timed: {wrong}")
        sys.exit(WRONG_STATUS if any("error" in each for each in wrong) else 1)
    if only_check:
        return
    chosen = workloads(smoke=smoke)
    for number, by in enumerate(IMPLEMENTATIONS):
        left_s = end_s - time.monotonic()
        share_s = left_s / (len(IMPLEMENTATIONS) - number) * (1.6 if by == "ours" else 1)
        share_s = min(share_s, left_s)
        if share_s < 10:
            record["results"].append({"by": by, "absent": f"{left_s:.0f} s left"})
            continue
        until_s = time.monotonic() + share_s
        record["results"] += _child(by, chosen, smoke=smoke, end_s=until_s)
        if json:
            write_json(json, benchmark="kernels, timed", **record)
    report(chosen, record["results"])


def time_with_tiles(
    workload: Workload, tiles: dict[str, dict[str, int]], *, time_limit_s: float = 300.0
) -> list[dict[str, Any]]:
    """A workload by our kernels with those tile sizes by operation; in a process of its own."""
    end_s = time.monotonic() + time_limit_s
    return _child("ours", [workload], smoke=False, end_s=end_s, tiles=tiles)[:1]


def _child(
    by: str,
    chosen: list[Workload],
    *,
    smoke: bool,
    end_s: float,
    tiles: dict[str, dict[str, int]] | None = None,
) -> list[dict[str, Any]]:
    """Results of a child process, those before its end if it fails; its failure is one of them.

    With `tiles` it measures no copy.
    """
    seconds = max(end_s - time.monotonic(), 1)
    asked = {
        "workloads": [dataclasses.asdict(w) for w in chosen],
        "budget_s": seconds - 8,
        "tiles": tiles,
    }
    python = os.environ.get("PEER_PYTHON") if by == "torch" else None
    module = "benchmarks.gpu.torch_attention" if by == "torch" else "benchmarks.kernels_timed"
    command = [python or sys.executable, "-m", module, "--by", by, *(["--smoke"] if smoke else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    print(f"== {by}, at most {seconds:.0f} s", flush=True)
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    timed_out = False
    try:
        output, _ = child.communicate(json.dumps(asked), timeout=seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
        child.kill()
        output, _ = child.communicate()
    results = []
    for line in (output or "").splitlines():
        if line.startswith("RESULT "):
            results.append(json.loads(line.removeprefix("RESULT ")))
        else:
            print(f"   {line}")
    if timed_out or child.returncode:
        reason = "ran out of time" if timed_out else f"exit status {child.returncode}"
        results.append({"by": by, "absent": reason})
    return results


def report(chosen: list[Workload], results: list[dict[str, Any]]) -> None:
    """Prints a table of the workloads, and what is absent with its reason."""
    copy = next((r["copy_bytes_per_s"] for r in results if "copy_bytes_per_s" in r), None)
    if copy:
        print(f"copy bandwidth, measured: {copy / 1e12:.3f} TB/s read + written")
    others = sorted({r["by"] for r in results if "us" in r} - {"ours"})
    columns = ["workload", "us", "least", "most", "GB/s", "% of copy", "TFLOP/s", "off by"]
    columns += [name for other in others for name in (f"{other} us", "ratio")]
    rows = []
    for workload in chosen:
        found = {
            r["by"]: r
            for r in results
            if "us" in r and (r["case"], r["workload"]) == (workload.case, workload.name)
        }
        ours = found.get("ours")
        if not found:
            continue
        row: list[object] = [f"{workload.case}: {workload.name}"]
        if ours:
            row += [ours["us"], ours["us_least"], ours["us_most"], ours["gb_per_s"]]
            row += [100 * 1e9 * ours["gb_per_s"] / copy if copy else None, ours["tflops"]]
            row.append(_off_by(ours, found.get("xla")))
        else:
            row += [None] * 7
        for other in others:
            theirs = found.get(other, {}).get("us")
            row += [theirs, f"{theirs / ours['us']:.2f}x" if ours and theirs else None]
        rows.append(row)
    print_table("A layer's attention; ratio: how many times as long the other takes", columns, rows)
    absent: dict[str, list[str]] = {}
    for result in results:
        if "absent" in result:
            what = f"{result.get('case', '')} {result.get('workload', '')}".strip() or "all or rest"
            absent.setdefault(f"{result['by']}: {result['absent']}", []).append(what)
    for reason, what in absent.items():
        print(f"absent, {reason} ({', '.join(what)})")


def _off_by(ours: dict[str, Any], xla: dict[str, Any] | None) -> str | None:
    """||ours - xla|| / ||xla|| of a sample of the outputs for the same inputs."""
    if xla is None:
        return None
    out, expected = np.array(ours["sample"]), np.array(xla["sample"])
    error = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
    return f"{error:.1e}" + ("" if error < WRONG else " WRONG")


def main() -> None:
    parser = argparse.ArgumentParser(description="One implementation; `run` starts this.")
    parser.add_argument("--by", required=True, choices=["check", *_TAKES])
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    asked = json.load(sys.stdin)
    end_s = time.monotonic() + asked["budget_s"]

    def add(result: dict[str, Any]) -> None:
        print("RESULT " + json.dumps(result), flush=True)

    if args.by == "check":
        for result in check(smoke=args.smoke):
            add(result)
        return
    chosen = [
        Workload(**{**w, "rows": tuple(tuple(row) for row in w["rows"])})
        for w in asked["workloads"]
    ]
    time_workloads(args.by, chosen, end_s=end_s, add=add, tiles=asked["tiles"])


if __name__ == "__main__":
    main()
