"""`KVBlocks`: the blocks of all KV groups: who holds which, and which prefixes they can save."""

from array import array
from hashlib import sha256

from jaxserve.kv_group import KVGroup, first_block, most_blocks
from jaxserve.request import Request
from jaxserve.scheduler.block_pool import NULL_BLOCK, BlockPool
from jaxserve.scheduler.sequence import Sequence

BlockIds = tuple[tuple[int, ...], ...]  # per KV group


class KVBlocks:
    """Gives blocks to sequences, in step over all KV groups, and finds computed prefixes again.

    Entry i of a sequence's list holds its tokens i * block_size ..., in every group. In a group
    whose layers have a sliding window, blocks that the sequence will never see again are given
    back as it goes on; the null block takes their place in the list. Whoever is handed such a block
    writes it in a later step than the last that reads it, or in a step that does not read it.

    A full block is found by a hash chain: SHA-256 over its parent's digest and its token ids,
    starting from the adapter and the cache salt. So equal digests mean an equal prefix, computed
    with the same weights, for tenants who share a salt, and nobody can craft a prompt that hits
    another's blocks. A prefix counts as found if every group has what the next token sees of it:
    all of its blocks, or those that reach into the window.

    Args:
        groups: How many blocks each group has, and how far its tokens see.
        block_size: Tokens in a block.
        step_tokens: The most tokens of a sequence that one step computes.
        enable_prefix_caching: False: nothing is ever found or remembered.
    """

    def __init__(
        self,
        *,
        groups: tuple[KVGroup, ...],
        block_size: int,
        step_tokens: int,
        enable_prefix_caching: bool,
    ) -> None:
        self.block_size = block_size
        self.pools = tuple(BlockPool(group.num_blocks) for group in groups)
        self.none: BlockIds = ((),) * len(groups)
        self._windows = tuple(group.window for group in groups)
        self._slides = any(window is not None for window in self._windows)
        self._step_tokens = step_tokens
        self._caches_prefixes = enable_prefix_caching

    @property
    def num_free(self) -> int:
        """Free or evictable blocks, in the group that has the fewest."""
        return min(pool.num_free for pool in self.pools)

    @property
    def tightest(self) -> BlockPool:
        """The pool of which the largest share is held: the one that will run out first."""
        return max(self.pools, key=lambda pool: pool.num_held / (pool.num_blocks - 1))

    def num_for(self, num_tokens: int) -> int:
        """Blocks, in each group, that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, seq: Sequence, num_tokens: int) -> BlockIds | None:
        """Takes the blocks that `num_tokens` tokens need, in all groups or, with None, in none.

        `seq` is not in the plan in the making yet: what it gives back, others may write in it.
        """
        self.slide(seq)
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

    def slide(self, seq: Sequence) -> None:
        """Gives back the blocks that nothing from `num_computed_tokens` on sees.

        It keeps those at the prompt's end that choices which wait for their turn could share.
        """
        if not self._slides:
            return
        self.remember(seq)
        position = seq.num_computed_tokens
        if seq.unstarted:
            position = min(position, self._num_prompt_blocks(seq) * self.block_size)
        self._slide_to(seq, position)

    def give_up_tails(self, running: list[Sequence], step: int) -> bool:
        """Gives back what one sequence keeps for choices that wait; False: none keeps anything.

        Args:
            step: The step in the making; of what is in it already, nothing goes that it reads.
        """
        return any(
            self._slide_to(seq, seq.num_computed_tokens - (seq.last_step == step))
            for seq in reversed(running)
            if self._slides and seq.request.sampling.n > 1
        )

    def _slide_to(self, seq: Sequence, position: int) -> bool:
        """Whether anything was before the window of a token at `position`, and was given back."""
        has_slid = False
        for group, window in enumerate(self._windows):
            start, end = seq.num_passed[group], first_block(window, position, self.block_size)
            if end > start:
                held = seq.block_ids[group]
                self.pools[group].give_back(held[start:end])
                held[start:end] = [NULL_BLOCK] * (end - start)
                seq.num_passed[group] = end
                has_slid = True
        return has_slid

    def share(self, seq: Sequence, shared: BlockIds) -> None:
        """Lets a sequence that holds nothing start with full blocks that others have computed."""
        position = len(shared[0]) * self.block_size
        seq.num_passed = [first_block(each, position, self.block_size) for each in self._windows]
        for group, block_ids in enumerate(shared):
            self.pools[group].share(block_ids[seq.num_passed[group] :])
            seq.block_ids[group].extend(block_ids)
        seq.num_remembered_blocks = len(shared[0])
        seq.num_slots = seq.num_computed_tokens = position

    def release(self, seq: Sequence) -> None:
        """Gives back all blocks of a sequence, the last first, so that prefixes live longest."""
        self.remember(seq)
        for pool, block_ids, start in zip(self.pools, seq.block_ids, seq.num_passed, strict=True):
            pool.give_back(reversed(block_ids[start:]))
            block_ids.clear()
        seq.num_slots = seq.num_computed_tokens = 0

    def lacking(
        self, num_tokens: int, shared: BlockIds, *, chunk: int, headroom: float
    ) -> BlockPool | None:
        """The pool, if any, that `num_tokens` tokens, some in shared blocks, would leave too empty.

        Args:
            chunk: Tokens that are computed at once.
            headroom: Share of a pool's blocks that must stay free.
        """
        if len(shared[0]) * self.block_size + chunk < num_tokens:
            chunk = self._step_tokens  # a later step may compute more
        for pool, window, block_ids in zip(self.pools, self._windows, shared, strict=True):
            num_evictable = sum(
                block_id != NULL_BLOCK and pool.ref_count(block_id) == 0 for block_id in block_ids
            )
            num_needed = num_evictable + self.num_for(num_tokens) - len(block_ids)
            most = most_blocks(
                window, num_tokens=num_tokens, step_tokens=chunk, block_size=self.block_size
            )
            if min(num_needed, most) + int(pool.num_blocks * headroom) > pool.num_free:
                return pool
        return None

    # -- The prefix cache --------------------------------------------------------------------------

    def may_read_cache(self, seq: Sequence) -> bool:
        """Whether hits may replace the computation of the sequence's prefix."""
        return (
            self._caches_prefixes
            and not seq.request.sampling.skip_reading_prefix_cache
            and seq.has_prompt_logprobs
        )

    def find(self, seq: Sequence) -> BlockIds:
        """The blocks of the longest computed prefix of the sequence, null where none is needed.

        At least the sequence's last token is left to compute, because it is the one that samples.
        """
        if not self.may_read_cache(seq):
            return self.none
        size, windows = self.block_size, self._windows
        found: tuple[list[int], ...] = tuple([] for _ in self.pools)
        unbroken = [0] * len(self.pools)  # the first of the blocks that were found in a row
        num_found = 0
        for index in range((seq.num_known_tokens - 1) // size):
            digest = self._digest(seq, index)
            for group, pool in enumerate(self.pools):
                hit = pool.find(digest)
                found[group].append(NULL_BLOCK if hit is None else hit)
                if hit is None:
                    unbroken[group] = index + 1
            if any(
                window is None and start > 0
                for window, start in zip(windows, unbroken, strict=True)
            ):
                break
            position = (index + 1) * size
            if all(
                start <= first_block(window, position, size)
                for window, start in zip(windows, unbroken, strict=True)
            ):
                num_found = index + 1
        return self._needed(found, num_found)

    def find_sibling(self, seq: Sequence, running: list[Sequence]) -> BlockIds:
        """The full prompt blocks of a running choice of the same request that has computed them."""
        num_blocks = self._num_prompt_blocks(seq)
        if seq.request.sampling.n == 1 or not seq.has_prompt_logprobs:
            return self.none
        position = num_blocks * self.block_size
        first = [first_block(window, position, self.block_size) for window in self._windows]
        for other in running:
            if (
                other.request is seq.request
                and other.num_computed_tokens >= position
                and all(p <= f for p, f in zip(other.num_passed, first, strict=True))
            ):
                seq.digests = seq.digests or other.digests[:num_blocks]
                return self._needed(other.block_ids, num_blocks)
        return self.none

    def _num_prompt_blocks(self, seq: Sequence) -> int:
        """Full blocks of the prompt that choices can share; each computes its last token."""
        return (seq.num_prompt_tokens - 1) // self.block_size

    def _needed(self, blocks: tuple[list[int], ...], count: int) -> BlockIds:
        """The first `count` blocks of each group, null those that no later token sees."""
        needed = []
        for window, block_ids in zip(self._windows, blocks, strict=True):
            first = first_block(window, count * self.block_size, self.block_size)
            needed.append((NULL_BLOCK,) * first + tuple(block_ids[first:count]))
        return tuple(needed)

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
                if block_ids[index] != NULL_BLOCK:  # given back before the host knew its tokens
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
