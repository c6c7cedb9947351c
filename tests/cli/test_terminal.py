"""`jaxserve chat` and `demo` in a terminal: streaming, Ctrl-C, the end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.terminal import CTRL_C, CTRL_D, ENTER, ROOT, Terminal

pytestmark = pytest.mark.timeout(300)


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(small: list[str]) -> None:
    flags = ["--temperature", "0", "--ignore-eos", "--max-tokens", "220"]
    with Terminal("chat", "demo", *flags, *small) as terminal:
        terminal.wait_for(r"Ctrl-D ends\.\s+>")
        for message in ("Count from one to one thousand.", "And from ten to ninety."):
            terminal.press(message + ENTER)
            terminal.wait_for(r"\n[^\n]*(\w+\W+){4}")  # the answer has begun
            terminal.press(CTRL_C)
            terminal.wait_for(r"\(stopped\)")
            terminal.wait_for(r">")
        terminal.press("/reset" + ENTER)
        terminal.wait_for(r"starts anew")
        terminal.wait_for(r">")
        terminal.press(CTRL_D)
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.screen


def test_the_demo_draws_a_table_in_a_terminal(small: list[str]) -> None:
    with Terminal("demo", "--num-prompts", "3", "--max-tokens", "8", *small) as terminal:
        terminal.wait_for(r"Answer")
        terminal.wait_for(r"3 requests")
        assert terminal.wait() == 0
        assert "capital" in terminal.screen


def test_ctrl_c_is_code_130_without_a_traceback(tmp_path: Path) -> None:
    fifo = tmp_path / "prompts"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "jaxserve", "generate", "--prompt-file", str(fifo)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with process, fifo.open("w"):  # opens when the command reads
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "jaxserve: interrupted"


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m jaxserve collect-env --no-devices; echo code=$? >&2"
    run = subprocess.run(
        ["sh", "-c", f"({command}) | true"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in run.stderr
    assert "BrokenPipe" not in run.stderr
