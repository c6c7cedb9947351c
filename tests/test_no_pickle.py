"""Nothing in the packages can run code from a file: no pickle, no eval, no unsafe loader."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for name in ("jaxserve", "pallas_kernels") for p in (ROOT / name).rglob("*.py"))
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}


def dangers(source: str) -> list[str]:
    """Each banned import or call in a source text, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                banned = {alias.name.partition(".")[0] for alias in names} & MODULES
            case ast.ImportFrom(module=str(module), names=names):
                banned = {module.partition(".")[0]} & MODULES
                banned |= {alias.name for alias in names} & YAML if module == "yaml" else set()
            case ast.Call(func=ast.Name(name)):
                banned = {name} & BUILTINS
            case ast.Call(func=ast.Attribute(ast.Name("yaml"), name)):
                banned = {name} & YAML
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(name), *_]):
                banned = {str(name).partition(".")[0]} & MODULES
            case ast.keyword(arg="allow_pickle", value=value):
                allowed = isinstance(value, ast.Constant) and value.value is False
                banned = set() if allowed else {"allow_pickle"}
            case _:
                continue
        found += [f"{getattr(node, 'lineno', 0)}: {name}" for name in sorted(banned)]
    return found


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for p in SOURCES])
def test_a_file_cannot_run_code_from_its_input(path: str) -> None:
    assert dangers((ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import nn",
        "import os, marshal",
        "importlib.import_module('dill')",
        "def f(x):\n    return eval(x)",
        "exec('1')",
        "yaml.load(f, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
    ],
)
def test_the_checker_sees_a_danger(source: str) -> None:
    assert len(dangers(source)) == 1


def test_the_checker_allows_harmless_namesakes() -> None:
    fine = "re.compile(p); jax.eval_shape(f); yaml.safe_load(f); np.load(p, allow_pickle=False)"
    assert dangers(fine) == []
