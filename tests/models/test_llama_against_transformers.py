"""Logits of tiny Llama checkpoints equal those that transformers computed from the same files."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import open_checkpoint
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.layers.kernels import XLA, Kernels
from jaxserve.models.registry import architecture, spec_from_config
from jaxserve.runner.model import split_model
from tests.models.alone import ModelAlone

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny_llama"
VARIANTS = sorted(path.name for path in GOLDEN.iterdir())


def logits_of(folder: Path, tokens: np.ndarray, *, scan: bool, chunks: list[int]) -> np.ndarray:
    model = ModelAlone(open_checkpoint(str(folder)), scan=scan, max_len=88)
    return model.logits(tokens, chunks)


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
        ({"hidden_act": "xielu"}, UnsupportedError, "xielu"),
        ({"rope_scaling": {"rope_type": "mrope"}}, UnsupportedError, "mrope"),
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
        spec = spec_from_config(checkpoint.config)
        split = split_model(
            spec, page_size=8, kernels=Kernels(XLA), dtype=jnp.float32, scan_layers=True
        )
        assert split.num_parameters == count
