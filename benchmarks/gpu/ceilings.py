"""What the device can do at most, measured: copy bandwidth and the rate of a bfloat16 product.

In a process of its own, because the engine decides the device's memory before JAX starts.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import print_table, write_json


def seconds(function: Callable[[Any], Any], x: Any, repeat: int) -> float:
    """The shortest of `repeat` calls after two warm-ups."""
    best = float("inf")
    for i in range(repeat + 2):
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        if i >= 2:
            best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    size, side = (1 << 24, 256) if args.smoke else (1 << 32, 8192)
    x = jnp.zeros(size // 2, jnp.bfloat16)
    copy_s = seconds(jax.jit(lambda a: a + 1), x, 10)
    x.delete()
    m = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product_s = seconds(jax.jit(lambda a: a @ a), m, 10)
    d = jax.devices()[0]
    figures = {
        "device": d.device_kind,
        "platform": d.platform,
        "copy_bytes_per_s": 2 * size / copy_s,
        "bfloat16_flops_per_s": 2 * side**3 / product_s,
    }
    rows = [
        (
            f"copy of {size >> 20} MiB, read + written, TB/s",
            f"{figures['copy_bytes_per_s'] / 1e12:.3f}",
        ),
        (f"bfloat16 {side}^3 product, TFLOP/s", f"{figures['bfloat16_flops_per_s'] / 1e12:.1f}"),
    ]
    print_table(f"Ceilings of {d.device_kind}, measured", ["", "value"], rows)
    write_json(args.json, benchmark="ceilings", **figures)


if __name__ == "__main__":
    main()
