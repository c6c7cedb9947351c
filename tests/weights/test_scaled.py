"""Weights of 8 bits with scales, as Hugging Face folders hold them, read as their products."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint import WeightSource, open_checkpoint
from jaxserve.config import EngineConfig
from jaxserve.convert import convert
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.model_index import Part
from jaxserve.weights.loader import load_weights
from jaxserve.weights.reader import TensorFiles, read_into
from tests.golden.models.weights import write_checkpoint
from tests.models.alone import ModelAlone
from tests.models.test_against_transformers import CASES

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32]}


def compressed(form: str = "float-quantized", **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "symmetric": True} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }


def folder(
    path: Path, tensors: Mapping[str, np.ndarray], quantization: dict[str, Any] | None
) -> Path:
    path.mkdir()
    config = {} if quantization is None else {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), path / "model.safetensors")
    return path


def stored(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape) * 20
    return values.astype(np.float32).astype(dtype)


def product(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Value by value."""
    out = np.zeros(values.shape, np.float32)
    for at in np.ndindex(values.shape):
        place = (*at[:-2], at[-2] // block[0], at[-1] // block[1])
        out[at] = np.float32(values[at]) * np.float32(scales[place])
    return out


def scales_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.01, 2, shape).astype(np.float32)


# values, shape of their scales and its name, quantization_config, rows and columns of a block
FORMS = {
    "blocks": (E4M3, (3, 2), "scale_inv", FP8, (16, 32)),
    "blocks of compressed-tensors": (
        *(E4M3, (3, 2), "scale"),
        compressed(strategy="block", block_structure="16x32"),
        (16, 32),
    ),
    "groups": (np.dtype(np.int8), (40, 2), "scale", compressed(group_size=32), (1, 32)),
    "channels": (E4M3, (40, 1), "scale", compressed(strategy="channel"), (1, 50)),
    "channels in a row": (E5M2, (40,), "scale", {"quant_method": "fbgemm_fp8"}, (1, 50)),
    "int8 channels": (np.dtype(np.int8), (40, 1), "scale", compressed("int-quantized"), (1, 50)),
    "one for all": (E4M3, (), "scale", {"quant_method": "fp8"}, (40, 50)),
    "one, in a vector": (
        *(E4M3, (1,), "scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        (40, 50),
    ),
}


@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_weight_is_its_values_times_their_scales(
    tmp_path: Path, name: str, scale_dtype: np.dtype
) -> None:
    dtype, shape, suffix, quantization, block = FORMS[name]
    values, scales = stored((40, 50), dtype), scales_of(shape).astype(scale_dtype)
    path = folder(
        tmp_path / "m",
        {"a.weight": values, f"a.weight_{suffix}": scales, "a.input_scale": scales_of(())},
        quantization,
    )
    source = WeightSource(names=("a.weight",), shape=(50, 40), transpose=True)
    loaded = load_weights(open_checkpoint(str(path)), {"a": source}, dtype=np.float32)
    grid = scales.reshape(-(-40 // block[0]), -(-50 // block[1]))
    np.testing.assert_array_equal(np.asarray(loaded["a"]).T, product(values, grid, block))


def test_stacked_experts_have_scales_each(tmp_path: Path) -> None:
    values, scales = stored((3, 40, 50), E4M3), scales_of((3, 1, 50))
    path = folder(tmp_path / "m", {"w": values, "w_scale": scales}, compressed())
    source = WeightSource(names=("w",), shape=(3, 40, 50))
    loaded = load_weights(open_checkpoint(str(path)), {"w": source}, dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(loaded["w"]), product(values, scales, (40, 1)))


def test_a_part_of_a_fused_weight_has_the_scales_of_its_rows(tmp_path: Path) -> None:
    values, scales = stored((40, 50), E4M3), scales_of((3, 2))
    path = folder(tmp_path / "m", {"w": values, "w_scale_inv": scales}, FP8)
    part = Part(start=3, stop=8, group_size=10, groups=4)
    source = WeightSource(names=("w",), shape=(20, 50), part=part)
    loaded = load_weights(open_checkpoint(str(path)), {"w": source}, dtype=np.float32)
    want = product(values, scales, (16, 32)).reshape(4, 10, 50)[:, 3:8].reshape(20, 50)
    np.testing.assert_array_equal(np.asarray(loaded["w"]), want)


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 20), slice(0, 50)),
        (slice(20, 40), slice(0, 50)),
        (slice(0, 40), slice(25, 50)),
        (slice(17, 18), slice(31, 33)),
        (slice(5, 5), slice(0, 50)),
    ],
)
def test_any_slice_has_its_own_scales(tmp_path: Path, index: tuple[slice, ...]) -> None:
    values, scales = stored((40, 50), E4M3), scales_of((3, 2))
    path = folder(tmp_path / "m", {"w": values, "w_scale_inv": scales}, FP8)
    want = product(values, scales, (16, 32))[index]
    out = np.full(want.shape, np.nan, np.float32)
    with TensorFiles() as files:
        read_into(files, open_checkpoint(str(path)).tensors["w"], index, out)
    np.testing.assert_array_equal(out, want)


def in_eight_bits(source: Path, quantised: Path, plain: Path) -> int:
    """Writes a folder's projections as float8 blocks, and what they mean as float32."""
    narrow: dict[str, np.ndarray] = {}
    wide: dict[str, np.ndarray] = {}
    count = 0
    for name, tensor in load_file(source / "model.safetensors").items():
        narrow[name] = wide[name] = tensor
        if name.endswith(("proj.weight", "proj_with_mqa.weight")):
            rows, columns = (-(-n // b) for n, b in zip(tensor.shape, (16, 32), strict=True))
            scales = scales_of((rows, columns)) * 0.1
            each = np.repeat(np.repeat(scales, 16, 0), 32, 1)[: tensor.shape[0], : tensor.shape[1]]
            narrow[name] = (tensor / each).astype(E4M3)
            narrow[f"{name}_scale_inv"] = scales
            wide[name] = narrow[name].astype(np.float32) * each
            count += 1
    config = json.loads((source / "config.json").read_text())
    for path, tensors, more in (
        (quantised, narrow, {"quantization_config": FP8}),
        (plain, wide, {}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | more))
        save_file(tensors, path / "model.safetensors")
    return count


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "phi3"])
def test_a_model_in_eight_bits_has_the_weights_of_the_one_it_stands_for(
    tmp_path: Path, name: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_checkpoint(CASES[name], source)
    assert in_eight_bits(source, tmp_path / "narrow", tmp_path / "wide") > 4
    convert(EngineConfig(model=str(tmp_path / "narrow")), tmp_path / "converted")
    narrow, wide, converted = (
        ModelAlone(open_checkpoint(str(tmp_path / kind)), scan=True, max_len=64)
        for kind in ("narrow", "wide", "converted")
    )
    for path, got, want, kept in zip(
        narrow.split.names, narrow.weights, wide.weights, converted.weights, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=path)
        # A converted model keeps 16 bits of what had 8.
        np.testing.assert_allclose(np.asarray(kept), np.asarray(want), rtol=2**-8, err_msg=path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq'; supported: fp8, "),
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'; supported: fp8, "),
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo='NVFP4'"),
        (compressed("pack-quantized", num_bits=4), "format='pack-quantized'"),
        (compressed(num_bits=4), "'num_bits': 4"),
        (compressed(symmetric=False), "'symmetric': False"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
    ],
)
def test_other_quantisations_are_refused_by_name(
    tmp_path: Path, quantization: dict[str, Any], message: str
) -> None:
    path = folder(tmp_path / "m", {"w": stored((4, 4), E4M3)}, quantization)
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(str(path))


def test_all_weights_without_scales_are_named(tmp_path: Path) -> None:
    tensors = {"a": stored((4, 4), E4M3), "b": stored((4, 4), E4M3), "b_scale": scales_of(())}
    path = folder(tmp_path / "m", tensors | {"c": stored((4, 4), E4M3)}, FP8)
    with pytest.raises(CheckpointError, match="2 weights of 8 bits have no scales: a, c; "):
        open_checkpoint(str(path))


@pytest.mark.parametrize("shape", [(3, 3), (2,), (40, 50, 1)])
def test_scales_that_do_not_fit_are_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"w": stored((40, 50), E4M3), "w_scale_inv": scales_of(shape)}
    path = folder(tmp_path / "m", tensors, FP8)
    with pytest.raises(CheckpointError, match=r"w_scale_inv is F32 \("):
        open_checkpoint(str(path))


@pytest.mark.parametrize("value", ["fp8", [1], {"quant_method": 5}, {"quant_method": None}])
def test_a_quantization_config_of_nonsense_is_an_error(tmp_path: Path, value: object) -> None:
    path = folder(tmp_path / "m", {"w": stored((4, 4), E4M3)}, None)
    (path / "config.json").write_text(json.dumps({"quantization_config": value}))
    with pytest.raises((CheckpointError, UnsupportedError), match="quantization_config"):
        open_checkpoint(str(path))
