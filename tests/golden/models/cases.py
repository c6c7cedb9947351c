"""The dense models that make.py builds: config.json as checkpoints on the hub have it, but tiny.

`config` is what the checkpoint's config.json says. Where transformers does not know an
architecture by that name, `reference` is the config of the model that computes the same numbers,
and `rename` turns the checkpoint's tensors into that model's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    config: dict[str, Any]
    reference: dict[str, Any] | None = None
    rename: Callable[[Tensors], Tensors] | None = None  # the checkpoint's tensors -> reference's
    names: Callable[[Shapes], Shapes] | None = None  # reference's tensors' names and shapes -> ours
    encoding: str = "F32"
    lengths: tuple[int, ...] = (5, 23, 61)  # of the sequences; greedy goes on from the second
    max_model_len: int | None = None  # where it changes the numbers
    rules: tuple[tuple[str, float, float], ...] = ()  # pattern of names, and the rule's numbers
    attention: str = "eager"  # transformers' implementation
    more: dict[str, Any] | None = None  # of config.json, but not of the model that is built
    extra: tuple[tuple[str, tuple[int, ...]], ...] = ()  # tensors that the model has no use for


LLAMA = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {
    "vocab_size": 128,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0],
}


def case(architecture: str, model_type: str, *bases: dict[str, Any], **changes: Any) -> Case:
    config = {"architectures": [architecture], "model_type": model_type}
    for base in (*bases, changes):
        config |= base
    return Case(config=config)


def llama(**changes: Any) -> Case:
    return case("LlamaForCausalLM", "llama", LLAMA, **changes)


def gemma3_text(**changes: Any) -> dict[str, Any]:
    base = {
        **{k: v for k, v in LLAMA.items() if k != "rms_norm_eps"},
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 12,
        "sliding_window_pattern": 3,
    }
    return base | changes


CASES: dict[str, Case] = {
    "llama_gqa": llama(),
    "llama_mha_tied": llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama_mqa_biases": llama(
        num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=32
    ),
    "llama_rope_llama3": llama(
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_rope_linear": llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_rope_dynamic": llama(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "llama_rope_yarn": llama(
        rope_scaling={
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ),
    "mistral": case("MistralForCausalLM", "mistral", LLAMA, sliding_window=None, head_dim=32),
    "mistral_window": case("MistralForCausalLM", "mistral", LLAMA, sliding_window=12),
    "ministral": case(
        "MinistralForCausalLM",
        "ministral",
        LLAMA,
        head_dim=32,
        num_hidden_layers=4,
        sliding_window=12,
        layer_types=["full_attention", *["sliding_attention"] * 3],
    ),
    "ministral3": case(
        "Ministral3ForCausalLM",
        "ministral3",
        LLAMA,
        head_dim=32,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "qwen2": case("Qwen2ForCausalLM", "qwen2", LLAMA, rope_theta=1000000.0),
    "qwen2_window": case(
        "Qwen2ForCausalLM",
        "qwen2",
        LLAMA,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=12,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": case(
        "Qwen3ForCausalLM",
        "qwen3",
        LLAMA,
        head_dim=32,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    ),
    "qwen3_yarn": case(
        "Qwen3ForCausalLM",
        "qwen3",
        LLAMA,
        head_dim=16,
        attention_bias=True,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "gemma": replace(
        case(
            "GemmaForCausalLM",
            "gemma",
            LLAMA,
            head_dim=32,
            num_key_value_heads=1,
            hidden_act="gelu",
            hidden_activation=None,
        ),
        rules=((r"embed_tokens", 0.0, 0.04),),
    ),
    "gemma2": case(
        "Gemma2ForCausalLM",
        "gemma2",
        LLAMA,
        num_hidden_layers=4,
        head_dim=32,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,
        sliding_window=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": case("Gemma3ForCausalLM", "gemma3_text", gemma3_text()),
    "gemma3_cap_linear": case(
        "Gemma3ForCausalLM",
        "gemma3_text",
        gemma3_text(
            num_hidden_layers=3,
            attention_bias=True,
            sliding_window_pattern=2,
            final_logit_softcapping=5.0,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
        ),
    ),
    "gemma3_conditional": case(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        text_config=gemma3_text(rope_scaling={"factor": 8.0, "rope_type": "linear"}),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=127,
        boi_token_index=125,
        eoi_token_index=126,
        eos_token_id=[1, 106],
    ),
    "vaultgemma": replace(
        case(
            "VaultGemmaForCausalLM",
            "vaultgemma",
            LLAMA,
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=12,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
        ),
        rules=((r"embed_tokens", 0.0, 0.04),),
    ),
    "phi": case(
        "PhiForCausalLM",
        "phi",
        LLAMA,
        num_key_value_heads=None,
        partial_rotary_factor=0.5,
        layer_norm_eps=1e-5,
        hidden_act="gelu_new",
    ),
    "phi_qk_layernorm": case(
        "PhiForCausalLM", "phi", LLAMA, qk_layernorm=True, partial_rotary_factor=0.25
    ),
    "phi3": case(
        "Phi3ForCausalLM",
        "phi3",
        LLAMA,
        num_key_value_heads=4,
        sliding_window=12,
        original_max_position_embeddings=256,
        pad_token_id=0,
    ),
    "phi3_longrope_long": replace(
        case(
            "Phi3ForCausalLM",
            "phi3",
            LLAMA,
            original_max_position_embeddings=16,
            max_position_embeddings=128,
            rope_scaling=LONGROPE,
            pad_token_id=0,
        ),
        lengths=(20, 37, 61),
    ),
    "phi3_longrope_short": replace(
        case(
            "Phi3ForCausalLM",
            "phi3",
            LLAMA,
            original_max_position_embeddings=64,
            max_position_embeddings=128,
            rope_scaling=LONGROPE,
            pad_token_id=0,
        ),
        max_model_len=64,
    ),
    "phi4": case(
        "Phi3ForCausalLM",
        "phi3",
        LLAMA,
        partial_rotary_factor=0.75,
        hidden_size=128,
        num_attention_heads=4,
        original_max_position_embeddings=256,
        sliding_window=None,
        tie_word_embeddings=True,
        pad_token_id=0,
    ),
    "olmo": case(
        "OlmoForCausalLM",
        "olmo",
        LLAMA,
        clip_qkv=1.0,
        num_key_value_heads=4,
        pad_token_id=0,
    ),
    "olmo2": case("Olmo2ForCausalLM", "olmo2", LLAMA, pad_token_id=0, rope_theta=500000),
    "olmo3": case(
        "Olmo3ForCausalLM",
        "olmo3",
        LLAMA,
        pad_token_id=0,
        num_hidden_layers=4,
        sliding_window=12,
        rope_theta=500000,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.2,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    ),
    "granite": replace(
        case(
            "GraniteForCausalLM",
            "granite",
            LLAMA,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            residual_multiplier=0.4,
            attention_multiplier=0.3,
            tie_word_embeddings=True,
        ),
        rules=((r"embed_tokens", 0.0, 0.05),),
    ),
    "granite_biases": case(
        "GraniteForCausalLM",
        "granite",
        LLAMA,
        attention_bias=True,
        mlp_bias=True,
        attention_multiplier=0.25,
    ),
    "hyperclovax": case(
        "HyperCLOVAXForCausalLM",
        "hyperclovax",
        LLAMA,
        embedding_multiplier=3.0,
        logits_scaling=0.5,
        residual_multiplier=0.8,
        attention_multiplier=0.3,
        use_post_norm=True,
    ),
    "starcoder2": case(
        "Starcoder2ForCausalLM",
        "starcoder2",
        LLAMA,
        sliding_window=12,
        norm_epsilon=1e-5,
        use_bias=True,
        hidden_act="gelu_pytorch_tanh",
    ),
    "starcoder2_plain": case(
        "Starcoder2ForCausalLM", "starcoder2", LLAMA, use_bias=False, tie_word_embeddings=False
    ),
    "gpt2": replace(  # the hub's own file: without a prefix, and with the masks
        case("GPT2LMHeadModel", "gpt2", GPT2),
        names=lambda shapes: {n.removeprefix("transformer."): s for n, s in shapes.items()},
        extra=(("h.0.attn.bias", (1, 1, 128, 128)), ("h.1.attn.bias", (1, 1, 128, 128))),
    ),
    "gpt2_layer_scaled": case(
        "GPT2LMHeadModel",
        "gpt2",
        GPT2,
        n_inner=96,
        scale_attn_by_inverse_layer_idx=True,
        activation_function="gelu",
    ),
    "gpt_bigcode": case("GPTBigCodeForCausalLM", "gpt_bigcode", GPT2, multi_query=True),
    "gpt_bigcode_mha": case(
        "GPTBigCodeForCausalLM", "gpt_bigcode", GPT2, multi_query=False, n_inner=96
    ),
    "gpt_neo": case(
        "GPTNeoForCausalLM",
        "gpt_neo",
        vocab_size=128,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], 2]],
        window_size=12,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": case(
        "OPTForCausalLM",
        "opt",
        vocab_size=128,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
        do_layer_norm_before=True,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    ),
    "gpt_neox": case(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        LLAMA,
        rotary_pct=0.25,
        rotary_emb_base=10000,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        use_parallel_residual=True,
    ),
    "gpt_neox_sequential": case(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        LLAMA,
        rotary_pct=1.0,
        hidden_act="gelu_new",
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
    ),
    "gptj": case("GPTJForCausalLM", "gptj", GPT2, rotary_dim=8, tie_word_embeddings=False),
    "codegen": case("CodeGenForCausalLM", "codegen", GPT2, rotary_dim=8),
    "falcon_7b": case(
        "FalconForCausalLM",
        "falcon",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
        new_decoder_architecture=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon_40b": case(
        "FalconForCausalLM",
        "falcon",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=False,
        alibi=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon_11b": case(
        "FalconForCausalLM",
        "falcon",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
        new_decoder_architecture=True,
        ffn_hidden_size=96,
        tie_word_embeddings=False,
        bias=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # Eager attention of transformers 5.23 adds the biases twice: they are in the mask, too.
    "falcon_rw": replace(
        case(
            "FalconForCausalLM",
            "falcon",
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=False,
            parallel_attn=False,
            bias=True,
            alibi=True,
            new_decoder_architecture=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        attention="sdpa",
    ),
    "stablelm": case(
        "StableLmForCausalLM",
        "stablelm",
        LLAMA,
        use_qkv_bias=True,
        partial_rotary_factor=0.25,
        layer_norm_eps=1e-5,
    ),
    "stablelm_parallel_qk_norm": case(
        "StableLmForCausalLM",
        "stablelm",
        LLAMA,
        use_parallel_residual=True,
        qk_layernorm=True,
        partial_rotary_factor=0.5,
        layer_norm_eps=1e-5,
    ),
    "cohere": case("CohereForCausalLM", "cohere", LLAMA, logit_scale=0.25, layer_norm_eps=1e-5),
    "cohere_qk_norm": case(
        "CohereForCausalLM",
        "cohere",
        LLAMA,
        logit_scale=0.5,
        use_qk_norm=True,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "cohere2": case(
        "Cohere2ForCausalLM",
        "cohere2",
        LLAMA,
        num_hidden_layers=4,
        logit_scale=0.25,
        sliding_window=12,
        sliding_window_pattern=2,
        layer_norm_eps=1e-5,
    ),
    "smollm3": case(
        "SmolLM3ForCausalLM",
        "smollm3",
        LLAMA,
        num_hidden_layers=4,
        no_rope_layer_interval=2,
        pad_token_id=0,
    ),
    "seed_oss": case(
        "SeedOssForCausalLM",
        "seed_oss",
        LLAMA,
        head_dim=32,
        attention_bias=True,
        attention_out_bias=False,
        rope_theta=1000000.0,
        rope_scaling={"rope_type": "default"},
    ),
    "arcee": case("ArceeForCausalLM", "arcee", LLAMA, hidden_act="relu2"),
    "exaone4": case(
        "Exaone4ForCausalLM",
        "exaone4",
        LLAMA,
        num_hidden_layers=4,
        sliding_window=12,
        sliding_window_pattern="LLLG",
        layer_types=[*["sliding_attention"] * 3, "full_attention"],
    ),
    "exaone4_full": case(
        "Exaone4ForCausalLM",
        "exaone4",
        LLAMA,
        sliding_window=None,
        layer_types=["full_attention"] * 2,
        tie_word_embeddings=True,
    ),
    "nemotron": case(
        "NemotronForCausalLM",
        "nemotron",
        LLAMA,
        norm_eps=1e-5,
        partial_rotary_factor=0.5,
        hidden_act="relu2",
    ),
    "glm": case(
        "GlmForCausalLM",
        "glm",
        LLAMA,
        head_dim=16,
        partial_rotary_factor=0.5,
        attention_bias=True,
        pad_token_id=0,
    ),
    "glm4": case(
        "Glm4ForCausalLM",
        "glm4",
        LLAMA,
        head_dim=16,
        partial_rotary_factor=0.5,
        attention_bias=False,
        pad_token_id=0,
    ),
    "helium": case("HeliumForCausalLM", "helium", LLAMA, head_dim=16),
    "hunyuan_dense": case("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", LLAMA, head_dim=32),
    "hunyuan_dense_dynamic": case(
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        LLAMA,
        head_dim=16,
        rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "mscale": 1.0},
    ),
    "ernie4_5": case(
        "Ernie4_5ForCausalLM", "ernie4_5", LLAMA, head_dim=32, use_bias=True, rope_theta=500000.0
    ),
    "apertus": replace(
        case("ApertusForCausalLM", "apertus", LLAMA, rope_theta=12000000),
        rules=((r"\.beta$", 0.5, 0.0), (r"\.eps$", -1e-6, 0.0)),
    ),
    "bloom": replace(
        case("BloomForCausalLM", "bloom", BLOOM),
        rules=((r"embeddings_layernorm.weight", 0.15, 0.05), (r"dense.*weight", 0.0, 0.6)),
    ),
    "bloom_six_heads": replace(  # the slopes of a count that is no power of two
        case("BloomForCausalLM", "bloom", BLOOM, n_embed=48, hidden_size=48, n_head=6),
        rules=((r"embeddings_layernorm.weight", 0.15, 0.05),),
    ),
    "mpt": case(
        "MptForCausalLM",
        "mpt",
        vocab_size=128,
        d_model=48,
        n_layers=2,
        n_heads=6,
        expansion_ratio=4,
        max_seq_len=128,
        no_bias=True,
        attn_config={"alibi": True, "clip_qkv": 1.0, "attn_type": "multihead_attention"},
    ),
    "jais2": case("Jais2ForCausalLM", "jais2", LLAMA, layer_norm_eps=1e-5),
    "persimmon": case(
        "PersimmonForCausalLM", "persimmon", LLAMA, partial_rotary_factor=0.5, qk_layernorm=True
    ),
    "nanochat": case("NanoChatForCausalLM", "nanochat", LLAMA, final_logit_softcapping=5.0),
    "cwm": case(
        "CwmForCausalLM", "cwm", LLAMA, head_dim=16, num_hidden_layers=5, sliding_window=12
    ),
    "granite_swa": case(
        "GraniteSWAForCausalLM",
        "granite_swa",
        LLAMA,
        num_hidden_layers=4,
        sliding_window=12,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
    ),
}
