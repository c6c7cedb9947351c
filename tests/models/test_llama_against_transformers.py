"""Logits of tiny Llama checkpoints equal those that transformers computed from the same files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import open_checkpoint
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.layers.kernels import XLA, Kernels, PageMetadata, kv_pages_shape
from jaxserve.models.llama import spec_from_config
from jaxserve.models.registry import architecture
from jaxserve.models.spec import ModelBatch
from jaxserve.runner.model import split_model
from jaxserve.weights.loader import load_weights

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny_llama"
VARIANTS = sorted(path.name for path in GOLDEN.iterdir())
PAGE_SIZE, NUM_PAGES = 8, 12


def logits_of(folder: Path, tokens: np.ndarray, *, scan: bool, chunks: list[int]) -> np.ndarray:
    """Logits [T, V] of one sequence, fed in chunks through pages in a scattered order."""
    checkpoint = open_checkpoint(str(folder))
    spec = spec_from_config(checkpoint.config)
    split = split_model(
        spec, page_size=PAGE_SIZE, kernels=Kernels(XLA), dtype=jnp.float32, scan_layers=scan
    )
    sources = split.sources(architecture(checkpoint.config), spec.num_layers)
    loaded = load_weights(checkpoint, sources, dtype=jnp.float32)
    weights = [loaded[name] for name in split.names]
    kv_spec = spec.attention(page_size=PAGE_SIZE, dtype=jnp.float32).kv
    shape = kv_pages_shape(kv_spec, spec.num_layers, NUM_PAGES, backend=XLA)
    kv = (jnp.full(shape.shape, jnp.nan, shape.dtype),)  # what is not written must not be read
    table = np.random.default_rng(0).permutation(np.arange(1, NUM_PAGES)).astype(np.int32)

    @jax.jit
    def run(weights: list, kv: tuple, batch: ModelBatch) -> tuple:
        model = split.merge(weights)
        hidden, kv = model(batch, kv)
        return model.logits(hidden), kv

    rows, done = [], 0
    for size in chunks:
        positions = np.arange(done, done + size)
        pages = PageMetadata(
            page_table=jnp.asarray(table[None]),
            slots=jnp.asarray(table[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE),
            kv_lens=jnp.asarray([done + size]),
            query_starts=jnp.asarray([0, size]),
            num_rows=jnp.asarray(1),
            num_decode_rows=jnp.asarray(int(size == 1)),
            num_pages=NUM_PAGES,
        )
        batch = ModelBatch(
            token_ids=jnp.asarray(tokens[positions]),
            positions=jnp.asarray(positions),
            pages=(pages,),
        )
        logits, kv = run(weights, kv, batch)
        rows.append(np.asarray(logits))
        done += size
    return np.concatenate(rows)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(variant: str, scan: bool) -> None:
    with np.load(GOLDEN / variant / "expected.npz", allow_pickle=False) as expected:
        tokens, want = expected["tokens_0"], expected["logits_0"]
    got = logits_of(GOLDEN / variant, tokens, scan=scan, chunks=[len(tokens)])
    assert np.linalg.norm(got - want) <= 2e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("variant", ["gqa", "rope_yarn"])
def test_prefill_in_chunks_and_decode_give_the_same_logits(variant: str) -> None:
    with np.load(GOLDEN / variant / "expected.npz", allow_pickle=False) as expected:
        tokens, want = expected["tokens_1"], expected["logits_1"]
    chunks = [5, 3, 1, 1, 2]
    chunks.append(len(tokens) - sum(chunks))
    got = logits_of(GOLDEN / variant, tokens, scan=True, chunks=chunks)
    assert np.linalg.norm(got - want) <= 2e-5 * np.linalg.norm(want)


def config(**changes: object) -> dict:
    base = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"hidden_size": None}, CheckpointError, "hidden_size"),
        ({"num_attention_heads": 0}, CheckpointError, "num_attention_heads=0"),
        ({"num_key_value_heads": 3}, CheckpointError, "num_key_value_heads=3"),
        ({"hidden_act": "relu"}, UnsupportedError, "relu"),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedError, "longrope"),
        ({"vocab_size": True}, CheckpointError, "vocab_size"),
    ],
)
def test_a_config_that_cannot_work_is_refused(
    changes: dict, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        spec_from_config(config(**changes))


def test_an_unknown_architecture_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"BertModel.*LlamaForCausalLM"):
        architecture({"architectures": ["BertModel"]})


def test_the_parameter_count_is_that_of_the_weights() -> None:
    for variant in VARIANTS:
        checkpoint = open_checkpoint(str(GOLDEN / variant))
        count = sum(int(np.prod(t.shape)) for t in checkpoint.tensors.values())
        assert spec_from_config(checkpoint.config).num_parameters == count
