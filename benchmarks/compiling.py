"""Compiling a program for a chip that is not there, in a process of its own, with what it dumps.

A program is named, not passed: "module:function" and JSON arguments of the function, which gets the
`Target` first and returns a `Program`. The child process compiles it and leaves the compiler's
dumps in a folder; `benchmarks.tpu_static` and `benchmarks.gpu_static` read them.

    python -m benchmarks.compiling v5e benchmarks.programs:attention '{"case": "llama-3.1-8b"}'

prints what XLA says of its memory. Its own process, because libtpu takes its flags once a process,
Mosaic GPU its architecture, and a faulty kernel can abort both.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ROOT / ".venv" / "compile"  # where `make` puts the packages of the extra `compile`
TIME_LIMIT_S = 240.0


class CompileFailed(RuntimeError):
    """The compiler refused a program, crashed or ran out of time; the message has its last words.

    `timed_out` and `crashed` tell the last two apart from a refusal: they may pass when repeated.
    """

    def __init__(self, message: str, *, timed_out: bool = False, crashed: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out
        self.crashed = crashed


class Refused(CompileFailed):
    """A backend refused the program; the message is its reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is to be compiled."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]  # arrays or ShapeDtypeStructs, in pytrees
    donate: tuple[int, ...] = ()
    compiler_options: Mapping[str, Any] | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # handed through, JSON
    tiles: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)  # to try


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A program by name, and the chip it is compiled for. Hashable; prints as its command."""

    target: str
    program: str  # "module:function"
    arguments: tuple[tuple[str, Any], ...] = ()  # of the function, sorted by name

    @classmethod
    def of(cls, target: str, program: str, **arguments: Any) -> "Job":
        return cls(target=target, program=program, arguments=tuple(sorted(arguments.items())))

    def command(self) -> list[str]:
        text = json.dumps(dict(self.arguments))
        return ["-m", "benchmarks.compiling", self.target, self.program, text]

    def __str__(self) -> str:
        return f"{self.program} {json.dumps(dict(self.arguments))} for {self.target}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What is left of a compile: XLA's figures of the whole program, and a folder of dumps."""

    job: Job
    dumps: Path
    compile_s: float  # wall time of lowering and compiling; it says nothing of the program
    memory: Mapping[str, int]  # bytes: arguments, output, alias, temporaries
    pallas_kernels: Sequence[str]  # names in the program of those that Pallas made
    notes: Mapping[str, Any]
    tiles: Mapping[str, Mapping[str, int]]  # that its kernels were given, by operation
    versions: Mapping[str, str]  # of JAX and the compiler

    @property
    def figures(self) -> dict[str, Any]:
        """Those of the whole program, for a JSON file."""
        names = ("compile_s", "memory", "notes", "tiles", "versions")
        return {name: getattr(self, name) for name in names}


def packages_path() -> list[str]:
    """Folders a compile process needs on its path besides this one's."""
    return [str(PACKAGES)] if PACKAGES.is_dir() else []


def why_not(target: str) -> str | None:
    """Why this machine cannot compile for a target, or None: whether its packages are there."""
    from pallas_kernels.aot import GPUS

    wanted = ["jax_plugins/xla_cuda13", "nvidia/cu13/bin/ptxas"] if target in GPUS else ["libtpu"]
    places = [Path(each) for each in (*packages_path(), *sys.path) if each]
    missing = [name for name in wanted if not any((p / name).exists() for p in places)]
    if not missing:
        return None
    return f"{', '.join(missing)} not found: `make compilers` installs them"


def environment(dumps: Path) -> dict[str, str]:
    """The environment of a process that compiles and dumps into a folder."""
    from pallas_kernels.aot import QUIET

    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    path = [*packages_path(), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    # What the TPU compiler would dump of a kernel is 25 MB; these passes are what is read.
    passes = "post-bundle-packing-post-ra|packed-bundles-post-ra|utilization|final_bundles"
    return {
        **kept,
        **QUIET,
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # a cached program dumps nothing
        "PYTHONPATH": os.pathsep.join(path),
        "LIBTPU_INIT_ARGS": (
            f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"
            f" --xla_jf_dump_llo_pass_label_regex=({passes})"
        ),
        "TPU_LOG_DIR": "disabled",
        "MOSAIC_GPU_DUMP_TO": str(dumps),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
    }


def prepare_this_process() -> None:
    """Lets this process compile itself, without dumps. Call it before the first import of jax."""
    sys.path += packages_path()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # these two are read at that import
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextmanager
def compiled(
    job: Job, *, time_limit_s: float = TIME_LIMIT_S, retries: int = 0
) -> Iterator[Compiled]:
    """Compiles a job in a process of its own; the dumps are deleted at exit.

    `retries` are for compiles that crash or run out of time, never for one that is refused.
    Raises CompileFailed.
    """
    with tempfile.TemporaryDirectory(prefix="compile-") as folder:
        dumps, result = Path(folder) / "dumps", Path(folder) / "result.json"
        for attempts_left in range(retries, -1, -1):
            shutil.rmtree(dumps, ignore_errors=True)
            dumps.mkdir()
            try:
                _run(job, dumps, result, time_limit_s)
                break
            except CompileFailed as failure:
                if not attempts_left or not (failure.timed_out or failure.crashed):
                    raise
        figures = json.loads(result.read_text())
        if "refused" in figures:
            raise Refused(figures["refused"])
        yield Compiled(job=job, dumps=dumps, **figures)


def _run(job: Job, dumps: Path, result: Path, time_limit_s: float) -> None:
    command = [sys.executable, *job.command(), "--result", str(result)]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(dumps),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # it may start ptxas, which must end with it
    )
    try:
        output, _ = child.communicate(timeout=time_limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        message = f"{job}: not compiled after {time_limit_s:.0f} s\n{_tail(output)}"
        raise CompileFailed(message, timed_out=True) from None
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if child.returncode:
        message = f"{job}: exit status {child.returncode}\n{_tail(output)}"
        raise CompileFailed(message, crashed=child.returncode < 0)


def _tail(text: str, size: int = 4000) -> str:
    return text if len(text) <= size else "..." + text[-size:]


def build(job: Job) -> Program:
    """The program of a job, in this process."""
    from pallas_kernels.aot import target

    module, _, function = job.program.partition(":")
    return getattr(importlib.import_module(module), function)(
        target(job.target), **dict(job.arguments)
    )


def compile_here(job: Job) -> dict[str, Any]:
    """Compiles a job in this process: what `Compiled` holds of it, or why it was refused."""
    from pallas_kernels import tuning
    from pallas_kernels.aot import GPUS, target
    from pallas_kernels.backend import BackendRefused

    try:
        program = build(job)
    except BackendRefused as refusal:
        return {"refused": str(refusal)}
    start = time.perf_counter()
    with tuning.trying(program.tiles) as tiles:
        executable = target(job.target).compile(
            program.fn,
            *program.args,
            donate=program.donate,
            compiler_options=program.compiler_options,
        )
    took_s = time.perf_counter() - start
    compiler = "jax-cuda13-plugin" if job.target in GPUS else "libtpu"
    stats: Any = executable.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "output": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
    }
    named = r"%(\S+) = [^\n]*custom_call_target=\"(?:tpu_custom_call|mosaic_gpu\S*)\""
    return {
        "compile_s": took_s,
        "memory": memory,
        "pallas_kernels": re.findall(named, executable.as_text() or ""),
        "notes": dict(program.notes),
        "tiles": tiles,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", compiler)},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("program", help="module:function")
    parser.add_argument("arguments", nargs="?", default="{}", help="of the function, as JSON")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    job = Job.of(args.target, args.program, **json.loads(args.arguments))
    if args.result:  # this is the child
        args.result.write_text(json.dumps(compile_here(job)))
        return
    with compiled(job) as outcome:
        print(json.dumps(outcome.figures, indent=1))


if __name__ == "__main__":
    main()
