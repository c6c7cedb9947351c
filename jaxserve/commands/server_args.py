"""The server's flags, made from the fields of `ServerConfig` and `RequestLimits`."""

import argparse
import json
import typing
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from jaxserve.commands.engine_args import json_object, without_none
from jaxserve.commands.parser import UsageError, number, whole_number
from jaxserve.server_config import RequestLimits, ServerConfig

HELP = {
    "host": "address to listen on; 0.0.0.0 is all of them",
    "port": "port to listen on; 0 is any free one",
    "uds": "listen on this Unix socket instead",
    "root_path": "path under which a proxy shows this server, such as /llm",
    "allowed_hosts": "Host headers to accept (default: every well-formed one)",
    "allowed_origins": "origins that browsers may call from (CORS); '*' is all (default: none)",
    "allowed_methods": "methods of such calls",
    "allowed_headers": "headers of such calls",
    "allow_credentials": "let such calls carry credentials",
    "ssl_keyfile": "TLS: private key (PEM)",
    "ssl_certfile": "TLS: certificate (PEM)",
    "ssl_ca_certs": "TLS: certificates that clients are checked against",
    "ssl_cert_reqs": "TLS: 0 clients need no certificate, 2 they do",
    "ssl_ciphers": "TLS: OpenSSL's cipher string",
    "protect_metrics": "/metrics needs an API key, too",
    "max_concurrent_requests_per_key": "requests of one API key at a time; more are answered 429",
    "shared_prefix_cache": "let requests of different API keys share cached prefixes",
    "served_model_name": "names under which the model is served; the first stands in answers",
    "response_role": "role of the answers",
    "default_chat_template_kwargs": "JSON object of template variables for every chat, such as "
    "'{\"enable_thinking\": false}'",
    "chat_template_content_format": "accepted for compatibility; the template decides",
    "enable_auto_tool_choice": "let the model decide whether to call a tool",
    "tool_call_parser": "how the model writes tool calls, such as hermes or llama3_json",
    "exclude_tools_when_tool_choice_none": "hide tools from the template when tool_choice is none",
    "reasoning_parser": "how the model marks its reasoning, such as qwen3 or deepseek_r1",
    "enable_prompt_tokens_details": "tell how many prompt tokens were cached",
    "enable_force_include_usage": "usage in every chunk of every stream",
    "return_tokens_as_token_ids": "write token_id:N for tokens in log-probabilities",
    "allow_unknown_fields": "ignore request fields that are not known, instead of refusing them",
    "disable_docs": "serve neither /docs nor /openapi.json",
    "disable_playground": "serve no page at /",
    "enable_log_requests": "log prompts and parameters of requests",
    "enable_log_outputs": "log outputs, too",
    "max_log_len": "characters of a prompt or output in the log, at most",
    "disable_access_log": "log no line for each request",
    "log_level": "from which level on to log: debug, info, warning, error or critical",
    "log_format": "text, or json: one object a line",
    "metrics_prefix": "jaxserve, or vllm for dashboards made for it",
    "otlp_traces_endpoint": "send OpenTelemetry traces there, such as http://localhost:4318",
    "request_timeout_s": "seconds a request may take (default: no limit)",
    "stream_interval": "tokens a streamed chunk brings, at least",
    "sse_keep_alive_interval_s": "seconds without an event after which a comment is sent; 0: never",
    "engine_step_timeout_s": "seconds without progress after which /health fails",
    "shutdown_timeout_s": "seconds that running requests have to end after SIGTERM",
    "shutdown_delay_s": "seconds between SIGTERM and refusing new requests",
    "max_body_bytes": "bytes of a request's body",
    "max_header_bytes": "bytes of its headers",
    "max_headers": "number of its headers",
    "header_timeout_s": "seconds for its headers to be complete",
    "body_timeout_s": "seconds for its body to be complete",
    "max_json_depth": "nesting of its JSON",
    "max_prompts": "prompts of one completion",
    "max_n": "n of a request",
    "max_sequences": "prompts times n",
    "max_messages": "messages of a chat",
    "max_stop_strings": "stop strings",
    "max_stop_chars": "characters of a stop string",
    "max_stop_token_ids": "stop token ids",
    "max_logit_bias": "entries of logit_bias",
    "max_bad_words": "bad words",
    "max_tools": "tools",
}
_NOT_A_FLAG = {"api_keys", "limits"}
_OF_ANSWERS = {
    "served_model_name", "response_role", "default_chat_template_kwargs", "enable_auto_tool_choice",
    "tool_call_parser", "exclude_tools_when_tool_choice_none", "reasoning_parser",
    "enable_prompt_tokens_details", "return_tokens_as_token_ids", "allow_unknown_fields",
}  # fmt: skip


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that shape answers, for a command that listens to no network."""
    group = parser.add_argument_group("answers")
    for field in fields(ServerConfig):
        if field.name in _OF_ANSWERS:
            group.add_argument(_flag(field), dest=field.name, **_options(field))


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field; only given flags are set."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--api-key",
        nargs="+",
        metavar="KEY",
        default=argparse.SUPPRESS,
        help="keys that clients must send one of; better in --api-key-file or JAXSERVE_API_KEY",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a file with one key a line",
    )
    for field in fields(ServerConfig):
        if field.name not in _NOT_A_FLAG:
            group.add_argument(_flag(field), dest=field.name, **_options(field))
    group = parser.add_argument_group("limits of a request")
    for field in fields(RequestLimits):
        group.add_argument(_flag(field), dest=field.name, **_options(field))


def server_config(values: dict[str, Any]) -> ServerConfig:
    """The server's settings among the values of a command line.

    Raises:
        ConfigError: A value is not allowed.
    """
    limits = RequestLimits(**_among(values, RequestLimits))
    own = _among(values, ServerConfig)
    return ServerConfig(**own, api_keys=_api_keys(values), limits=limits)


def _among(values: dict[str, Any], kind: type) -> dict[str, Any]:
    names = {field.name for field in fields(kind)} - _NOT_A_FLAG
    return {
        name: _items(name, value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in names
    }


def _items(name: str, values: list[str]) -> tuple[str, ...]:
    """Several values of a flag; as with vLLM, also one JSON list of them.

    Raises:
        UsageError: What begins like a JSON list is none of strings.
    """
    if len(values) != 1 or not values[0].startswith("["):
        return tuple(values)
    try:
        found = json.loads(values[0])
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"{flag} {values[0]!r} is no JSON list of strings; write {flag} A B")
    return tuple(found)


def _api_keys(values: dict[str, Any]) -> tuple[str, ...]:
    keys = list(values.get("api_key") or [])
    path = values.get("api_key_file")
    if path is not None:
        try:
            lines = Path(path).expanduser().read_text(encoding="ascii").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"--api-key-file {path!r} cannot be read ({error})") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UsageError(f"--api-key-file {path!r} holds no key; write one a line")
        keys += found
    return tuple(dict.fromkeys(keys))


def _flag(field: Field[Any]) -> str:
    name = (
        field.name.removesuffix("_s") if field.name == "sse_keep_alive_interval_s" else field.name
    )
    return f"--{name.replace('_', '-')}"


def _options(field: Field[Any]) -> dict[str, Any]:
    text = HELP[field.name]
    kind = without_none(field.type)
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if isinstance(field.default, str | int | float) and field.default not in ("", 0):
        options["help"] += f" (default: {field.default})"
    if typing.get_origin(kind) is typing.Literal:
        options["choices"] = typing.get_args(kind)
    elif typing.get_origin(kind) is tuple:
        options |= {"nargs": "+", "metavar": "X"}
    elif kind in (int, float):
        options |= {"type": whole_number if kind is int else number, "metavar": "N"}
    elif kind is str:
        options["metavar"] = "X"
    else:
        options |= {"type": json_object, "metavar": "JSON"}
    return options
