"""What the TPU compiler's own schedule says of a Pallas kernel, with no TPU.

    python -m benchmarks.tpu_static v5e v6e --program module:function --args '{...}'

Compiles a program for a TPU that is not there and reads libtpu's dumps of each kernel: how many
cycles an iteration of each loop is scheduled for, how full its instruction slots are, what is
spilled, and what VMEM and SMEM it takes.

**A static figure is not a timing.** The schedule has the stalls the compiler knows of. It leaves
out waits for DMAs and their back-pressure, and bank conflicts of VMEM; it counts both sides of a
branch; it does not know how often a loop runs. It was never compared with a run. Use it to rank
variants of a kernel on one chip and to notice spills and regressions; differences under a fifth
are noise.

`hbm_cycles` turns bytes into the cycles that HBM takes to stream them. The clocks in `CHIPS` are
*derived* from published peak FLOP/s and the size and number of matrix units, not stated by libtpu,
and v6e's is the least certain (1.75 GHz supposes four 256 x 256 units' worth of work a cycle where
JAX's own table says two). v5p's and v4's bandwidth is the chip's, for one core of it; tpu7x's is
half of the chip's, which has two cores that run programs of their own.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table
from benchmarks.compiling import TIME_LIMIT_S, Compiled, Job, compiled

# The columns of the utilization dump. FILL and SPILL are loads and stores of spilled registers,
# counted in VLOAD and VSTORE as well.
SLOTS = (
    "MATMUL",
    "MATPUSH",
    "XLU",
    "VALU",
    "VPOP",
    "EUP",
    "VLOAD",
    "FILL",
    "VSTORE",
    "SPILL",
    "SALU",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TpuChip:
    """What a core is taken to do at most; see the module's text for how much to trust it."""

    clock_ghz: float
    hbm_bytes_per_s: float


CHIPS = {
    "v4": TpuChip(clock_ghz=1.05, hbm_bytes_per_s=1.2e12),
    "v5e": TpuChip(clock_ghz=1.5, hbm_bytes_per_s=819e9),
    "v5p": TpuChip(clock_ghz=1.75, hbm_bytes_per_s=2765e9),
    "v6e": TpuChip(clock_ghz=1.75, hbm_bytes_per_s=1640e9),
    "tpu7x": TpuChip(clock_ghz=2.2, hbm_bytes_per_s=3.69e12),
}


def hbm_cycles(target: str, num_bytes: float) -> float:
    """Cycles in which a core's HBM streams that many bytes at its full bandwidth."""
    chip = CHIPS[target]
    return num_bytes / chip.hbm_bytes_per_s * chip.clock_ghz * 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of the schedule, start <= cycle < end."""

    start: int
    end: int
    used: dict[str, int]  # slots used, by the names in SLOTS
    use: dict[str, float]  # share of those there are
    num_dma_in: int  # issues of copies from HBM to VMEM
    num_dma_out: int
    num_dma_waits: int

    @property
    def cycles(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Span):
    """One iteration of a loop: inner loops and both sides of branches counted once."""

    depth: int  # 0: no loop around it
    self_cycles: int  # without its inner loops
    # A kernel's common path: without inner loops that do matrix work, nor the branches they are in.
    # An inner loop that only issues copies counts once.
    straight_cycles: int
    straight_matmuls: int  # MATMUL slots used on it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """What was read of one kernel, or of one of XLA's own fusions."""

    name: str
    target: str
    whole: Span
    loops: tuple[Loop, ...]  # outer before inner, in program order
    num_bundles: int  # instructions emitted: fewer than cycles, empty ones are folded
    vmem_bytes: int
    smem_bytes: int
    scratch: tuple[tuple[tuple[int, ...], int], ...]  # of scratch in VMEM: (shape, bytes)

    @property
    def num_fills(self) -> int:
        """Loads of spilled vector registers in the program's text."""
        return self.whole.used["FILL"]

    @property
    def num_spills(self) -> int:
        """Stores of spilled vector registers in the program's text."""
        return self.whole.used["SPILL"]

    @property
    def block_loop(self) -> Loop | None:
        """The loop over blocks of KV: that with the most matrix work on its common path."""
        return max(self.loops, key=lambda loop: loop.straight_matmuls, default=None)

    @property
    def block_bytes(self) -> int | None:
        """Bytes of a block of KV, padding included: one slot of the largest scratch buffer."""
        shape, size = max(self.scratch, key=lambda buffer: buffer[1], default=((), 0))
        return size // shape[0] if shape else None

    def record(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return dataclasses.asdict(self)


def measure(
    job: Job, *, only: str = "", time_limit_s: float = TIME_LIMIT_S
) -> tuple[list[Kernel], dict[str, Any]]:
    """The Pallas kernels of a job whose names match `only`, and the whole program's figures.

    Compiles in a process of its own. Raises CompileFailed, and Refused if a backend refuses.
    """
    with compiled(job, time_limit_s=time_limit_s) as result:
        return [k for k in read(result) if re.search(only, k.name)], result.figures


def read(result: Compiled) -> list[Kernel]:
    """Every Pallas kernel in a compile's dumps; not XLA's own fusions."""
    kernels = parse(result.dumps, result.job.target)
    return [kernel for kernel in kernels if kernel.name in result.pallas_kernels]


def parse(folder: Path, target: str) -> list[Kernel]:
    """Every kernel and fusion that has a schedule in a folder of dumps."""
    found = []
    for tree in sorted(folder.glob("*-post-bundle-packing-post-ra.txt")):
        named = re.fullmatch(r"(\d+-(.+))-\d+-post-bundle-packing-post-ra\.txt", tree.name)
        if not named or named[2] == "TLP" or named[2].startswith("<late-"):
            continue
        dumps = {
            label: next(iter(_dumps(folder, named[1], label)), None)
            for label in (
                "pre-delay_hlo-static-per-bundle-utilization",
                "packed-bundles-post-ra",
                "final_bundles",
            )
        }
        utilization, packed, final = dumps.values()
        if utilization is None or packed is None or final is None:
            continue
        found.append(_kernel(named[2], target, tree, utilization, packed, final))
    return found


def _dumps(folder: Path, prefix: str, label: str) -> Iterable[Path]:
    named = re.compile(re.escape(prefix) + r"-\d+-" + re.escape(label) + r"\.txt")
    return (path for path in folder.iterdir() if named.fullmatch(path.name))


@dataclasses.dataclass
class _Region:
    """A node of the compiler's tree of regions."""

    parent: int | None
    kind: str
    start: int = 0
    end: int = 0


def _kernel(
    name: str, target: str, tree: Path, utilization: Path, packed: Path, final: Path
) -> Kernel:
    capacity, used = _utilization(utilization)
    bundles = _bundles(packed)
    if abs(len(bundles) - len(used)) > 1:  # one of each a cycle
        raise ValueError(f"{name}: {len(bundles)} bundles, but {len(used)} rows of utilization")
    regions, memory, scratch = _tree(tree)

    def span(start: int, end: int) -> dict[str, Any]:
        total = used[start:end].sum(axis=0)
        text = "".join(bundles[start:end])
        cycles = max(end - start, 1)
        return {
            "start": start,
            "end": end,
            "used": {slot: int(n) for slot, n in zip(SLOTS, total, strict=True)},
            "use": {
                slot: float(n / (cap * cycles))
                for slot, n, cap in zip(SLOTS, total, capacity, strict=True)
            },
            "num_dma_in": len(re.findall(r"= dma\.hbm_to_vmem", text)),
            "num_dma_out": len(re.findall(r"= dma\.vmem_to_hbm", text)),
            "num_dma_waits": len(re.findall(r"dma\.done", text)),
        }

    def depth(region: _Region) -> int:
        count = 0
        while region.parent in regions:  # dumps of two cores leave some parents out
            region = regions[region.parent]
            count += region.kind == "loop_body"
        return count

    bodies = [region for region in regions.values() if region.kind == "loop_body"]
    loops = []
    for body in sorted(bodies, key=lambda region: (region.start, -region.end)):
        level = depth(body)
        inner = [
            other
            for other in bodies
            if other is not body and body.start <= other.start and other.end <= body.end
        ]
        nested = sum(each.end - each.start for each in inner if depth(each) == level + 1)
        working = [
            each for each in inner if used[each.start : each.end, SLOTS.index("MATMUL")].any()
        ]
        rare = [
            region
            for region in regions.values()
            if region.kind == "pred_region"
            and body.start <= region.start
            and region.end <= body.end
            and any(region.start <= each.start and each.end <= region.end for each in working)
        ]
        straight = np.ones(body.end - body.start, bool)
        for region in [*working, *rare]:
            straight[region.start - body.start : region.end - body.start] = False
        loops.append(
            Loop(
                **span(body.start, body.end),
                depth=level,
                self_cycles=body.end - body.start - nested,
                straight_cycles=int(straight.sum()),
                straight_matmuls=int(
                    used[body.start : body.end][straight, SLOTS.index("MATMUL")].sum()
                ),
            )
        )
    return Kernel(
        name=name,
        target=target,
        whole=Span(**span(0, len(used))),
        loops=tuple(loops),
        num_bundles=len(_bundles(final)),
        vmem_bytes=memory.get("vmem", 0),
        smem_bytes=memory.get("smem", 0),
        scratch=tuple(scratch),
    )


def _utilization(path: Path) -> tuple[list[int], np.ndarray]:
    """Slots there are, and slots used in each cycle [cycles, slots]."""
    lines = path.read_text().splitlines()
    names = [name.strip().split(":")[-1] for name in lines[1].split(",")]
    if tuple(names) != SLOTS:
        raise ValueError(f"{path.name}: slots {names}, expected {list(SLOTS)}")
    capacity = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
    return capacity, np.array(rows).reshape(-1, len(SLOTS))


def _bundles(path: Path) -> list[str]:
    """The lines of a listing that are instructions, one a bundle."""
    start = re.compile(r"\s*(0x)?[0-9a-f]+\s.*:\s")
    with path.open(errors="replace") as file:
        return [line for line in file if start.match(line[:40])]


def _tree(
    path: Path,
) -> tuple[dict[int, _Region], dict[str, int], list[tuple[tuple[int, ...], int]]]:
    """Regions by number, bytes allocated of each memory space, shapes and bytes of VMEM scratch."""
    regions: dict[int, _Region] = {}
    scratch: dict[str, tuple[tuple[int, ...], int]] = {}
    allocated: dict[str, tuple[str, int]] = {}
    current = None
    with path.open(errors="replace") as file:
        for line in file:
            head = line[:300]
            if found := re.match(
                r" *\$region(\d+): #\{.*?\}(?: parent=(\d+))?(?: // (\S+))?", head
            ):
                parent = int(found[2]) if found[2] else None
                current = regions[int(found[1])] = _Region(parent, found[3] or "")
            elif current and (found := re.search(r"region range: \[(\d+), (\d+)\)", head)):
                current.start, current.end = int(found[1]), int(found[2])
            elif found := re.match(
                r" *#(allocation\w+) \[shape = '\w+\[([\d,]*)\].*?space=(\w+), size = (\w+)", head
            ):
                size = int(found[4], 0)
                allocated[found[1]] = found[3], size
                if found[3] == "vmem" and "scratch operand" in head:
                    shape = tuple(int(n) for n in found[2].split(",") if n)
                    scratch[found[1]] = shape, size
    total: dict[str, int] = {}
    for space, size in allocated.values():
        total[space] = total.get(space, 0) + size
    return regions, total, list(scratch.values())


def show(kernels: Sequence[Kernel], *, min_cycles: int = 64) -> None:
    """Prints a table of each kernel's loops."""
    for kernel in kernels:
        title = (
            f"{kernel.name} on {kernel.target}: {kernel.whole.cycles:,} cycles of text, "
            f"{kernel.num_bundles:,} bundles, {kernel.num_fills} fills, {kernel.num_spills} "
            f"spills, VMEM {kernel.vmem_bytes / 2**20:.2f} MiB, SMEM "
            f"{kernel.smem_bytes / 1024:.1f} KiB"
        )
        shown = [slot for slot in SLOTS if slot not in ("FILL", "SPILL")]
        columns = ["loop", "cycles", "self", "straight", *[f"{s} %" for s in shown]]
        columns += ["fills", "spills", "DMAs in", "out", "waits"]
        rows = []
        for loop in kernel.loops:
            if loop.cycles < min_cycles:
                continue
            rows.append(
                [
                    f"{'  ' * loop.depth}{loop.start}..{loop.end}",
                    loop.cycles,
                    loop.self_cycles,
                    loop.straight_cycles,
                    *[100 * loop.use[slot] for slot in shown],
                    loop.used["FILL"],
                    loop.used["SPILL"],
                    loop.num_dma_in,
                    loop.num_dma_out,
                    loop.num_dma_waits,
                ]
            )
        print_table(title, columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="+", choices=CHIPS, metavar="TARGET")
    parser.add_argument("--program", default="benchmarks.programs:attention")
    parser.add_argument("--args", default="{}", help="of the program's function, as JSON")
    parser.add_argument("--only", default="", help="a pattern of the kernels' names")
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S)
    args = parser.parse_args()
    for target in args.targets:
        job = Job.of(target, args.program, **json.loads(args.args))
        kernels, figures = measure(job, only=args.only, time_limit_s=args.time_limit_s)
        show(kernels)
        temporaries = figures["memory"]["temporaries"] / 2**20
        print(
            f"{target}: temporaries {temporaries:.2f} MiB, compiled in {figures['compile_s']:.1f} s"
        )


if __name__ == "__main__":
    main()
