"""The keyword arguments of `LLM` and `AsyncLLM`: `EngineConfig`'s fields, and vLLM's other names.

A script written for vLLM keeps working when what it sets has no meaning here; what would change
the result is refused, never ignored.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, UnsupportedError

# Accepted with any value: nothing here corresponds to them.
_NO_EFFECT = """
    allowed_local_media_path allowed_media_domains code_revision compilation_config
    cudagraph_metrics device disable_async_output_proc disable_cascade_attn
    disable_custom_all_reduce disable_log_requests distributed_executor_backend
    enable_log_requests fail_on_environ_validation ignore_patterns jit_monitor_mode
    limit_mm_per_prompt max_cudagraph_capture_size max_num_partial_prefills
    max_parallel_loading_workers max_seq_len_to_capture mm_processor_cache_gb
    mm_processor_kwargs model_loader_extra_config multi_step_stream_outputs num_scheduler_steps
    optimization_level performance_mode prefix_caching_hash_algo preemption_mode
    safetensors_load_strategy shutdown_timeout swap_space
    use_v2_block_manager worker_use_ray
"""
NO_EFFECT = frozenset(_NO_EFFECT.split())
# Accepted with these values, which say what jaxserve does anyway.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention_config": (None, {}),
    "config_format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0, None),
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "enable_expert_parallel": (False,),
    "enable_lora": (False, None),
    "enable_prompt_embeds": (False,),
    "enable_sleep_mode": (False,),
    "hf_config_path": (None,),
    "kv_offloading_size": (None,),
    "kv_transfer_config": (None,),
    "logits_processors": (None, []),
    "logprobs_mode": ("raw_logprobs",),
    "model_impl": ("auto",),
    "override_pooler_config": (None,),
    "pipeline_parallel_size": (1,),
    "pooler_config": (None,),
    "prefill_context_parallel_size": (1,),
    "quantization": (None,),
    "runner": ("auto", "generate"),
    "spec_method": (None,),
    "spec_model": (None,),
    "spec_tokens": (None,),
    "speculative_config": (None,),
    "stream_interval": (1,),
    "task": ("auto", "generate", None),
    "tensor_parallel_size": (1,),
    "tokenizer_mode": ("auto", "hf", "fast"),
    "trust_request_chat_template": (False,),
}
# The same within an object: other keys are refused, and those that are not here have any value.
STRUCTURED_OUTPUTS: Mapping[str, tuple[Any, ...] | None] = {
    "backend": None,  # there is one
    "disable_fallback": None,
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
    "enable_in_reasoning": (False,),
    "reasoning_parser": ("", None),
    "reasoning_parser_plugin": ("", None),
}
_FIELDS = frozenset(field.name for field in fields(EngineConfig))


def engine_config(model: str, given: Mapping[str, Any], **defaults: Any) -> EngineConfig:
    """The config that keyword arguments ask for, over `defaults`.

    Raises:
        ConfigError: A name is unknown, or a value is not allowed.
        UnsupportedError: A value asks for something that is not implemented.
    """
    known = sorted(_FIELDS | NO_EFFECT | ONLY.keys() | {"structured_outputs_config"})
    problems = []
    given = dict(given)
    _check_structured_outputs(given.pop("structured_outputs_config", None))
    if given.pop("hf_token", None) not in (None, True):  # never shown
        problems.append("hf_token is not taken as an argument; set HF_TOKEN in the environment")
    if given.get("max_model_len") in (-1, "auto"):  # as in vLLM: what the model allows
        given["max_model_len"] = None
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "see EngineConfig for all names"
            problems.append(f"unknown argument {name!r}; {hint}")
    if problems:
        raise ConfigError("; ".join(problems))
    refused = [
        f"{name}={given[name]!r} is not supported; leave it out, or use "
        f"{' or '.join(repr(value) for value in allowed)}"
        for name, allowed in ONLY.items()
        if name in given and given[name] not in allowed
    ]
    if refused:
        raise UnsupportedError("; ".join(refused))
    own = {name: value for name, value in given.items() if name in _FIELDS}
    return EngineConfig(**{**defaults, **own, "model": model})


def _check_structured_outputs(given: Any) -> None:
    """Raises UnsupportedError for a `structured_outputs_config` that would change something."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"structured_outputs_config={given!r:.80} is not an object; leave it out")
    for key, value in (given or {}).items():
        allowed = STRUCTURED_OUTPUTS.get(key, ())
        if allowed is not None and value not in allowed:
            raise UnsupportedError(
                f"structured_outputs_config.{key}={value!r:.80} is not supported; leave it out "
                "(reasoning parsers have a flag of their own, --reasoning-parser)"
            )
