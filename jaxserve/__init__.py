"""jaxserve: an LLM server in JAX, with vLLM's Python interface.

Names are imported when they are first used, so `import jaxserve` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.async_llm import AsyncLLM
    from jaxserve.config import EngineConfig
    from jaxserve.llm import LLM
    from jaxserve.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestOutput,
    )
    from jaxserve.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
    from jaxserve.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "EngineConfig": "config",
    "SamplingParams": "sampling_params",
    "BeamSearchParams": "sampling_params",
    "RequestOutputKind": "sampling_params",
    "StructuredOutputsParams": "structured_outputs",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "BeamSearchOutput": "outputs",
    "BeamSearchSequence": "outputs",
    "EmbeddingOutput": "outputs",
    "EmbeddingRequestOutput": "outputs",
    "Logprob": "outputs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    value = getattr(import_module(f"jaxserve.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
