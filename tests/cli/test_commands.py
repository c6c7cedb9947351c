"""The commands as a user runs them: as processes, on the demo model, with few tokens."""

import json
import re
from pathlib import Path

import pytest

from jaxserve.checkpoint import demo_path
from tests.cli.conftest import Run

pytestmark = pytest.mark.timeout(300)


def test_generate_prints_one_json_object_a_prompt_in_order(
    jaxserve: Run, small: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The capital of France is\n\nOne, two, three,\nThe sky is\n")
    flags = ["--json", "--temperature", "0", "--max-tokens", "6", "--logprobs", "1"]
    run = jaxserve("generate", "--prompt-file", str(file), *flags, *small)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["prompt"] for row in rows][1] == "One, two, three,"
    assert "Paris" in rows[0]["outputs"][0]["text"]
    assert "four" in rows[1]["outputs"][0]["text"]
    for row in rows:
        (output,) = row["outputs"]
        assert len(output["token_ids"]) == len(output["logprobs"]) == 6
        assert output["finish_reason"] == "length"
        assert output["logprobs"][0][0]["id"] == output["token_ids"][0]
    table = dict(re.findall(r"^(\S+(?: cache)?) {2,}(.*)$", run.stderr, flags=re.MULTILINE))
    assert {"model", "dtype", "device", "attention", "KV cache", "concurrency", "compile"} <= set(
        table
    )
    assert table["model"].startswith("demo")
    assert "80 pages" in table["KV cache"]


def test_generate_takes_chat_messages_from_stdin(jaxserve: Run, small: list[str]) -> None:
    flags = ["--chat", "--quiet", "--temperature", "0", "--max-tokens", "12"]
    run = jaxserve("generate", "demo", *flags, *small, stdin="What is the capital of France?\n")
    assert (run.returncode, run.stderr) == (0, "")
    assert "Paris" in run.stdout


def test_a_prompt_over_the_limit_is_one_line(jaxserve: Run, small: list[str]) -> None:
    run = jaxserve("generate", "demo", "word " * 400, "--quiet", *small)
    assert run.returncode == 1
    assert run.stderr.startswith("jaxserve: error: ")
    assert run.stderr.count("\n") == 1
    assert "256" in run.stderr
    assert run.stdout == ""


def test_chat_remembers_and_reads_lines_from_a_pipe(jaxserve: Run, small: list[str]) -> None:
    lines = "What is the capital of France?\n/nonsense\nAnd of Italy?\n/reset\n/exit\nnever read\n"
    flags = ["--temperature", "0", "--max-tokens", "24", "--stats"]
    run = jaxserve("chat", "demo", *flags, *small, stdin=lines)
    assert run.returncode == 0, run.stderr
    assert "Paris" in run.stdout
    assert "unknown command /nonsense" in run.stderr
    found = re.findall(r"\[(\d+) tokens in, (\d+) of them cached, (\d+) out", run.stderr)
    first, second = [[int(number) for number in numbers] for numbers in found]
    assert first[1] == 0
    assert second[0] > first[0] + first[2]  # the whole conversation
    assert second[1] >= 16  # the first turn's pages


def test_chat_answers_one_message(jaxserve: Run, small: list[str]) -> None:
    flags = ["--temperature", "0", "--max-tokens", "12", "--quiet", "--system", "Be brief."]
    run = jaxserve("chat", str(demo_path()), "-q", "What is the capital of France?", *flags, *small)
    assert (run.returncode, run.stderr) == (0, "")
    assert "Paris" in run.stdout


def test_demo_shows_answers_and_figures(jaxserve: Run, small: list[str]) -> None:
    run = jaxserve("demo", "--num-prompts", "5", "--max-tokens", "16", *small)
    assert run.returncode == 0, run.stderr
    numbers = re.findall(r"^\[(\d)\]", run.stdout, flags=re.MULTILINE)
    assert sorted(numbers) == ["1", "2", "3", "4", "5"]
    last = run.stdout.strip().splitlines()[-1]
    for words in ("5 requests", "tokens in", "output tokens/s", "first token", "KV", "compile"):
        assert words in last


def test_bench_throughput_counts_every_token(
    jaxserve: Run, small: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--input-len", "20", "--output-len", "6", "--num-prompts", "5", "--json", str(file)]
    run = jaxserve("bench", "throughput", "--model", "demo", *sizes, *small)
    assert run.returncode == 0, run.stderr
    assert re.search(
        r"Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, [\d.]+ out", run.stdout
    )
    result = json.loads(file.read_text())
    assert result["total_num_tokens"] == 5 * 26
    assert result["num_requests"] == 5
    rate = result["total_num_tokens"] / result["elapsed_time"]
    assert result["tokens_per_second"] == pytest.approx(rate)


def test_bench_latency_gives_percentiles(jaxserve: Run, small: list[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--input-len", "8", "--output-len", "4", "--batch-size", "2", "--num-iters", "3"]
    run = jaxserve("bench", "latency", *sizes, "--json", str(file), "--quiet", *small)
    assert (run.returncode, run.stderr) == (0, "")
    assert "Avg latency: " in run.stdout
    assert "99% percentile latency: " in run.stdout
    result = json.loads(file.read_text())
    assert len(result["latencies"]) == 3
    assert min(result["latencies"]) <= result["percentiles"]["50"] <= max(result["latencies"])
