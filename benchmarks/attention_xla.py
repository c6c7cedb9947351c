"""Time of a layer's attention through the xla backend, beside dense attention on contiguous KV.

    python -m benchmarks.attention_xla [--json FILE] [--repeats N] [--case NAME] [--only SHAPE ...]

Every layer reads its own part of the cache, so nothing is warm. "kv GB/s" counts each row's keys
and values once. "dense" is attention on keys and values that already lie contiguous, head by head:
decode rows in one padded batch, other rows one by one, no paging and no cache write. Wall time is
the median of the repeats; cpu is the least process time, which a busy machine disturbs less.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.attention import paged_attention
from pallas_kernels.backend import XLA
from pallas_kernels.cases import CASES, attention_case
from pallas_kernels.kv_write import kv_pages_shape
from pallas_kernels.ragged import RaggedShape, scatter_pages
from pallas_kernels.types import AttentionSpec, PageMetadata

NUM_LAYERS = 6


def shapes() -> dict[str, RaggedShape]:
    """The batches a small model's server sees on a CPU."""
    rng = np.random.default_rng(0)

    def decode(num_rows: int, low: int, high: int) -> list[tuple[int, int]]:
        return [(1, int(kv_len)) for kv_len in rng.integers(low, high + 1, num_rows)]

    chunks = [(16, 16), (64, 64), (64, 320), (128, 128), (192, 256)]
    return {
        "decode 64": RaggedShape(rows=decode(64, 100, 380), num_tokens=64, max_rows=64),
        "decode 8": RaggedShape(rows=decode(8, 100, 380), num_tokens=8, max_rows=8),
        "decode 1": RaggedShape(rows=[(1, 192)], num_tokens=1, max_rows=1),
        "decode 1, long": RaggedShape(rows=[(1, 4000)], num_tokens=1, max_rows=1, table_pages=256),
        "mixed 512": RaggedShape(rows=decode(20, 100, 380) + chunks, num_tokens=512, max_rows=64),
        "prefill 32 x 32 of 544": RaggedShape(
            rows=[(32, 544)] * 32, num_tokens=1024, max_rows=64, shared_tokens=512
        ),
        "prefill 512": RaggedShape(rows=[(512, 512)], num_tokens=512, max_rows=64),
    }


def paged_step(spec: AttentionSpec, shape: RaggedShape) -> Callable[[], Array]:
    """A call that attends in NUM_LAYERS layers, the cache donated and carried."""
    rng = np.random.default_rng(2)
    pages, _ = scatter_pages(shape, page_size=spec.kv.page_size)
    cache_shape = kv_pages_shape(spec.kv, NUM_LAYERS, pages.num_pages, backend=XLA)
    kv_pages = jnp.asarray(rng.standard_normal(cache_shape.shape, np.float32), cache_shape.dtype)
    q, k, v = (
        jnp.asarray(rng.standard_normal((shape.num_tokens, heads, spec.kv.head_dim)), spec.kv.dtype)
        for heads in (spec.num_heads, spec.kv.num_kv_heads, spec.kv.num_kv_heads)
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(kv_pages: Array, q: Array, k: Array, v: Array, pages: PageMetadata):
        def layer(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x, kv_pages = carry
            out, kv_pages = paged_attention(x, k, v, kv_pages, pages, index, spec=spec, backend=XLA)
            return q + 1e-6 * out, kv_pages

        return lax.fori_loop(0, NUM_LAYERS, layer, (q, kv_pages))

    held = [kv_pages]

    def call() -> Array:
        out, held[0] = step(held[0], q, k, v, pages)
        return out

    return call


def dense_step(spec: AttentionSpec, shape: RaggedShape) -> Callable[[], Array]:
    """A call that attends in NUM_LAYERS layers to contiguous keys and values [B, K, S, H]."""
    rng = np.random.default_rng(3)
    heads, head_dim, dtype = spec.kv.num_kv_heads, spec.kv.head_dim, spec.kv.dtype
    group = spec.num_heads // heads
    decode = [kv_len for num_queries, kv_len in shape.rows if num_queries == 1]
    batches = [(1, decode)] if decode else []  # (query tokens, kv lengths)
    batches += [(queries, [kv_len]) for queries, kv_len in shape.rows if queries > 1]

    def normal(*sizes: int) -> Array:
        return jnp.asarray(rng.standard_normal(sizes, np.float32), dtype)

    def one(q: Array, k: Array, v: Array, kv_lens: Array) -> Array:
        dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        num_queries = q.shape[3]
        logits = dot("bkgqh,bksh->bkgqs", q, k) * spec.scale
        last = kv_lens[:, None] - num_queries + jnp.arange(num_queries)  # [B, Q]
        seen = jnp.arange(k.shape[2]) <= last[:, :, None]
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -1e30), axis=-1)
        return dot("bkgqs,bksh->bkgqh", weights.astype(v.dtype), v)

    arguments = []
    for num_queries, kv_lens in batches:
        rows, longest = len(kv_lens), max(kv_lens)
        q = normal(rows, heads, group, num_queries, head_dim)
        layers = [
            (normal(rows, heads, longest, head_dim), normal(rows, heads, longest, head_dim))
            for _ in range(NUM_LAYERS)
        ]
        arguments.append((q, layers, jnp.asarray(kv_lens, jnp.int32)))

    @jax.jit
    def step(arguments: list[tuple[Array, list[tuple[Array, Array]], Array]]) -> list[Array]:
        outs = []
        for q, layers, kv_lens in arguments:
            x = q
            for k, v in layers:
                x = q + 1e-6 * one(x, k, v, kv_lens)
            outs.append(x)
        return outs

    return lambda: step(arguments)


def measure(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds a layer of each call, taken in turns: median wall and least process time."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats + 1):  # the first compiles
        for name, call in calls.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            took = time.perf_counter() - wall_s, time.process_time() - cpu_s
            samples[name].append(took)
    return {
        name: {
            "wall_ms": 1e3 * float(np.median([wall_s for wall_s, _ in taken[1:]])) / NUM_LAYERS,
            "cpu_ms": 1e3 * min(cpu_s for _, cpu_s in taken[1:]) / NUM_LAYERS,
        }
        for name, taken in samples.items()
    }


def main() -> None:
    """Print the table; write the same figures as JSON where asked."""
    parser = argparse.ArgumentParser(description="Time of a layer's paged attention.")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--case", choices=CASES, default="smollm2-135m")
    parser.add_argument("--only", nargs="*", choices=list(shapes()), help="default: all shapes")
    args = parser.parse_args()

    spec = attention_case(args.case)
    results = []
    print(f"{args.case} on {jax.devices()[0].device_kind}, ms a layer")
    columns = ("wall", "cpu", "kv GB/s", "dense", "cpu", "ratio", "cpu")
    print(f"{'shape':24}" + "".join(f"{column:>9}" for column in columns))
    for name, shape in shapes().items():
        if args.only and name not in args.only:
            continue
        token_bytes = (
            2 * spec.kv.num_kv_heads * spec.kv.head_dim * jnp.dtype(spec.kv.dtype).itemsize
        )
        kv_bytes = token_bytes * sum(kv_len for _, kv_len in shape.rows)
        calls = {"paged": paged_step(spec, shape), "dense": dense_step(spec, shape)}
        taken = measure(calls, args.repeats)
        paged, dense = taken["paged"], taken["dense"]
        result = {
            "case": args.case,
            "shape": name,
            "paged": paged,
            "dense": dense,
            "kv_gb_per_s": kv_bytes / paged["wall_ms"] / 1e6,
            "wall_ratio": paged["wall_ms"] / dense["wall_ms"],
            "cpu_ratio": paged["cpu_ms"] / dense["cpu_ms"],
        }
        results.append(result)
        print(
            f"{name:24}{paged['wall_ms']:9.3f}{paged['cpu_ms']:9.3f}{result['kv_gb_per_s']:9.2f}"
            f"{dense['wall_ms']:9.3f}{dense['cpu_ms']:9.3f}"
            f"{result['wall_ratio']:9.2f}{result['cpu_ratio']:9.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
