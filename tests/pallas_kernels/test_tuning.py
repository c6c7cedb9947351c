"""Tile sizes come from the table where it has them, else from the kernel's guess."""

import dataclasses
import json
from pathlib import Path

import pytest

from pallas_kernels import tuning
from pallas_kernels.cases import attention_case
from pallas_kernels.chips import Chip

V5E = Chip(platform="tpu", kind="TPU v5 lite")
V6E = Chip(platform="tpu", kind="TPU v6 lite")


@dataclasses.dataclass(frozen=True)
class Tiles:
    block: int = 512
    rows: int = 8


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(tuning, "TABLE", path)
    tuning._table.cache_clear()
    yield path
    tuning._table.cache_clear()


def test_a_guess_stands_where_nothing_was_tuned() -> None:
    assert tuning.tiles("decode", V5E, "any", Tiles(block=256)) == Tiles(block=256)


def test_an_entry_replaces_the_fields_it_has_for_its_op_device_and_shape(table: Path) -> None:
    tuning.record("decode", V5E.kind, "a", {"block": 1024}, path=table, by="static cycles")
    assert tuning.tiles("decode", V5E, "a", Tiles()) == Tiles(block=1024)
    assert tuning.tiles("decode", V6E, "a", Tiles()) == Tiles()
    assert tuning.tiles("decode", V5E, "b", Tiles()) == Tiles()
    assert tuning.tiles("mixed", V5E, "a", Tiles()) == Tiles()


def test_an_entry_says_how_it_was_found_and_leaves_the_others(table: Path) -> None:
    tuning.record("decode", V5E.kind, "a", {"block": 1024}, path=table, by="static cycles")
    tuning.record("decode", V5E.kind, "b", {"rows": 4}, path=table, by="time")
    assert json.loads(table.read_text())["decode"][V5E.kind] == {
        "a": {"by": "static cycles", "tiles": {"block": 1024}},
        "b": {"by": "time", "tiles": {"rows": 4}},
    }


def test_an_entry_with_a_field_that_is_gone_is_an_error(table: Path) -> None:
    tuning.record("decode", V5E.kind, "a", {"chunk": 1}, path=table)
    with pytest.raises(ValueError, match="chunk"):
        tuning.tiles("decode", V5E, "a", Tiles())


def test_what_is_tried_goes_before_the_table_and_is_seen(table: Path) -> None:
    tuning.record("decode", V5E.kind, "a", {"block": 1024}, path=table)
    with tuning.trying({"decode": {"rows": 2}}) as used:
        assert tuning.tiles("decode", V5E, "a", Tiles()) == Tiles(rows=2)
        assert tuning.tiles("mixed", V5E, "a", Tiles()) == Tiles()
    assert used == {"decode": {"block": 512, "rows": 2}, "mixed": {"block": 512, "rows": 8}}
    assert tuning.tiles("decode", V5E, "a", Tiles()) == Tiles(block=1024)


def test_layers_that_want_other_tiles_have_other_keys() -> None:
    specs = [
        attention_case("llama-3.1-8b"),
        attention_case("llama-3.1-8b/tp8"),
        attention_case("llama-3.1-8b", page_size=32),
        attention_case("llama-3.1-8b", dtype="bfloat16"),
        attention_case("llama-3.1-8b", window=128),
        attention_case("deepseek-v3"),
    ]
    assert len({tuning.attention_key(spec) for spec in specs}) == len(specs)


def test_the_table_in_the_package_reads() -> None:
    path = Path(tuning.__file__).with_name("tiles.json")
    for ops in json.loads(path.read_text()).values():
        for entries in ops.values():
            for entry in entries.values():
                assert {"tiles", "by", "versions"} <= set(entry)
