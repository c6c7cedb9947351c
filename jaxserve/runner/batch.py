"""One step's upload: every integer and float that the device needs, in a single int32 array.

Its layout depends only on the token bucket, so each bucket is one shape and one executable. A
bucket of T tokens holds at most B = min(T, R) rows, for each scheduled row has a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.layers.kernels import PageMetadata
from jaxserve.models.spec import ModelBatch
from jaxserve.runner.row_state import RowShapes, RowState
from jaxserve.runner.sampler import SamplingRows, TokenMasks
from jaxserve.step import StepPlan

ON_DEVICE = -1  # token id: the row's newest token, which the host has not seen

FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
INTS = ("prompt_lens", "min_lens", "flags", "top_k", "seed_low", "seed_high", "num_logprobs")


def token_buckets(
    max_num_batched_tokens: int, sizes: Sequence[int] | None = None
) -> tuple[int, ...]:
    """`sizes`, or 1, 2, 4, ...; below the budget, and the budget, which need not be one of them."""
    if sizes is None:
        sizes = [1 << i for i in range(max_num_batched_tokens.bit_length())]
    smaller = sorted({n for n in sizes if n < max_num_batched_tokens})
    return (*smaller, max_num_batched_tokens)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each field of a bucket's upload lies."""

    num_tokens: int  # T
    shapes: RowShapes

    @property
    def num_rows(self) -> int:  # B
        return min(self.num_tokens, self.shapes.max_num_seqs)

    @property
    def num_updates(self) -> int:  # U: new pages a step, prefix hits apart
        return self.num_tokens // self.shapes.page_size + 2 * self.num_rows

    def fields(self) -> dict[str, int]:
        """Name to length, in order."""
        t, b, u = self.num_tokens, self.num_rows, self.num_updates
        sizes = {"counts": 3, "token_ids": t, "rows": b, "query_starts": b + 1, "kv_lens": b}
        for group in range(self.shapes.num_groups):
            sizes |= {f"update_{part}_{group}": u for part in ("rows", "columns", "pages")}
        return sizes | {"samples": b} | dict.fromkeys((*INTS, *FLOATS), b)

    def views(self, blob: np.ndarray) -> dict[str, np.ndarray]:
        """Named views into an upload; those of floats are float32."""
        views, at = {}, 0
        for name, size in self.fields().items():
            part = blob[at : at + size]
            views[name] = part.view(np.float32) if name in FLOATS else part
            at += size
        return views

    @property
    def size(self) -> int:
        return sum(self.fields().values())


class RowParameters:
    """The host's copy of each row's sampling parameters, [R + 1] arrays; the last row is idle."""

    def __init__(self, shapes: RowShapes) -> None:
        rows = shapes.max_num_seqs + 1
        self.values = {name: np.zeros(rows, np.int32) for name in INTS}
        self.values |= {name: np.zeros(rows, np.float32) for name in FLOATS}
        self.values["num_logprobs"][:] = -1
        self.values["top_p"][:] = 1
        self.values["repetition"][:] = 1

    def set(self, row: int, **given: float) -> None:
        for name, value in given.items():
            self.values[name][row] = value


class PageUpdate(NamedTuple):
    """One new page of a row: its page table's `column` becomes `page`."""

    row: int
    column: int
    page: int


def pack(
    layout: Layout,
    plan: StepPlan,
    parameters: RowParameters,
    updates: tuple[list[PageUpdate], ...],
) -> np.ndarray:
    """Builds a step's upload; `updates` has at most `layout.num_updates` entries a group."""
    blob = np.zeros(layout.size, np.int32)
    v = layout.views(blob)
    num_rows, idle = len(plan.rows), layout.shapes.max_num_seqs
    tokens: list[int] = []
    starts, rows, lens, samples = [0], [], [], []
    for row in plan.rows:
        tokens.extend(row.token_ids or (ON_DEVICE,))
        starts.append(starts[-1] + row.num_tokens)
        rows.append(row.row)
        lens.append(row.num_computed_tokens + row.num_tokens)
        samples.append(row.samples)
    several = (i for i, row in enumerate(plan.rows) if row.num_tokens > 1)
    v["counts"][:] = num_rows, next(several, num_rows), len(plan.token_masks)
    v["token_ids"][: len(tokens)] = tokens
    v["query_starts"][: num_rows + 1] = starts
    v["query_starts"][num_rows + 1 :] = starts[-1]
    v["rows"][:] = idle
    v["rows"][:num_rows] = rows
    v["kv_lens"][:num_rows] = lens
    v["samples"][:num_rows] = samples
    for group, new in enumerate(updates):
        v[f"update_rows_{group}"][:] = idle
        if new:
            triples = np.array(new, np.int32)
            for i, part in enumerate(("rows", "columns", "pages")):
                v[f"update_{part}_{group}"][: len(new)] = triples[:, i]
    # A row that does not sample takes the idle row's parameters, so that it makes no work.
    sources = np.where(v["samples"], v["rows"], idle)
    for name, values in parameters.values.items():
        v[name][:] = values[sources]
    return blob


def pack_masks(layout: Layout, plan: StepPlan) -> np.ndarray:
    """The upload of a step in which rows sample by a grammar: [B, ceil(V / 32)] uint32."""
    words = layout.shapes.mask_words
    masks = np.full((layout.num_rows, words), 0xFFFFFFFF, np.uint32)
    for i, row in enumerate(plan.rows):
        mask = plan.token_masks.get(row.seq_id)
        if mask is not None:
            known = min(words, len(mask))  # the tokenizer may have fewer tokens than the model
            masks[i, :known] = mask[:known]
            masks[i, known:] = 0
    return masks


class StepInputs(NamedTuple):
    """An upload, unpacked on the device."""

    batch: ModelBatch
    sampling: SamplingRows
    masks: TokenMasks
    page_tables: tuple[Array, ...]  # per group [R + 1, P], this step's new pages included
    owners: Array  # [T] int32: each token's row of the state; padding: the idle row
    last_places: Array  # [B] int32: where in the step each row's last token is
    keep_at: Array  # [B] int32: the row that keeps the drawn token; not sampling: the idle row


def unpack(
    layout: Layout, blob: Array, masks: Array, state: RowState, *, num_pages: tuple[int, ...]
) -> StepInputs:
    """Splits an upload and derives all that follows from it."""
    f, at = {}, 0
    for name, size in layout.fields().items():
        f[name] = blob[at : at + size]
        at += size
    for name in FLOATS:
        f[name] = jax.lax.bitcast_convert_type(f[name], jnp.float32)
    page_size, idle = layout.shapes.page_size, layout.shapes.max_num_seqs
    rows, starts = f["rows"], f["query_starts"]
    places = jnp.arange(layout.num_tokens, dtype=jnp.int32)  # [T]
    in_use = places < starts[-1]
    # Each token's row within the batch: how many rows end at or before it.
    row = jnp.sum(places[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    row = jnp.where(in_use, row, 0)  # [T]
    first = f["kv_lens"] - (starts[1:] - starts[:-1])  # [B] position of each row's first token
    positions = jnp.where(in_use, (first - starts[:-1])[row] + places, 0)
    newest = state.last_tokens[rows][row]
    token_ids = jnp.where(f["token_ids"] == ON_DEVICE, newest, f["token_ids"])
    tables, pages = [], []
    for group, (table, count) in enumerate(zip(state.page_tables, num_pages, strict=True)):
        where, columns, new = (f[f"update_{part}_{group}"] for part in ("rows", "columns", "pages"))
        table = table.at[where, columns].set(new)
        own = table[rows]  # [B, P]
        slots = own[row, positions // page_size] * page_size + positions % page_size
        tables.append(table)
        pages.append(
            PageMetadata(
                page_table=own,
                slots=jnp.where(in_use, slots, places % page_size),
                kv_lens=f["kv_lens"],
                query_starts=starts,
                num_rows=f["counts"][0],
                num_decode_rows=f["counts"][1],
                num_pages=count,
            )
        )
    sampling = SamplingRows(
        rows=rows,
        lens=f["kv_lens"],
        seeds=jnp.stack([f["seed_low"], f["seed_high"]], axis=1).astype(jnp.uint32),
        **{name: f[name] for name in ("prompt_lens", "min_lens", "flags", "top_k")},
        **{name: f[name] for name in (*FLOATS, "num_logprobs")},
    )
    return StepInputs(
        batch=ModelBatch(token_ids=token_ids, positions=positions, pages=tuple(pages)),
        sampling=sampling,
        masks=TokenMasks(words=masks, on=f["counts"][2] > 0),
        page_tables=tuple(tables),
        owners=jnp.where(in_use, rows[row], idle),
        last_places=jnp.maximum(starts[1:] - 1, 0),
        keep_at=jnp.where(f["samples"] != 0, rows, idle),
    )
