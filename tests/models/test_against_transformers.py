"""Every architecture agrees with transformers: logits and greedy tokens of tiny models.

The cases lie in tests/golden/models, where `make.py` says how they were made.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.checkpoint import open_checkpoint
from jaxserve.models import registry
from tests.golden.models.weights import write_checkpoint
from tests.models.alone import ModelAlone
from tests.models.together import Together

GOLDEN = Path(__file__).parent.parent / "golden" / "models"
CASES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))
}
SERVED = [
    name for name, case in CASES.items() if case["config"]["architectures"][0] in registry.FAMILIES
]
# Architectures that have a case, but no family yet.
AWAITED: set[str] = set()
UNROLLED = [name for name in ("qwen2_window", "gemma3", "phi3") if name in SERVED]
TOLERANCE = 2e-4  # of a position's logits, relative, in float32
NUM_TOKENS = 96  # a step's; all sequences of a case fit


@dataclass(frozen=True)
class Expected:
    """What transformers computed."""

    sequences: list[np.ndarray]
    positions: list[np.ndarray]
    logits: list[np.ndarray]
    greedy: list[int]

    @classmethod
    def read(cls, name: str) -> "Expected":
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return cls(
                [arrays[f"tokens_{i}"] for i in range(3)],
                [arrays[f"positions_{i}"] for i in range(3)],
                [arrays[f"logits_{i}"] for i in range(3)],
                arrays["greedy"].tolist(),
            )

    def check(self, logits: list[np.ndarray]) -> None:
        """Logits [T, V] of each sequence."""
        for got, at, want in zip(logits, self.positions, self.logits, strict=True):
            error = np.linalg.norm(got[at] - want, axis=-1) / np.linalg.norm(want, axis=-1)
            np.testing.assert_array_less(error, TOLERANCE)


def start(name: str, folder: Path, *, scan: bool = True) -> Together:
    """The case's model with empty caches."""
    case = CASES[name]
    write_checkpoint(case, folder)
    max_len = case.get("max_model_len", 128)
    model = ModelAlone(open_checkpoint(str(folder)), scan=scan, max_len=max_len)
    return Together(model, num_rows=3, max_len=128, num_tokens=NUM_TOKENS)


def run_in_chunks(rows: Together, sequences: list[np.ndarray]) -> list[np.ndarray]:
    """Prefill in chunks of odd sizes, then the last tokens one at a time."""
    logits: list[list[np.ndarray]] = [[] for _ in sequences]
    for sizes in ((1, 7, 19), (2, 11, 3), (0, 1, 17), (0, 2, 19)):
        step = {
            row: sequence[rows.lengths[row] : rows.lengths[row] + size]
            for row, (sequence, size) in enumerate(zip(sequences, sizes, strict=True))
            if size
        }
        for row, some in rows.feed(step).items():
            logits[row].append(some)
    while waiting := [row for row, s in enumerate(sequences) if rows.lengths[row] < len(s)]:
        step = {row: sequences[row][rows.lengths[row] :][:1] for row in waiting}
        for row, some in rows.feed(step).items():
            logits[row].append(some)
    return [np.concatenate(parts) for parts in logits]


@pytest.mark.parametrize("name", SERVED)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    expected = Expected.read(name)
    rows = start(name, tmp_path)
    prefill = rows.feed(dict(enumerate(expected.sequences)))
    expected.check([prefill[row] for row in range(3)])

    tokens = [int(np.argmax(prefill[1][-1]))]
    while len(tokens) < len(expected.greedy):
        tokens.append(int(np.argmax(rows.feed({1: tokens[-1:]})[1])))
    assert tokens == expected.greedy

    rows.empty()
    expected.check(run_in_chunks(rows, expected.sequences))


@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_layers_give_the_same_logits(name: str, tmp_path: Path) -> None:
    expected = Expected.read(name)
    rows = start(name, tmp_path, scan=False)
    expected.check(run_in_chunks(rows, expected.sequences))


@pytest.mark.parametrize("name", [n for n in SERVED if "saved_config" in CASES[n]])
def test_the_config_that_transformers_saves_describes_the_same_decoder(name: str) -> None:
    case = CASES[name]
    saved = registry.spec_from_config(case["saved_config"])
    assert saved == registry.spec_from_config(case["config"])


def test_every_case_has_a_family_or_awaits_one() -> None:
    without = {case["config"]["architectures"][0] for case in CASES.values()}
    assert without - registry.FAMILIES.keys() == AWAITED
