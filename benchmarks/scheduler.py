"""Host time that the scheduler takes for a step, with a runner that computes nothing.

Run: python -m benchmarks.scheduler [--json PATH]. The loop is one step ahead, as in the engine.
Times are ms of this thread's CPU time for a step, so that a busy machine does not change them:
`schedule()`, `update()`, and both together, median and 99th percentile.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxserve.kv_group import KVGroup
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.step import SampledRow, StepPlan, StepResult

NUM_ROWS = 256
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one workload took."""

    workload: str
    num_steps: int
    rows_per_step: float
    tokens_per_step: float
    schedule_median_ms: float
    schedule_p99_ms: float
    update_median_ms: float
    update_p99_ms: float
    step_median_ms: float
    step_p99_ms: float
    kv_waste: float  # allocated but unused slots over allocated, mean over steps
    num_preemptions: int


def request(index: int, num_prompt: int, max_tokens: int, *, shared: int = 0) -> Request:
    """A request whose prompt starts with `shared` tokens that all have, then its own."""
    prompt = (7,) * shared + (index + 10,) * (num_prompt - shared)
    return Request(
        request_id=str(index),
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        max_tokens=max_tokens,
        eos_token_id=2,
    )


def result_of(plan: StepPlan) -> StepResult:
    rows = tuple(SampledRow(row.seq_id, (5,) if row.samples else (), None) for row in plan.rows)
    return StepResult(rows=rows, finished_s=time.monotonic(), device_s=0.0)


def measure(
    workload: str,
    scheduler: Scheduler,
    arrivals: Iterator[Request],
    *,
    num_steps: int,
    num_live: int,
    warm: Callable[[StepPlan], bool],
) -> Timing:
    """Keeps `num_live` requests in the scheduler and times `num_steps` steps after warming up."""
    live = 0
    in_flight: StepPlan | None = None
    is_warm = False
    times: list[tuple[float, float]] = []
    sizes: list[tuple[int, int]] = []
    waste: list[float] = []
    gc.collect()
    gc.freeze()
    while len(times) < num_steps:
        while live < num_live:
            scheduler.accept(next(arrivals))
            live += 1
        start = time.thread_time()
        plan = scheduler.schedule()
        schedule_s = time.thread_time() - start
        update_s = 0.0
        if in_flight is not None:
            result = result_of(in_flight)
            start = time.thread_time()
            deltas = scheduler.update(in_flight, result)
            update_s = time.thread_time() - start
            live -= sum(delta.finish_reason is not None for delta in deltas)
        in_flight = plan
        is_warm = is_warm or (plan is not None and warm(plan))
        if is_warm and plan is not None:
            times.append((schedule_s * 1e3, update_s * 1e3))
            sizes.append((len(plan.rows), plan.num_tokens))
            stats = scheduler.stats(plan)
            waste.append(1 - stats.num_written_slots / stats.num_allocated_slots)
    schedule_ms, update_ms = np.array(times).T
    rows, tokens = np.mean(sizes, axis=0)
    return Timing(
        workload=workload,
        num_steps=num_steps,
        rows_per_step=float(rows),
        tokens_per_step=float(tokens),
        schedule_median_ms=float(np.median(schedule_ms)),
        schedule_p99_ms=float(np.quantile(schedule_ms, 0.99)),
        update_median_ms=float(np.median(update_ms)),
        update_p99_ms=float(np.quantile(update_ms, 0.99)),
        step_median_ms=float(np.median(schedule_ms + update_ms)),
        step_p99_ms=float(np.quantile(schedule_ms + update_ms, 0.99)),
        kv_waste=float(np.mean(waste)),
        num_preemptions=scheduler.stats(None).num_preemptions,
    )


def make_scheduler(num_blocks: int) -> Scheduler:
    return Scheduler(
        groups=(KVGroup(num_blocks=num_blocks),),
        block_size=BLOCK_SIZE,
        max_num_seqs=NUM_ROWS,
        max_num_batched_tokens=2048,
        max_model_len=MAX_MODEL_LEN,
    )


def decode(num_steps: int) -> Timing:
    """Every step is 256 rows of one token."""
    arrivals = (request(i, 128, 3900) for i in range(NUM_ROWS))
    return measure(
        "256 rows decode",
        make_scheduler(NUM_ROWS * MAX_MODEL_LEN // BLOCK_SIZE + 1),
        arrivals,
        num_steps=num_steps,
        num_live=NUM_ROWS,
        warm=lambda plan: len(plan.rows) == NUM_ROWS and not plan.new_rows,
    )


def mixed(name: str, num_blocks: int, num_steps: int) -> Timing:
    """Requests of 100-700 prompt tokens (a third shared) and 20-220 output tokens, always 320."""
    random = np.random.default_rng(0)

    def arrivals() -> Iterator[Request]:
        for index in range(1_000_000):
            num_prompt = int(random.integers(100, 700))
            yield request(index, num_prompt, int(random.integers(20, 220)), shared=num_prompt // 3)

    return measure(
        name,
        make_scheduler(num_blocks),
        arrivals(),
        num_steps=num_steps,
        num_live=NUM_ROWS + 64,
        warm=lambda plan: len(plan.rows) >= NUM_ROWS // 2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--steps", type=int, default=1000, help="steps measured per workload")
    args = parser.parse_args()
    timings = [
        decode(args.steps),
        mixed("mixed, room for all", 16_384, args.steps),
        mixed("mixed, tight: preempts", 4_096, args.steps),
    ]
    print(f"{'ms a step':<24} {'rows':>5} {'tokens':>6}  schedule p50/p99   update p50/p99", end="")
    print("    both p50/p99   KV waste  preempted")
    for t in timings:
        print(
            f"{t.workload:<24} {t.rows_per_step:>5.0f} {t.tokens_per_step:>6.0f}"
            f"    {t.schedule_median_ms:>6.3f} {t.schedule_p99_ms:>6.3f}"
            f"    {t.update_median_ms:>6.3f} {t.update_p99_ms:>6.3f}"
            f"   {t.step_median_ms:>6.3f} {t.step_p99_ms:>6.3f}"
            f"   {t.kv_waste:>7.2%}  {t.num_preemptions:>9}"
        )
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(t) for t in timings], indent=2) + "\n")


if __name__ == "__main__":
    main()
