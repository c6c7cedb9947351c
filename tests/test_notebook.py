"""The notebooks run from top to bottom, without a display, on the demo model."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
MAX_BYTES = 100_000


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def sources(notebook: Any, kind: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_small_and_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_opens_in_colab(path: Path) -> None:
    notebook = read(path)
    link = f"https://colab.research.google.com/github/jaxserve/jaxserve/blob/main/colab/{path.name}"
    assert f"({link})" in notebook.cells[0].source
    assert notebook.metadata.kernelspec.name == "python3"
    assert any("# @param" in source for source in sources(notebook, "code"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_installs_before_it_imports_jax(path: Path) -> None:
    code = sources(read(path), "code")
    install = next(i for i, source in enumerate(code) if "%pip" in source)
    early = re.compile(r"^\s*(import|from) jax", re.MULTILINE)
    assert not any(early.search(source) for source in code[: install + 1])
    assert "torch" not in "".join(code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_NOTEBOOK_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = read(path)
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    text = {name: "".join(o.get("text", "") for o in found) for name, found in outputs.items()}
    for word in ("model", "dtype", "device", "attention", "KV cache", "concurrency", "compile"):
        assert word in str(outputs["load"])
    assert "The capital of France is" in text["generate"]
    assert "4/4" in str(outputs["generate"])  # the progress bar
    assert len(text["chat"].strip()) > 10
    assert any("image/png" in output.get("data", {}) for output in outputs["plot"])
