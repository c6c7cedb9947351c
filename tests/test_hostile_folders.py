"""Model folders made to harm: one clear error, no crash, bounded memory and time."""

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.checkpoint import WeightSource, open_checkpoint
from jaxserve.errors import CheckpointError, JaxserveError
from jaxserve.frontend.defaults import default_sampling
from jaxserve.models import registry
from jaxserve.weights.loader import load_weights
from tests.weights.files import llama_config, llama_weights, write_folder
from tests.weights.test_loader import wanted_of

NUMBERS: list[Any] = [-1, 0, 10**9, 10**12, 10**30, 1e308, float("nan"), float("inf"), -0.5]
OTHERS: list[Any] = ["x", [], {}, [[]] * 3, None, True, {"a": {"b": 1}}, "9" * 5000]
ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
FIELDS = [*llama_config(), "head_dim", "rope_scaling", "torch_dtype", "attention_bias", "mlp_bias"]


@pytest.mark.parametrize("name", FIELDS)
def test_no_value_of_a_config_does_harm(tmp_path: Path, name: str) -> None:
    values = [*NUMBERS, *OTHERS]
    if name == "rope_scaling":
        values += [{**ROPE, key: value} for key in ROPE for value in values]
    tracemalloc.start()
    start = time.process_time()
    for value in values:
        config = llama_config(rope_scaling=ROPE, head_dim=16) | {name: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            found = open_checkpoint(str(tmp_path), load_format="dummy")
            registry.weight_names(found.config, registry.spec_from_config(found.config))
        except JaxserveError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("value", [v for v in NUMBERS if v not in (10**9, 0)])
@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_an_absurd_size_is_named(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config() | {name: value}))
    found = open_checkpoint(str(tmp_path), load_format="dummy")
    with pytest.raises(CheckpointError, match=name):
        registry.spec_from_config(found.config)


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "top_k", "eos_token_id", "max_new_tokens"]
)
def test_no_value_of_a_generation_config_does_harm(name: str) -> None:
    for value in [*NUMBERS, *OTHERS]:
        try:
            default_sampling({name: value})
        except JaxserveError as error:
            assert "\n" not in str(error)


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.safetensors")


def a_device(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("/dev/zero")


def a_loop(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")


def a_folder(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


def a_link_to_text(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("/etc/passwd")


def a_claim(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def an_index_of_folders(folder: Path) -> None:
    (folder / "sub.safetensors").mkdir()
    index = {"weight_map": {"a": "sub.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def an_index_that_leads_out(folder: Path) -> None:
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_pipe, "no .safetensors file"),
        (a_device, "no .safetensors file"),
        (a_loop, "no .safetensors file"),
        (a_folder, "no .safetensors file"),
        (a_link_to_text, "not a valid safetensors file"),
        (a_claim, "claims 1152921504606846976 bytes"),
        (an_index_of_folders, "lacks the shard"),
        (an_index_that_leads_out, "in the folder itself"),
    ],
)
def test_what_is_no_model_file_is_refused(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    make(tmp_path)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(tmp_path))
    assert words in str(error.value)
    assert "root:" not in str(error.value)


def test_a_pipe_in_the_place_of_a_small_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", llama_weights())
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        os.mkfifo(folder / name)
    assert open_checkpoint(str(folder)).generation_config == {}


def test_renamed_and_misshaped_tensors_are_listed_together(tmp_path: Path) -> None:
    weights = llama_weights()
    wanted = wanted_of(weights)
    weights["model.layers.0.mlp.up_projx.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    weights["model.norm.weight"] = np.zeros((2**10,), np.float32)
    weights["lm_head.weight"] = weights["lm_head.weight"].T.copy()
    found = open_checkpoint(str(write_folder(tmp_path / "m", weights, num_shards=3)))
    with pytest.raises(CheckpointError) as error:
        load_weights(found, wanted, dtype="float32")
    text = str(error.value)
    for words in (
        "up_proj.weight",
        "up_projx.weight",
        "norm.weight is (1024,)",
        "lm_head.weight is",
    ):
        assert words in text


def test_a_huge_promise_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config(vocab_size=2**30)))
    save_file(
        {"model.embed_tokens.weight": np.zeros((4, 4), np.float32)}, tmp_path / "m.safetensors"
    )
    found = open_checkpoint(str(tmp_path))
    shape = (2**30, 2**20)
    wanted = {"w": WeightSource(names=("model.embed_tokens.weight",), shape=shape)}
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        load_weights(found, wanted, dtype="float32")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
