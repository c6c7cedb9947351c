"""Commands on models from the hub, as a user runs them; the hub is a server on this machine."""

import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from jaxserve.checkpoint import demo_path
from jaxserve.cli import main
from tests.cli.conftest import Run
from tests.hub_server import HubServer, Repo

TOKEN = "hf_secretsecretsecret"


def test_generate_fetches_a_gguf_model_with_its_tokenizer(
    jaxserve: Run, small: list[str], tmp_path: Path
) -> None:
    with HubServer() as server:
        files = {"SmolLM2-Q4_1.gguf": demo_path().read_bytes(), "SmolLM2-F16.gguf": b"x"}
        server.repos["org/SmolLM2-GGUF"] = Repo(files=files, revisions=("v1",), token=TOKEN)
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }
        flags = ["--temperature", "0", "--max-tokens", "8", "--revision", "v1"]
        flags += ["--download-dir", str(tmp_path / "cache"), *small]
        model = "org/SmolLM2-GGUF:Q4_1"
        run = jaxserve("generate", model, "The capital of France is", *flags, **environment)
        assert run.returncode == 0, run.stderr
        assert "Paris" in run.stdout
        assert TOKEN not in run.stdout + run.stderr
        assert re.search(rf"^model +{model}, ", run.stderr, flags=re.MULTILINE), run.stderr
        assert server.fetched() == ["SmolLM2-Q4_1.gguf"]
        assert list((tmp_path / "cache").glob("models--org--SmolLM2-GGUF/snapshots/*/*.gguf"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["org/absent"], "model 'org/absent' is neither a folder here nor a repository"),
        (["org/gated"], "org/gated is gated: accept its terms"),
        (["org/open", "--revision", "v9"], "org/open has no revision 'v9'"),
        (["org/open:Q4_0"], "org/open on the hub has no GGUF file 'Q4_0'"),
        (["demo", "--tokenizer", "org/absent"], "'org/absent' is neither a folder here"),
    ],
)
def test_a_model_that_cannot_be_fetched_is_one_line(
    flags: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with HubServer() as server:
        server.repos["org/gated"] = Repo(files={"config.json": b"{}"}, token="x", gated=True)
        server.repos["org/open"] = Repo(files={"config.json": b"{}", "model.safetensors": b""})
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert main(["generate", flags[0], "Hello", *flags[1:]]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxserve: error: ")
    assert words in err
    assert err.count("\n") == 1
    assert TOKEN not in err
