"""`jaxserve run-batch`: OpenAI's batch files."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli import main
from jaxserve.commands.run_batch import answer_file
from tests.cli.conftest import Run
from tests.frontend.fake_engine import FakeEngine
from tests.server.running import RunningServer


def line(name: str, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


def answered(
    server: RunningServer, lines: list[str | bytes], output: Path, limit: int = 4
) -> list[dict[str, Any]]:
    data = [text.encode() if isinstance(text, str) else text for text in lines]
    failed, num = asyncio.run(answer_file(server.app, data, output, limit, True))
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    assert (failed, num) == (sum(row["error"] is not None for row in rows), len(rows))
    return rows


def test_answers_have_the_order_of_the_requests(server: RunningServer, tmp_path: Path) -> None:
    prompts = {f"r{i}": " a" * (1 + i % 7) for i in range(40)}
    lines: list[str | bytes] = [
        line(name, model="demo", prompt=text, max_tokens=1 + 5 * (i % 3))
        for i, (name, text) in enumerate(prompts.items())
    ]
    messages = [{"role": "user", "content": "Hi"}]
    lines.append(line("chat", "/v1/chat/completions", model="demo", messages=messages))
    rows = answered(server, lines, tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in rows] == [*prompts, "chat"]
    assert len({row["id"] for row in rows}) == 41
    for row, text in zip(rows, prompts.values(), strict=False):
        assert row.keys() == {"id", "custom_id", "response", "error"}
        assert (row["response"]["status_code"], row["error"]) == (200, None)
        body = row["response"]["body"]
        assert body["usage"]["prompt_tokens"] == len(text.split())
        assert row["response"]["request_id"]
    assert rows[-1]["response"]["body"]["object"] == "chat.completion"
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


def test_bad_lines_are_told_and_do_not_end_the_run(server: RunningServer, tmp_path: Path) -> None:
    lines: list[str | bytes] = [
        "{",
        b"\xff\xfe",
        "",
        "[1]",
        json.dumps({"url": "/v1/completions", "body": {}}),
        line("url", "/v1/models"),
        json.dumps({"custom_id": "body", "url": "/v1/completions", "body": "x"}),
        line("stream", model="demo", prompt="a", stream=True),
        line("model", model="other", prompt="a"),
        line("field", model="demo", prompt="a", temprature=1),
        line("good", model="demo", prompt="a"),
        line("good", model="demo", prompt="a"),
    ]
    rows = answered(server, lines, tmp_path / "out.jsonl")
    told = [(row["custom_id"], row["error"] and row["error"]["code"]) for row in rows]
    assert told == [
        (None, "invalid_json_line"),
        (None, "invalid_json_line"),
        (None, "invalid_json_line"),
        (None, "missing_required_parameter"),
        ("url", "invalid_url"),
        ("body", "missing_required_parameter"),
        ("stream", "unsupported_parameter"),
        ("model", "model_not_found"),
        ("field", "unknown_parameter"),
        ("good", None),
        ("good", "duplicate_custom_id"),
    ]
    assert rows[3]["error"]["message"].startswith("line 5: ")
    assert rows[0]["response"] is None
    assert rows[7]["response"]["status_code"] == 404
    assert rows[7]["response"]["body"]["error"]["code"] == "model_not_found"


def test_no_more_requests_run_than_allowed(server: RunningServer, tmp_path: Path) -> None:
    engine = server.llm.client.engine
    assert isinstance(engine, FakeEngine)
    most = 0
    script = engine.script

    def watched(*arguments: Any) -> Any:
        nonlocal most
        most = max(most, engine.num_running + 1)
        return script(*arguments)

    engine.script = watched
    try:
        lines: list[str | bytes] = [
            line(f"r{i}", model="demo", prompt="a", max_tokens=4) for i in range(30)
        ]
        answered(server, lines, tmp_path / "out.jsonl", limit=3)
    finally:
        engine.script = script
    assert most == 3


def test_files_that_cannot_be_used_are_told_before_the_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "in.jsonl"
    there.write_text("")
    for source, target, words in (
        (tmp_path / "none", tmp_path / "out", "none cannot be read"),
        (there, tmp_path / "no" / "out", "its folder does not exist"),
    ):
        assert main(["run-batch", "-i", str(source), "-o", str(target), "--model", "demo"]) == 2
        assert words in capsys.readouterr().err


def test_a_file_is_answered_by_a_model(jaxserve: Run, small: list[str], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    fields: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    lines = [
        line("a", prompt="The capital of France is", **fields),
        "nonsense",
        line("b", "/v1/chat/completions", messages=messages, **fields),
    ]
    source.write_text("\n".join(lines) + "\n")
    flags = ["-i", str(source), "-o", str(target), "--model", "demo"]
    run = jaxserve("run-batch", *flags, "--served-model-name", "tiny", *small)
    assert run.returncode == 0, run.stderr
    a, bad, b = [json.loads(row) for row in target.read_text().splitlines()]
    assert "Paris" in a["response"]["body"]["choices"][0]["text"]
    assert bad["error"]["message"] == "line 2: it is not JSON"
    assert "Paris" in b["response"]["body"]["choices"][0]["message"]["content"]
    assert f"3 requests, 1 of them failed: {target}" in run.stderr
