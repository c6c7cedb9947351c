"""`jaxserve serve` as a process: it starts, serves, drains and ends as an operator expects."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server.running import until

SMALL = (
    "--max-model-len=256", "--max-num-seqs=8", "--max-num-batched-tokens=64",
    "--num-gpu-blocks-override=40", "--layer-loop=scan", "--cudagraph-capture-sizes=8",
)  # fmt: skip


class Process:
    """A server's process and what it wrote to stderr."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "jaxserve", "serve", *flags]
        self.popen = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=os.environ | (env or {}),
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line)

    def wait_ready(self, timeout_s: float = 280) -> str:
        """The address, once it serves."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self.lines:
                if found := re.search(r"serving .* at (\S+) after", line):
                    return found[1]
            assert self.popen.poll() is None, "".join(self.lines)
            time.sleep(0.05)
        raise AssertionError("".join(self.lines))

    def end(self, timeout_s: float = 30) -> int:
        code = self.popen.wait(timeout_s)
        self._reader.join(5)
        return code


@pytest.fixture
def launch() -> Iterator[Any]:
    started: list[Process] = []

    def begin(*flags: str, **options: Any) -> Process:
        started.append(Process(*flags, **options))
        return started[-1]

    yield begin
    for process in started:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.wait()
        if process.popen.stderr is not None:
            process.popen.stderr.close()


@pytest.mark.timeout(600)
def test_a_server_starts_serves_and_drains_on_sigterm(launch: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsk-secret-one\n")
    config = tmp_path / "server.yaml"
    config.write_text("served-model-name: [tiny, demo]\nport: 0\nlog-format: json\n")
    process = launch(
        "demo", *SMALL, "--config", str(config), "--api-key-file", str(keys),
        "--shutdown-timeout-s=120", env={"JAXSERVE_ENABLE_PROMPT_TOKENS_DETAILS": "1"},
    )  # fmt: skip
    url = process.wait_ready()
    assert url.startswith("http://127.0.0.1:")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-secret-one", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny", "demo"]
    answer = client.completions.create(
        model="tiny", prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None  # from the environment
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()

    streams = [
        client.completions.create(
            model="tiny", prompt=f"Count {i}:", max_tokens=60, stream=True, temperature=0,
            extra_body={"ignore_eos": True},
        )
        for i in range(4)
    ]  # fmt: skip
    texts = [next(iter(stream)).choices[0].text for stream in streams]
    process.popen.send_signal(signal.SIGTERM)
    with httpx.Client(base_url=url) as http:
        until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/health").status_code == 200
        refused = http.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "x"},
            headers={"authorization": "Bearer sk-secret-one"},
        )
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == "server_shutting_down"
    reasons = []
    for i, stream in enumerate(streams):
        for chunk in stream:
            texts[i] += chunk.choices[0].text
            reasons.append(chunk.choices[0].finish_reason)
    assert reasons.count("length") == 4  # none was cut
    assert process.end() == 0
    log = "".join(process.lines)
    assert "sk-secret-one" not in log
    lines = [json.loads(line) for line in process.lines if line.startswith("{")]
    access = [line for line in lines if line.get("path") == "/v1/completions"]
    assert {line["status"] for line in access} >= {200, 503}
    assert all(line["request_id"] for line in access)
    client.close()


@pytest.mark.timeout(600)
def test_what_outlasts_the_grace_time_is_told_so(launch: Any) -> None:
    process = launch("demo", *SMALL, "--port=0", "--shutdown-timeout-s=0.1")
    url = process.wait_ready()
    body = {"model": "demo", "prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=url, timeout=30) as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "server_shutting_down"
    assert rest[-1] == "data: [DONE]"
    assert process.end() == 0


def test_a_taken_port_shows_before_the_model_loads(launch: Any) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = launch("demo", f"--port={taken.getsockname()[1]}")
        assert process.end(60) == 2
    assert "--port" in "".join(process.lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temprature=1"], "unknown flag"),
        (["--port=99999"], "out of range"),
        (["--tool-call-parser=hermez", "--enable-auto-tool-choice"], "hermes"),
        (["--enable-auto-tool-choice"], "tool-call-parser"),
        (["--config=/nowhere.yaml"], "cannot be read"),
        (["--api-key-file=/nowhere"], "cannot be read"),
        (["--max-n=0"], "too small"),
        (["-tp", "2"], "tensor_parallel_size"),
        (["--quantization=awq"], "quantization"),
        (["--enable-lora"], "enable_lora"),
        (["--api-server-count=2"], "api-server-count"),
        (["--log-config-file=x"], "use --log-level"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(launch: Any, flags: list[str], words: str) -> None:
    process = launch("demo", *flags)
    assert process.end(60) in (1, 2)
    text = "".join(process.lines)
    assert words in text
    assert "Traceback" not in text


def test_the_flags_of_vllm_serve_are_known() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "jaxserve", "serve", "--disable-log-requests", "demo", "-tp", "1",
         "--no-enable-log-requests", "--tokenizer-mode", "auto", "--shutdown-timeout=7",
         "--disable-uvicorn-access-log",
         "--swap_space", "4", "--compilation-config", '{"level": 3}', "--download-dir", "models",
         "--max-model-len=1k", "--gpu-memory-utilization=0.8", "--print-config"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "max_model_len: 1000  # command line" in result.stdout
    assert "model: 'demo'  # command line" in result.stdout
    assert "shutdown_timeout_s: 7.0  # command line" in result.stdout
    assert "disable_access_log: True  # command line" in result.stdout


# A flag of vllm serve with its values, and what becomes of it.
FLAGS = {
    "--served-model-name a b": "served_model_name: ('a', 'b')",
    "--tokenizer other": "tokenizer: 'other'",
    "--revision r1": "revision: 'r1'",
    "--tokenizer-revision r2": "tokenizer_revision: 'r2'",
    "--dtype half": "dtype: 'half'",
    "--max-model-len 25.6k": "max_model_len: 25600",
    "--gpu-memory-utilization 0.5": "gpu_memory_utilization: 0.5",
    "--kv-cache-memory-bytes 1G": "kv_cache_memory_bytes: 1073741824",
    "--max-num-seqs 7": "max_num_seqs: 7",
    "--max-num-batched-tokens 1K": "max_num_batched_tokens: 1024",
    "--kv-cache-dtype fp8": "kv_cache_dtype: 'fp8'",
    "--cudagraph-capture-sizes 8 64": "cudagraph_capture_sizes: (8, 64)",
    "--no-enable-prefix-caching": "enable_prefix_caching: False",
    "--block-size 32": "block_size: 32",
    "--no-enable-chunked-prefill": "enable_chunked_prefill: False",
    "--enforce-eager": "enforce_eager: True",
    "--seed 5": "seed: 5",
    "--max-logprobs -1": "max_logprobs: -1",
    "--generation-config vllm": "generation_config: 'vllm'",
    '--override-generation-config {"temperature":0.5}': (
        "override_generation_config: {'temperature': 0.5}"
    ),
    "--load-format safetensors": "load_format: 'safetensors'",
    "--download-dir d": "download_dir: 'd'",
    "--disable-log-stats": "disable_log_stats: True",
    "--enable-log-requests": "enable_log_requests: True",
    "--max-log-len 10": "max_log_len: 10",
    "--uvicorn-log-level debug": "log_level: 'debug'",
    "--reasoning-parser qwen3": "reasoning_parser: 'qwen3'",
    "--enable-auto-tool-choice": "enable_auto_tool_choice: True",
    "--tool-call-parser hermes": "tool_call_parser: 'hermes'",
    "--host 0.0.0.0": "host: '0.0.0.0'",
    "--port 81": "port: 81",
    "--root-path /x": "root_path: '/x'",
    '--allowed-origins ["http://a"]': "allowed_origins: ('http://a',)",
    "--chat-template t": "chat_template: 't'",
    "--tokenizer-mode auto": None,
    "--code-revision c": None,
    '--structured-outputs-config {"backend":"guidance"}': None,
}


def test_every_flag_of_vllm_serve_has_its_effect() -> None:
    flags = [word for flag in FLAGS for word in flag.split()]
    result = subprocess.run(
        [sys.executable, "-m", "jaxserve", "serve", "demo", *flags, "--print-config"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = set(result.stdout.splitlines())
    expected = {f"{line}  # command line" for line in FLAGS.values() if line}
    assert expected <= lines, expected - lines


def test_print_config_tells_where_each_setting_is_from(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("max-model-len: 512\nport: 1234\nseed: 3\n")
    result = subprocess.run(
        [sys.executable, "-m", "jaxserve", "serve", "demo", "--print-config",
         f"--config={config}", "--port=99"],
        capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {"JAXSERVE_SEED": "7", "JAXSERVE_PORT": "tcp://10.0.0.1:80"},
    )  # fmt: skip
    assert f"max_model_len: 512  # {config}" in result.stdout
    assert "port: 99  # command line" in result.stdout
    assert "seed: 7  # environment" in result.stdout
    assert "host: '127.0.0.1'  # default" in result.stdout


@pytest.mark.parametrize(
    "text", ["max-modle-len: 5", "- a\n- b", "port: [1, 2]", "enable-log-requests: maybe", "a: [", ]
)  # fmt: skip
def test_a_wrong_file_is_told_in_one_line(launch: Any, tmp_path: Path, text: str) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(text)
    process = launch("demo", f"--config={config}")
    assert process.end(60) == 2
    assert "server.yaml" in "".join(process.lines)
    assert "Traceback" not in "".join(process.lines)


@pytest.mark.timeout(600)
def test_a_unix_socket_serves_and_is_taken_away(launch: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = launch("demo", *SMALL, f"--uds={path}")
    process.wait_ready()
    assert path.stat().st_mode & 0o777 == 0o600
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://s") as http:
        assert http.get("/health").status_code == 200
        body = {"model": "demo", "prompt": "a", "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 200
    process.popen.send_signal(signal.SIGINT)
    assert process.end() == 0
    assert not path.exists()
