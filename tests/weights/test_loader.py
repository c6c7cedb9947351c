"""Loading: both formats give the same parameters, problems come all at once, memory is bounded."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file

from jaxserve.checkpoint import Checkpoint, WeightSource, open_checkpoint
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.weights.loader import aligned_empty, load_weights
from tests.weights.files import (
    LAYERS,
    llama_config,
    llama_gguf,
    llama_weights,
    write_folder,
)


def wanted_of(weights: dict[str, np.ndarray]) -> dict[str, WeightSource]:
    """Layers stacked, matrices of layers transposed, as the models room asks for."""
    wanted = {}
    for name, weight in weights.items():
        if not name.startswith("model.layers."):
            wanted[name] = WeightSource(names=(name,), shape=weight.shape)
        elif name.startswith("model.layers.0."):
            part = name.removeprefix("model.layers.0.")
            wanted[part] = WeightSource(
                names=tuple(f"model.layers.{i}.{part}" for i in range(LAYERS)),
                stack=(LAYERS,),
                shape=(LAYERS, *weight.shape[::-1]),
                transpose=weight.ndim == 2,
            )
    return wanted


def expected_of(weights: dict[str, np.ndarray], wanted: dict[str, WeightSource]) -> dict:
    found = {}
    for name, source in wanted.items():
        parts = [weights[n].T if source.transpose else weights[n] for n in source.names]
        found[name] = np.stack(parts) if source.stack else parts[0]
    return found


def check(params: dict[str, jax.Array], expected: dict[str, np.ndarray]) -> None:
    assert params.keys() == expected.keys()
    for name, value in params.items():
        assert np.array_equal(np.asarray(value), expected[name]), name


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_folder_is_loaded(tmp_path: Path, num_shards: int, dtype: np.dtype) -> None:
    weights = llama_weights()
    wanted = wanted_of(weights)
    found = open_checkpoint(str(write_folder(tmp_path / "m", weights, num_shards=num_shards)))
    params = load_weights(found, wanted, dtype=dtype)
    expected = expected_of(weights, wanted)
    check(params, {name: value.astype(dtype) for name, value in expected.items()})


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_folders_are_loaded_exactly(tmp_path: Path, stored: np.dtype) -> None:
    weights = {name: w.astype(stored) for name, w in llama_weights().items()}
    wanted = wanted_of(weights)
    found = open_checkpoint(str(write_folder(tmp_path / "m", weights)))
    for dtype in (stored, np.float32):
        expected = expected_of(weights, wanted)
        params = load_weights(found, wanted, dtype=dtype)
        check(params, {name: value.astype(dtype) for name, value in expected.items()})


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_and_folder_give_the_same_parameters(tmp_path: Path, tied: bool) -> None:
    weights = llama_weights(tied=tied)
    wanted = wanted_of(weights)
    (tmp_path / "m.gguf").write_bytes(llama_gguf(weights))
    found = open_checkpoint(str(tmp_path / "m.gguf"))
    assert found.config["tie_word_embeddings"] is tied
    check(load_weights(found, wanted, dtype="float32"), expected_of(weights, wanted))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_quantised_gguf_is_close_to_its_source(tmp_path: Path, kind: str) -> None:
    weights = llama_weights()
    wanted = wanted_of(weights)
    (tmp_path / "m.gguf").write_bytes(llama_gguf(weights, kind=GGMLQuantizationType[kind]))
    params = load_weights(open_checkpoint(str(tmp_path / "m.gguf")), wanted, dtype="float32")
    for name, value in expected_of(weights, wanted).items():
        assert np.abs(np.asarray(params[name]) - value).max() < 0.4, name


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    weights = llama_weights()
    found = open_checkpoint(str(write_folder(tmp_path / "m", weights)))
    calls: list[tuple[int, int]] = []
    load_weights(
        found, wanted_of(weights), dtype="bfloat16", progress=lambda *call: calls.append(call)
    )
    total = 2 * sum(w.size for w in weights.values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert len(calls) == len(weights)


# --- problems ---


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    weights = llama_weights()
    wanted = wanted_of(weights)
    weights["odd.weight"] = weights["new\nline"] = np.zeros(3, np.float32)
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((5, 6), np.float32)
    found = open_checkpoint(str(write_folder(tmp_path / "m", weights)))
    with pytest.raises(CheckpointError) as error:
        load_weights(found, wanted, dtype="float32")
    text = str(error.value)
    assert "1 missing: model.norm.weight" in text
    assert "2 unexpected: 'new\\nline', odd.weight" in text
    assert "model.layers.1.mlp.up_proj.weight is (5, 6), the config needs (96, 64)" in text
    assert "\n" not in text


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    weights = llama_weights()
    found = open_checkpoint(str(write_folder(tmp_path / "m", {"x": np.zeros(1, np.float32)})))
    with pytest.raises(CheckpointError, match=r"30 missing: .* and 22 more"):
        load_weights(found, wanted_of(weights), dtype="float32")


def test_derived_buffers_and_a_tied_head_are_no_surprise(tmp_path: Path) -> None:
    weights = llama_weights(tied=True)
    wanted = wanted_of(weights)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
        "lm_head.weight": np.zeros((2, 2), np.float32),
    }
    for tied in (True, False):
        config = llama_config(tie_word_embeddings=tied)
        folder = write_folder(tmp_path / str(tied), weights | extra, config=config)
        found = open_checkpoint(str(folder))
        if tied:
            load_weights(found, wanted, dtype="float32")
        else:
            with pytest.raises(CheckpointError, match=r"1 unexpected: lm_head\.weight"):
                load_weights(found, wanted, dtype="float32")


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_other_encodings_are_refused_by_name(tmp_path: Path, dtype: np.dtype) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": np.zeros((2, 2), dtype)}, tmp_path / "model.safetensors")
    wanted = {"w": WeightSource(names=("w",), shape=(2, 2))}
    with pytest.raises(UnsupportedError, match=r"w \((I8|F8_E4M3)\)\. Supported: F64, F32"):
        load_weights(open_checkpoint(str(tmp_path)), wanted, dtype="float32")


def test_a_source_that_contradicts_itself_is_a_bug(tmp_path: Path) -> None:
    found = open_checkpoint(str(write_folder(tmp_path / "m", llama_weights())))
    wanted = {"w": WeightSource(names=("model.norm.weight",), stack=(2,), shape=(2, 64))}
    with pytest.raises(ValueError, match="cannot make"):
        load_weights(found, wanted, dtype="float32")


# --- dummy ---


def dummy(wanted: dict[str, WeightSource], seed: int) -> dict[str, jax.Array]:
    empty = Checkpoint(name="x", config={})
    return load_weights(empty, wanted, dtype="bfloat16", load_format="dummy", seed=seed)


def test_dummy_weights_are_reproducible_and_sane() -> None:
    wanted = wanted_of(llama_weights())
    first, again, other = dummy(wanted, 1), dummy(wanted, 1), dummy(wanted, 2)
    for name, source in wanted.items():
        assert first[name].shape == source.shape
        assert first[name].dtype == jnp.bfloat16
        assert jnp.array_equal(first[name], again[name])
        if name.endswith("norm.weight"):
            assert (first[name] == 1).all()
        else:
            assert not jnp.array_equal(first[name], other[name])
            assert 0.015 < first[name].astype(jnp.float32).std() < 0.025
    gate, up = first["mlp.gate_proj.weight"], first["mlp.up_proj.weight"]
    assert not jnp.array_equal(gate, up)


# --- devices and memory ---


def test_a_cpu_parameter_is_its_host_array_and_may_be_donated() -> None:
    host = aligned_empty((1024, 1024), np.dtype(np.float32))
    assert host.ctypes.data % 64 == 0
    host[...] = 1
    param = jax.device_put(host)
    assert param.unsafe_buffer_pointer() == host.ctypes.data
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(param)
    assert (doubled == 2).all()
    assert (host == 1).all()  # XLA did not write into memory that it does not own


SHARDED = """
import jax, numpy as np, sys
from pathlib import Path
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxserve.checkpoint import open_checkpoint
from jaxserve.weights.loader import load_weights
from tests.weights.files import llama_weights
from tests.weights.test_loader import check, dummy, expected_of, wanted_of
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
weights = llama_weights()
wanted = wanted_of(weights)
specs = {"self_attn.q_proj.weight": P(None, None, "tensor"),
         "self_attn.k_proj.weight": P(None, None, "tensor"),
         "self_attn.v_proj.weight": P(None, "data", "tensor"),
         "self_attn.o_proj.weight": P(None, "tensor"),
         "mlp.down_proj.weight": P(None, "tensor"),
         "model.embed_tokens.weight": P("tensor"),
         "model.norm.weight": P(), "input_layernorm.weight": P(None, "tensor")}
shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
for model in sys.argv[1:]:
    calls = []
    params = load_weights(open_checkpoint(model), wanted, dtype="float32", shardings=shardings,
                          progress=lambda *call: calls.append(call))
    check(params, expected_of(weights, wanted))
    for name, sharding in shardings.items():
        assert params[name].sharding == sharding, name
    assert calls[-1][0] == calls[-1][1] == 4 * sum(w.size for w in weights.values())
    assert calls == sorted(calls)
    assert len(params["lm_head.weight"].sharding.device_set) == 1
whole = dummy(wanted, 3)
parts = load_weights(open_checkpoint(model), wanted, dtype="bfloat16", shardings=shardings,
                     load_format="dummy", seed=3)
check(parts, whole)
assert parts["self_attn.q_proj.weight"].sharding == shardings["self_attn.q_proj.weight"]
print("ok", len(jax.devices()))
"""


def run_python(code: str, *arguments: str, **environment: str) -> str:
    import os

    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_each_device_gets_its_slice(tmp_path: Path) -> None:
    weights = llama_weights()
    folder = write_folder(tmp_path / "m", weights, num_shards=2)
    (tmp_path / "m.gguf").write_bytes(llama_gguf(weights))
    flags = "--xla_force_host_platform_device_count=4"
    out = run_python(
        SHARDED, str(folder), str(tmp_path / "m.gguf"), XLA_FLAGS=flags, JAX_PLATFORMS="cpu"
    )
    assert out.strip() == "ok 4"


PEAK = """
import resource, sys, jax, numpy as np
from jaxserve.checkpoint import WeightSource, open_checkpoint
from jaxserve.weights.loader import load_weights
found = open_checkpoint(sys.argv[1])
names = tuple(found.tensors)
shape = found.tensors[names[0]].shape
wanted = {"w": WeightSource(names=names[:8], stack=(8,), shape=(8, *shape[::-1]), transpose=True),
          "v": WeightSource(names=names[8:], stack=(8,), shape=(8, *shape))}
jax.numpy.zeros(1).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
params = jax.block_until_ready(load_weights(found, wanted, dtype=sys.argv[2]))
print(peak() - before, sum(p.nbytes for p in params.values()) >> 20)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_never_holds_the_model_twice(tmp_path: Path, dtype: str) -> None:
    tensors = {f"t{i:02}": np.full((2048, 2048), i, np.float32) for i in range(16)}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")  # 256 MiB
    peak, size = map(int, run_python(PEAK, str(tmp_path), dtype, JAX_PLATFORMS="cpu").split())
    assert size == (256 if dtype == "float32" else 128)
    assert peak < 1.3 * size + 32


DEMO = """
import resource, time, jax, numpy as np
from jaxserve.checkpoint import open_checkpoint
from jaxserve.weights.loader import load_weights
from tests.weights.test_loader import demo_wanted
jax.numpy.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
found = open_checkpoint("demo")
params = jax.block_until_ready(load_weights(found, demo_wanted(found), dtype="float32"))
seconds = time.process_time() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(p.size for p in params.values()), (after - before) >> 10, seconds)
"""


def demo_wanted(found: Checkpoint) -> dict[str, WeightSource]:
    layers, wanted = found.config["num_hidden_layers"], {}
    for name, info in found.tensors.items():
        if not name.startswith("model.layers."):
            wanted[name] = WeightSource(names=(name,), shape=info.shape)
        elif name.startswith("model.layers.0."):
            part = name.removeprefix("model.layers.0.")
            names = tuple(f"model.layers.{i}.{part}" for i in range(layers))
            shape = (layers, *info.shape[::-1])
            wanted[part] = WeightSource(
                names=names, stack=(layers,), shape=shape, transpose=len(info.shape) == 2
            )
    return wanted


def test_the_demo_loads_quickly_in_little_memory() -> None:
    count, peak, seconds = map(float, run_python(DEMO, JAX_PLATFORMS="cpu").split())
    assert count == 134_515_008
    assert peak < 1.2 * 4 * count / 2**20
    assert seconds < 20  # processor time; about 2 on an idle machine


IN_PLACE = """
import sys, weakref, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxserve.checkpoint import WeightSource, open_checkpoint
from jaxserve.weights import loader
alive = peak = 0
allocate = loader.aligned_empty
def counted(shape, dtype):
    global alive, peak
    made = allocate(shape, dtype)
    alive += made.nbytes
    peak = max(peak, alive)
    def free(nbytes=made.nbytes):
        global alive
        alive -= nbytes
    root = made
    while isinstance(root.base, np.ndarray):
        root = root.base
    weakref.finalize(root, free)
    return made
loader.aligned_empty = counted
loader.fills_in_place = lambda device: sys.argv[2] == "yes"
loader.PIECE_BYTES = 100_000
loader.SPLIT_BYTES = 10_000
found = open_checkpoint(sys.argv[1])
names = tuple(sorted(found.tensors))
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
stacks = {"layers": (16,), "experts": (4, 4)}
wanted = {n: WeightSource(names=names, stack=s, shape=(*s, 128, 64), transpose=True)
          for n, s in stacks.items()}
shardings = {"layers": NamedSharding(mesh, P(None, "x", "y")),
             "experts": NamedSharding(mesh, P(None, "x"))}
expected = np.stack([np.full((128, 64), i, np.float32) for i in range(16)])
for places in ({}, shardings):
    found_sizes = []
    for name, source in wanted.items():
        peak = alive
        before = alive
        made = loader.load_weights(found, {name: source}, dtype="float32", shardings=places)
        assert np.array_equal(np.asarray(made[name]).reshape(16, 128, 64), expected), name
        if places:
            assert made[name].sharding == places[name]
        found_sizes.append(peak - before)
        del made
    print(*found_sizes)
whole = np.concatenate([np.full((64, 128), i, np.float32) + np.arange(128) for i in range(16)])
if len(sys.argv) > 3:
    found = open_checkpoint(sys.argv[3])
    for transpose in (False, True):
        shape = (128, 1024) if transpose else (1024, 128)
        source = WeightSource(names=("w",), shape=shape, transpose=transpose)
        for places in ({}, {"w": NamedSharding(mesh, P("x", "y"))}):
            made = loader.load_weights(found, {"w": source}, dtype="float32", shardings=places)
            assert np.array_equal(np.asarray(made["w"]), whole.T if transpose else whole)
"""


def test_a_parameter_is_filled_on_its_device_piece_by_piece(tmp_path: Path) -> None:
    tensors = {f"t{i:02}": np.full((64, 128), i, np.float32) for i in range(16)}  # 32 KiB each
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    one = tmp_path / "one"
    one.mkdir()
    (one / "config.json").write_text("{}")
    columns = np.arange(128, dtype=np.float32)
    save_file(
        {"w": np.concatenate([t + columns for t in tensors.values()])}, one / "model.safetensors"
    )
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    peaks = [
        [int(n) for line in run_python(IN_PLACE, str(tmp_path), how, str(one), **env).splitlines()
         for n in line.split()]
        for how in ("yes", "no")
    ]  # fmt: skip
    whole = 16 * 64 * 128 * 4
    # Pieces of at most 100 kB, or one layer's experts, and two of them at a time.
    assert all(peak <= 2 * 131_072 for peak in peaks[0])
    assert peaks[1][:2] == [whole, whole]
