"""Load time and peak host memory of a checkpoint, beside reading the same bytes.

    python -m benchmarks.loading [--gib 1.0] [--json FILE]

Makes a sharded bfloat16 checkpoint of Llama's shapes, converts it to Orbax, and loads both, and
the demo's GGUF file, each in a fresh process. "cold" has dropped the files from the page cache
before (as far as the system lets a process do that), "warm" has just read them. "read" reads the
same bytes with as many threads into memory that stays, as a loader must.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.common import print_table, write_json

HIDDEN, FFN, KV, VOCAB = 2048, 8192, 512, 32_000
SHARD_BYTES = 256 << 20
BLOCK = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "MODEL", "DTYPE"))
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    folder = Path(tempfile.mkdtemp(prefix="jaxserve-loading-"))
    try:
        rows = compare(folder, args.gib, args.repeats)
    finally:
        shutil.rmtree(folder)
    load = [round(n, 1) for n in os.getloadavg()]
    columns = (
        "what",
        "cache",
        "dtype",
        "GB on disk",
        "s",
        "GB/s",
        "x read",
        "peak MiB",
        "held MiB",
    )
    print_table(f"Loading (load average {load})", columns, [list(row.values()) for row in rows])
    if args.json:
        write_json(args.json, load_average=load, rows=rows)


def compare(folder: Path, gib: float, repeats: int) -> list[dict[str, Any]]:
    """One row for each way of loading and state of the page cache."""
    from jaxserve.checkpoint import demo_path

    source, converted = folder / "source", folder / "converted"
    write_checkpoint(source, gib)
    command = [sys.executable, "-m", "jaxserve", "convert", str(source), str(converted), "--quiet"]
    subprocess.run(command, check=True)
    demo = demo_path()
    rows = []
    plan = {source: ("bfloat16", "float32"), converted: ("bfloat16",), demo: ("float32",)}
    for model, dtypes in plan.items():
        files = [model] if model.is_file() else [p for p in model.rglob("*") if p.is_file()]
        size = sum(path.stat().st_size for path in files)
        for cache in ("cold", "warm"):
            read_s = 0.0
            for what, dtype in (("read", "-"), *(("load", dtype) for dtype in dtypes)):
                found = [one(what, model, dtype, files, cache) for _ in range(repeats)]
                seconds = statistics.median(f["s"] for f in found)
                read_s = seconds if what == "read" else read_s
                rows.append(
                    {
                        "what": f"{what} {'demo.gguf' if model == demo else model.name}",
                        "cache": cache,
                        "dtype": dtype,
                        "GB": size / 1e9,
                        "s": seconds,
                        "GB/s": size / 1e9 / seconds,
                        "x read": seconds / read_s,
                        "peak MiB": max(f["peak"] for f in found) >> 20,
                        "held MiB": found[0]["held"] >> 20,
                    }
                )
    return rows


def one(what: str, model: Path, dtype: str, files: list[Path], cache: str) -> dict[str, Any]:
    """A measurement in a process of its own."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(BLOCK):
                    pass
    command = [sys.executable, "-m", "benchmarks.loading", "--measure", what, str(model), dtype]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def measure(what: str, model: str, dtype: str) -> dict[str, Any]:
    """Seconds, peak growth of this process, and bytes that stay."""
    import jax

    from jaxserve.checkpoint import open_checkpoint
    from jaxserve.layers.kernels import XLA, Kernels
    from jaxserve.models import registry
    from jaxserve.runner.model import split_model
    from jaxserve.weights.loader import load_weights

    found = open_checkpoint(model)
    spec = registry.spec_from_config(found.config)
    split = split_model(
        spec, page_size=16, kernels=Kernels(XLA), dtype=np.float32, scan_layers=True
    )
    jax.numpy.zeros(1).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if what == "read":
        held = sum(len(block) for block in read_all(Path(model)))
    else:
        found = open_checkpoint(model)
        names = registry.weight_names(found.config, spec)
        target = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        wanted = split.sources(names, found.tensors)
        wanted = {name: replaced(source, target) for name, source in wanted.items()}
        weights = load_weights(found, wanted, dtype=target, ignored=names.ignored)
        held = sum(weight.nbytes for weight in jax.block_until_ready(weights).values())
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return {"s": seconds, "peak": peak, "held": held}


def replaced(source: Any, dtype: np.dtype) -> Any:
    from dataclasses import replace

    return replace(source, dtype=dtype.name)


def read_all(model: Path) -> list[np.ndarray]:
    """The bytes of all files, read in blocks by as many threads as the loader has."""
    from jaxserve.weights.loader import _num_threads

    files = [model] if model.is_file() else [p for p in model.rglob("*") if p.is_file()]
    jobs = [
        (path, start, min(BLOCK, path.stat().st_size - start))
        for path in files
        for start in range(0, path.stat().st_size, BLOCK)
    ]

    def read(job: tuple[Path, int, int]) -> np.ndarray:
        path, start, size = job
        out = np.empty(size, np.uint8)
        with path.open("rb", buffering=0) as file:
            os.preadv(file.fileno(), [out.data], start)
        return out

    with ThreadPoolExecutor(_num_threads()) as pool:
        return list(pool.map(read, jobs))


def write_checkpoint(folder: Path, gib: float) -> None:
    """Random weights of Llama's shapes, as many layers as fill the size, in shards."""
    from safetensors.numpy import save_file

    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (KV, HIDDEN),
        "self_attn.v_proj.weight": (KV, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    a_layer = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    num_layers = max(1, int((gib * 2**30 - 4 * VOCAB * HIDDEN) / a_layer))
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": num_layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": VOCAB, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    noise = (noise * 0.02).astype(ml_dtypes.bfloat16)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    shapes["model.norm.weight"] = (HIDDEN,)
    for i in range(num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shard: dict[str, np.ndarray] = {}
    weight_map: dict[str, str] = {}
    number = 0

    def write() -> None:
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = np.resize(noise, shape)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            write()
            number += 1
    if shard:
        write()
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
