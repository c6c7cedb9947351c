"""Programs that are compiled for chips that are not there: a layer's attention by each kernel.

Functions for `benchmarks.compiling`: each takes the target and JSON arguments. The ones about
attention take a case of `pallas_kernels.cases` and a batch of `num_rows` rows, whose page table has
room for `context` tokens a row, with `num_tokens` tokens (default: one a row).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compiling import Program
from pallas_kernels.aot import Target
from pallas_kernels.attention import paged_attention
from pallas_kernels.backend import Backend, BackendRefused, why_not
from pallas_kernels.cases import attention_case
from pallas_kernels.kv_write import kv_pages_shape
from pallas_kernels.tuning import attention_key
from pallas_kernels.types import AttentionSpec, PageMetadata

PAGE_SIZE = {"tpu": 32, "gpu": 16}
NUM_LAYERS = 2  # of the cache: with one, a layer's offset could be folded away


def attention(
    target: Target,
    case: str,
    *,
    num_rows: int = 64,
    num_tokens: int | None = None,
    context: int = 2048,
    page_size: int | None = None,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    backend: str | None = None,
    tiles: dict[str, dict[str, int]] | None = None,
) -> Program:
    """Our paged attention, the write of the new tokens included, as a layer of the model calls it.

    `backend` is the target's own unless it is named; `tiles` go before the tuned ones. The cache is
    donated. Raises BackendRefused.
    """
    spec = attention_case(case, page_size=page_size or _page_size(target), dtype=kv_dtype)
    name: Any = backend or target.chip.platform
    reason = why_not(name, spec, chip=target.chip)
    if reason is not None:
        raise BackendRefused(reason)
    chosen = Backend(name=name, chip=target.chip)
    num_tokens = num_tokens or num_rows
    pages = page_metadata(spec, num_rows=num_rows, num_tokens=num_tokens, context=context)
    kv = spec.kv
    wide = jnp.dtype(dtype)
    q = jax.ShapeDtypeStruct((num_tokens, spec.num_heads, kv.head_dim), wide)
    k = jax.ShapeDtypeStruct((num_tokens, kv.num_kv_heads, kv.head_dim), wide)
    v = None if kv.kind == "latent" else k
    kv_pages = kv_pages_shape(kv, NUM_LAYERS, pages.num_pages, backend=chosen)
    sinks = jax.ShapeDtypeStruct((spec.num_heads,), jnp.float32) if spec.sinks else None
    scales = None
    if jnp.dtype(kv_dtype).itemsize == 1:
        scales = jax.ShapeDtypeStruct((kv.num_scales,), jnp.float32)
    call = functools.partial(_attend, spec=spec, backend=chosen)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    return Program(
        fn=call,
        args=(q, k, v, kv_pages, pages, layer, sinks, scales),
        donate=(3,),
        notes={
            "kv_token_bytes": kv_token_bytes(spec),
            "key": attention_key(spec),
            "chip": target.chip.kind,
        },
        tiles=tiles or {},
    )


def model_step(
    target: Target,
    model: str,
    num_tokens: int,
    *,
    scan: bool = True,
    num_layers: int | None = None,
    num_pages: int = 4096,
    kv_dtype: str | None = None,
    backend: str | None = None,
) -> Program:
    """A whole step of a model, sampling included, as the engine compiles it for this chip."""
    from benchmarks import model_step as models
    from jaxserve.runner.executables import COMPILER_OPTIONS

    name: Any = backend or target.chip.platform
    step, arguments, _ = models.model_step(
        model,
        num_tokens,
        backend=Backend(name=name, chip=target.chip),
        dtype=jnp.bfloat16,
        scan=scan,
        page_size=_page_size(target),
        num_pages=num_pages,
        num_layers=num_layers,
        kv_dtype=kv_dtype,
    )
    options = COMPILER_OPTIONS.get(target.chip.platform)
    return Program(fn=step, args=arguments, donate=(1,), compiler_options=options)


def matmul(
    target: Target,
    case: str,
    *,
    num_tokens: int = 64,
    num_layers: int | None = None,
    activations: Any = "keep",
    backend: str | None = None,
    tiles: dict[str, dict[str, int]] | None = None,
) -> Program:
    """Activations by a quantized weight, or tokens by their experts: a case of `matmul_cases`.

    With `num_layers` a scan over a stack of such weights, with a step's compiler options: a copy of
    a layer's would be a temporary. Raises BackendRefused.
    """
    from pallas_kernels import grouped_matmul, quantized_matmul
    from pallas_kernels.matmul_cases import MATMUL_CASES
    from pallas_kernels.quantized import quantize

    shape = MATMUL_CASES[case]
    name: Any = backend or target.chip.platform
    chosen = Backend(name=name, chip=target.chip)
    experts = () if shape.num_experts is None else (shape.num_experts,)
    weight: Any = jax.ShapeDtypeStruct((*experts, shape.in_dim, shape.out_dim), jnp.bfloat16)
    if shape.format is not None:
        make = functools.partial(
            quantize, format=shape.format, block=shape.block, zeros=shape.zeros
        )
        weight = jax.eval_shape(make, weight)
    num_rows = num_tokens * shape.top_k
    x = jax.ShapeDtypeStruct((num_rows, shape.in_dim), jnp.bfloat16)
    if shape.num_experts is None:
        reason = quantized_matmul.why_not(
            name, weight, chip=target.chip, x=x, activations=activations
        )
        call = functools.partial(
            quantized_matmul.quantized_matmul, backend=chosen, activations=activations
        )
        args = (x, weight)
    else:
        reason = grouped_matmul.why_not(name, weight, chip=target.chip, x=x)
        call = functools.partial(grouped_matmul.grouped_matmul, backend=chosen)
        args = (x, weight, jax.ShapeDtypeStruct(experts, jnp.int32))
    if reason is not None:
        raise BackendRefused(reason)
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    notes = {"weight_bytes": num_bytes}
    if num_layers is None:
        return Program(fn=call, args=args, notes=notes, tiles=tiles or {})
    from jaxserve.runner.executables import COMPILER_OPTIONS

    def layers(x: Any, stack: Any, *rest: Any) -> Any:
        def layer(x: Any, weight: Any) -> tuple[Any, None]:
            out = jax.lax.optimization_barrier(call(x, weight, *rest))
            return x + out[:, :1], None

        return jax.lax.scan(layer, x, stack)[0]

    stack = jax.tree.map(lambda a: jax.ShapeDtypeStruct((num_layers, *a.shape), a.dtype), weight)
    options = COMPILER_OPTIONS.get(target.chip.platform)
    return Program(
        fn=layers,
        args=(x, stack, *args[2:]),
        notes=notes,
        tiles=tiles or {},
        compiler_options=options,
    )


def bundled_ragged(
    target: Target,
    case: str,
    *,
    num_rows: int = 64,
    num_tokens: int | None = None,
    context: int = 2048,
    page_size: int | None = None,
    kv_dtype: str = "bfloat16",
    pages_per_block: int = 16,
    queries_per_block: int = 16,
) -> Program:
    """JAX's bundled ragged paged attention for TPUs; it writes no new tokens."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    page_size = page_size or _page_size(target)
    spec = attention_case(case, page_size=page_size, dtype=kv_dtype)
    kv = spec.kv
    num_tokens = num_tokens or num_rows
    pages = page_metadata(spec, num_rows=num_rows, num_tokens=num_tokens, context=context)

    def call(q: Any, kv_pages: Any, pages: PageMetadata) -> Any:
        return ragged_paged_attention(
            q,
            kv_pages,
            pages.kv_lens,
            pages.page_table,
            pages.query_starts,
            pages.num_rows.reshape(1),
            sm_scale=spec.scale,
            sliding_window=spec.window,
            soft_cap=spec.soft_cap,
            num_kv_pages_per_block=pages_per_block,
            num_queries_per_block=queries_per_block,
        )

    q = jax.ShapeDtypeStruct((num_tokens, spec.num_heads, kv.head_dim), jnp.bfloat16)
    kv_pages = jax.ShapeDtypeStruct(
        (pages.num_pages, page_size, 2 * kv.num_kv_heads, kv.head_dim), jnp.dtype(kv_dtype)
    )
    block_tokens = pages_per_block * page_size
    return Program(
        fn=call,
        args=(q, kv_pages, pages),
        notes={"kv_token_bytes": kv_token_bytes(spec), "block_tokens": block_tokens},
    )


def page_metadata(
    spec: AttentionSpec, *, num_rows: int, num_tokens: int, context: int
) -> PageMetadata:
    """The shapes of a batch's page metadata, enough pages for every row's context."""
    pages_per_row = -(-context // spec.kv.page_size)

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return PageMetadata(
        page_table=ints(num_rows, pages_per_row),
        slots=ints(num_tokens),
        kv_lens=ints(num_rows),
        query_starts=ints(num_rows + 1),
        num_rows=ints(),
        num_decode_rows=ints(),
        num_pages=1 + num_rows * pages_per_row,
    )


def kv_token_bytes(spec: AttentionSpec) -> int:
    """Bytes of the cache that attention has to read of one token of context, padding left out."""
    kv = spec.kv
    width = kv.head_dim if kv.kind == "latent" else 2 * kv.num_kv_heads * kv.head_dim
    return width * jnp.dtype(kv.dtype).itemsize


def _page_size(target: Target) -> int:
    return PAGE_SIZE[target.chip.platform]


def _attend(
    q: Any,
    k: Any,
    v: Any,
    kv_pages: Any,
    pages: PageMetadata,
    layer: Any,
    sinks: Any,
    scales: Any,
    *,
    spec: AttentionSpec,
    backend: Backend,
) -> Any:
    return paged_attention(
        q,
        k,
        v,
        kv_pages,
        pages,
        layer,
        spec=spec,
        backend=backend,
        sinks=sinks,
        kv_scales=scales,
    )
