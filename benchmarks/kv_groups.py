"""Pages that a sequence holds where some layers see only a window, beside full attention in all.

Counts what the scheduler hands out; no model, no device, no clock.

    python -m benchmarks.kv_groups
"""

import argparse

from jaxserve.kv_group import KVGroup, most_blocks
from jaxserve.request import Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.step import SampledRow, StepPlan, StepResult


def result_of(plan: StepPlan) -> StepResult:
    rows = tuple(SampledRow(row.seq_id, (7,) if row.samples else (), None) for row in plan.rows)
    return StepResult(rows=rows, finished_s=1.0, device_s=0.0)


def pages_held(
    windows: tuple[int | None, ...],
    *,
    num_prompt: int,
    max_tokens: int,
    page_size: int,
    step_tokens: int,
) -> tuple[list[int], tuple[int, ...]]:
    """Of each group: the most pages between two steps, and those at the end."""
    num_tokens = num_prompt + max_tokens
    groups = tuple(
        KVGroup(num_blocks=num_tokens // page_size + 2, window=window) for window in windows
    )
    scheduler = Scheduler(
        groups=groups,
        block_size=page_size,
        max_num_seqs=1,
        max_num_batched_tokens=step_tokens,
        max_model_len=num_tokens,
    )
    request = Request(
        request_id="a",
        prompt_token_ids=tuple(i % 1000 for i in range(num_prompt)),
        sampling=SamplingParams(max_tokens=max_tokens),
        max_tokens=max_tokens,
        eos_token_id=None,
    )
    scheduler.accept(request)
    most, held = [0] * len(groups), (0,) * len(groups)
    while not scheduler.idle:
        plan = scheduler.schedule()
        if plan is None:
            raise RuntimeError("the sequence does not go on")
        held = scheduler.num_held_blocks
        most = [max(pair) for pair in zip(most, held, strict=True)]
        scheduler.update(plan, result_of(plan))
    return most, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=7936, help="tokens")
    parser.add_argument("--output", type=int, default=256, help="tokens")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--window-layers", type=int, default=5, help="for each full layer")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--step-tokens", type=int, default=2048)
    args = parser.parse_args()
    most, held = pages_held(
        (args.window, None),
        num_prompt=args.prompt,
        max_tokens=args.output,
        page_size=args.page_size,
        step_tokens=args.step_tokens,
    )
    within = most_blocks(
        args.window,
        num_tokens=args.prompt + args.output,
        step_tokens=args.step_tokens,
        block_size=args.page_size,
    )
    layers = args.window_layers + 1
    print(f"{args.prompt} + {args.output} tokens, pages of {args.page_size}, a layer:")
    print(f"  window {args.window}: {held[0]} pages at the end, at most {most[0]} after a step")
    print(f"    (and within one of {args.step_tokens} tokens, at most {within})")
    print(f"  full attention: {held[1]} pages at the end")
    mix, full = args.window_layers * held[0] + held[1], layers * held[1]
    print(f"{args.window_layers} layers with the window to 1 without, at the end:")
    print(f"  {mix} pages for {layers} layers, {mix / full:.1%} of the {full} without windows")


if __name__ == "__main__":
    main()
