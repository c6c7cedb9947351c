"""The report for a bug: complete, and without secrets."""

import pytest

from jaxserve.cli import main
from jaxserve.commands.collect_env import environment


def test_the_report_has_versions_machine_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env"]) == 0
    out = capsys.readouterr().out
    for words in (
        "python",
        "jaxlib",
        "transformers",
        "CPU",
        "cores",
        "memory",
        "devices:\n  cpu 0",
    ):
        assert words in out


def test_the_devices_can_be_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect-env", "--no-devices"]) == 0
    assert "not opened" in capsys.readouterr().out


def test_secrets_are_named_and_not_shown() -> None:
    variables = {
        "JAXSERVE_API_KEY": "abc",
        "HF_TOKEN": "def",
        "JAX_PLATFORMS": "cpu",
        "HOME": "/somewhere",
    }
    shown = dict(environment(variables))
    assert shown == {
        "HF_TOKEN": "(hidden)",
        "JAXSERVE_API_KEY": "(hidden)",
        "JAX_PLATFORMS": "cpu",
    }
