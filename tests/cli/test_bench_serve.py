"""`jaxserve bench serve` as a process, against a scripted server in this one."""

import itertools
import json
import math
import re
import statistics
from pathlib import Path

import pytest

from jaxserve.cli import main
from jaxserve.commands.load.arguments import add_load_arguments
from jaxserve.commands.load.figures import block, figures
from jaxserve.commands.load.requests import Dataset
from jaxserve.commands.load.run import Record, arrivals
from jaxserve.commands.parser import Parser, UsageError
from jaxserve.frontend.tokenizer import Tokenizer
from tests.cli.conftest import Run
from tests.server.running import RunningServer

SMALL = ["--random-input-len", "12", "--random-output-len", "6", "--num-prompts", "8"]
VLLM_KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts",
    "request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed",
    "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
    "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
}  # fmt: skip
DETAILED = {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}


def percentile(values: list[float], percent: float) -> float:
    """By linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def dataset_of(tokenizer: Tokenizer | None, *flags: str) -> Dataset:
    parser = Parser()
    add_load_arguments(parser)
    return Dataset(parser.parse(list(flags)), tokenizer)


def test_a_run_has_vllms_block_and_keys_and_its_figures_add_up(
    jaxserve: Run, server: RunningServer, tmp_path: Path
) -> None:
    run = jaxserve(
        *("bench", "serve", "--base-url", server.url, *SMALL, "--request-rate", "100"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99.9"),
        *("--goodput", "ttft:60000", "tpot:60000", "--num-warmups", "2", "--metadata", "tp=1"),
        *("--save-result", "--save-detailed", "--result-dir", str(tmp_path / "new")),
        *("--result-filename", "run.json", "--plot", str(tmp_path / "run.png")),
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "new" / "run.json").read_text())
    assert result.keys() >= VLLM_KEYS | DETAILED
    assert (result["completed"], result["failed"], result["request_rate"]) == (8, 0, 100)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (8 * 12, 8 * 6)
    assert (result["input_lens"], result["output_lens"]) == ([12] * 8, [6] * 8)
    assert (result["model_id"], result["tp"]) == ("demo", "1")
    assert result["errors"] == [""] * 8
    assert all("You have 12 tokens" in text for text in result["generated_texts"])
    assert result["duration"] >= 8 / 100
    assert result["request_throughput"] == pytest.approx(8 / result["duration"])
    assert result["request_goodput"] == result["request_throughput"]
    assert result["total_token_throughput"] == pytest.approx(8 * 18 / result["duration"])
    # The figures over again, from what was kept of each request.
    ttfts, itls = result["ttfts"], result["itls"]
    tpots = [sum(gaps) / 5 for gaps in itls]
    e2els = [ttft + sum(gaps) for ttft, gaps in zip(ttfts, itls, strict=True)]
    gaps = [gap for each in itls for gap in each]
    assert 8 <= len(gaps) <= 8 * 5  # a chunk may bring several tokens
    for name, values in (("ttft", ttfts), ("tpot", tpots), ("itl", gaps), ("e2el", e2els)):
        ms = [1e3 * value for value in values]
        expected = {
            f"mean_{name}_ms": statistics.fmean(ms),
            f"median_{name}_ms": statistics.median(ms),
            f"std_{name}_ms": statistics.pstdev(ms),
            f"p50_{name}_ms": percentile(ms, 50),
            f"p99.9_{name}_ms": percentile(ms, 99.9),
        }
        assert {key: result[key] for key in expected} == pytest.approx(expected)
    lines = run.stdout.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     8         " in lines
    assert "Request rate configured (RPS):           100.00    " in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert f"P99.9 TTFT (ms):                         {result['p99.9_ttft_ms']:<10.2f}" in lines
    assert lines[-1] == "=" * 50
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_several_concurrencies_are_a_run_each(
    jaxserve: Run, server: RunningServer, tmp_path: Path
) -> None:
    run = jaxserve(
        *("bench", "serve", "--port", str(server.port), "--backend", "openai-chat", *SMALL),
        *("--max-concurrency", "1", "4", "--save-result", "--result-dir", str(tmp_path)),
        *("--result-filename", "r.json", "--plot", str(tmp_path / "sweep.svg")),
        *("--tokenizer", "demo"),
    )
    assert run.returncode == 0, run.stderr
    results = [
        json.loads((tmp_path / f"r-infqps-concurrency{limit}.json").read_text()) for limit in (1, 4)
    ]
    assert [result["max_concurrency"] for result in results] == [1, 4]
    assert [result["max_concurrent_requests"] for result in results] == [1, 4]
    assert [result["completed"] for result in results] == [8, 8]
    assert [result["total_output_tokens"] for result in results] == [48, 48]
    assert not DETAILED & results[0].keys()
    assert run.stdout.count("Serving Benchmark Result") == 2
    assert "Maximum request concurrency:             4" in run.stdout
    assert re.search(r"rate +concurrency +failed.*\n +inf +1 .*\n +inf +4 .*\n", run.stdout)
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


def test_what_fails_at_once_is_one_line(jaxserve: Run, server: RunningServer) -> None:
    run = jaxserve("bench", "serve", "--port", "1", *SMALL)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.count("\n") == 1
    assert "no server answers at http://127.0.0.1:1 (" in run.stderr
    assert "jaxserve serve" in run.stderr
    run = jaxserve("bench", "serve", "--base-url", server.url, "--model", "other", *SMALL)
    assert (run.returncode, run.stdout) == (1, "")
    assert "first request failed: the server answered 404: the model 'other'" in run.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--request-rate", "0"], "--request-rate 0.0 is too small"),
        (["--max-concurrency", "0"], "--max-concurrency 0 is too small"),
        (["--goodput", "itl:5"], "write ttft, tpot or e2el"),
        (["--goodput", "ttft"], "--goodput 'ttft'"),
        (["--metric-percentiles", "101"], "from 0 to 100"),
        (["--percentile-metrics", "ttft,x"], "'x' is unknown"),
        (["--header", "x"], "KEY=VALUE"),
        (["--plot", "a.gif"], ".png or .svg"),
        (["--dataset-name", "custom"], "needs --dataset-path"),
        (["--dataset-path", "x"], "has no use for --dataset-path"),
        (["--random-range-ratio", "1"], "is not in [0, 1)"),
        (["--base-url", "ftp://x"], "is not a URL"),
        (["--num-prompts", "0"], "--num-prompts 0 is too small"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_sent(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *flags]) == 2
    assert expected in capsys.readouterr().err


def record(start_s: float, chunks_s: list[float], num_output: int, error: str = "") -> Record:
    return Record(
        start_s=start_s, chunks_s=chunks_s, num_input=10, num_output=num_output, error=error
    )


def test_figures_of_known_times() -> None:
    records = [
        record(0.0, [0.1, 0.2, 0.5], 5),  # several tokens in a chunk
        record(0.2, [0.5], 1),  # has no time per output token
        record(1.0, [1.1], 3, error="cut"),
    ]
    result = figures(
        records,
        2.0,
        metrics=["ttft", "tpot", "itl"],
        percentiles=[25],
        goodput={"ttft": 100.5, "e2el": 500.5},
    )
    expected = {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 20,
        "total_output_tokens": 6,
        "output_throughput": 3.0,
        "request_goodput": 0.5,
        "mean_ttft_ms": 200.0,
        "p25_ttft_ms": 150.0,
        "std_ttft_ms": 100.0,
        "mean_tpot_ms": 100.0,
        "mean_itl_ms": 200.0,
        "median_itl_ms": 200.0,
        "max_concurrent_requests": 2,
        "max_output_tokens_per_s": 6.0,
    }
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    assert "mean_e2el_ms" not in result
    text = block(result, rate=math.inf, max_concurrency=None, percentiles=[25])
    assert "Request goodput (req/s):                 0.50" in text
    assert "Request rate configured" not in text


def test_send_times_keep_the_rate_and_the_burstiness() -> None:
    times = arrivals(4000, 50.0, 1.0, seed=3)
    assert times[-1] == pytest.approx(80.0)
    assert times == sorted(times)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1.0, abs=0.1)
    steady = arrivals(4000, 50.0, 25.0, seed=3)
    gaps = [b - a for a, b in itertools.pairwise(steady)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(0.2, abs=0.02)
    assert arrivals(3, math.inf, 1.0, seed=0) == [0.0] * 3


@pytest.mark.parametrize("counted", [True, False])
def test_random_prompts_have_the_length_asked_for(tokenizer: Tokenizer, counted: bool) -> None:
    dataset = dataset_of(tokenizer if counted else None, "--random-input-len", "40")
    requests = dataset.make(20, salt=0)
    lengths = [len(tokenizer.encode(each.prompt, add_special_tokens=False)) for each in requests]
    assert lengths == [40] * 20
    assert [each.num_prompt_tokens for each in requests] == [40 if counted else None] * 20
    assert requests == dataset.make(20, salt=0)
    others = dataset.make(20, salt=1)
    assert not {each.prompt for each in requests} & {each.prompt for each in others}
    ranged = dataset_of(None, "--input-len", "40", "--random-range-ratio", "0.5").make(200, salt=0)
    lengths = [len(each.prompt.split()) for each in ranged]
    assert (min(lengths), max(lengths)) == (20, 60)


def test_prompts_of_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "talks.json"
    human = {"from": "human", "value": "What is the capital of France?"}
    answer = {"from": "gpt", "value": "The capital of France is Paris."}
    short = [human, {"from": "gpt", "value": "Hi"}]
    talks = [[human, answer], [human], short, [answer, human]]
    file.write_text(json.dumps([{"conversations": talk} for talk in talks]))
    flags = ["--dataset-name", "sharegpt", "--dataset-path", str(file)]
    requests = dataset_of(tokenizer, *flags).make(4, salt=0)
    assert {(each.prompt, each.output_len) for each in requests} == {
        (human["value"], 7),
        (answer["value"], 7),
    }
    with pytest.raises(UsageError, match="needs --tokenizer"):
        dataset_of(None, *flags)
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a", "output_tokens": 3}\n\n{"prompt": "b", "output_tokens": 9}\n')
    flags = ["--dataset-name", "custom", "--dataset-path", str(lines)]
    requests = dataset_of(None, *flags, "--custom-output-len", "-1").make(2, salt=0)
    assert {(each.prompt, each.output_len) for each in requests} == {("a", 3), ("b", 9)}
    lines.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UsageError, match=r"prompts\.jsonl, line 2"):
        dataset_of(None, *flags)


def test_prefixes_are_shared(tokenizer: Tokenizer) -> None:
    flags = ["--prefix-repetition-prefix-len", "9", "--prefix-repetition-suffix-len", "3"]
    flags += ["--prefix-repetition-num-prefixes", "2", "--dataset-name", "prefix_repetition"]
    requests = dataset_of(None, *flags).make(10, salt=0)
    prefixes = [tuple(each.prompt.split()[:9]) for each in requests]
    assert {len(each.prompt.split()) for each in requests} == {12}
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [5, 5]
