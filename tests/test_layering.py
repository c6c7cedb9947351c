"""The rooms of the house import only downwards: the table of ARCHITECTURE.md, held by `ast`."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for name in ("jaxserve", "pallas_kernels") for p in (ROOT / name).rglob("*.py"))

# The corridor, each with what it may import of the files before it.
CORRIDOR = {
    "errors": "",
    "config": "errors",
    "server_config": "errors",
    "structured_outputs": "errors",
    "sampling_params": "errors structured_outputs",
    "model_index": "errors",
    "gguf": "errors model_index",
    "safetensors": "errors",
    "scaled_tensors": "errors model_index",
    "hub_files": "errors",
    "hub": "errors hub_files",
    "converted": "errors safetensors",
    "bucket": "errors safetensors converted",
    "overrides": "errors",
    "checkpoint": (
        "errors config gguf model_index safetensors scaled_tensors hub_files hub converted bucket "
        "overrides"
    ),
    "request": "errors structured_outputs sampling_params",
    "outputs": "errors structured_outputs sampling_params request",
    "kv_group": "",
    "step": "errors structured_outputs sampling_params request",
}
ALL = " ".join(CORRIDOR)

# Every room, with what it may import of the project besides itself.
MAY_IMPORT = {
    room: set(names.split())
    for room, names in {
        "pallas_kernels": "",
        **CORRIDOR,
        "mesh": ALL,
        "layers": "mesh errors",  # and layers/kernels.py alone: pallas_kernels
        "models": f"layers mesh {ALL}",
        "weights": f"layers mesh {ALL}",
        "scheduler": ALL,
        "runner": f"models weights layers mesh {ALL}",
        "engine": f"scheduler runner {ALL}",
        "frontend": ALL,
        "client": f"engine frontend {ALL}",
        "convert": f"runner models weights layers mesh frontend {ALL}",
        "llm": f"client frontend {ALL}",
        "async_llm": f"client frontend {ALL}",
        "server": f"async_llm client frontend {ALL}",
        "commands": f"llm async_llm server convert frontend {ALL}",
        "cli": f"commands {ALL}",
        "__init__": f"llm async_llm {ALL}",
        "__main__": "cli",
    }.items()
}
DEVICE = {"jax", "jaxlib", "flax", "orbax", "optax"}
NO_DEVICE = {"scheduler", "frontend", "client", "llm", "async_llm", "server"}
LAZY = {"commands", "cli", "__init__"}  # outside functions: the corridor and commands, no JAX
FEW = {"pallas_kernels": {"jax", "jaxlib", "numpy"}, **{room: {"numpy"} for room in CORRIDOR}}
FEW |= {"hub": {"huggingface_hub"}, "bucket": {"tensorstore"}}  # inside functions


def room_of(module: str) -> str:
    """`jaxserve.layers.norm` is in `layers`; what is no room, such as LLM, is in `__init__`."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0] if package == "jaxserve" else package
    return room if room in MAY_IMPORT else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every import at any depth, also by `import_module("...")`; "." for a relative one."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node, alias.name) for alias in node.names)
            case ast.ImportFrom(module="jaxserve", level=0):
                yield from ((node, f"jaxserve.{alias.name}") for alias in node.names)
            case ast.ImportFrom(level=level):
                yield node, "." if level or node.module is None else node.module
            case ast.Call(
                func=ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield node, name


def runs_later(node: ast.AST) -> bool:
    """Whether what `node` holds runs after the import of its file, if ever."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.If(test=ast.Name("TYPE_CHECKING")):
            return True
        case _:
            return False


def violations(path: str, source: str) -> list[str]:
    """What a file at `path`, relative to the repository, imports against the table."""
    tree = ast.parse(source)
    parts = Path(path).with_suffix("").parts
    room = parts[1] if parts[0] == "jaxserve" else parts[0]
    if room not in MAY_IMPORT:
        return [f"{path}: room {room} is not in the table; give it a floor"]
    delayed = {node for body in ast.walk(tree) if runs_later(body) for node, _ in imports(body)}
    found = []
    for node, name in imports(tree):
        top, where = name.partition(".")[0], f"{path}:{getattr(node, 'lineno', 0)}: {room}"
        at_once = room in LAZY and node not in delayed
        if not top:
            found.append(f"{where} imports relatively")
        elif top in {"jaxserve", "pallas_kernels"}:
            target = room_of(name)
            door = path == "jaxserve/layers/kernels.py" and target == "pallas_kernels"
            if target != room and target not in MAY_IMPORT[room] and not door:
                found.append(f"{where} may not import {target}")
            elif at_once and target not in {*CORRIDOR, "commands"}:
                found.append(f"{where} may import {target} only inside a function")
        elif top not in sys.stdlib_module_names:
            device = top in DEVICE and (room in NO_DEVICE or at_once)
            if device or top not in FEW.get(room, {top}):
                found.append(f"{where} may not import {top}")
    return found


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for p in SOURCES])
def test_a_file_imports_only_what_its_room_may(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jaxserve/scheduler/scheduler.py", "import jax.numpy as jnp"),
        ("jaxserve/scheduler/scheduler.py", "from jaxserve.runner import runner"),
        ("jaxserve/scheduler/scheduler.py", "def f():\n    from jaxserve import runner"),
        ("jaxserve/scheduler/scheduler.py", "from . import block_pool"),
        ("jaxserve/frontend/chat.py", "from jaxserve.engine.engine import Engine"),
        ("jaxserve/models/llama.py", "import jaxserve.weights.gguf"),
        ("jaxserve/layers/attention.py", "from pallas_kernels.types import KVSpec"),
        ("jaxserve/layers/attention.py", "importlib.import_module('pallas_kernels')"),
        ("jaxserve/request.py", "from jaxserve.step import StepPlan"),
        ("jaxserve/step.py", "import flax"),
        ("jaxserve/llm.py", "from jaxserve import LLM"),
        ("jaxserve/cli.py", "from jaxserve.llm import LLM"),
        ("jaxserve/commands/chat.py", "from jaxserve.llm import LLM"),
        ("jaxserve/commands/chat.py", "import jax"),
        ("jaxserve/attic.py", "import os"),
        ("pallas_kernels/attention.py", "from jaxserve.errors import ConfigError"),
        ("pallas_kernels/attention.py", "import flax"),
    ],
)
def test_the_checker_sees_a_violation(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jaxserve/layers/kernels.py", "from pallas_kernels.types import KVSpec"),
        ("jaxserve/scheduler/scheduler.py", "import heapq\nfrom jaxserve.step import StepPlan"),
        ("jaxserve/cli.py", "def run():\n    from jaxserve.commands import chat"),
        ("jaxserve/commands/chat.py", "def run():\n    from jaxserve.llm import LLM"),
        ("jaxserve/commands/chat.py", "if TYPE_CHECKING:\n    from jaxserve.llm import LLM"),
        ("pallas_kernels/types.py", "import jax\nimport numpy as np"),
    ],
)
def test_the_checker_allows_what_the_table_allows(path: str, source: str) -> None:
    assert violations(path, source) == []
