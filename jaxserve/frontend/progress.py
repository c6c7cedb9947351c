"""The progress bar of `LLM.generate`."""

import time
from collections.abc import Callable
from typing import Any, Self

from jaxserve.outputs import RequestOutput


class Progress:
    """Counts finished prompts and shows the input and output tokens a second.

    Args:
        total: Prompts.
        use_tqdm: Whether to show it, or what to call instead of tqdm.
    """

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any]) -> None:
        self._bar: Any = None
        self._num_input = self._num_output = 0
        self._start_s = time.perf_counter()
        if use_tqdm and total:
            make = use_tqdm
            if not callable(make):
                from tqdm.auto import tqdm as make
            self._bar = make(total=total, desc="Processed prompts", dynamic_ncols=True)

    def add(self, output: RequestOutput) -> None:
        """One prompt is finished."""
        if self._bar is None:
            return
        self._num_input += len(output.prompt_token_ids)
        self._num_output += sum(len(choice.token_ids) for choice in output.outputs)
        elapsed_s = max(time.perf_counter() - self._start_s, 1e-9)
        self._bar.set_postfix_str(
            f"input: {self._num_input / elapsed_s:.1f} tok/s, "
            f"output: {self._num_output / elapsed_s:.1f} tok/s",
            refresh=False,
        )
        self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
