"""A model that cannot be served ends with one line that names it and says what to do."""

import json
import struct
from pathlib import Path

import pytest

from jaxserve.checkpoint import demo_path
from jaxserve.cli import main


def truncated_gguf(folder: Path) -> str:
    path = folder / "short.gguf"
    with demo_path().open("rb") as file:
        path.write_bytes(file.read(100_000))
    return str(path)


def no_gguf(folder: Path) -> str:
    path = folder / "text.gguf"
    path.write_text("this is not a model")
    return str(path)


def hf_folder(folder: Path, architecture: str) -> Path:
    config = {
        "architectures": [architecture], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def truncated_safetensors(folder: Path) -> str:
    hf_folder(folder, "LlamaForCausalLM")
    entry = {"dtype": "F32", "shape": [512, 64], "data_offsets": [0, 4 * 512 * 64]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(1000)
    (folder / "model.safetensors").write_bytes(data)
    return str(folder)


def no_weights(folder: Path) -> str:
    return str(hf_folder(folder, "LlamaForCausalLM"))


def unknown_architecture(folder: Path) -> str:
    return str(hf_folder(folder, "MambaForCausalLM") / "config.json")


def absent(folder: Path) -> str:
    return str(folder / "absent")


def empty_folder(folder: Path) -> str:
    return str(folder)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (absent, ["absent", "does not exist", "pass 'demo'"]),
        (empty_folder, ["no config.json", "pass"]),
        (no_gguf, ["text.gguf"]),
        (truncated_gguf, ["short.gguf", "download"]),
        (truncated_safetensors, ["model.safetensors", "download"]),
        (no_weights, ["no .safetensors file", "--load-format dummy"]),
        (unknown_architecture, ["MambaForCausalLM", "LlamaForCausalLM"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_model_is_one_line_and_code_1(
    make, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(tmp_path)
    flags = (
        ["--load-format", "dummy", "--tokenizer", "demo"] if make is unknown_architecture else []
    )
    assert main(["generate", model, "Hello", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxserve: error: ")
    assert err.count("\n") == 1
    for words in expected:
        assert words in err
