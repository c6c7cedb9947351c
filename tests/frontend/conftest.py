"""What the frontend's tests share: the demo model's header and tokenizer."""

import pytest

from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo", load_format="dummy")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)
