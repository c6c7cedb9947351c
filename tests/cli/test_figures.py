"""What the commands print about an engine and a run."""

import io

from rich.console import Console

from jaxserve.commands.demo import closing_line
from jaxserve.commands.startup_table import print_startup_table
from jaxserve.commands.streams import Figures
from jaxserve.step import StepStats

SUMMARY = {
    "model": "demo",
    "parameters": 134_515_008,
    "dtype": "float32",
    "device": "cpu (cpu)",
    "attention backend": "xla",
    "other backends": "tpu: needs a TPU; gpu: needs a GPU",
    "weight bytes": 538_060_032,
    "weight load s": 0.61,
    "KV bytes": 1 << 31,
    "KV pages": 2001,
    "page size": 16,
    "KV tokens": 32_000,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "max concurrency": 31.25,
    "compile s": 4.24,
}


def figures(num_output_tokens: int, ttft_s: float) -> Figures:
    return Figures(
        num_prompt_tokens=10,
        num_cached_tokens=0,
        num_output_tokens=num_output_tokens,
        finish_reason="stop",
        ttft_s=ttft_s,
        total_s=2.0,
    )


def step(num_running: int, allocated: int, written: int) -> StepStats:
    return StepStats(
        num_running=num_running,
        num_waiting=0,
        num_prefill_tokens=0,
        num_decode_tokens=num_running,
        num_used_blocks=1,
        num_free_blocks=1,
        num_allocated_slots=allocated,
        num_written_slots=written,
        num_preemptions=0,
        num_prefix_queries=0,
        num_prefix_hits=0,
        host_s=0.0,
        device_s=0.0,
    )


def test_the_startup_table_tells_what_the_engine_decided() -> None:
    file = io.StringIO()
    print_startup_table(SUMMARY, Console(file=file, width=160))
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [
        "model        demo, 134,515,008 parameters, 513 MiB, loaded in 0.6 s",
        "dtype        float32",
        "device       cpu (cpu)",
        "attention    xla (passed over tpu: needs a TPU; gpu: needs a GPU)",
        "KV cache     2,001 pages of 16 tokens = 32,000 tokens, 2.00 GiB",
        "concurrency  31.2 requests of 1,024 tokens fit; at most 8 rows and 256 tokens a step",
        "compile      4.2 s",
    ]


def test_the_startup_table_leaves_out_what_is_not_known() -> None:
    file = io.StringIO()
    print_startup_table({"dtype": "float32"}, Console(file=file, width=160))
    assert file.getvalue() == "dtype  float32\n"


def test_the_closing_line_adds_up() -> None:
    runs = [figures(11, 0.1), figures(21, 0.3), figures(1, 0.2)]
    line = closing_line(runs, 3.0, [step(3, 100, 90), step(2, 100, 100)], SUMMARY)
    assert line == (
        "3 requests in 3.0 s | 30 tokens in, 33 out | 11.0 output tokens/s | "
        "first token after 200 ms (median) | 2 steps, up to 3 rows | KV waste 5.0% | compile 4.2 s"
    )


def test_a_rate_leaves_out_the_first_token() -> None:
    assert figures(20, 0.1).tokens_per_s == 10.0
    assert figures(1, 0.1).tokens_per_s == 0.0
