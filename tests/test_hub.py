"""Models from the hub, against a server that speaks its protocol: what is fetched, what fails."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from jaxserve import hub
from jaxserve.checkpoint import open_checkpoint, open_configured
from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError
from jaxserve.hub_files import HubName, parse_name
from tests.hub_server import HubServer, Repo
from tests.weights.files import llama_gguf, llama_weights, write_folder

TOKEN = "hf_secretsecretsecret"
REPO = "org/tiny"


def folder_files(folder: Path, *, num_shards: int = 2) -> dict[str, bytes]:
    write_folder(folder, llama_weights(), num_shards=num_shards)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub with one model, and a client that knows no other; the cache is empty."""
    with HubServer() as server:
        files = folder_files(tmp_path / "source") | {
            "tokenizer.json": b"{}",
            "tokenizer_config.json": b'{"eos_token": "x"}',
            "chat_template.jinja": b"hello",
            "generation_config.json": b'{"temperature": 0.5}',
            "README.md": b"# tiny",
            "modeling_tiny.py": b"raise SystemExit",
            "pytorch_model.bin": b"pickle",
            "consolidated.00.pth": b"pickle",
            "consolidated.safetensors": b"again",
            "original/model.safetensors": b"again",
            "onnx/model.onnx": b"again",
        }
        server.repos[REPO] = Repo(files=files, revisions=("main", "v1"))
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's attempts
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refusal(model: str = REPO, **options: str) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(model, **options)  # pyright: ignore[reportArgumentType]
    text = str(error.value)
    assert TOKEN not in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/name", HubName(repo="org/name")),
        ("o.r-g/Qwen3_0.6B", HubName(repo="o.r-g/Qwen3_0.6B")),
        ("org/name:Q4_K_M", HubName(repo="org/name", variant="Q4_K_M")),
        ("org/name:sub/x.gguf", HubName(repo="org/name", variant="sub/x.gguf")),
        *((bad, None) for bad in ("name", "a/b/c", "/a/b", "../b", "a/..", "~a/b", "a/b:", "a//b")),
        *((bad, None) for bad in ("a/b--c", "a/b.git", "./b", "a/b\n", "", "a/" + "b" * 97)),
    ],
)
def test_a_name_on_the_hub_has_two_parts(reference: str, expected: HubName | None) -> None:
    assert parse_name(reference) == expected


# --- what is fetched ---


def test_only_what_is_served_is_fetched(server: HubServer) -> None:
    found = open_checkpoint(REPO)
    assert found.name == REPO
    assert found.tensors.keys() == llama_weights().keys()
    assert found.generation_config == {"temperature": 0.5}
    assert found.chat_template == "hello"
    assert sorted(server.fetched()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    server.requests.clear()
    assert open_checkpoint(REPO).tensors.keys() == found.tensors.keys()
    assert server.fetched() == []


def test_a_single_file_is_preferred_to_others(server: HubServer, tmp_path: Path) -> None:
    files = folder_files(tmp_path / "one", num_shards=1) | {"model.fp16.safetensors": b"no"}
    server.repos["org/one"] = Repo(files=files)
    assert open_checkpoint("org/one").tensors.keys() == llama_weights().keys()
    assert sorted(server.fetched()) == ["config.json", "model.safetensors"]


def test_dummy_weights_and_a_tokenizer_need_no_weights(server: HubServer) -> None:
    assert not open_checkpoint(REPO, load_format="dummy").tensors
    found = open_checkpoint("demo", load_format="dummy", tokenizer=REPO)
    assert found.tokenizer is not None
    assert found.tokenizer.folder is not None
    assert found.chat_template == "hello"
    assert not [name for name in server.fetched() if "model" in name]


def test_a_revision_is_fetched_by_its_name(server: HubServer) -> None:
    config = EngineConfig(model=REPO, revision="v1", show_progress=False)
    assert open_configured(config).tensors
    assert any("/revision/v1" in path for _, path, _ in server.requests)
    assert not any("/revision/main" in path for _, path, _ in server.requests)
    assert open_checkpoint(REPO, revision=server.repos[REPO].sha).tensors
    text = refusal(revision="v2")
    assert "no revision 'v2'" in text
    assert "--revision" in text


def test_the_download_dir_is_the_cache(server: HubServer, tmp_path: Path) -> None:
    found = open_checkpoint(REPO, download_dir=str(tmp_path / "here"))
    assert all(i.file.is_relative_to(tmp_path / "here") for i in found.tensors.values())
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_is_named_by_its_quantisation(server: HubServer) -> None:
    gguf = llama_gguf(llama_weights())
    names = ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "mmproj-tiny-F16.gguf")
    server.repos["org/tiny-GGUF"] = Repo(files={"README.md": b"x"} | dict.fromkeys(names, gguf))
    for variant in ("Q8_0", "q8_0", "tiny-Q8_0.gguf"):
        found = open_checkpoint(f"org/tiny-GGUF:{variant}")
        assert {info.file.name for info in found.tensors.values()} == {"tiny-Q8_0.gguf"}
    assert set(server.fetched()) == {"tiny-Q8_0.gguf"}
    for text in (refusal("org/tiny-GGUF"), refusal("org/tiny-GGUF:Q2_K")):
        assert "org/tiny-GGUF:Q4_K_M, org/tiny-GGUF:Q8_0" in text
    server.repos["org/one-GGUF"] = Repo(files={"tiny.gguf": gguf, "config.json": b"{}"})
    assert open_checkpoint("org/one-GGUF").config["hidden_size"] == 64
    assert "no GGUF file 'Q8_0', and no other" in refusal(f"{REPO}:Q8_0")


def test_parts_of_a_split_gguf_file_are_one_choice(server: HubServer, tmp_path: Path) -> None:
    parts = {f"Q4_0/t-Q4_0-{i:05}-of-00002.gguf": bytes([i]) for i in (1, 2)}
    server.repos["org/split"] = Repo(files=parts)
    path = hub.fetch(HubName(repo="org/split", variant="Q4_0"), show_progress=False)
    assert path.name == "t-Q4_0-00001-of-00002.gguf"
    assert sorted(server.fetched()) == sorted(parts)


def test_progress_is_drawn_only_when_asked_for(
    server: HubServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # draws without a terminal
    open_checkpoint(REPO, load_format="dummy", show_progress=False)
    assert capfd.readouterr().err == ""
    open_checkpoint(REPO, show_progress=True)
    assert "%" in capfd.readouterr().err


# --- faults on the way ---


def test_a_transfer_that_breaks_off_goes_on_where_it_was(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    shard = "model-00001-of-00002.safetensors"
    server.faults.cut[shard] = 2
    assert open_checkpoint(REPO).tensors
    size = len(server.repos[REPO].files[shard])
    first, *rest = [r for method, path, r in server.requests if method == "GET" and shard in path]
    starts = [int((r or "bytes=0-").removeprefix("bytes=").removesuffix("-")) for r in rest]
    assert first is None
    assert [start // 1000 for start in starts] == [size // 2 // 1000, size * 3 // 4 // 1000]


def test_files_that_are_complete_are_not_fetched_again(server: HubServer) -> None:
    shard = "model-00002-of-00002.safetensors"
    server.faults.status[shard] = 500
    assert "in trouble (500)" in refusal()
    del server.faults.status[shard]
    server.requests.clear()
    assert open_checkpoint(REPO).tensors
    assert server.fetched() == [shard]


def test_a_damaged_file_is_not_kept(server: HubServer) -> None:
    shard = "model-00001-of-00002.safetensors"
    server.faults.damaged.add(shard)
    assert "damaged on its way" in refusal()
    server.faults.damaged.clear()
    assert open_checkpoint(REPO).tensors
    server.faults.short.add("config.json")
    shutil.rmtree(constants.HF_HUB_CACHE)
    text = refusal()
    assert "another size" in text or "damaged" in text


def test_a_full_disk_is_told(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    text = refusal()
    assert "disk is full" in text
    assert "--download-dir" in text


def test_a_cache_that_cannot_be_written_is_told(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be stored" in refusal(download_dir=str(tmp_path / "file"))


# --- who may ---


def test_a_repository_that_is_not_there(server: HubServer) -> None:
    text = refusal("org/nothing")
    assert "neither a folder here nor a repository" in text
    assert "HF_TOKEN" in text


def test_a_gated_repository_names_its_terms(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.repos[REPO].gated = True
    server.repos[REPO].token = TOKEN
    assert f"accept its terms at {server.url}/{REPO}" in refusal()
    monkeypatch.setenv("HF_TOKEN", TOKEN + "wrong")
    assert "gated" in refusal()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with caplog.at_level(logging.DEBUG):
        assert open_checkpoint(REPO).tensors
    assert f"Bearer {TOKEN}" in server.tokens
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "wants a valid token for org/tiny (401); set HF_TOKEN"),
        (403, "denies access to org/tiny (403)"),
        (418, "answered 418"),
        (429, "too many requests (429)"),
        (502, "is in trouble (502)"),
    ],
)
def test_each_status_is_explained(server: HubServer, status: int, words: str) -> None:
    server.faults.status["api"] = status
    assert words in refusal()


# --- without a network ---


def test_offline_the_cache_serves(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_checkpoint(REPO, revision="v1")
    go_offline(monkeypatch)
    server.requests.clear()
    assert open_checkpoint(REPO, revision="v1").tensors == online.tensors
    assert server.requests == []
    text = refusal(revision="main")
    assert "at revision 'main' is not in the hub's cache" in text
    assert "HF_HUB_OFFLINE is set" in text


def test_offline_a_part_is_not_enough(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint(REPO, load_format="dummy")
    go_offline(monkeypatch)
    assert not open_checkpoint(REPO, load_format="dummy").tensors
    assert "only in part" in refusal()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = open_checkpoint(REPO)
    next(iter(found.tensors.values())).file.unlink()
    go_offline(monkeypatch)
    assert ".safetensors is missing" in refusal()


@pytest.mark.parametrize("fault", ["down", "trouble"])
def test_a_hub_that_does_not_answer_leaves_the_cache(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    open_checkpoint(REPO)
    if fault == "down":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        server.faults.status["api"] = 503
    assert open_checkpoint(REPO).tensors
    assert "from the cache" in caplog.text
    assert "is not in the hub's cache" in refusal("org/other")


def test_a_password_in_the_address_is_not_shown(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    text = refusal()
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert "secret" not in text


def test_a_damaged_cache_says_where_it_is(server: HubServer) -> None:
    found = open_checkpoint(REPO)
    file = next(iter(found.tensors.values())).file
    blob = file.resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    text = refusal()
    assert str(file) in text
    assert "from the hub's cache" in text


# --- hostile repositories ---


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../../x.safetensors"}, "names the shard '../../x.safetensors'"),
        ({"a": "config.json"}, "names the shard 'config.json'"),
        ({"a": 3}, "cannot be read"),
        ([], "cannot be read"),
        ({"a": "gone.safetensors"}, "gone.safetensors is gone"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    server: HubServer, weight_map: object, words: str
) -> None:
    index = json.dumps({"weight_map": weight_map}).encode()
    server.repos[REPO].files["model.safetensors.index.json"] = index
    assert words in refusal()


def test_a_repository_of_pickles_is_refused(server: HubServer) -> None:
    server.repos["org/bin"] = Repo(files={"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert "only pytorch_model.bin; pickle files can run code" in refusal("org/bin")
    server.repos["org/none"] = Repo(files={"README.md": b"x"})
    assert "neither config.json nor a GGUF file" in refusal("org/none")
    assert server.fetched() == []


def test_the_environment_names_hub_cache_and_token(server: HubServer, tmp_path: Path) -> None:
    server.repos[REPO].token = TOKEN
    code = "import sys; from jaxserve.checkpoint import open_checkpoint as o; o(sys.argv[1])"
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
    }
    command = [sys.executable, "-c", code, REPO]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "home" / "hub" / "models--org--tiny").is_dir()
    env |= {"HF_TOKEN": TOKEN + "wrong"}
    run = subprocess.run([*command[:-1], "org/other"], env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert "neither a folder here" in run.stderr
    assert TOKEN not in run.stderr + run.stdout
    env |= {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_tensors_from_the_hub_are_those_of_the_source(server: HubServer) -> None:
    weights = llama_weights()
    for name, info in open_checkpoint(REPO).tensors.items():
        raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert np.array_equal(np.frombuffer(raw, np.float32), weights[name].reshape(-1))
