"""Embeddings of a decoder: the hidden state of a text's last token, as vLLM's `--convert embed`."""

import numpy as np

from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams


def pooling_params() -> SamplingParams:
    """What a request that only pools is sampled with: nothing is kept of the token."""
    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)


def embedding(pooled: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """A hidden state [D] as a vector of length 1, cut to `dimensions` first (arXiv 2205.13147).

    Raises:
        RequestError: There are fewer dimensions.
    """
    if dimensions is not None:
        if not 1 <= dimensions <= pooled.size:
            raise RequestError(
                f"dimensions={dimensions} is not allowed; use 1 to {pooled.size}",
                param="dimensions",
                code="invalid_value",
            )
        pooled = pooled[:dimensions]
    return pooled / max(float(np.linalg.norm(pooled)), 1e-12)
