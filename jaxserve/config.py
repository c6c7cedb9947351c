"""The engine's arguments, with vLLM's names and defaults where the meaning is the same."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.errors import ConfigError

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")
ATTENTION_BACKENDS = (
    "auto",
    "xla",
    "tpu",
    "gpu",
    "reference",  # and with these, for debugging kernels on any machine, slowly:
    "tpu-interpret",
    "gpu-interpret",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that shapes an engine. Values are checked, once, in `__post_init__`.

    None means: decided at start-up, from the model, the device and the free memory.
    """

    model: str = "demo"  # "demo", a Hugging Face folder, a .gguf file, or a name on the hub
    tokenizer: str | None = None  # folder, .gguf file or name on the hub; None: the model's own
    skip_tokenizer_init: bool = False
    revision: str | None = None  # of a model on the hub: branch, tag or commit
    tokenizer_revision: str | None = None
    download_dir: str | None = None  # None: $HF_HUB_CACHE, else ~/.cache/huggingface/hub
    trust_remote_code: bool = False
    hf_overrides: dict[str, Any] = field(default_factory=dict)  # laid over config.json
    rope_scaling: dict[str, Any] | None = None  # laid over config.json, and its context stretched
    rope_theta: float | None = None
    served_model_name: str | None = None
    generation_config: str = "auto"  # "auto": the model's; "vllm": none; or a folder
    override_generation_config: dict[str, Any] = field(default_factory=dict)  # laid over that
    chat_template: str | None = None  # a file, or the template itself
    load_format: Literal["auto", "safetensors", "gguf", "orbax", "dummy"] = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"  # as dtype; fp8 is fp8_e4m3, stored unscaled
    max_model_len: int | None = None  # tokens, prompt and output together
    max_num_seqs: int | None = None  # rows
    max_num_batched_tokens: int | None = None  # tokens a step
    gpu_memory_utilization: float = 0.9  # share of the device's memory that the engine may use
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    block_size: int | None = None  # tokens a KV page
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    cudagraph_capture_sizes: tuple[int, ...] | None = None  # tokens that steps are padded to
    async_scheduling: bool = True  # one step in flight ahead of the host
    max_num_queued_reqs: int | None = None
    attention_backend: str = "auto"  # one of ATTENTION_BACKENDS
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    enforce_eager: bool = False  # accepted; XLA always compiles
    max_logprobs: int = 20  # -1: the whole vocabulary
    grammar_compile_timeout_s: float = 2.0  # of structured outputs; longer ones are refused
    max_grammar_bytes: int = 1 << 18  # of a schema, regex, grammar, or all choices together
    seed: int = 0
    compilation_cache_dir: str | None = None  # None: $JAXSERVE_CACHE_DIR, else ~/.cache/jaxserve
    warm_up: bool = True
    forbid_late_compile: bool = False  # a compile after warm-up raises (tests)
    disable_log_stats: bool = False
    show_progress: bool = True

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("; ".join(problems))


def _problems(c: EngineConfig) -> Iterator[str]:
    """What is wrong with a config, each as one sentence that names the argument."""
    if c.trust_remote_code:
        yield (
            "trust_remote_code=True is refused: jaxserve never runs code from a model folder. "
            "Leave it out; supported architectures load without it"
        )
    for name, allowed in (
        ("dtype", DTYPES),
        ("load_format", LOAD_FORMATS),
        ("kv_cache_dtype", KV_CACHE_DTYPES),
        ("attention_backend", ATTENTION_BACKENDS),
        ("scheduling_policy", ("fcfs", "priority")),
        ("layer_loop", ("auto", "scan", "unroll")),
    ):
        value = getattr(c, name)
        if value not in allowed:
            yield f"{name}={value!r} is unknown; use one of {', '.join(allowed)}"
    for name in (
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "kv_cache_memory_bytes",
        "num_gpu_blocks_override",
        "max_num_queued_reqs",
        "max_grammar_bytes",
    ):
        value = getattr(c, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            yield f"{name}={value!r} is not an integer; pass a whole number of at least 1"
        elif value < 1:
            yield f"{name}={value} is too small; use at least 1"
    if c.block_size not in (None, 8, 16, 32, 64, 128):
        yield f"block_size={c.block_size!r} is not usable; use 8, 16, 32, 64 or 128"
    sizes = c.cudagraph_capture_sizes
    if sizes is not None and not (
        isinstance(sizes, tuple | list)
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
    ):
        yield f"cudagraph_capture_sizes={sizes!r:.80} is no list of token counts, such as [8, 64]"
    if c.max_logprobs < -1:
        yield f"max_logprobs={c.max_logprobs} is too small; use -1 for the whole vocabulary"
    theta = c.rope_theta
    if theta is not None and not (_is_number(theta) and 0 < theta < 1e30):
        yield f"rope_theta={theta!r} is not usable; use a positive number, such as 10000"
    if c.rope_scaling is not None:
        yield from _rope_problems(c.rope_scaling)
    t = c.grammar_compile_timeout_s
    if isinstance(t, bool) or not (isinstance(t, int | float) and 0 < t <= 60):
        yield f"grammar_compile_timeout_s={t!r} is out of range; use more than 0 and at most 60"
    u = c.gpu_memory_utilization
    if not (isinstance(u, int | float) and math.isfinite(u) and 0 < u <= 1):
        yield f"gpu_memory_utilization={u!r} is out of range; use more than 0 and at most 1"
    if not -(2**63) <= c.seed < 2**63:
        yield f"seed={c.seed} is out of range; use a 64-bit integer"
    if not isinstance(c.model, str) or not c.model:
        yield f"model={c.model!r} is not a name; use 'demo', a model folder, or a .gguf file"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rope_problems(scaling: object) -> Iterator[str]:
    example = '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}'
    if not isinstance(scaling, dict):
        yield f"rope_scaling={scaling!r:.80} is not an object; use one such as {example}"
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str):
        yield f"rope_scaling has no rope_type; use one such as {example}"
    factor = scaling.get("factor", 1.0)
    if not (_is_number(factor) and 1 <= factor <= 1e6):
        yield f"rope_scaling has factor={factor!r:.80}; use a number of at least 1"
