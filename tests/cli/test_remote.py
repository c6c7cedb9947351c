"""`jaxserve complete` and `jaxserve chat --url`, against a scripted server."""

import re
import time

import pytest

from jaxserve.checkpoint import Checkpoint
from jaxserve.cli import main
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.server_config import ServerConfig
from tests.cli.conftest import Run
from tests.cli.terminal import CTRL_C, CTRL_D, ENTER, Terminal
from tests.frontend.fake_engine import FakeEngine
from tests.server.running import RunningServer, scripted


def test_complete_answers_one_prompt_or_each_line(jaxserve: Run, server: RunningServer) -> None:
    url = ["--url", f"{server.url}/v1"]
    run = jaxserve("complete", *url, "-q", "One two three", "--max-tokens", "20")
    assert (run.returncode, run.stdout, run.stderr) == (0, "You have 3 tokens.\n", "")
    run = jaxserve("complete", *url, "--stats", stdin="a\n\na b\n", OPENAI_API_KEY="x")
    assert (run.returncode, run.stdout) == (0, "You have 1 tokens.\nYou have 2 tokens.\n")
    assert re.search(r"\[2 tokens in, 0 of them cached, \d out, stop; first after", run.stderr)
    run = jaxserve("complete", *url, "--max-tokens", "999999", stdin="a\nb\n")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.count("error: the server answered 400: ") == 2


def test_chat_talks_to_a_server_and_remembers(jaxserve: Run, server: RunningServer) -> None:
    flags = ["--url", server.url, "--model-name", "demo", "--system-prompt", "Be brief.", "--stats"]
    run = jaxserve("chat", *flags, stdin="Hi\nAnd now?\n/reset\nHi\n")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    first, second, third = (int(re.findall(r"\d+", line)[0]) for line in lines)
    assert second > first == third
    assert run.stderr.count("tokens in") == 3
    run = jaxserve("chat", "--url", server.url, "-q", "Hi")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("You have ")


def test_a_server_that_is_not_there_is_one_line(jaxserve: Run) -> None:
    run = jaxserve("chat", "--url", "http://127.0.0.1:1", "-q", "Hi")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("jaxserve: error: no server answers at http://127.0.0.1:1 (")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chat", "demo", "--url", "http://x"], "take MODEL out"),
        (["chat", "--url", "http://x", "--dtype", "half"], "take --dtype out"),
        (["chat", "--model-name", "x"], "need --url"),
        (["chat", "--url", "x:1"], "is not a URL"),
        (["complete", "--temperature", "-1"], "temperature=-1.0"),
    ],
)
def test_wrong_flags(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_on_the_server_too(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    server = scripted(
        checkpoint,
        tokenizer,
        "word ",
        server=ServerConfig(port=0, api_keys=("secret",)),
        ends=False,
        delay_s=0.01,
        max_model_len=4000,
    )
    engine = server.llm.client.engine
    assert isinstance(engine, FakeEngine)
    try:
        with Terminal("chat", "--url", server.url, JAXSERVE_API_KEY="secret") as terminal:
            terminal.wait_for(r"Ctrl-D ends\.\s+>")
            terminal.press("Go on." + ENTER)
            terminal.wait_for(r"(word\s+){4}")
            terminal.press(CTRL_C)
            terminal.wait_for(r"\(stopped\)")
            terminal.wait_for(r">")
            end = time.monotonic() + 10
            while engine.num_running and time.monotonic() < end:
                time.sleep(0.02)
            assert engine.num_running == 0
            terminal.press(CTRL_D)
            assert terminal.wait() == 0
            assert "Traceback" not in terminal.screen
    finally:
        server.stop()
