"""The table of architectures is what the golden cases say."""

from pathlib import Path

import jaxserve.models
from tests.models.features import table


def test_the_table_of_architectures_is_true() -> None:
    folder = Path(jaxserve.models.__file__).parent
    assert table() in (folder / "README.md").read_text(), (
        "make it again: python -m tests.models.features"
    )
