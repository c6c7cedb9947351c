"""Embeddings of a decoder: the hidden state of a text's last token, as vLLM's `--convert embed`."""

import numpy as np

from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams


def pooling_params() -> SamplingParams:
    """What a request that only pools is sampled with: nothing is kept of the token."""
    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)


def check_dimensions(dimensions: int | None, hidden_size: int) -> None:
    """Raises RequestError where a hidden state cannot be cut to so many dimensions."""
    if dimensions is not None and not 1 <= dimensions <= hidden_size:
        raise RequestError(
            f"dimensions={dimensions} is not allowed; use 1 to {hidden_size}",
            param="dimensions",
            code="invalid_value",
        )


def embedding(pooled: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """A hidden state [D] as a vector of length 1, cut to `dimensions` first (arXiv 2205.13147)."""
    pooled = pooled[:dimensions]
    return pooled / max(float(np.linalg.norm(pooled)), 1e-12)
