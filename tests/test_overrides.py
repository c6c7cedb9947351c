"""What a user lays over config.json, and how a rope scaling changes a model's context."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.checkpoint import open_configured
from jaxserve.commands.engine_args import add_engine_arguments, add_model_argument, engine_config
from jaxserve.commands.parser import Parser, UsageError
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.frontend.engine_args import engine_config as config_of_keywords
from jaxserve.overrides import with_rope
from tests.weights.files import llama_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "scaling", "expected"),
    [
        (
            {"max_position_embeddings": 40960, "rope_scaling": None},
            YARN,
            {"max_position_embeddings": 131072, "rope_scaling": YARN},
        ),
        (
            {"max_position_embeddings": 2048},
            {"type": "linear", "factor": 2},
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {
                    "rope_type": "linear",
                    "factor": 2,
                    "original_max_position_embeddings": 2048,
                },
            },
        ),
        (
            {"max_position_embeddings": 2048},
            {"rope_type": "llama3", "factor": 8.0},
            {
                "max_position_embeddings": 2048,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
            },
        ),
        (  # the form of transformers 5: what is scaled goes, the base stays
            {
                "max_position_embeddings": 100,
                "rope_parameters": {"rope_type": "llama3", "factor": 9, "rope_theta": 5e5},
            },
            {"rope_type": "yarn", "factor": 2.0},
            {
                "max_position_embeddings": 200,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 100,
                },
                "rope_parameters": {
                    "rope_theta": 5e5,
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 100,
                },
            },
        ),
        (  # layers of two kinds
            {
                "max_position_embeddings": 100,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            {"rope_type": "llama3", "factor": 8.0},
            {
                "max_position_embeddings": 100,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "llama3", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        (
            {"text_config": {"max_position_embeddings": 10}},
            {"rope_type": "yarn", "factor": 3, "original_max_position_embeddings": 10},
            {
                "text_config": {
                    "max_position_embeddings": 30,
                    "rope_scaling": {
                        "rope_type": "yarn",
                        "factor": 3,
                        "original_max_position_embeddings": 10,
                    },
                }
            },
        ),
    ],
)
def test_a_rope_scaling_replaces_the_models(
    config: dict[str, Any], scaling: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = json.dumps([config, scaling])
    assert with_rope(config, scaling=scaling) == expected
    assert json.dumps([config, scaling]) == before


def test_a_rope_theta_replaces_the_models() -> None:
    assert with_rope({"rope_theta": 1e4}, theta=5e5) == {"rope_theta": 5e5}
    config = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert with_rope(config, theta=7.0)["rope_parameters"] == {
        "rope_theta": 7.0,
        "rope_type": "default",
    }


def test_nothing_asked_changes_nothing() -> None:
    config = {"rope_scaling": {"rope_type": "yarn", "factor": 2}, "max_position_embeddings": 5}
    assert with_rope(config) == config


def parsed(*arguments: str) -> EngineConfig:
    parser = Parser(prog="test")
    add_model_argument(parser)
    add_engine_arguments(parser)
    return engine_config(parser.parse(list(arguments)))


def test_flags_reach_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    config = parsed(
        str(tmp_path),
        *("--load-format", "dummy", "--rope-theta", "5e5", "--rope-scaling"),
        '{"type": "yarn", "factor": 4}',
        *("--hf-overrides", '{"vocab_size": 7}', "--max-model-len", "0.5k"),
        *("--revision", "v1", "--tokenizer-revision", "v2", "--download-dir", "here"),
    )
    found = open_configured(config)
    assert found.config["max_position_embeddings"] == 4 * 128
    assert found.config["rope_theta"] == 5e5
    assert found.config["rope_scaling"]["rope_type"] == "yarn"
    assert found.config["vocab_size"] == 7
    assert config.max_model_len == 500
    assert (config.revision, config.tokenizer_revision, config.download_dir) == ("v1", "v2", "here")


def test_overrides_win_over_the_stretched_context(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    config = EngineConfig(
        model=str(tmp_path),
        load_format="dummy",
        rope_scaling=YARN,
        hf_overrides={"max_position_embeddings": 99},
    )
    assert open_configured(config).config["max_position_embeddings"] == 99


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("32k", 32_000),
        ("32K", 32_768),
        ("1.5K", 1536),
        ("4096", 4096),
        ("auto", None),
        ("-1", None),
    ],
)
def test_a_length_is_written_as_in_vllm(text: str, length: int | None) -> None:
    assert parsed("--max-model-len", text).max_model_len == length


@pytest.mark.parametrize("length", [-1, "auto", None])
def test_minus_one_is_the_models_length_in_python_too(length: object) -> None:
    assert config_of_keywords("demo", {"max_model_len": length}).max_model_len is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rope-scaling", "yarn"], "is not a JSON object"),
        (["--rope-scaling", '{"factor": 2}'], "has no rope_type"),
        (["--rope-scaling", '{"rope_type": "yarn", "factor": NaN}'], "factor=nan"),
        (["--rope-scaling", '{"rope_type": "yarn", "factor": 0.5}'], "at least 1"),
        (["--rope-theta", "-3"], "rope_theta=-3.0"),
        (["--rope-theta", "inf"], "rope_theta=inf"),
        (["--max-model-len", "long"], "not a whole number"),
        (["--trust-remote-code"], "never runs code from a model folder"),
        (["--dtype", "int8"], "dtype='int8' is unknown; use one of auto"),
    ],
)
def test_a_flag_that_cannot_work_says_why(flags: list[str], words: str) -> None:
    with pytest.raises((ConfigError, UsageError)) as error:
        parsed(*flags)
    assert words in str(error.value)


def test_a_token_is_never_an_argument() -> None:
    with pytest.raises(ConfigError) as error:
        config_of_keywords("demo", {"hf_token": "hf_verysecret"})
    assert "HF_TOKEN" in str(error.value)
    assert "verysecret" not in str(error.value)
