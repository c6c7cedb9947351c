"""How far loading is, on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def loading_bar(*, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """What to call with bytes done and bytes in all; None if nothing is to be shown."""
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="Loading", unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
