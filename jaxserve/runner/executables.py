"""Every executable that live traffic can need, compiled before it starts."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
NUM_WORKERS = 2


@dataclass(slots=True)
class CompileCounter:
    """Counts XLA compilations on the threads that are being watched."""

    count: int = 0
    _threads: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT and threading.get_ident() in self._threads:
            self.count += 1

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Counts what this thread compiles from here on."""
        self._threads.add(threading.get_ident())
        try:
            yield
        finally:
            self._threads.discard(threading.get_ident())

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)


@dataclass(frozen=True, slots=True)
class Job:
    """One function to compile for one set of shapes."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # ShapeDtypeStructs
    donate: tuple[int, ...] = ()


# With scanned layers XLA:GPU's defaults copy every layer's weights in every step, because a fused
# Triton matmul cannot read its slice of a stack in place. Without Triton it would still concatenate
# the matrices of q, k, v (and of gate and up) to merge their matmuls. With neither, no weight is
# copied (read from what the compiler makes for an H100: `benchmarks/layer_loop.py`).
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
}


def compile_all(
    jobs: list[Job], *, platform: str, precision: str | None, show_progress: bool
) -> tuple[dict[str, Any], float]:
    """Compiles the jobs, several at a time; returns executables by name, and seconds taken.

    Tracing holds the interpreter's lock, XLA's compiler does not.
    """
    start = time.perf_counter()

    def compile_one(job: Job) -> tuple[str, Any]:
        with jax.default_matmul_precision(precision or "default"):
            lowered = jax.jit(job.function, donate_argnums=job.donate).lower(*job.arguments)
        return job.name, lowered.compile(compiler_options=COMPILER_OPTIONS.get(platform))

    with ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="jaxserve-compile") as pool:
        done = pool.map(compile_one, jobs)
        if show_progress:
            from tqdm.auto import tqdm

            done = tqdm(done, total=len(jobs), desc="Compiling", unit="shape", leave=False)
        executables = dict(done)
    return executables, time.perf_counter() - start
