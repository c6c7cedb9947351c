"""Compiling for chips that are not there: TPUs by libtpu, NVIDIA GPUs by XLA's CUDA plugin.

    from pallas_kernels.aot import compile_for, target

    chip = target("v5e").chip                                   # what a Backend is made of
    compiled = compile_for("v5e", step, weights, kv_pages, donate=1)
    compiled.memory_analysis().temp_size_in_bytes

Nothing can be run: the compiler's output is all there is. It needs the packages of the extra
`compile` (libtpu for TPUs; the CUDA plugin and ptxas for GPUs) and no device. Three things to know:

- Set JAX_PLATFORMS=cpu, or JAX looks for the devices these packages drive and complains. `QUIET`
  holds what keeps libtpu and XLA silent; `target` sets those of it that are not set, which is early
  enough for libtpu, but not for XLA's own log: a process started for compiling gets all of `QUIET`.
- One GPU architecture a process. Mosaic GPU fixes ptxas's options at the first kernel it compiles;
  later ones are built for that chip whatever was asked for, and either fail ("SM version specified
  by .target is higher than default SM version assumed") or, from a newer to an older chip, pass and
  mean nothing (read off with jax 0.11.2). So a second architecture is refused here.
- A faulty kernel may take the process with it, and libtpu reads LIBTPU_INIT_ARGS once: compile in
  a subprocess where either matters.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.chips import Chip

# libtpu asks a metadata server who it is unless it is told; any accelerator type will do. Nor does
# it want to be loaded by two processes at a time, which is about devices that are not there.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# The smallest topology libtpu knows of each generation; one device of it is used.
TPUS = {
    "v4": "v4:1x1x1",
    "v5e": "v5e:1x1",
    "v5p": "v5p:1x1x1",
    "v6e": "v6e:1x1",
    "tpu7x": "tpu7x:1x1x1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gpu:
    """What XLA's compiler wants to know of a GPU. Of the vendor's data sheets and guides."""

    kind: str  # jax's device_kind
    capability: tuple[int, int]
    accelerated: bool  # compiled for sm_90a, sm_100a: with the features that only this chip has
    num_sms: int
    smem_per_sm: int  # bytes
    smem_per_block: int  # bytes, the most a block may opt in to
    memory_gb_per_s: int
    memory_bytes: int
    l2_bytes: int
    clock_ghz: float

    def config(self) -> str:
        """A GpuTargetConfigProto as text, the form XLA takes a GPU's description in."""
        major, minor = self.capability
        feature = "feature_extension: ACCELERATED_FEATURES" if self.accelerated else ""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.smem_per_sm} threads_per_core_limit: 2048
  core_count: {self.num_sms} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_gb_per_s}000000000 l2_cache_size: {self.l2_bytes}
  clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory_bytes}
  shared_memory_per_block_optin: {self.smem_per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}{"a" if self.accelerated else ""}"
  model_str: "{self.kind}" name: "{self.kind}" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.kind}"
"""


_GPUS = {
    "h100": _Gpu(
        kind="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        accelerated=True,
        num_sms=132,
        smem_per_sm=233_472,
        smem_per_block=232_448,
        memory_gb_per_s=3352,
        memory_bytes=84_942_979_072,
        l2_bytes=52_428_800,
        clock_ghz=1.98,
    ),
    "b200": _Gpu(
        kind="NVIDIA B200",
        capability=(10, 0),
        accelerated=True,
        num_sms=148,
        smem_per_sm=233_472,
        smem_per_block=232_448,
        memory_gb_per_s=8000,
        memory_bytes=191_503_138_816,
        l2_bytes=132_120_576,
        clock_ghz=1.97,
    ),
    "a100": _Gpu(
        kind="NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        accelerated=False,
        num_sms=108,
        smem_per_sm=167_936,
        smem_per_block=166_912,
        memory_gb_per_s=1555,
        memory_bytes=42_505_273_344,
        l2_bytes=41_943_040,
        clock_ghz=1.41,
    ),
    "l4": _Gpu(
        kind="NVIDIA L4",
        capability=(8, 9),
        accelerated=False,
        num_sms=58,
        smem_per_sm=102_400,
        smem_per_block=101_376,
        memory_gb_per_s=300,
        memory_bytes=23_660_331_008,
        l2_bytes=50_331_648,
        clock_ghz=2.04,
    ),
    "t4": _Gpu(
        kind="Tesla T4",
        capability=(7, 5),
        accelerated=False,
        num_sms=40,
        smem_per_sm=65_536,
        smem_per_block=65_536,
        memory_gb_per_s=320,
        memory_bytes=15_843_721_216,
        l2_bytes=4_194_304,
        clock_ghz=1.59,
    ),
}
GPUS = tuple(_GPUS)
TARGETS = (*TPUS, *GPUS)


def architecture(name: str) -> str:
    """What ptxas calls a GPU target: "sm_90a". Raises KeyError for another."""
    gpu = _GPUS[name]
    return f"sm_{gpu.capability[0]}{gpu.capability[1]}{'a' if gpu.accelerated else ''}"


class TargetUnavailable(RuntimeError):
    """The compiler for a target is not installed; the message says how to get it."""


class ArchitectureFixed(RuntimeError):
    """A second GPU architecture was asked of Mosaic GPU in one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One device of a chip that is not there."""

    name: str  # one of TARGETS
    chip: Chip
    sharding: NamedSharding  # where arguments lie: whole, on that device

    def abstract(self, tree: Any) -> Any:
        """The arrays of a pytree as shapes and dtypes on this device; other leaves as they are."""

        def place(leaf: Any) -> Any:
            if not hasattr(leaf, "shape"):
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding)

        return jax.tree.map(place, tree)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """While this is entered, what is traced and lowered takes this chip for the device.

        Pallas asks the mesh in context for the kind of the device; without one it would find this
        machine's CPU.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.sharding.use_abstract_mesh(self.sharding.mesh.abstract_mesh))
            if self.chip.platform == "gpu":
                stack.enter_context(_mosaic_gpu_builds_for(self))
            yield

    def compile(
        self,
        fn: Callable[..., Any],
        *args: Any,
        donate: int | Sequence[int] = (),
        compiler_options: Mapping[str, Any] | None = None,
    ) -> jax.stages.Compiled:
        """`fn` compiled for this chip; `args` are arrays or their ShapeDtypeStructs, in pytrees."""
        with self.context():
            lowered = jax.jit(fn, donate_argnums=donate).lower(*self.abstract(args))
            return lowered.compile(compiler_options=dict(compiler_options or {}) or None)


@functools.cache
def target(name: str) -> Target:
    """The target of that name. Raises ValueError for an unknown one, TargetUnavailable."""
    if name not in TARGETS:
        raise ValueError(f"no target {name!r}: choose one of {', '.join(TARGETS)}")
    for variable, value in QUIET.items():
        if variable != "JAX_PLATFORMS":  # which devices to look for is for the caller to say
            os.environ.setdefault(variable, value)
    try:
        if name in TPUS:
            topology = topologies.get_topology_desc(TPUS[name], "tpu")
        else:
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=_GPUS[name].config(), topology="1x1x1"
            )
    except (NotImplementedError, RuntimeError) as error:
        raise TargetUnavailable(
            f"cannot compile for {name} ({error}). It needs the packages of the extra `compile`, "
            "and JAX_PLATFORMS=cpu where there is no such device"
        ) from error
    device = topology.devices[0]
    mesh = Mesh(np.array([device]), ("chip",))
    return Target(name=name, chip=Chip.of(device), sharding=NamedSharding(mesh, PartitionSpec()))


def compile_for(
    name: str,
    fn: Callable[..., Any],
    *abstract_args: Any,
    donate: int | Sequence[int] = (),
    compiler_options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
    """`fn` compiled for the target `name`: `Target.compile` in one call."""
    return target(name).compile(
        fn, *abstract_args, donate=donate, compiler_options=compiler_options
    )


_mosaic_gpu_target: Target | None = None  # the one whose architecture this process is bound to


@contextlib.contextmanager
def _mosaic_gpu_builds_for(wanted: Target) -> Iterator[None]:
    """While this is entered, Mosaic GPU takes `wanted`'s compute capability for the device's.

    It reads the capability off the device in context, but an abstract device carries none, and
    then it assumes 9.0 without a word: a kernel "for an A100" would be lowered for Hopper. JAX
    offers no way to say it (0.11.2), so the function that finds it out is replaced, and put back.
    """
    from jax.experimental.mosaic.gpu import utils

    def infer_arch() -> tuple[int, int]:
        global _mosaic_gpu_target
        if _mosaic_gpu_target is None:
            _mosaic_gpu_target = wanted
        elif _mosaic_gpu_target.chip.compute_capability != wanted.chip.compute_capability:
            raise ArchitectureFixed(
                f"this process has compiled Mosaic GPU kernels for {_mosaic_gpu_target.name}, and "
                f"those for {wanted.name} would be built with its options: use another process"
            )
        return _GPUS[wanted.name].capability

    original = utils._infer_arch
    utils._infer_arch = infer_arch
    try:
        yield
    finally:
        utils._infer_arch = original
