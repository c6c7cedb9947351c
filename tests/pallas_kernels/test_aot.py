"""Targets that are not there: what is known of them, and what compiling for them changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compiling
from pallas_kernels import aot

ROOT = Path(__file__).parents[2]


def run_with_compilers(code: str, tmp_path: Path, target: str) -> str:
    """Standard output of a process that has the compile packages."""
    missing = compiling.why_not(target)
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=compiling.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="h1000.*v5e.*h100"):
        aot.target("h1000")


def test_what_ptxas_builds_for_is_known() -> None:
    names = {name: aot.architecture(name) for name in aot.GPUS}
    assert names == {
        "h100": "sm_90a",
        "b200": "sm_100a",
        "a100": "sm_80",
        "l4": "sm_89",
        "t4": "sm_75",
    }


def test_every_tpu_gives_its_chip_and_compiles_in_place(tmp_path: Path) -> None:
    code = """
import jax
from pallas_kernels import aot
x = jax.ShapeDtypeStruct((256, 256), "bfloat16")
for name in aot.TPUS:
    compiled = aot.compile_for(name, lambda x: x + 1, x, donate=0)
    alias = compiled.memory_analysis().alias_size_in_bytes
    print(name, aot.target(name).chip.tpu_generation, alias)
"""
    lines = run_with_compilers(code, tmp_path, "v5e").split("\n")[:-1]
    assert lines == [f"{name} {name} {256 * 256 * 2}" for name in aot.TPUS]


def test_mosaic_gpu_builds_for_the_target_and_for_one_a_process(tmp_path: Path) -> None:
    code = """
import jax
from jax.experimental.mosaic.gpu import utils
from pallas_kernels import aot
original = utils._infer_arch
for name in aot.GPUS:
    target = aot.target(name)
    (device,) = target.sharding.device_set
    print(name, target.chip.sm, device.device_kind == target.chip.kind)
for name in ("a100", "h100", "a100"):
    try:
        with aot.target(name).context():
            device = jax.sharding.get_abstract_mesh().abstract_device
            print(name, utils._infer_arch(), device.platform)
    except aot.ArchitectureFixed as error:
        print(error)
print(utils._infer_arch is original, jax.sharding.get_abstract_mesh().empty)
"""
    lines = run_with_compilers(code, tmp_path, "h100").split("\n")[:-1]
    chips = {"h100": 90, "b200": 100, "a100": 80, "l4": 89, "t4": 75}
    assert lines[:5] == [f"{name} {chips[name]} True" for name in aot.GPUS]
    assert lines[5] == lines[7] == "a100 (8, 0) gpu"
    assert "those for h100 would be built with its options" in lines[6]
    assert lines[8] == "True True"


def test_a_target_without_its_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "PACKAGES", tmp_path / "none")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "make compilers" in str(compiling.why_not("v5e"))
    assert "ptxas" in str(compiling.why_not("h100"))
