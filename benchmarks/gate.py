"""The compile gate: kernels and chips that must compile, and what they may cost.

What the compilers report of each gate's kernels is held against the budgets of `BUDGETS`, a file
in the repository: registers, spills, shared memory, VMEM, SMEM, and the temporaries of the whole
program (a copy of the cache would be one). A gate whose backend refuses has the reason as its
budget. Tests check them all; after a change that is meant to cost more, or less,

    python -m benchmarks.kernels --write-budgets [PATTERN]

writes what is measured now, rounded up.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import gpu_static, tpu_static
from benchmarks.compiling import ROOT, CompileFailed, Job, Refused, compiled
from pallas_kernels.aot import GPUS, architecture
from pallas_kernels.matmul_cases import MATMUL_CASES

BUDGETS = ROOT / "tests" / "pallas_kernels" / "compile_budgets.json"
TIME_LIMIT_S = 120.0  # alone on a machine a compile takes 5 to 20 s, a whole step about a minute
STEP_TIME_LIMIT_S = 270.0

Budget = dict[str, Any]  # "refused": reason; or "temporaries" and "kernels": name -> figure -> most

# Budgets are what was measured, up to the next multiple: small changes of the compiler pass.
ROUNDING = {
    "registers": 8,
    "spill_bytes": 16,
    "smem_bytes": 1024,
    "spills": 32,
    "vmem_bytes": 64 << 10,
    "temporaries": 1 << 20,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One program for one chip that has to compile."""

    name: str
    job: Job
    slow: bool = False  # not in the set of every change
    time_limit_s: float = TIME_LIMIT_S


def _attention(
    case: str, targets: str, *, slow: bool = False, label: str = "", **arguments: Any
) -> list[Gate]:
    return [
        Gate(
            name=f"{case}{label} {target}",
            job=Job.of(target, "benchmarks.programs:attention", case=case, **arguments),
            slow=slow,
        )
        for target in targets.split()
    ]


def _step(targets: str, *, num_tokens: int = 64, slow: bool = False) -> list[Gate]:
    """Whole steps of a model with Llama-3.1-8B's layers, as many as a chip of 16 GB can hold."""
    arguments = {"num_tokens": num_tokens, "num_layers": 16, "num_pages": 1024}
    return [
        Gate(
            name=f"llama-3.1-8b step of {num_tokens} {target}",
            job=Job.of(target, "benchmarks.programs:model_step", model="llama-3.1-8b", **arguments),
            slow=slow,
            time_limit_s=STEP_TIME_LIMIT_S,
        )
        for target in targets.split()
    ]


def _matmul(
    case: str, targets: str, *, slow: bool = False, label: str = "", **arguments: Any
) -> list[Gate]:
    return [
        Gate(
            name=f"{case} by {arguments['num_tokens']}{label} {target}",
            job=Job.of(target, "benchmarks.programs:matmul", case=case, **arguments),
            slow=slow,
        )
        for target in targets.split()
    ]


_DECODE: dict[str, Any] = {"num_rows": 64, "context": 2048}
_MIXED: dict[str, Any] = {"num_rows": 64, "num_tokens": 512, "context": 2048}
_LONG: dict[str, Any] = {"num_rows": 1, "context": 32768}
_WIDE: dict[str, Any] = {**_MIXED, "page_size": 128}
_FP8: dict[str, Any] = {"kv_dtype": "float8_e4m3fn"}
_ALL = "v5e v6e v5p tpu7x h100 b200 a100 l4"


def gates() -> list[Gate]:
    """Every gate, the quick ones first; names are unique."""
    quick = [
        *_attention("llama-3.1-8b", "v5e v5p tpu7x h100 b200 a100", label=" mixed", **_MIXED),
        *_attention("llama-3.1-8b", "v6e", label=" fp8 decode", **_DECODE, **_FP8),
        *_attention("llama-3.1-8b", "h100 l4", label=" fp8 mixed", **_MIXED, **_FP8),
        *_attention("llama-3.2-1b", "v6e l4", label=" mixed", **_MIXED),
        *_attention("gpt-oss-20b/window", "v5e h100", label=" mixed", **_MIXED),
        *_attention("deepseek-v3/tp8", "v6e h100", label=" decode", **_DECODE),
        *_step("v5e h100"),
        *_matmul("llama-8b/gate-up", "h100", num_tokens=16),
        *_matmul("llama-8b/gate-up", "h100", label=" in layers", num_tokens=16, num_layers=4),
        *_matmul("llama-8b/gate-up", "v5e h100", num_tokens=64),
        *_matmul("qwen3-30b-a3b/gate-up/int8", "v6e h100", num_tokens=64),
    ]
    families = (
        "qwen3-0.6b",
        "llama-3.2-1b",
        "llama-3.1-8b/tp8",
        "llama-3.1-70b",
        "phi-3-mini",
        "gemma-2b",
        "gemma-2-9b",
        "gemma-3-4b",
        "gpt-oss-20b",
        "deepseek-v3",
    )
    slow = [
        *_step("v6e tpu7x b200 a100 l4", slow=True),
        *_step("v5e h100", num_tokens=512, slow=True),
        *(
            gate
            for case in families
            for gate in _attention(case, "v5e tpu7x h100 l4", label=" mixed", slow=True, **_MIXED)
        ),
        *(
            gate
            for case in MATMUL_CASES
            for gate in _matmul(case, "v5e tpu7x h100", slow=True, num_tokens=64)
            if case != "tiny"
        ),
        *_matmul("llama-8b/gate-up", "v5e h100", slow=True, num_tokens=512),
        *_attention("llama-3.1-8b", _ALL, label=" decode", slow=True, **_DECODE),
        *_attention("llama-3.1-8b", _ALL, label=" fp8 mixed", slow=True, **_MIXED, **_FP8),
        *_attention("deepseek-v3", "v6e h100", label=" fp8 mixed", slow=True, **_MIXED, **_FP8),
        *_attention("llama-3.1-8b", "v4 v6e l4 t4", label=" mixed", slow=True, **_MIXED),
        *_attention("llama-3.1-8b", "v5e h100", label=" one of 32k", slow=True, **_LONG),
        *_attention("llama-3.1-8b", "v5e h100", label=" pages of 128", slow=True, **_WIDE),
        *_attention("llama-3.1-8b", "t4", label=" xla", slow=True, backend="xla", **_MIXED),
    ]
    found: dict[str, Gate] = {}
    for gate in (*quick, *slow):  # a quick one may be among the slow ones, too
        if found.setdefault(gate.name, gate).job != gate.job:
            raise ValueError(f"two gates of one name: {gate.name}")
    return list(found.values())


def measure(gate: Gate) -> Budget:
    """What the compiler reports, by the names of a budget. Raises CompileFailed."""
    is_gpu = gate.job.target in GPUS
    try:
        with compiled(
            gate.job, time_limit_s=gate.time_limit_s, retries=gpu_static.RETRIES if is_gpu else 0
        ) as result:
            figures = _gpu_figures(result) if is_gpu else _tpu_figures(result)
            return {"temporaries": result.memory["temporaries"], "kernels": figures}
    except Refused as refusal:
        return {"refused": str(refusal)}


def _gpu_figures(result: Any) -> dict[str, dict[str, int]]:
    figures: dict[str, dict[str, int]] = {}
    for kernel in gpu_static.read(result):
        _check_architecture(kernel)
        _most(
            figures.setdefault(kernel.name, {}),
            registers=kernel.num_registers,
            spill_bytes=kernel.spill_store_bytes + kernel.spill_load_bytes,
            smem_bytes=kernel.smem_bytes,
        )
    return figures


def _tpu_figures(result: Any) -> dict[str, dict[str, int]]:
    figures: dict[str, dict[str, int]] = {}
    for kernel in tpu_static.read(result):
        _most(
            figures.setdefault(re.sub(r"\.\d+$", "", kernel.name), {}),
            spills=kernel.num_spills + kernel.num_fills,
            vmem_bytes=kernel.vmem_bytes,
            smem_bytes=kernel.smem_bytes,
        )
    return figures


def _most(figures: dict[str, int], **values: int) -> None:
    """Kernels of one name share a budget: that of the largest."""
    for name, value in values.items():
        figures[name] = max(value, figures.get(name, 0))


def _check_architecture(kernel: gpu_static.Kernel) -> None:
    """A kernel built for another chip than asked for compiles, too, and means nothing."""
    wanted = architecture(kernel.target)
    if kernel.architecture != wanted:
        raise CompileFailed(f"{kernel.name} was built for {kernel.architecture}, not {wanted}")


def over_budget(measured: Budget, budget: Budget) -> list[str]:
    """Each way in which a measurement does not fit its budget, as a sentence; none: it passes."""
    if "refused" in measured or "refused" in budget:
        now, then = (each.get("refused", "no refusal") for each in (measured, budget))
        return [] if now == then else [f"{now!r}, where the budget says {then!r}"]
    faults = []
    if measured["temporaries"] > budget["temporaries"]:
        faults.append(
            f"{measured['temporaries']:,} bytes of temporaries, {budget['temporaries']:,} allowed"
        )
    if set(measured["kernels"]) != set(budget["kernels"]):
        faults.append(
            f"kernels {sorted(measured['kernels'])}, the budget has {sorted(budget['kernels'])}"
        )
    for name, figures in measured["kernels"].items():
        for figure, most in budget["kernels"].get(name, {}).items():
            if figures[figure] > most:
                faults.append(f"{name}: {figure} {figures[figure]:,}, {most:,} allowed")
    return faults


def load() -> dict[str, Budget]:
    """The budgets by gate; none if the file is not there yet."""
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def write(measured: Mapping[str, Budget]) -> None:
    """Writes budgets for what was measured; those of other gates stay, those of none go."""
    known = {gate.name for gate in gates()}
    budgets = {name: budget for name, budget in load().items() if name in known}
    budgets |= {name: rounded(each) for name, each in measured.items()}
    BUDGETS.write_text(json.dumps(dict(sorted(budgets.items())), indent=1) + "\n")


def rounded(measured: Budget) -> Budget:
    """The budget that a measurement gives."""
    if "refused" in measured:
        return measured

    def up(name: str, value: int) -> int:
        step = ROUNDING[name]
        return -(-value // step) * step

    return {
        "temporaries": up("temporaries", measured["temporaries"]),
        "kernels": {
            name: {figure: up(figure, value) for figure, value in figures.items()}
            for name, figures in measured["kernels"].items()
        },
    }


def select(pattern: str, *, slow: bool = True) -> Iterable[Gate]:
    """The gates whose names match."""
    return [g for g in gates() if re.search(pattern, g.name) and (slow or not g.slow)]
