"""Compiles attend_mma's kernels for a chip that is not there, and runs their PTX in numpy.

    python -m tests.pallas_kernels.emulate_mma TARGET CASE [CUT]
    python -m tests.pallas_kernels.emulate_mma TARGET widen

prints one line of JSON: the error against dense attention, and the races found; CUT is what
`Kernel.cut` takes out of the kernels before. `widen` instead takes every value of every 8-bit type
to float16 as the kernels do, and prints those that become another value. Mosaic GPU compiles for
one architecture a process and reads where to write the PTX when it is imported, so this is a
program and not a function.
"""

import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

_DUMP = tempfile.mkdtemp(prefix="emulate_mma")
os.environ.update(
    JAX_PLATFORMS="cpu",
    TF_CPP_MIN_LOG_LEVEL="3",
    MOSAIC_GPU_DUMP_TO=_DUMP,
    MOSAIC_GPU_DUMP_PTX="1",
    MOSAIC_GPU_DUMP_RESOURCES="1",
)

import jax  # noqa: E402
import jax.experimental.pallas.mosaic_gpu as plgpu  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import Array  # noqa: E402

from pallas_kernels import attention_gpu_mma, gpu_widen  # noqa: E402
from pallas_kernels.aot import compile_for, target  # noqa: E402
from pallas_kernels.backend import Backend  # noqa: E402
from pallas_kernels.kv_write import write_kv  # noqa: E402
from pallas_kernels.types import AttentionSpec, KVSpec  # noqa: E402
from tests.pallas_kernels.batches import error, make_batch, oracle  # noqa: E402
from tests.pallas_kernels.ptx_emulator import Kernel, Races, launch  # noqa: E402

_launch = attention_gpu_mma._launch
_DECODE = [(1, 5), (1, 90), (1, 64), (1, 150), (3, 70)]
_PREFILL = [(1, 5), (1, 90), (0, 7), (30, 100), (40, 40), (1, 65)]


def _spec(num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, **more: Any):
    dtype = more.pop("dtype", jnp.bfloat16)
    kv = KVSpec(num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    return AttentionSpec(kv=kv, num_heads=num_heads, scale=head_dim**-0.5, **more)


# name: (spec, rows, decode rows, tokens, rows at most)
CASES: dict[str, tuple[AttentionSpec, list[tuple[int, int]], int, int, int]] = {
    "decode-128": (_spec(8, 2, 128, 16), _DECODE, 4, 8, 8),
    "decode-80": (_spec(2, 2, 80, 16), _DECODE, 4, 8, 8),
    "decode-long": (_spec(4, 1, 64, 64), [(1, 700), (1, 40), (1, 257)], 3, 4, 4),
    "decode-256-window": (
        _spec(2, 1, 256, 16, window=40, soft_cap=5.0, sinks=True),
        _DECODE,
        4,
        8,
        8,
    ),
    "decode-cap": (_spec(4, 2, 64, 16, soft_cap=5.0), _DECODE, 4, 8, 8),
    "decode-256": (_spec(2, 1, 256, 16), _DECODE, 4, 8, 8),
    "decode-group-64": (_spec(64, 1, 64, 32), _DECODE, 4, 8, 8),
    "decode-fp8": (
        _spec(8, 2, 128, 16, dtype=jnp.float8_e4m3fn, window=70, sinks=True),
        _DECODE,
        4,
        8,
        8,
    ),
    "decode-e5m2": (_spec(4, 1, 256, 16, dtype=jnp.float8_e5m2), _DECODE, 4, 8, 8),
    "decode-int8": (_spec(2, 2, 80, 32, dtype=jnp.int8), _DECODE, 4, 8, 8),
    "prefill-fp8": (_spec(8, 2, 64, 32, dtype=jnp.float8_e4m3fn), _PREFILL, 2, 96, 8),
    "prefill-int8": (_spec(4, 1, 128, 16, dtype=jnp.int8, soft_cap=8.0), _PREFILL, 2, 96, 8),
    "prefill-128": (_spec(8, 2, 128, 16), _PREFILL, 2, 96, 8),
    "prefill-96-window": (
        _spec(6, 2, 96, 128, window=33, dtype=jnp.float16, sinks=True),
        _PREFILL,
        2,
        96,
        8,
    ),
    "prefill-256-cap": (_spec(4, 2, 256, 16, soft_cap=8.0), _PREFILL, 2, 96, 8),
}


def _compiled(name: str, call: Callable[..., Any], *operands: Any) -> tuple[Kernel, int]:
    """The one kernel of a call, and the bytes of shared memory that it may use."""
    for each in pathlib.Path(_DUMP).iterdir():
        each.unlink()
    compile_for(name, call, *operands)
    (ptx,) = (path.read_text() for path in pathlib.Path(_DUMP).glob("*.ptx"))
    (resources,) = (path.read_text() for path in pathlib.Path(_DUMP).glob("*.resources.txt"))
    return Kernel.parse(ptx), int(resources.split("smem_scratch_bytes=")[1].split(",")[0]) + 2048


def widen(name: str) -> dict[str, list[str]]:
    """What `gpu_widen.widen` makes another value of, by type: each of the 256 at every place."""

    def kernel(x_ref: Any, out_ref: Any) -> None:
        x = plgpu.load(x_ref, layout=gpu_widen.LAYOUT, optimized=False)
        out_ref[...] = gpu_widen.widen(x)

    wrong = {}
    for dtype in gpu_widen.DTYPES:
        shape = (256, 16)
        rows = np.arange(256, dtype=np.uint8)[:, None] + np.arange(16, dtype=np.uint8)
        x = rows.view(jnp.dtype(dtype))
        call = plgpu.kernel(
            kernel,
            out_type=jax.ShapeDtypeStruct(shape, gpu_widen.WIDE),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        )
        out = np.zeros(shape, gpu_widen.WIDE)
        compiled, smem_bytes = _compiled(name, call, x)
        launch(compiled, [x, out], (1, 1, 1), smem_bytes)
        expected = x.astype(np.float32)
        differs = ~np.isclose(out.astype(np.float32), expected, rtol=0, atol=0, equal_nan=True)
        wrong[dtype] = [f"{x[at]}: {out[at]}" for at in zip(*np.nonzero(differs), strict=True)]
    return wrong


def main(name: str, case: str, cut: str | None = None) -> dict[str, Any]:
    """What came of a case. `cut` is taken out of the kernels first, to see that it is missed."""
    spec, rows, num_decode_rows, num_tokens, max_rows = CASES[case]
    backend = Backend(name="gpu", chip=target(name).chip)
    races = Races()
    blocks = []

    def emulated(*operands: Array, **static: Any) -> tuple[Array, Array]:
        kernel, smem_bytes = _compiled(name, lambda *args: _launch(*args, **static), *operands)
        queries, kv_pages, items, table = (np.array(each) for each in operands)
        shape = jax.eval_shape(lambda *args: _launch(*args, **static), *operands)
        outputs = [np.full(each.shape, np.nan, each.dtype) for each in shape]
        num_shares = static["num_shares"]
        if cut is not None:
            kernel.cut(cut)
        grid = (num_shares, queries.shape[0], queries.shape[1])
        blocks.append(grid)
        arrays = [items, queries, table, kv_pages, *outputs]  # in the order the kernel uses them
        found = launch(kernel, arrays, grid, smem_bytes)
        races.reports += found.reports
        return jnp.asarray(outputs[0]), jnp.asarray(outputs[1])

    attention_gpu_mma._launch = emulated
    batch = make_batch(
        spec, rows, num_decode_rows=num_decode_rows, num_tokens=num_tokens, max_rows=max_rows
    )
    kv_pages = write_kv(
        batch.kv_pages, batch.k, batch.v, batch.pages, batch.layer, spec=spec.kv, backend=backend
    )
    out = attention_gpu_mma.attend_mma(
        batch.q,
        kv_pages,
        batch.pages,
        batch.layer,
        spec=spec,
        backend=backend,
        sinks=batch.sinks,
    )
    used = int(batch.pages.query_starts[-1])
    return {
        "error": error(out, oracle(spec, batch)),
        "padding": float(jnp.abs(out[used:].astype(jnp.float32)).max()),
        "races": races.reports,
        "grids": blocks,
    }


if __name__ == "__main__":
    arguments = sys.argv[1:]
    print(json.dumps(widen(arguments[0]) if arguments[1:] == ["widen"] else main(*arguments)))
