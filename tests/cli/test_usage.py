"""Help and wrong usage: instant, and one line that says what to do."""

import dataclasses
import os
import subprocess
import sys

import pytest

from jaxserve.cli import COMMANDS, main
from jaxserve.commands.engine_args import (
    HELP,
    add_engine_arguments,
    add_model_argument,
    engine_config,
)
from jaxserve.commands.parser import Parser, UsageError, whole_number
from jaxserve.config import EngineConfig

SLOW = ("jax", "transformers", "numpy", "rich", "tokenizers", "prompt_toolkit", "tqdm", "flax")


def config_of(*arguments: str) -> EngineConfig:
    parser = Parser()
    add_model_argument(parser)
    add_engine_arguments(parser)
    return engine_config(parser.parse(list(arguments)))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_slow(command: str) -> None:
    code = (
        "import sys; from jaxserve.cli import main; "
        f"code = main([*sys.argv[1:], '--help']); "
        f"print('imported', [m for m in {SLOW} if m in sys.modules]); sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"usage: jaxserve {command or 'COMMAND'}")
    assert run.stdout.endswith("imported []\n")


def test_every_engine_argument_is_explained() -> None:
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    assert names - set(HELP) - {"model"} == set()


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxserve ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["genrate"], ["unknown command 'genrate'", "did you mean generate?"]),
        (["bench", "foo"], ["unknown command 'bench foo'", "bench throughput"]),
        (["chat", "--max-model-lenn", "5"], ["--max-model-lenn", "did you mean --max-model-len?"]),
        (["chat", "--max-model", "5"], ["unknown flag --max-model"]),
        (["chat", "demo", "extra"], ["unknown argument extra", "jaxserve chat --help"]),
        (["chat", "demo", "--model", "demo"], ["two models", "name one"]),
        (["chat", "--dtype"], ["--dtype", "expected one argument"]),
        (["chat", "--dtype", "int3"], ["dtype='int3' is unknown", "bfloat16"]),
        (["chat", "--load-format", "pickle"], ["--load-format", "'pickle'", "'safetensors'"]),
        (["chat", "--block-size", "7"], ["block_size=7", "16"]),
        (["chat", "--max-model-len", "1.5"], ["'1.5' is not a whole number"]),
        (["chat", "--hf-overrides", "[1]"], ["'[1]' is not a JSON object"]),
        (["chat", "--trust-remote-code"], ["trust_remote_code", "never runs code"]),
        (["generate", "demo", "x", "--temperature", "-1"], ["temperature=-1.0", "between 0 and 2"]),
        (["generate", "demo", "x", "--max-tokens", "0"], ["max_tokens=0", "at least 1"]),
        (["generate", "demo", "x", "--max-tokens", "ten"], ["--max-tokens", "'ten'"]),
        (["generate", "demo", ""], ["a prompt is empty"]),
        (["generate", "--prompt-file", os.devnull], ["no prompt was given", "write one"]),
        (["generate", "demo", "x", "--system", "y"], ["--system needs --chat"]),
        (
            ["generate", "--prompt-file", "/nowhere/x"],
            ["/nowhere/x cannot be read", "No such file"],
        ),
        (["bench", "throughput", "--num-prompts", "0"], ["--num-prompts 0 is too small"]),
        (["bench", "latency", "--input-len", "200", "--max-model-len", "256"], ["328", "lower"]),
        (["bench", "latency", "--json", "/nowhere/x"], ["--json /nowhere/x", "does not exist"]),
        (["demo", "--num-prompts", "0"], ["--num-prompts 0 is too small"]),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxserve: error: ")
    assert err.count("\n") == 1
    for words in expected:
        assert words in err


def test_flags_of_the_engine_become_its_arguments() -> None:
    config = config_of(
        *("m", "--max_model_len", "25.6k", "--kv-cache-memory-bytes=2M", "--dtype", "half"),
        *("--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5"),
        *("--hf-overrides", '{"a": 1}', "--attention-backend", "xla"),
    )
    assert config == EngineConfig(
        model="m",
        max_model_len=25_600,
        kv_cache_memory_bytes=2 * 2**20,
        dtype="half",
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
        hf_overrides={"a": 1},
        attention_backend="xla",
    )
    assert config_of() == EngineConfig()
    assert config_of("--model", "x") == EngineConfig(model="x")


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("1k", 1000), ("1K", 1024), ("25.6k", 25_600), ("2M", 2**21), ("-1", -1),
     ("9223372036854775807", 2**63 - 1)],
)  # fmt: skip
def test_whole_numbers_have_suffixes(text: str, value: int) -> None:
    assert whole_number(text) == value


def test_a_flag_may_stand_between_positional_arguments() -> None:
    parser = Parser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("prompts", nargs="*")
    parser.add_argument("--n", type=int)
    args = parser.parse(["m", "--n", "2", "a", "b"])
    assert (args.model, args.prompts, args.n) == ("m", ["a", "b"], 2)
    args = parser.parse(["m", "--", "--n", "b_c"])
    assert (args.model, args.prompts) == ("m", ["--n", "b_c"])
    with pytest.raises(UsageError, match="unknown flag --x"):
        parser.parse(["m", "--x", "2"])
