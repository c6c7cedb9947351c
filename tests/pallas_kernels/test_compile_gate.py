"""Kernels compile for chips that are not there, and cost no more than their budgets say.

Each gate is compiled in a process of its own by the vendor's compiler; `benchmarks.gate` has the
list, `compile_budgets.json` what each may cost.
"""

import os

import pytest

from benchmarks import gate
from benchmarks.compiling import why_not

GATES = {each.name: each for each in gate.gates()}
MARKED = [
    pytest.param(name, marks=[pytest.mark.slow] if each.slow else [])
    for name, each in GATES.items()
]
SMALL = {"temporaries": 10, "kernels": {"decode": {"spills": 5}}}


@pytest.mark.timeout(600)  # its process has a limit of its own, and on a GPU two tries
@pytest.mark.parametrize("name", MARKED)
def test_a_kernel_compiles_within_its_budget(name: str) -> None:
    missing = why_not(GATES[name].job.target)
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    budget = gate.load().get(name)
    assert budget is not None, f"no budget: python -m benchmarks.kernels --write-budgets {name!r}"
    assert gate.over_budget(gate.measure(GATES[name]), budget) == []


def test_no_budget_is_left_of_a_gate_that_is_gone() -> None:
    assert set(gate.load()) <= set(GATES)


def test_the_gate_of_every_change_has_every_chip() -> None:
    quick = {each.job.target for each in GATES.values() if not each.slow}
    assert quick == {"v5e", "v6e", "v5p", "tpu7x", "h100", "b200", "a100", "l4"}


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ({"temporaries": 11, "kernels": {"decode": {"spills": 5}}}, "temporaries"),
        ({"temporaries": 10, "kernels": {"decode": {"spills": 6}}}, "spills 6, 5 allowed"),
        ({"temporaries": 10, "kernels": {}}, "the budget has ['decode']"),
        ({"temporaries": 10, "kernels": {"decode": {"spills": 5}, "x": {}}}, "['decode', 'x']"),
        ({"refused": "no kernel"}, "no kernel"),
    ],
)
def test_what_exceeds_a_budget_is_said(measured: gate.Budget, says: str) -> None:
    (fault,) = gate.over_budget(measured, SMALL)
    assert says in fault


def test_what_fits_its_budget_passes() -> None:
    assert gate.over_budget(SMALL, SMALL) == []
    assert gate.over_budget({"temporaries": 0, "kernels": {"decode": {"spills": 0}}}, SMALL) == []
    assert gate.over_budget({"refused": "why"}, {"refused": "why"}) == []


def test_a_refusal_that_is_gone_needs_a_new_budget() -> None:
    assert gate.over_budget(SMALL, {"refused": "why"}) != []


def test_a_budget_is_what_was_measured_rounded_up() -> None:
    measured = {"temporaries": 1, "kernels": {"decode": {"registers": 129, "smem_bytes": 2048}}}
    budget = gate.rounded(measured)
    assert budget == {
        "temporaries": 1 << 20,
        "kernels": {"decode": {"registers": 136, "smem_bytes": 2048}},
    }
    assert gate.over_budget(measured, budget) == []
