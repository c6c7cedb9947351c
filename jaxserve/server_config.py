"""`ServerConfig` and its `RequestLimits`: everything that shapes the HTTP server.

vLLM's names where it has them.
"""

import ipaddress
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jaxserve.errors import ConfigError

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Upper bounds of a request; each is a flag (`--max-body-bytes`), shown in /openapi.json."""

    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 64 << 10  # all of them together
    max_headers: int = 128
    header_timeout_s: float = 15.0  # for a request's headers to be complete
    body_timeout_s: float = 60.0  # for its body
    max_json_depth: int = 64
    max_prompts: int = 1024  # of one completion
    max_n: int = 128  # choices a prompt
    max_sequences: int = 2048  # prompts times n
    max_messages: int = 10_000
    max_stop_strings: int = 4
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024
    max_bad_words: int = 128
    max_tools: int = 128

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name}={value!r} is too small; use more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Checked once, when made.

    Raises:
        ConfigError: All that is wrong, at once.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    uds: str | None = None  # a Unix socket instead of host and port
    root_path: str = ""  # path under which a proxy shows this server
    allowed_hosts: tuple[str, ...] = ()  # Host headers; none: any well-formed one
    allowed_origins: tuple[str, ...] = ()  # CORS; none: off
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = ssl.CERT_NONE
    ssl_ciphers: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # never in a log
    protect_metrics: bool = False  # /metrics needs a key, too
    max_concurrent_requests_per_key: int | None = None
    shared_prefix_cache: bool = False  # with keys: share cached prefixes between them
    served_model_name: tuple[str, ...] = ()  # none: the model's own name
    response_role: str = "assistant"
    default_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    chat_template_content_format: Literal["auto", "string", "openai"] = "auto"
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None
    exclude_tools_when_tool_choice_none: bool = False
    reasoning_parser: str | None = None
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False
    return_tokens_as_token_ids: bool = False
    allow_unknown_fields: bool = False
    disable_docs: bool = False  # neither /docs nor /openapi.json
    disable_playground: bool = False
    enable_log_requests: bool = False
    enable_log_outputs: bool = False
    max_log_len: int | None = None
    disable_access_log: bool = False
    log_level: str = "info"  # debug, info, warning, error or critical
    log_format: Literal["text", "json"] = "text"
    metrics_prefix: str = "jaxserve"
    otlp_traces_endpoint: str | None = None
    request_timeout_s: float | None = None  # None: as long as it takes
    stream_interval: int = 1  # tokens a streamed chunk, at least
    sse_keep_alive_interval_s: float = 0.0  # 0: no comments while nothing comes
    engine_step_timeout_s: float = 60.0  # /health fails when a step takes longer
    shutdown_timeout_s: float = 30.0  # for running requests to end after SIGTERM
    shutdown_delay_s: float = 0.0  # not ready, but still accepting, before that
    limits: RequestLimits = field(default_factory=RequestLimits)

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def is_loopback(self) -> bool:
        if self.uds is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _problems(c: ServerConfig) -> Iterator[str]:
    if not 0 <= c.port < 65536:
        yield f"port={c.port} is out of range; use 1 to 65535, or 0 for any free one"
    if (c.ssl_keyfile is None) != (c.ssl_certfile is None) and c.ssl_certfile is None:
        yield "ssl_keyfile needs ssl_certfile; pass both"
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(c, name)
        if path is not None and not Path(path).expanduser().is_file():
            yield f"{name}={path!r} is not a file; pass one in PEM"
    if c.root_path and (not c.root_path.startswith("/") or c.root_path.endswith("/")):
        yield f"root_path={c.root_path!r} must begin with / and not end with it"
    if any(not key or not key.isascii() or not key.isprintable() or " " in key
           for key in c.api_keys):  # fmt: skip
        yield "an API key is empty or holds spaces or other than printable ASCII; choose another"
    if c.enable_auto_tool_choice and c.tool_call_parser is None:
        yield "enable_auto_tool_choice needs tool_call_parser (--tool-call-parser)"
    if c.log_level.upper() not in LOG_LEVELS:
        yield f"log_level={c.log_level!r} is unknown; use {', '.join(LOG_LEVELS).lower()}"
    if c.metrics_prefix not in ("jaxserve", "vllm"):
        yield f"metrics_prefix={c.metrics_prefix!r} is unknown; use jaxserve or vllm"
    for name in ("request_timeout_s", "max_concurrent_requests_per_key", "max_log_len"):
        value = getattr(c, name)
        if value is not None and value <= 0:
            yield f"{name}={value} is too small; use more than 0"
    for name in ("stream_interval", "engine_step_timeout_s"):
        if getattr(c, name) <= 0:
            yield f"{name}={getattr(c, name)} is too small; use more than 0"
    for name in ("shutdown_timeout_s", "shutdown_delay_s", "sse_keep_alive_interval_s"):
        if getattr(c, name) < 0:
            yield f"{name}={getattr(c, name)} is negative; use 0 or more"
