"""The work that every engine is given: seeded, the same on every machine.

W1  throughput    64 requests, prompts of 16-256 tokens, outputs of 16-128
W2  latency       one request, 128 tokens in, 128 out
W3  prefix reuse  32 requests that share 512 tokens and differ in 32 more, 32 out
WU  warm-up       4 short requests, not measured

Lengths depend on the seed only; token ids on the seed and the salt. Repeats take one salt each: the
amount of work stays the same and no prefix cache answers from an earlier repeat.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

NAMES = ("W1", "W2", "W3", "WU")
VOCAB_SIZE = 49_152  # SmolLM2's
FIRST_TOKEN = 17  # below are SmolLM2's special tokens


@dataclass(frozen=True, slots=True)
class WorkRequest:
    """One request: greedy, without EOS, so that `max_tokens` tokens come out."""

    prompt_token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are handed over all at once."""

    name: str
    salt: int
    requests: list[WorkRequest]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(r.prompt_token_ids) for r in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(r.max_tokens for r in self.requests)

    def write(self, folder: Path) -> Path:
        """Writes the file that the peers read; returns its path."""
        path = folder / f"{self.name}-{self.salt}.json"
        path.write_text(json.dumps(asdict(self)))
        return path


def make(
    name: str,
    *,
    seed: int = 0,
    salt: int = 0,
    num_requests: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    first_token: int = FIRST_TOKEN,
) -> Workload:
    """Makes one of NAMES; `num_requests` shortens or lengthens it."""
    rng = random.Random(f"tok-{name}-{seed}-{salt}")

    def ids(count: int) -> list[int]:
        return [rng.randrange(first_token, vocab_size) for _ in range(count)]

    requests = []
    if name == "W1":
        lengths = random.Random(seed)
        for _ in range(num_requests or 64):
            prompt_len, output_len = lengths.randint(16, 256), lengths.randint(16, 128)
            requests.append(WorkRequest(ids(prompt_len), output_len))
    elif name == "W2":
        requests = [WorkRequest(ids(128), 128) for _ in range(num_requests or 1)]
    elif name == "W3":
        prefix = ids(512)
        requests = [WorkRequest(prefix + ids(32), 32) for _ in range(num_requests or 32)]
    elif name == "WU":
        requests = [WorkRequest(ids(24 + 8 * i), 8) for i in range(num_requests or 4)]
    else:
        raise ValueError(f"unknown workload {name!r}; these are: {', '.join(NAMES)}")
    return Workload(name, salt, requests)
