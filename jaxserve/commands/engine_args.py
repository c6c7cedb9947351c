"""The engine's flags, made from the fields of `EngineConfig`."""

import argparse
import json
import types
import typing
from collections.abc import Set
from dataclasses import Field, fields
from typing import Any

from jaxserve.commands.parser import UsageError, number, whole_number
from jaxserve.config import ATTENTION_BACKENDS, DTYPES, KV_CACHE_DTYPES, EngineConfig

# What each field means. Fields without a line here still get a flag.
HELP = {
    "tokenizer": "folder, .gguf file or hub name to take the tokenizer from (default: the model's)",
    "skip_tokenizer_init": "load no tokenizer; token ids in, token ids out",
    "revision": "branch, tag or commit of a hub model",
    "tokenizer_revision": "the same of a tokenizer on the hub",
    "download_dir": "where hub models are kept (default: $HF_HUB_CACHE, else "
    "~/.cache/huggingface/hub)",
    "trust_remote_code": "refused: jaxserve never runs code from a model folder",
    "hf_overrides": "JSON object laid over the model's config.json",
    "rope_scaling": "JSON object that replaces the model's rope scaling, such as "
    '{"rope_type":"yarn","factor":4}',
    "rope_theta": "base of the rotary embedding, instead of the model's",
    "served_model_name": "name under which the model is shown",
    "generation_config": "where sampling defaults come from: auto (the model), vllm (none), or a "
    "folder",
    "override_generation_config": "JSON object of sampling defaults that win over those, such as "
    '{"temperature":0.6}',
    "chat_template": "a file with a Jinja chat template, or the template itself",
    "load_format": "which weights to load; dummy: random ones",
    "dtype": f"type of weights and activations: {', '.join(DTYPES)}. auto is float32 on the CPU, "
    "and else the model's own",
    "kv_cache_dtype": f"type of stored keys and values: {', '.join(KV_CACHE_DTYPES)}. auto is "
    "dtype; fp8 halves the cache and is less exact",
    "max_model_len": "tokens of a request, prompt and output together; 1k is 1000, 1K is 1024 "
    "(default: the model's limit)",
    "max_num_seqs": "sequences that run at once (default: by device)",
    "max_num_batched_tokens": "tokens a step, at most (default: by device)",
    "gpu_memory_utilization": "share of the device's memory that the engine may use",
    "kv_cache_memory_bytes": "size of the KV cache, such as 2G (default: what is free)",
    "num_gpu_blocks_override": "pages of the KV cache, instead of what fits",
    "block_size": "tokens a KV page: 8, 16, 32, 64 or 128 (default: by device)",
    "enable_prefix_caching": "reuse the KV of prompts that begin alike",
    "enable_chunked_prefill": "spread a long prompt over several steps",
    "scheduling_policy": "who runs first: in order of arrival, or by priority",
    "cudagraph_capture_sizes": "token counts that steps are padded to, each compiled at start "
    "(default: powers of two); fewer start sooner and pad more",
    "async_scheduling": "plan the next step while the device works",
    "max_num_queued_reqs": "refuse requests when so many wait (serve: 1024)",
    "attention_backend": f"attention kernel: {', '.join(ATTENTION_BACKENDS)}. auto: the first that "
    "supports model and device",
    "layer_loop": "compile layers as a loop or one by one",
    "enforce_eager": "accepted for compatibility; XLA always compiles",
    "max_logprobs": "most log-probabilities a request may ask for; -1: the whole vocabulary",
    "grammar_compile_timeout_s": "seconds that the grammar of a request may take to compile",
    "max_grammar_bytes": "bytes of a request's schema, regex, grammar or choices",
    "seed": "seed of requests that bring none",
    "compilation_cache_dir": "where compiled programs are kept (default: ~/.cache/jaxserve)",
    "warm_up": "compile every shape at start",
    "forbid_late_compile": "fail if something compiles after warm-up (tests)",
    "disable_log_stats": "log no statistics",
    "show_progress": "show progress bars at start",
}
_NOT_A_FLAG = {"model"}  # positional, or --model
_HIDDEN = {"forbid_late_compile"}
_SERVER_ONLY = {"served_model_name", "max_num_queued_reqs", "disable_log_stats"}


def add_engine_arguments(
    parser: argparse.ArgumentParser,
    *,
    without: Set[str] = frozenset(),
    of_server: Set[str] = frozenset(),
) -> None:
    """Adds a flag for each field of `EngineConfig` but `without`. Only given flags are set.

    Args:
        of_server: Flags to add that only a server has a use for.
    """
    group = parser.add_argument_group("engine")
    for field in fields(EngineConfig):
        if field.name not in _NOT_A_FLAG | (_SERVER_ONLY - of_server) | without:
            flag = f"--{field.name.replace('_', '-')}"
            group.add_argument(flag, dest=field.name, **_options(field))


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, also as --model."""
    what = (
        "'demo', a Hugging Face folder, a .gguf file, or a name on the hub: org/name, or "
        "org/name:Q4_K_M for one of its GGUF files (default: demo)"
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=what)
    parser.add_argument("--model", metavar="MODEL", dest="model_flag", help="the same as MODEL")


def engine_config(args: argparse.Namespace, **defaults: Any) -> EngineConfig:
    """The engine's arguments of a command line, over `defaults`.

    Raises:
        ConfigError: A value is not allowed.
    """
    if args.model is not None and args.model_flag is not None:
        raise UsageError(
            f"two models are named, {args.model!r} and --model {args.model_flag!r}; name one"
        )
    names = {field.name for field in fields(EngineConfig)} - _NOT_A_FLAG
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in names
    }
    model = args.model if args.model_flag is None else args.model_flag
    return EngineConfig(model="demo" if model is None else model, **(defaults | given))


def _options(field: Field[Any]) -> dict[str, Any]:
    """What argparse needs to know of a field."""
    text = HELP.get(field.name, "")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    kind = without_none(field.type)
    if kind is bool:
        default = "on" if field.default else "off"
        text = argparse.SUPPRESS if field.name in _HIDDEN else f"{text} (default: {default})"
        return options | {"action": argparse.BooleanOptionalAction, "help": text}
    if isinstance(field.default, str | int | float):
        options["help"] += f" (default: {field.default})"
    if typing.get_origin(kind) is typing.Literal:
        options["choices"] = typing.get_args(kind)
    elif typing.get_origin(kind) is tuple:
        options |= {"nargs": "+", "type": whole_number, "metavar": "N"}
    elif field.name == "max_model_len":
        options |= {"type": _length, "metavar": "N"}
    elif kind in (int, float):
        options |= {"type": whole_number if kind is int else number, "metavar": "N"}
    elif kind is str:
        options["metavar"] = "X"
    else:
        options |= {"type": json_object, "metavar": "JSON"}
    return options


def _length(text: str) -> int | None:
    """A whole number; `auto` and `-1`, as in vLLM: what the model and the memory allow."""
    return None if text in ("auto", "-1") else whole_number(text)


def without_none(kind: Any) -> Any:
    """`int` of `int | None`."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return kind


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a JSON object; write it as '{{\"key\": value}}'"
        )
    return value
