"""`KVBlocks`: the blocks of all KV groups: who holds which, and which prefixes they can save."""

from array import array
from hashlib import sha256

from jaxserve.request import Request
from jaxserve.scheduler.block_pool import BlockPool
from jaxserve.scheduler.sequence import Sequence

BlockIds = tuple[tuple[int, ...], ...]  # per KV group


class KVBlocks:
    """Gives blocks to sequences, in step over all KV groups, and finds computed prefixes again.

    A full block is found by a hash chain: SHA-256 over its parent's digest and its token ids,
    starting from the adapter and the cache salt. So equal digests mean an equal prefix, computed
    with the same weights, for tenants who share a salt, and nobody can craft a prompt that hits
    another's blocks. A hit counts only if every group has the block.

    Args:
        num_blocks: Blocks of each group, with the null block.
        block_size: Tokens in a block.
        num_groups: KV groups.
        enable_prefix_caching: False: nothing is ever found or remembered.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, num_groups: int, enable_prefix_caching: bool
    ) -> None:
        self.block_size = block_size
        self.pools = tuple(BlockPool(num_blocks) for _ in range(num_groups))
        self.none: BlockIds = ((),) * num_groups
        self._caches_prefixes = enable_prefix_caching

    @property
    def num_free(self) -> int:
        """Free or evictable blocks, in the group that has the fewest."""
        return min(pool.num_free for pool in self.pools)

    def num_for(self, num_tokens: int) -> int:
        """Blocks, in each group, that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, seq: Sequence, num_tokens: int) -> BlockIds | None:
        """Takes the blocks that `num_tokens` tokens need, in all groups or, with None, in none."""
        num_missing = self.num_for(num_tokens - seq.num_slots)
        if num_missing <= 0:
            return self.none
        if num_missing > self.num_free:
            return None
        new = tuple(pool.take(num_missing) for pool in self.pools)
        for held, block_ids in zip(seq.block_ids, new, strict=True):
            held.extend(block_ids)
        seq.num_slots += num_missing * self.block_size
        return new

    def share(self, seq: Sequence, shared: BlockIds) -> None:
        """Lets a sequence that holds nothing start with full blocks that others have computed."""
        for pool, held, block_ids in zip(self.pools, seq.block_ids, shared, strict=True):
            pool.share(block_ids)
            held.extend(block_ids)
        seq.num_remembered_blocks = len(shared[0])
        seq.num_slots = seq.num_computed_tokens = len(shared[0]) * self.block_size

    def release(self, seq: Sequence) -> None:
        """Gives back all blocks of a sequence, the last first, so that prefixes live longest."""
        self.remember(seq)
        for pool, block_ids in zip(self.pools, seq.block_ids, strict=True):
            pool.give_back(reversed(block_ids))
            block_ids.clear()
        seq.num_slots = seq.num_computed_tokens = 0

    def has_room(self, num_tokens: int, shared: BlockIds, headroom: int) -> bool:
        """Whether `num_tokens` tokens, some in shared blocks, leave `headroom` blocks free."""
        num_new = self.num_for(num_tokens) - len(shared[0]) + headroom
        for pool, block_ids in zip(self.pools, shared, strict=True):
            num_evictable = sum(pool.ref_count(block_id) == 0 for block_id in block_ids)
            if num_new + num_evictable > pool.num_free:
                return False
        return True

    # -- The prefix cache --------------------------------------------------------------------------

    def may_read_cache(self, seq: Sequence) -> bool:
        """Whether hits may replace the computation of the sequence's prefix."""
        return (
            self._caches_prefixes
            and not seq.request.sampling.skip_reading_prefix_cache
            and seq.has_prompt_logprobs
        )

    def find(self, seq: Sequence) -> BlockIds:
        """The blocks of the longest computed prefix of the sequence that every group has.

        At least the sequence's last token is left to compute, because it is the one that samples.
        """
        found: list[list[int]] = []
        if self.may_read_cache(seq):
            for index in range((seq.num_known_tokens - 1) // self.block_size):
                digest = self._digest(seq, index)
                hits = [hit for pool in self.pools if (hit := pool.find(digest)) is not None]
                if len(hits) < len(self.pools):
                    break
                found.append(hits)
        return tuple(zip(*found, strict=True)) if found else self.none

    def find_sibling(self, seq: Sequence, running: list[Sequence]) -> BlockIds:
        """The full prompt blocks of a running choice of the same request that has computed them."""
        num_blocks = (seq.num_prompt_tokens - 1) // self.block_size
        if seq.request.sampling.n == 1 or not seq.has_prompt_logprobs:
            return self.none
        for other in running:
            if (
                other.request is seq.request
                and other.num_computed_tokens >= num_blocks * self.block_size
            ):
                seq.digests = seq.digests or other.digests[:num_blocks]
                return tuple(tuple(block_ids[:num_blocks]) for block_ids in other.block_ids)
        return self.none

    def remember(self, seq: Sequence) -> None:
        """Makes the sequence's full blocks findable, as far as launched steps have computed them.

        Nothing that the plan in the making writes may count as computed yet: a block can be read
        by the steps after the one that writes it, not by the same.
        """
        if not self._caches_prefixes:
            return
        num_full = min(seq.num_computed_tokens, seq.num_known_tokens) // self.block_size
        for index in range(seq.num_remembered_blocks, num_full):
            digest = self._digest(seq, index)
            for pool, block_ids in zip(self.pools, seq.block_ids, strict=True):
                pool.remember(block_ids[index], digest)
            seq.num_remembered_blocks = index + 1

    def forget_all(self) -> None:
        """Makes every block unfindable; nobody may hold any."""
        for pool in self.pools:
            pool.forget_all()

    def _digest(self, seq: Sequence, index: int) -> bytes:
        """The digest of block `index`; those of its parents are known or found on the way."""
        digests = seq.digests
        for i in range(len(digests), index + 1):
            parent = digests[i - 1] if i else _root_digest(seq.request)
            tokens = seq.token_ids(i * self.block_size, (i + 1) * self.block_size)
            digests.append(sha256(parent + array("I", tokens).tobytes()).digest())
        return digests[index]


def _root_digest(request: Request) -> bytes:
    """Where a hash chain starts: equal only for equal adapter and cache salt."""
    return sha256(repr((request.adapter, request.cache_salt)).encode()).digest()
