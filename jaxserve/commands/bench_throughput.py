"""Measure throughput: many requests at once, random prompts, output of a fixed length."""

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

USAGE = "[MODEL] [flags]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, input_len=128, output_len=64)
    parser.add_argument(
        "--num-prompts",
        type=whole_number,
        default=32,
        metavar="N",
        help="requests, all given at once",
    )
    parser.add_argument(
        "--dataset",
        "--dataset-name",
        choices=["random"],
        default="random",
        help="where prompts come from; random: random token ids",
    )


def run(args: argparse.Namespace) -> int:
    from jaxserve.sampling_params import SamplingParams

    llm = open_llm(args)
    try:
        prompts = random_prompts(args, llm, args.num_prompts)
        sampling = SamplingParams(
            temperature=1.0, ignore_eos=True, max_tokens=args.output_len, detokenize=False
        )
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=shows_progress(args))
        elapsed_s = time.perf_counter() - start
    finally:
        llm.shutdown()
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    result = {
        "elapsed_time": elapsed_s,
        "num_requests": len(outputs),
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(outputs) / elapsed_s,
        "tokens_per_second": (num_input + num_output) / elapsed_s,
        "output_tokens_per_second": num_output / elapsed_s,
    }
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {num_input}")
    print(f"Total num output tokens:  {num_output}")
    print(f"Elapsed time: {elapsed_s:.2f} s")
    write_json(args, result)
    return 0
