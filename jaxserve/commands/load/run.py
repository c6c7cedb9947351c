"""One run: requests go out at times drawn before, and the answers are timed."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from jaxserve.commands.remote.api import Api, Chunk


@dataclass(slots=True)
class Record:
    """What happened to one request; times are of `time.perf_counter`, in seconds.

    Attributes:
        delay_s: How much later than drawn it was sent: it waited for --max-concurrency, or this
            process was too slow.
        chunks_s: When each chunk of the answer came; the first one brought the first output.
    """

    delay_s: float = 0.0
    start_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    num_input: int | None = None
    num_output: int | None = None
    text: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.chunks_s[0] - self.start_s if self.chunks_s else 0.0

    @property
    def e2el_s(self) -> float:
        return self.chunks_s[-1] - self.start_s if self.chunks_s else 0.0

    @property
    def itls_s(self) -> list[float]:
        """Gaps between chunks."""
        pairs = zip(self.chunks_s, self.chunks_s[1:], strict=False)
        return [later - earlier for earlier, later in pairs]

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (output tokens - 1); None for one token."""
        if self.num_output is None or self.num_output < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_output - 1)


def arrivals(num: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When to send each of `num` requests, in seconds after the start.

    Gaps are drawn from a gamma distribution of shape `burstiness` (1: a Poisson process) and scaled
    so that the last one is sent after num / rate seconds: the rate asked for is the rate sent.
    """
    import numpy as np

    if rate == float("inf"):
        return [0.0] * num
    rng = np.random.default_rng([seed & (2**63 - 1), 1])
    times = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), num))
    return (times * (num / rate / times[-1])).tolist()


async def run_load(
    api: "Api",
    path: str,
    bodies: Sequence[bytes],
    times: Sequence[float],
    *,
    max_concurrency: int | None,
    request_ids: Sequence[str],
    on_done: Callable[[], None],
) -> tuple[list[Record], float]:
    """Sends all and waits for all; the records in the order of `bodies`, and the seconds it took.

    A request is sent at its time whether or not earlier ones are answered, unless
    `max_concurrency` are under way.
    """
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    start = time.perf_counter()

    async def one(i: int, record: Record) -> None:
        async with places:
            record.start_s = time.perf_counter()
            record.delay_s = record.start_s - start - times[i]
            await _answered(api, path, bodies[i], record, request_ids[i])
        on_done()

    records = [Record() for _ in bodies]
    async with asyncio.TaskGroup() as group:
        for i, record in enumerate(records):
            wait_s = start + times[i] - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            group.create_task(one(i, record))
    return records, time.perf_counter() - start


async def _answered(api: "Api", path: str, body: bytes, record: Record, name: str) -> None:
    texts: list[str] = []

    def on_chunk(chunk: "Chunk") -> None:
        # The chunk that only tells the role is no output yet. What follows the first output counts,
        # also when it has no text: the token that ends an answer took a step as well.
        if chunk.is_output or (chunk.is_choice and (record.chunks_s or chunk.finish_reason)):
            record.chunks_s.append(chunk.at_s)
            texts.append(chunk.text)
        if chunk.usage is not None:
            record.num_input = chunk.usage.get("prompt_tokens")
            record.num_output = chunk.usage.get("completion_tokens")

    try:
        await api.stream(path, body, on_chunk, {"x-request-id": name})
        if not record.chunks_s:
            record.error = "the stream had no output"
    except JaxserveError as error:
        record.error = str(error)
    record.text = "".join(texts)
