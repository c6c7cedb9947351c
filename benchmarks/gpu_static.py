"""What ptxas and Mosaic GPU say of a kernel's resources, with no GPU.

    python -m benchmarks.gpu_static h100 b200 --program module:function --args '{...}'

Compiles a program for a GPU that is not there and reads the dumps of each Mosaic GPU kernel:
registers a thread, spilled bytes, shared memory, barriers, tensor memory. There is no schedule to
read, as there is for TPUs: nothing here says how fast a kernel is. Kernels that XLA or Triton
generate are not in these dumps.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import print_table
from benchmarks.compiling import TIME_LIMIT_S, Compiled, Job, compiled

RETRIES = 1  # compiles for GPUs were seen to hang on a busy machine, and to pass when repeated


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What was read of one Mosaic GPU kernel."""

    name: str
    target: str
    architecture: str  # what it was built for: "sm_90a"
    num_registers: int  # a thread
    spill_store_bytes: int  # a thread
    spill_load_bytes: int
    stack_bytes: int
    smem_bytes: int  # a block: what the kernel asks for, and the compiler's own
    num_barriers: int  # mbarriers in shared memory
    num_named_barriers: int  # of the hardware's 16 a block
    tmem_columns: int  # of tensor memory (Blackwell)

    def record(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return dataclasses.asdict(self)


def measure(
    job: Job, *, only: str = "", time_limit_s: float = TIME_LIMIT_S
) -> tuple[list[Kernel], dict[str, Any]]:
    """The kernels of a job whose names match `only`, and the whole program's figures.

    Compiles in a process of its own. Raises CompileFailed, and Refused if a backend refuses.
    """
    with compiled(job, time_limit_s=time_limit_s, retries=RETRIES) as result:
        return [k for k in read(result) if re.search(only, k.name)], result.figures


def read(result: Compiled) -> list[Kernel]:
    """Every Mosaic GPU kernel in a compile's dumps."""
    return parse(result.dumps, result.job.target)


def parse(folder: Path, target: str) -> list[Kernel]:
    """Every Mosaic GPU kernel in a folder of dumps, in the order they were compiled.

    Raises ValueError for a dump that does not read as expected.
    """
    found = []
    for path in sorted(folder.glob("*.ptxas"), key=_number):
        assembled = path.read_text(errors="replace")
        entry = _search(r"Compiling entry function '(\w+)' for '(\w+)'", assembled, path)
        spills = _search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            assembled,
            path,
        )
        used = _search(r"Used (\d+) registers(?:, used (\d+) barriers)?", assembled, path)
        own_smem = re.search(r"(\d+) bytes smem", assembled)
        resources = path.with_suffix(".resources.txt").read_text()
        smem = _search(r"smem_scratch_bytes=(\d+)", resources, path)
        tmem = re.search(r"tmem_scratch_cols=(\d+)", resources)
        barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
        found.append(
            Kernel(
                name=re.sub(r"_mosaic_gpu_kernel$|_kernel$", "", entry[1]) or entry[1],
                target=target,
                architecture=entry[2],
                num_registers=int(used[1]),
                num_named_barriers=int(used[2] or 0),
                stack_bytes=int(spills[1]),
                spill_store_bytes=int(spills[2]),
                spill_load_bytes=int(spills[3]),
                smem_bytes=int(smem[1]) + int(own_smem[1] if own_smem else 0),
                num_barriers=sum(int(size) * int(count) for size, count in barriers),
                tmem_columns=int(tmem[1]) if tmem else 0,
            )
        )
    return found


def _number(path: Path) -> int:
    digits = re.search(r"(\d+)$", path.stem)
    return int(digits[1]) if digits else 0


def _search(pattern: str, text: str, path: Path) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{path.name}: no {pattern!r} in {text[:500]!r}")
    return found


def show(kernels: Sequence[Kernel]) -> None:
    """Prints a table of kernels, those of several targets together."""
    rows = [
        [
            f"{k.name} on {k.target}",
            k.architecture,
            k.num_registers,
            k.spill_store_bytes,
            k.spill_load_bytes,
            k.smem_bytes,
            k.num_barriers,
            k.num_named_barriers,
            k.tmem_columns,
        ]
        for k in kernels
    ]
    columns = ["kernel", "built for", "registers", "spill stores B", "loads B", "SMEM B"]
    columns += ["mbarriers", "named", "TMEM columns"]
    print_table("GPU kernels, as the compiler reports them", columns, rows)


def main() -> None:
    from pallas_kernels.aot import GPUS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="+", choices=GPUS, metavar="TARGET")
    parser.add_argument("--program", default="benchmarks.programs:attention")
    parser.add_argument("--args", default="{}", help="of the program's function, as JSON")
    parser.add_argument("--only", default="", help="a pattern of the kernels' names")
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S)
    args = parser.parse_args()
    kernels = []
    for target in args.targets:
        job = Job.of(target, args.program, **json.loads(args.args))
        kernels += measure(job, only=args.only, time_limit_s=args.time_limit_s)[0]
    show(kernels)


if __name__ == "__main__":
    main()
