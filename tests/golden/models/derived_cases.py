"""Models that transformers knows by another name; see cases.py.

Their code lives on the hub beside their weights. What it computes is a model of transformers with
tensors that are named or packed otherwise, and options that are called otherwise.
"""

from collections.abc import Callable

import numpy as np
from cases import LLAMA, Case, Shapes, Tensors, case

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def packed(
    shapes: Shapes, parts: tuple[str, ...], into: str, change: Callable[[str], str]
) -> Shapes:
    """`shapes` with each run of `parts` (of equal width) as one tensor `into`."""
    found: Shapes = {}
    for name, shape in shapes.items():
        part = next((p for p in parts if p in name), None)
        if part is None:
            found[change(name)] = shape
            continue
        whole = change(name.replace(part, into))
        rows = found.get(whole, (0,))[0] + shape[0]
        found[whole] = (rows, *shape[1:])
    return found


def replaced(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


INTERNLM2 = {  # transformers' name -> the checkpoint's
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "self_attn.wqkv": "attention.wqkv",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def internlm2_names(shapes: Shapes) -> Shapes:
    parts = ("q_proj", "k_proj", "v_proj")
    return packed(shapes, parts, "wqkv", lambda name: replaced(name, INTERNLM2))


def from_internlm2(tensors: Tensors) -> Tensors:
    """wqkv [K * (N / K + 2) * H, D] holds, for each kv head, its queries, its key, its value."""
    found: Tensors = {}
    group = HEADS // KV_HEADS
    for name, tensor in tensors.items():
        ours = replaced(name, {new: old for old, new in INTERNLM2.items()})
        ours = ours.replace("post_input_layernorm", "post_attention_layernorm")
        if "wqkv" not in name:
            found[ours] = tensor
            continue
        grouped = tensor.reshape(KV_HEADS, group + 2, HEAD_DIM, -1)
        q, k, v = grouped[:, :group], grouped[:, group], grouped[:, group + 1]
        for part, value in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            flat = value.reshape(-1, *tensor.shape[1:])
            found[ours.replace("wqkv", part)] = flat
    return found


def without_output_bias(shapes: Shapes) -> Shapes:
    return {n: s for n, s in shapes.items() if not n.endswith("o_proj.bias")}


def with_zero_output_bias(tensors: Tensors) -> Tensors:
    zeros = {
        n.replace("o_proj.weight", "o_proj.bias"): np.zeros(t.shape[0], np.float32)
        for n, t in tensors.items()
        if n.endswith("o_proj.weight")
    }
    return tensors | zeros


CHATGLM = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.layers": "transformer.encoder.layers",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "self_attn.qkv_proj": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def chatglm_names(shapes: Shapes) -> Shapes:
    parts = ("q_proj", "k_proj", "v_proj")
    return packed(shapes, parts, "qkv_proj", lambda name: replaced(name, CHATGLM))


def from_chatglm(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    cuts = [HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM]
    for name, tensor in tensors.items():
        ours = replaced(name, {new: old for old, new in CHATGLM.items()})
        if "qkv_proj" not in ours:
            found[ours] = tensor
            continue
        for part, value in zip("qkv", np.split(tensor, cuts), strict=True):
            found[ours.replace("qkv_proj", f"{part}_proj")] = value
    return found


def of(architecture: str, model_type: str, base: dict, **changes: object) -> dict:
    return case(architecture, model_type, base, **changes).config


LLAMA_REFERENCE = of("LlamaForCausalLM", "llama", LLAMA)
MINICPM_CONFIG = LLAMA | {
    "num_hidden_layers": 4,
    "scale_emb": 3,
    "scale_depth": 1.4,
    "dim_model_base": 32,
    "tie_word_embeddings": True,
}

CASES: dict[str, Case] = {
    "internlm": Case(
        config=of("InternLMForCausalLM", "internlm", LLAMA, num_key_value_heads=None, bias=True),
        reference=LLAMA_REFERENCE | {"num_key_value_heads": 4, "attention_bias": True},
    ),
    "internlm2": Case(
        config=of(
            "InternLM2ForCausalLM",
            "internlm2",
            LLAMA,
            bias=False,
            rope_theta=1000000,
            rope_scaling={"type": "dynamic", "factor": 2.0},
        ),
        reference=LLAMA_REFERENCE | {"rope_theta": 1000000.0},
        names=internlm2_names,
        rename=from_internlm2,
    ),
    "internlm3": Case(
        config=of(
            "InternLM3ForCausalLM",
            "internlm3",
            LLAMA,
            head_dim=32,
            qkv_bias=True,
            bias=False,
            rope_scaling={"rope_type": "dynamic", "factor": 6.0},
        ),
        reference=LLAMA_REFERENCE | {"head_dim": 32, "attention_bias": True},
        names=without_output_bias,
        rename=with_zero_output_bias,
    ),
    "aquila": Case(config=of("AquilaForCausalLM", "aquila", LLAMA), reference=LLAMA_REFERENCE),
    "xverse": Case(config=of("XverseForCausalLM", "xverse", LLAMA), reference=LLAMA_REFERENCE),
    "minicpm": Case(
        config=of("MiniCPMForCausalLM", "minicpm", MINICPM_CONFIG),
        reference=of(
            "GraniteForCausalLM",
            "granite",
            LLAMA,
            num_hidden_layers=4,
            embedding_multiplier=3.0,
            residual_multiplier=1.4 / 4**0.5,
            logits_scaling=64 / 32,
            attention_multiplier=16**-0.5,
            tie_word_embeddings=True,
        ),
        rules=((r"embed_tokens", 0.0, 0.06),),
    ),
    "orion": Case(
        config=of("OrionForCausalLM", "orion", LLAMA),
        reference=of(
            "StableLmForCausalLM",
            "stablelm",
            LLAMA,
            partial_rotary_factor=1.0,
            layer_norm_eps=1e-5,
        ),
    ),
    "chatglm": Case(
        config={
            "architectures": ["ChatGLMModel"],
            "model_type": "chatglm",
            "padded_vocab_size": 128,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_layers": 2,
            "num_attention_heads": 4,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": 16,
            "seq_length": 256,
            "rope_ratio": 50,
            "layernorm_epsilon": 1e-5,
            "add_qkv_bias": True,
            "add_bias_linear": False,
            "rmsnorm": True,
            "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False,
            "original_rope": True,
            "eos_token_id": [2, 3],
        },
        reference=of(
            "GlmForCausalLM",
            "glm",
            LLAMA,
            head_dim=16,
            rope_theta=500000.0,
            partial_rotary_factor=0.5,
            attention_bias=True,
            pad_token_id=0,
        ),
        names=chatglm_names,
        rename=from_chatglm,
        extra=(("transformer.rotary_pos_emb.inv_freq", (4,)),),
    ),
}
