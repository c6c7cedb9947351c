"""Measure latency: how long one batch takes from first prompt token to last output token."""

import argparse
import time

from jaxserve.commands.bench import (
    add_common_arguments,
    open_llm,
    random_prompts,
    shows_progress,
    write_json,
)
from jaxserve.commands.parser import whole_number

PERCENTILES = (10, 25, 50, 75, 90, 99)

USAGE = "[MODEL] [flags]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, input_len=32, output_len=128)
    for flag, default, text in (
        ("--batch-size", 8, "requests in the batch"),
        ("--num-iters", 5, "measured repetitions"),
        ("--num-iters-warmup", 1, "repetitions before them"),
    ):
        parser.add_argument(flag, type=whole_number, default=default, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    import numpy as np
    from tqdm import tqdm

    from jaxserve.sampling_params import SamplingParams

    llm = open_llm(args)
    latencies = []
    try:
        sampling = SamplingParams(
            temperature=1.0, ignore_eos=True, max_tokens=args.output_len, detokenize=False
        )
        rounds = range(-args.num_iters_warmup, args.num_iters)
        for i in tqdm(rounds, desc="Rounds", disable=not shows_progress(args)):
            prompts = random_prompts(args, llm, args.batch_size, salt=i)
            start = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            if i >= 0:
                latencies.append(time.perf_counter() - start)
    finally:
        llm.shutdown()
    percentiles = np.percentile(latencies, PERCENTILES).tolist()
    average = sum(latencies) / len(latencies)
    print(f"Avg latency: {average:.4f} seconds")
    for percent, value in zip(PERCENTILES, percentiles, strict=True):
        print(f"{percent}% percentile latency: {value:.4f} seconds")
    print(f"Output tokens/s: {args.batch_size * args.output_len / average:.2f}")
    named = {str(p): value for p, value in zip(PERCENTILES, percentiles, strict=True)}
    write_json(args, {"avg_latency": average, "latencies": latencies, "percentiles": named})
    return 0
