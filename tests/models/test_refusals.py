"""What a config asks for and we do not compute is an error that says so, never passed over."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.models import registry

GOLDEN = Path(__file__).parent.parent / "golden" / "models"


def config(name: str, **changes: Any) -> dict[str, Any]:
    """A case's config.json with changes."""
    return {**json.loads((GOLDEN / f"{name}.json").read_text())["config"], **changes}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma", {"use_bidirectional_attention": True}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"activation_function": "mish"}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("mpt", {"no_bias": False}),
        ("mpt", {"logit_scale": "inv_sqrt_d_model"}),
        ("mpt", {"attn_config": {"alibi": False}}),
        ("mpt", {"attn_config": {"qk_ln": True}}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("falcon_40b", {"parallel_attn": False}),
        ("apertus", {"hidden_act": "silu"}),
        ("chatglm", {"post_layer_norm": False}),
        ("chatglm", {"quantization_bit": 4}),
        ("hunyuan_dense", {"use_cla": True}),
        ("arcee", {"use_sliding_window": True}),
        ("cohere2", {"layer_types": ["chunked_attention"] * 4}),
        ("llama_gqa", {"rope_scaling": {"rope_type": "mystery"}}),
    ],
)
def test_what_is_not_computed_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        registry.spec_from_config(config(name, **changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cohere2", {"use_qk_norm": True}),
        ("granite", {"logits_scaling": 0}),
        ("granite_swa", {"layer_rope_theta": [1e4]}),
        ("smollm3", {"no_rope_layers": [1]}),
        ("gpt_neo", {"attention_types": [[["global", "sideways"], 2]]}),
        ("gpt_neo", {"attention_types": 7}),
        ("gpt_neo", {"attention_types": [[["global"], 10**12]]}),
        ("codegen", {"n_head": 6}),
        ("ministral3", {"rope_parameters": {"rope_type": "default"}}),
        ("gemma3_conditional", {"text_config": None}),
        ("mpt", {"attn_config": 7}),
        ("falcon_7b", {"num_attention_heads": 0}),
    ],
)
def test_a_config_that_cannot_be_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        registry.spec_from_config(config(name, **changes))
