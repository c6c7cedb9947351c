"""`KVGroup`: layers of one kind, which share pages, a page table and a block list."""

from dataclasses import dataclass

HEADROOM = 0.01  # share of a group's blocks that an admission leaves to those who run


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroup:
    """What the scheduler knows of a group: how many blocks it has, and how far its tokens see."""

    num_blocks: int  # with the null block 0, which is never handed out
    window: int | None = None  # a token sees itself and the window - 1 before it; None: all


def first_block(window: int | None, position: int, block_size: int) -> int:
    """The first block of which a token at `position`, or any after it, sees something."""
    return 0 if window is None else max(0, position - (window - 1)) // block_size


def most_blocks(window: int | None, *, num_tokens: int, step_tokens: int, block_size: int) -> int:
    """The most blocks that a sequence ever holds in a group, up to its `num_tokens`-th token.

    Args:
        step_tokens: The most tokens of a sequence that one step computes. All of their blocks are
            held at once, and those of the window before the first of them.
    """
    most = -(-num_tokens // block_size)
    if window is None:
        return most
    # The tokens first seen ... last computed of a step, wherever in its block the first one is.
    seen = window - 1 + step_tokens
    return min(most, -(-(seen - 1) // block_size) + 1)
