"""`BlockPool`: who holds which KV block of one group, and which free blocks can be found again."""

from collections import OrderedDict, deque
from collections.abc import Iterable

NULL_BLOCK = 0  # padding is written to its page, so nobody ever holds it


class BlockPool:
    """Reference-counted blocks of one KV group; every operation is O(1) for each block it names.

    A block is in one of three places: held (one reference or more), blank (free, nothing in it that
    could be found again), or evictable (free, but a prefix-cache hit still finds it by its digest).
    Blank blocks are handed out first, then evictable ones, each least recently freed first.

    Args:
        num_blocks: Blocks of the group, with the null block 0, which is never handed out.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._blank = deque(range(NULL_BLOCK + 1, num_blocks))
        self._evictable: OrderedDict[int, bytes] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `take` could hand out: blank and evictable ones."""
        return len(self._blank) + len(self._evictable)

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference, each counted once."""
        return self.num_blocks - 1 - self.num_free

    def ref_count(self, block_id: int) -> int:
        """How many sequences hold the block."""
        return self._ref_counts[block_id]

    def take(self, count: int = 1) -> tuple[int, ...]:
        """Hands out free blocks with one reference each; the caller has looked at `num_free`."""
        return tuple(self._take_one() for _ in range(count))

    def _take_one(self) -> int:
        if self._blank:
            block_id = self._blank.popleft()
        else:
            block_id, digest = self._evictable.popitem(last=False)
            del self._by_digest[digest]
            self._digests[block_id] = None
        self._ref_counts[block_id] = 1
        return block_id

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to blocks that are held or evictable."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._evictable[block_id]
            self._ref_counts[block_id] += 1

    def give_back(self, block_ids: Iterable[int]) -> None:
        """Drops one reference to each block, in this order; the last one out frees it."""
        for block_id in block_ids:
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] > 0:
                continue
            if self._ref_counts[block_id] < 0:
                raise RuntimeError(f"block {block_id} was given back twice")
            digest = self._digests[block_id]
            if digest is None:
                self._blank.append(block_id)
            else:
                self._evictable[block_id] = digest

    def find(self, digest: bytes) -> int | None:
        """The block, held or evictable, that was remembered under the digest."""
        return self._by_digest.get(digest)

    def remember(self, block_id: int, digest: bytes) -> None:
        """Lets `find` find a held block, unless another block has the same content already."""
        if digest not in self._by_digest:
            self._by_digest[digest] = block_id
            self._digests[block_id] = digest

    def forget_all(self) -> None:
        """Makes every block unfindable; evictable blocks become blank."""
        self._blank.extend(self._evictable)
        self._evictable.clear()
        self._by_digest.clear()
        self._digests = [None] * self.num_blocks
