"""The architectures of GGUF files, as data: constants of a config.json, and what follows from keys.

Patterns of layers (windows, layers without rope) and some scales are in no file, but follow from
the architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.gguf.header import GGUFHeader
from jaxserve.gguf.keys import GGUFKeys, rounded

type Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one `general.architecture` becomes a config.json."""

    architecture: str  # Hugging Face's
    config: Mapping[str, Any] = field(default_factory=dict)  # constants
    eps: str = "rms_norm_eps"  # what the norm's epsilon is called
    layer_norm: bool = False  # the epsilon is a LayerNorm's
    partial_rope: bool = False  # only a part of each head may be rotated
    latent: bool = False  # MLA: heads of k and v may differ, rotated columns are apart
    finish: Callable[[GGUFKeys, Config], Mapping[str, Any]] | None = None  # what is computed


# --- what is computed of the keys ---


def _llama(keys: GGUFKeys, config: Config) -> Config:
    if config["num_experts_in_file"] > 1:
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": config["num_experts_in_file"],
            "num_experts_per_tok": keys.integer("expert_used_count"),
        }
    if config.get("sliding_window"):
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    return {}


def _smollm3(keys: GGUFKeys, config: Config) -> Config:
    layers = range(config["num_hidden_layers"])
    return {"no_rope_layer_interval": 4, "no_rope_layers": [int((i + 1) % 4 != 0) for i in layers]}


def _granite(keys: GGUFKeys, config: Config) -> Config:
    found: Config = {
        "attention_multiplier": keys.number("attention.scale", default=config["head_dim"] ** -0.5),
        "embedding_multiplier": keys.number("embedding_scale", default=1.0),
        "residual_multiplier": keys.number("residual_scale", default=1.0),
        "logits_scaling": keys.number("logit_scale", default=1.0),
    }
    if keys.arch == "granitemoe":
        found["num_local_experts"] = config["num_experts_in_file"]
        found["num_experts_per_tok"] = keys.integer("expert_used_count")
        if "expert_shared_feed_forward_length" in keys:
            found |= {
                "architectures": ["GraniteMoeSharedForCausalLM"],
                "model_type": "granitemoeshared",
                "shared_intermediate_size": keys.integer("expert_shared_feed_forward_length"),
            }
    return found


def _qwen_moe(keys: GGUFKeys, config: Config) -> Config:
    found: Config = {
        "num_experts": config["num_experts_in_file"],
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": keys.arch == "qwen3moe",
    }
    stacked = keys.header.tensors.get("blk.0.ffn_gate_exps.weight")
    width = stacked.shape[1] if stacked is not None and len(stacked.shape) == 3 else None
    found["moe_intermediate_size"] = keys.integer("expert_feed_forward_length", default=width)
    if keys.arch == "qwen2moe":
        shared = keys.header.tensors.get("blk.0.ffn_gate_shexp.weight")
        found["shared_expert_intermediate_size"] = keys.integer(
            "expert_shared_feed_forward_length", default=shared.shape[0] if shared else None
        )
    return found


def _gemma2(keys: GGUFKeys, config: Config) -> Config:
    return {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", default=50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", default=30.0),
        "layer_types": _windows(keys, config, period=2),
        "query_pre_attn_scalar": _gemma_scalar(config, largest=46),
    }


def _gemma3(keys: GGUFKeys, config: Config) -> Config:
    local = keys.number("rope.freq_base_swa", default=10000.0)
    return {
        "layer_types": _windows(keys, config, period=6),
        "query_pre_attn_scalar": _gemma_scalar(config, largest=62),
        "final_logit_softcapping": keys.number("final_logit_softcapping")
        if "final_logit_softcapping" in keys
        else None,
        "rope_local_base_freq": local,
        **_rope_by_kind(config, local),
    }


def _rope_by_kind(config: Config, local: float) -> Config:
    """Rope where only full attention is scaled, and the windows may have a base of their own."""
    scaled = config["rope_scaling"] or {"rope_type": "default"}
    return {
        "rope_scaling": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": {**scaled, "rope_theta": config["rope_theta"]},
        },
    }


def _gemma_scalar(config: Config, *, largest: int) -> int:
    """The head's width, but in the largest model, known by its number of layers."""
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _cohere(keys: GGUFKeys, config: Config) -> Config:
    found: Config = {
        "logit_scale": keys.number("logit_scale"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in keys.header.tensors,
    }
    if keys.arch == "cohere2":
        found["layer_types"] = _windows(keys, config, period=4)
    return found


def _olmo2(keys: GGUFKeys, config: Config) -> Config:
    if not config.get("sliding_window"):
        return {}
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "layer_types": _windows(keys, config, period=4),
        **_rope_by_kind(config, keys.number("rope.freq_base_swa", default=config["rope_theta"])),
    }


def _phi3(keys: GGUFKeys, config: Config) -> Config:
    original = "rope.scaling.original_context_length"
    return {
        "original_max_position_embeddings": keys.integer(
            original, default=config["max_position_embeddings"]
        )
    }


def _stablelm(keys: GGUFKeys, config: Config) -> Config:
    tensors = keys.header.tensors
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
        # The key is written true for want of a field; a block without a second norm is parallel.
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors,
    }


def _starcoder2(keys: GGUFKeys, config: Config) -> Config:
    return {"use_bias": "blk.0.ffn_down.bias" in keys.header.tensors}


def _gpt2(keys: GGUFKeys, config: Config) -> Config:
    names = {
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    return {new: config[old] for new, old in names.items()}


def _gptneox(keys: GGUFKeys, config: Config) -> Config:
    return {
        "rotary_pct": config.get("partial_rotary_factor", 1.0),
        "rotary_emb_base": config["rope_theta"],
        "use_parallel_residual": keys.flag("use_parallel_residual", default=True),
    }


def _falcon(keys: GGUFKeys, config: Config) -> Config:
    kv_heads, tensors = config["num_key_value_heads"], keys.header.tensors
    two_norms = "blk.0.attn_norm_2.weight" in tensors
    return {
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": two_norms or kv_heads > 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "ffn_hidden_size": config["intermediate_size"],
        "bias": "blk.0.attn_qkv.bias" in tensors,
    }


def _deepseek2(keys: GGUFKeys, config: Config) -> Config:
    rotated = keys.integer("rope.dimension_count")
    # Files since mid-2025 keep the latent form's sizes under key_length and value_length.
    whole = keys.integer("attention.key_length_mla", default=config["head_dim"])
    values = "attention.value_length_mla"
    if whole <= rotated:
        raise keys.wrong("attention.key_length", whole, f"more than the {rotated} rotated columns")
    sigmoid = keys.integer("expert_gating_func", default=1) == 2
    groups = keys.integer("expert_group_count", default=1)
    method = "group_limited_greedy" if groups > 1 else "greedy"
    found: Config = {
        "num_key_value_heads": config["num_attention_heads"],
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": whole - rotated,
        "v_head_dim": keys.integer(
            values, default=keys.integer("attention.value_length", default=whole)
        ),
        "head_dim": rotated,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "q_lora_rank": keys.integer("attention.q_lora_rank")
        if "blk.0.attn_q_a.weight" in keys.header.tensors
        else None,
        "first_k_dense_replace": keys.integer("leading_dense_block_count", default=0, least=0),
        "n_routed_experts": config["num_experts_in_file"],
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "n_shared_experts": keys.integer("expert_shared_count", default=0, least=0) or None,
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "routed_scaling_factor": keys.number("expert_weights_scale", default=1.0),
        "norm_topk_prob": keys.flag("expert_weights_norm", default=sigmoid),
        "n_group": groups,
        "topk_group": keys.integer("expert_group_used_count", default=1),
        "topk_method": "noaux_tc" if sigmoid else method,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "rope_interleave": True,
    }
    if sigmoid:
        found |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    scaling = config["rope_scaling"]
    if scaling and "rope.scaling.yarn_log_multiplier" in keys:
        mscale = rounded(10 * keys.number("rope.scaling.yarn_log_multiplier"))
        found["rope_scaling"] = scaling | {"mscale": mscale, "mscale_all_dim": mscale}
    return found


def _gpt_oss(keys: GGUFKeys, config: Config) -> Config:
    scaling = config["rope_scaling"]
    return {
        "num_local_experts": config["num_experts_in_file"],
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "intermediate_size": keys.integer(
            "expert_feed_forward_length", default=config["intermediate_size"]
        ),
        "layer_types": _windows(keys, config, period=2),
        "rope_scaling": scaling
        and {"beta_fast": 32.0, "beta_slow": 1.0} | scaling | {"truncate": False},
    }


def _windows(keys: GGUFKeys, config: Config, *, period: int) -> list[str]:
    """Which layers see a window alone: as the file lists them, else all but each period's last."""
    if not config.get("sliding_window"):
        return ["full_attention"] * config["num_hidden_layers"]
    key, num_layers = "attention.sliding_window_pattern", config["num_hidden_layers"]
    listed = keys.layer_flags(key, num_layers)
    if listed is None:
        period = keys.integer(key, default=period)
        listed = [(i + 1) % period != 0 for i in range(num_layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in listed]


# --- the architectures ---

_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_MOE_SILU = {**_SILU, "output_router_logits": False}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM", config={"model_type": "llama", **_SILU}, finish=_llama
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        config={"model_type": "smollm3", "use_sliding_window": False, **_SILU},
        finish=_smollm3,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        config={"model_type": "granite", **_SILU},
        finish=_granite,
    ),
    "granitemoe": Family(
        architecture="GraniteMoeForCausalLM",
        config={"model_type": "granitemoe", **_MOE_SILU},
        finish=_granite,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        config={"model_type": "qwen2", "use_sliding_window": False, **_SILU},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        config={"model_type": "qwen3", "use_sliding_window": False, **_SILU},
    ),
    "qwen2moe": Family(
        architecture="Qwen2MoeForCausalLM",
        config={"model_type": "qwen2_moe", "use_sliding_window": False, **_MOE_SILU},
        finish=_qwen_moe,
    ),
    "qwen3moe": Family(
        architecture="Qwen3MoeForCausalLM",
        config={"model_type": "qwen3_moe", "use_sliding_window": False, **_MOE_SILU},
        finish=_qwen_moe,
    ),
    "gemma": Family(architecture="GemmaForCausalLM", config={"model_type": "gemma", **_GELU}),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        config={"model_type": "gemma2", **_GELU},
        finish=_gemma2,
    ),
    "gemma3": Family(
        architecture="Gemma3ForCausalLM",
        config={"model_type": "gemma3_text", **_GELU},
        finish=_gemma3,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        config={"model_type": "phi3", **_SILU},
        partial_rope=True,
        finish=_phi3,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM", config={"model_type": "olmo2", **_SILU}, finish=_olmo2
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        config={"model_type": "seed_oss", "attention_out_bias": False, **_SILU},
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        config={"model_type": "starcoder2", **_GELU},
        eps="norm_epsilon",
        layer_norm=True,
        finish=_starcoder2,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        config={"model_type": "gpt2", "activation_function": "gelu_new"},
        eps="layer_norm_epsilon",
        layer_norm=True,
        finish=_gpt2,
    ),
    "gptneox": Family(
        architecture="GPTNeoXForCausalLM",
        config={"model_type": "gpt_neox", "hidden_act": "gelu"},
        eps="layer_norm_eps",
        layer_norm=True,
        partial_rope=True,
        finish=_gptneox,
    ),
    "falcon": Family(
        architecture="FalconForCausalLM",
        config={
            "model_type": "falcon",
            "activation": "gelu",
            "alibi": False,
            "parallel_attn": True,
            "multi_query": True,
        },
        eps="layer_norm_epsilon",
        layer_norm=True,
        finish=_falcon,
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        config={"model_type": "stablelm", **_SILU},
        eps="layer_norm_eps",
        layer_norm=True,
        partial_rope=True,
        finish=_stablelm,
    ),
    "command-r": Family(
        architecture="CohereForCausalLM",
        config={"model_type": "cohere", **_SILU},
        eps="layer_norm_eps",
        layer_norm=True,
        finish=_cohere,
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        config={"model_type": "cohere2", **_SILU},
        eps="layer_norm_eps",
        layer_norm=True,
        finish=_cohere,
    ),
    "internlm2": Family(
        architecture="InternLM2ForCausalLM",
        config={"model_type": "internlm2", "bias": False, **_SILU},
    ),
    "deepseek2": Family(
        architecture="DeepseekV2ForCausalLM",
        config={"model_type": "deepseek_v2", **_SILU},
        latent=True,
        finish=_deepseek2,
    ),
    "gpt-oss": Family(
        architecture="GptOssForCausalLM",
        config={"model_type": "gpt_oss", "swiglu_limit": 7.0, **_SILU},
        finish=_gpt_oss,
    ),
}


def gguf_family(header: GGUFHeader) -> Family:
    """The table of a file's architecture; UnsupportedError when there is none."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{header.path} has no general.architecture; it is not a model: use another file"
        )
    if name not in FAMILIES:
        raise UnsupportedError(
            f"{header.path} has the GGUF architecture {name[:80]!r}; supported: "
            f"{', '.join(FAMILIES)}. Use the model's Hugging Face folder instead"
        )
    return FAMILIES[name]
