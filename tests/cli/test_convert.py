"""Converting: the same parameters and tokens from the Orbax checkpoint, whole or not at all."""

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from jaxserve import LLM, SamplingParams
from jaxserve import convert as converting
from jaxserve.checkpoint import Checkpoint, WeightSource, open_checkpoint
from jaxserve.cli import main
from jaxserve.config import EngineConfig
from jaxserve.convert import _write_small, convert
from jaxserve.converted import INDEX, ConvertedEntry, index_bytes, part_name
from jaxserve.errors import CheckpointError, ConfigError, UnsupportedError
from jaxserve.frontend.defaults import end_tokens
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.weights import orbax
from jaxserve.weights.loader import load_weights
from tests.cli.conftest import Run
from tests.weights.files import llama_gguf, llama_weights, write_folder
from tests.weights.test_loader import (
    SHARDED,
    check,
    demo_wanted,
    expected_of,
    run_python,
    wanted_of,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny_llama"


def config_of(model: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(model), **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", llama_weights(), num_shards=2)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hello")
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "PART_BYTES", 50_000)
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 2_000)


# --- what is written ---


def test_a_converted_folder_gives_the_same_parameters(
    source: Path, tmp_path: Path, small_parts: None
) -> None:
    result = convert(config_of(source), tmp_path / "out")
    weights = llama_weights()
    assert result.num_tensors == len(weights)
    assert result.nbytes == sum(w.nbytes for w in weights.values())
    assert result.num_parts > 3
    shutil.rmtree(source)
    for load_format in ("auto", "orbax"):
        found = open_checkpoint(str(tmp_path / "out"), load_format=load_format)
        assert found.chat_template == "hello"
        assert found.generation_config == {"temperature": 0.5}
        assert found.tokenizer is not None
        for dtype in (np.float32, ml_dtypes.bfloat16):
            wanted = wanted_of(weights)
            params = load_weights(found, wanted, dtype=dtype)
            expected = expected_of(weights, wanted)
            check(params, {name: value.astype(dtype) for name, value in expected.items()})


def test_a_dtype_is_stored(source: Path, tmp_path: Path) -> None:
    result = convert(config_of(source, dtype="bfloat16"), tmp_path / "out")
    found = open_checkpoint(str(tmp_path / "out"))
    assert result.nbytes == 2 * sum(w.size for w in llama_weights().values())
    assert {info.encoding for info in found.tensors.values()} == {"BF16"}
    assert found.config["dtype"] == "bfloat16"


def test_a_quantised_file_is_stored_in_16_bits_or_as_told(tmp_path: Path) -> None:
    weights = llama_weights()
    path = tmp_path / "m.gguf"
    path.write_bytes(llama_gguf(weights, kind=GGMLQuantizationType.Q8_0))
    wanted = wanted_of(weights)
    whole = load_weights(open_checkpoint(str(path)), wanted, dtype="float32")
    convert(config_of(path, dtype="float32"), tmp_path / "f32")
    again = load_weights(open_checkpoint(str(tmp_path / "f32")), wanted, dtype="float32")
    check(again, {name: np.asarray(value) for name, value in whole.items()})
    convert(config_of(path), tmp_path / "auto")
    found = open_checkpoint(str(tmp_path / "auto"))
    assert found.tensors["lm_head.weight"].encoding == "BF16"
    assert found.tensors["model.norm.weight"].encoding == "F32"


def test_orbax_itself_restores_it(source: Path, tmp_path: Path, small_parts: None) -> None:
    import orbax.checkpoint as ocp

    result = convert(config_of(source), tmp_path / "out")
    restored: dict[str, np.ndarray] = {}
    for part in range(result.num_parts):
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored |= checkpointer.restore(tmp_path / "out" / part_name(part))
    weights = llama_weights()
    assert restored.keys() == weights.keys()
    for name, weight in weights.items():
        assert np.array_equal(np.asarray(restored[name]), weight)


def greedy(model: Path, layer_loop: Any) -> list[list[int]]:
    with LLM(
        str(model),
        skip_tokenizer_init=True,
        layer_loop=layer_loop,
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=1,  # one shape to compile
        num_gpu_blocks_override=32,
        show_progress=False,
    ) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        prompts: Any = [{"prompt_token_ids": [1, 5, 9, 20]}, {"prompt_token_ids": [7, 3]}]
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling)]


def test_the_same_tokens_come_from_the_converted_model(tmp_path: Path, small_parts: None) -> None:
    source = GOLDEN / "gqa"
    convert(config_of(source), tmp_path / "out")
    assert greedy(tmp_path / "out", "unroll") == greedy(source, "scan")


def same_tokenizer(old: Checkpoint, new: Checkpoint) -> None:
    first, second = load_tokenizer(old), load_tokenizer(new)
    text = "<|im_start|>user\nHällo, it's 1234 <|im_end|>\n"
    ids = first.encode(text)
    assert second.encode(text) == ids
    for skip in (False, True):
        assert second.decode(ids, skip) == first.decode(ids, skip)
    assert second.all_special_ids == first.all_special_ids
    assert second.special_tokens_map == first.special_tokens_map
    assert second.chat_template == first.chat_template
    ends, again = (
        end_tokens(found.generation_config, found.config, tokenizer, 49_152)
        for found, tokenizer in ((old, first), (new, second))
    )
    assert ends == again


def test_the_tokenizer_of_a_gguf_file_becomes_files(tmp_path: Path) -> None:
    demo = open_checkpoint("demo", load_format="dummy")
    _write_small(demo, tmp_path, EngineConfig())
    new = open_checkpoint(str(tmp_path), load_format="dummy")
    same_tokenizer(demo, new)
    assert new.config == demo.config


def test_the_command_says_what_it_wrote(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(source), str(out), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith("30 tensors, 0.00 GB in 1 Orbax checkpoints, ")
    assert main(["convert", str(source), str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"jaxserve: error: {out} exists")


@pytest.mark.slow
def test_the_demo_answers_the_same_when_converted(
    jaxserve: Run, small: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = jaxserve("convert", "demo", str(out), "--dtype", "float32")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("272 tensors, 0.54 GB in 1 Orbax checkpoints")
    demo, found = open_checkpoint("demo"), open_checkpoint(str(out))
    wanted = demo_wanted(demo)
    whole = load_weights(demo, wanted, dtype="float32")
    check(
        load_weights(found, wanted, dtype="float32"),
        {name: np.asarray(value) for name, value in whole.items()},
    )
    same_tokenizer(demo, found)
    flags = ["--temperature", "0", "--max-tokens", "12", "--quiet", *small]
    answers = [jaxserve("generate", m, "The capital of France is", *flags) for m in ("demo", out)]
    assert answers[0].stdout == answers[1].stdout
    assert "Paris" in answers[0].stdout


# --- by the slice ---

BYTES_READ = """
import sys, jax, numpy as np, tensorstore as ts
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxserve.checkpoint import WeightSource, open_checkpoint
from jaxserve.weights.loader import load_weights
found = open_checkpoint(sys.argv[1])
mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
name = "lm_head.weight"
rows, columns = found.tensors[name].shape
wanted = {"w": WeightSource(names=(name,), shape=(columns, rows), transpose=True)}
checkpoint = type(found)(name="x", config=found.config, tensors={name: found.tensors[name]})
def read():
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])
load_weights(checkpoint, wanted, dtype="float32")
whole = read()
class Mine(NamedSharding):
    def addressable_devices_indices_map(self, shape):
        found = super().addressable_devices_indices_map(shape)
        return dict(list(found.items())[:1])
try:
    load_weights(checkpoint, wanted, dtype="float32",
                 shardings={"w": Mine(mesh, P(None, "x"))})
except (TypeError, ValueError) as error:  # one shard of four does not make an array
    pass
print(whole, read() - whole, rows * columns * 4)
"""


FLAGS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}


def test_each_device_gets_its_slice(source: Path, tmp_path: Path, small_parts: None) -> None:
    convert(config_of(source), tmp_path / "out")
    assert run_python(SHARDED, str(tmp_path / "out"), **FLAGS).strip() == "ok 4"


def test_each_device_reads_only_its_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 32 << 10)
    weight = np.arange(1024 * 256, dtype=np.float32).reshape(1024, 256)
    orbax.save_arrays(tmp_path / part_name(0), {"lm_head.weight": weight})
    entry = ConvertedEntry("lm_head.weight", weight.shape, "F32", 0)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_bytes(index_bytes(["config.json"], [entry]))
    whole, part, size = map(int, run_python(BYTES_READ, str(tmp_path), **FLAGS).split())
    assert size <= whole < 1.05 * size
    assert part < 0.3 * size


def test_leading_axes_of_one_are_left_out(tmp_path: Path) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    orbax.save_arrays(tmp_path / part_name(0), {"w": weight})
    entry = ConvertedEntry("w", weight.shape, "F32", 0)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_bytes(index_bytes(["config.json"], [entry]))
    wanted = {"w": WeightSource(names=("w",), shape=(4, 3), transpose=True)}
    params = load_weights(open_checkpoint(str(tmp_path)), wanted, dtype="bfloat16")
    check(params, {"w": weight[0].T.astype(ml_dtypes.bfloat16)})


# --- whole or not at all ---


def test_an_interrupted_conversion_leaves_nothing(
    source: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(folder: Path, arrays: object) -> None:
        calls.append(folder)
        if len(calls) == 3:
            raise KeyboardInterrupt
        orbax.save_arrays(folder, arrays)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(converting, "save_arrays", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(config_of(source), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_without_its_index_does_not_load(source: Path, tmp_path: Path) -> None:
    convert(config_of(source), tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    for load_format, words in (("auto", "no .safetensors file"), ("orbax", "jaxserve convert")):
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(str(tmp_path / "out"), load_format=load_format)


def test_what_cannot_be_served_is_not_converted(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is in a bucket"):
        convert(config_of(source), Path("gs://bucket/x"))
    with pytest.raises(ConfigError, match="no weights to convert"):
        convert(config_of(source, load_format="dummy"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="of the wrong shape"):
        convert(config_of(source, hf_overrides={"vocab_size": 50}), tmp_path / "out")
    overrides = {"architectures": ["MambaForCausalLM"]}
    with pytest.raises(UnsupportedError, match="Mamba"):
        convert(config_of(source, hf_overrides=overrides), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(config_of(source), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="converted already"):
        convert(config_of(tmp_path / "out"), tmp_path / "again")
    with pytest.raises(ConfigError, match="cannot be written"):
        convert(config_of(source), source / "config.json" / "out")


# --- damaged and hostile folders ---


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no version"),
        ('{"version": true}', "no version"),
        ('{"version": 2}', "update jaxserve"),
        ('{"version": 1, "files": ["../x"]}', "plain names"),
        ('{"version": 1, "files": ["/x"]}', "plain names"),
        ('{"version": 1, "files": [".."]}', "plain names"),
        ('{"version": 1, "files": [], "tensors": {}}', "no tensors"),
        *(
            (f'{{"version": 1, "files": [], "tensors": {{"w": {entry}}}}}', "impossible")
            for entry in (
                "1",
                '{"shape": [-1], "dtype": "F32", "part": 0}',
                '{"shape": [1e9], "dtype": "F32", "part": 0}',
                f'{{"shape": [{2**60}], "dtype": "F32", "part": 0}}',
                '{"shape": [1], "dtype": "F32", "part": -1}',
                '{"shape": [1], "dtype": "F32", "part": "../../x"}',
                '{"shape": [1], "dtype": "X", "part": 0}',
            )
        ),
    ],
)
def test_a_damaged_index_is_one_clear_error(tmp_path: Path, index: str, words: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        open_checkpoint(str(tmp_path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["gone", "short", "lie"])
def test_damaged_arrays_are_one_clear_error(source: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    convert(config_of(source), out)
    if damage == "gone":
        shutil.rmtree(out / part_name(0))
    elif damage == "short":
        data = max((p for p in (out / part_name(0)).rglob("*") if p.is_file()), key=file_size)
        data.write_bytes(data.read_bytes()[:1000])
    else:
        index = json.loads((out / INDEX).read_text())
        index["tensors"]["lm_head.weight"]["dtype"] = "BF16"
        (out / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="convert") as error:
        load_weights(open_checkpoint(str(out)), wanted_of(llama_weights()), dtype="float32")
    assert "\n" not in str(error.value)


def file_size(path: Path) -> int:
    return path.stat().st_size


# --- from a bucket ---


@pytest.fixture
def bucket_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path / "cache"))


def test_a_url_is_read_like_a_folder(source: Path, tmp_path: Path, bucket_cache: None) -> None:
    out = tmp_path / "out with space"
    convert(config_of(source), out)
    url = "file://" + str(out).replace(" ", "%20")
    wanted = wanted_of(llama_weights())
    for model in (url, url + "/", str(out)):
        found = open_checkpoint(model)
        assert found.chat_template == "hello"
        params = load_weights(found, wanted, dtype="float32")
        check(params, expected_of(llama_weights(), wanted))
    (out / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"lacks chat_template\.jinja"):
        open_checkpoint(url)
    with pytest.raises(CheckpointError, match="only what `jaxserve convert` wrote"):
        open_checkpoint(f"file://{source}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(CheckpointError, match="gs://bucket/model/ needs the package tensorstore"):
        open_checkpoint("gs://bucket/model")


class _Bucket(BaseHTTPRequestHandler):
    """Objects of one bucket, as Google Cloud Storage's JSON API serves them."""

    root: Path

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, _, name = url.path.partition("/b/bucket/o/")
        path = self.root / unquote(name)
        if not name or "media" not in parse_qs(url.query).get("alt", []) or not path.is_file():
            return self._send(404, b"{}")
        data = path.read_bytes()
        span = self.headers.get("Range")
        if span is None:
            return self._send(200, data)
        first, _, last = span.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(data) - int(last)
        stop = int(last) + 1 if first and last else len(data)
        piece = data[start:stop]
        total = f"bytes {start}-{start + len(piece) - 1}/{len(data)}"
        return self._send(206, piece, {"Content-Range": total})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"x-goog-generation": "1", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def bucket_url(tmp_path: Path) -> Iterator[str]:
    handler = type("Handler", (_Bucket,), {"root": tmp_path})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FROM_BUCKET = """
import sys
from jaxserve.checkpoint import open_checkpoint
from jaxserve.errors import CheckpointError
from jaxserve.weights.loader import load_weights
from tests.weights.files import llama_weights
from tests.weights.test_loader import check, expected_of, wanted_of
weights = llama_weights()
wanted = wanted_of(weights)
found = open_checkpoint("gs://bucket/out")
check(load_weights(found, wanted, dtype="float32"), expected_of(weights, wanted))
try:
    open_checkpoint("gs://bucket/other")
except CheckpointError as error:
    print(error)
"""


def test_a_model_is_served_from_google_cloud_storage(
    source: Path, tmp_path: Path, bucket_url: str
) -> None:
    convert(config_of(source), tmp_path / "out")
    env = {
        "TENSORSTORE_GCS_HTTP_URL": bucket_url,
        "JAXSERVE_CACHE_DIR": str(tmp_path / "cache"),
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
        "JAX_PLATFORMS": "cpu",
    }
    assert "gs://bucket/other/ holds no jaxserve_weights.json" in run_python(FROM_BUCKET, **env)
