"""How the tensors of each GGUF architecture are called, and stored, in Hugging Face's terms.

A table gives a GGUF stem ("attn_q") the Hugging Face name that `save_pretrained` writes. What
llama.cpp's converter changes in a tensor is undone by its entry: rows of rotary pairs, transposed
matrices, norm weights with 1 added, stacked experts, split or reordered fused projections.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

type Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The Hugging Face tensor that a GGUF tensor is."""

    name: str  # without its end; {e}: one tensor for each entry of the first axis
    weight: str = ".weight"  # what follows the name
    bias: str = ".bias"
    permuted: str | None = None  # config key of the heads whose rows are rotated pairs
    transposed: bool = False  # a weight; biases never are
    shift: float = 0.0  # of a weight
    row: bool = False  # a vector that is a matrix of one row


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A Hugging Face tensor that GGUF stores as several, or in another order.

    Its axis is made of `sizes(config)[0]` groups; each group takes the next `sizes(config)[1][i]`
    of source i. A source that is named again goes on where it ended. Sources are changed as their
    entries in the layer's table say, before they are joined.
    """

    to: Entry
    sources: tuple[str, ...]
    sizes: Callable[[Config], tuple[int, tuple[int, ...]]]
    axis: int = -2


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The tables of one architecture."""

    top: Mapping[str, Entry]
    layer: Mapping[str, Entry]
    layers: str = "model.layers.{}."
    joins: tuple[Join, ...] = field(default_factory=tuple)


def _table(**names: str) -> dict[str, Entry]:
    return {stem: Entry(name=name) for stem, name in names.items()}


# --- Llama and its kin ---

_TOP = _table(token_embd="model.embed_tokens", output_norm="model.norm", output="lm_head")
_ATTENTION = _table(
    attn_q="self_attn.q_proj",
    attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj",
    attn_output="self_attn.o_proj",
)
_QK_NORM = _table(attn_q_norm="self_attn.q_norm", attn_k_norm="self_attn.k_norm")
_NORMS = _table(attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
_FFN = _table(ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
_LAYER = _NORMS | _ATTENTION | _FFN
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def _permuted(layer: Mapping[str, Entry]) -> dict[str, Entry]:
    """With q and k in the order of rotated pairs, as the converter writes Llama's."""
    return {n: replace(e, permuted=_HEADS.get(n)) for n, e in layer.items()}


def _plus_one(layer: Mapping[str, Entry]) -> dict[str, Entry]:
    """With 1 added to the weights of norms, as the converter writes Gemma's."""
    return {n: replace(e, shift=-1.0 if n.endswith("norm") else 0.0) for n, e in layer.items()}


_LLAMA = Names(top=_TOP, layer=_permuted(_LAYER))
_MIXTRAL = Names(
    top=_TOP,
    layer=_permuted(_NORMS | _ATTENTION)
    | _table(
        ffn_gate_inp="block_sparse_moe.gate",
        ffn_gate_exps="block_sparse_moe.experts.{e}.w1",
        ffn_down_exps="block_sparse_moe.experts.{e}.w2",
        ffn_up_exps="block_sparse_moe.experts.{e}.w3",
    ),
)
_PLAIN = Names(top=_TOP, layer=_LAYER)
_QWEN3 = Names(top=_TOP, layer=_LAYER | _QK_NORM)
_EXPERTS = _table(
    ffn_gate_inp="mlp.gate",
    ffn_gate_exps="mlp.experts.{e}.gate_proj",
    ffn_up_exps="mlp.experts.{e}.up_proj",
    ffn_down_exps="mlp.experts.{e}.down_proj",
)
_QWEN2_MOE = Names(
    top=_TOP,
    layer=_LAYER
    | _EXPERTS
    | _table(
        ffn_gate_shexp="mlp.shared_expert.gate_proj",
        ffn_up_shexp="mlp.shared_expert.up_proj",
        ffn_down_shexp="mlp.shared_expert.down_proj",
    )
    | {"ffn_gate_inp_shexp": Entry(name="mlp.shared_expert_gate", row=True)},
)
_QWEN3_MOE = Names(top=_TOP, layer=_LAYER | _QK_NORM | _EXPERTS)
_SEED_OSS = Names(top=_TOP, layer=_LAYER | _table(post_attention_norm="post_attention_layernorm"))
_OLMO2 = Names(
    top=_TOP,
    layer=_ATTENTION
    | _FFN
    | _QK_NORM
    | _table(
        post_attention_norm="post_attention_layernorm",
        post_ffw_norm="post_feedforward_layernorm",
    ),
)
_PHI3 = Names(
    top=_TOP,
    layer=_LAYER | _table(attn_qkv="self_attn.qkv_proj", ffn_up="mlp.gate_up_proj"),
)
_COHERE = Names(top=_TOP, layer=_LAYER | _QK_NORM)
_STABLELM = Names(
    top=_TOP,
    layer=_LAYER
    | _table(
        attn_q_norm="self_attn.q_layernorm.norms.{e}",
        attn_k_norm="self_attn.k_layernorm.norms.{e}",
    ),
)
_STARCODER2 = Names(
    top=_TOP,
    layer=_NORMS | _ATTENTION | _table(ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"),
)

# --- Gemma ---

_GEMMA_TOP = _plus_one(_TOP)
_GEMMA = Names(top=_GEMMA_TOP, layer=_plus_one(_LAYER))
_GEMMA2 = Names(
    top=_GEMMA_TOP,
    layer=_plus_one(
        _LAYER
        | _QK_NORM
        | _table(
            post_attention_norm="post_attention_layernorm",
            ffn_norm="pre_feedforward_layernorm",
            post_ffw_norm="post_feedforward_layernorm",
        )
    ),
)

# --- fused and reordered projections ---


def _qkv_by_kv_head(config: Config) -> tuple[int, tuple[int, ...]]:
    """For each kv head: its query heads, then its key and its value."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // heads
    return kv_heads, (heads // kv_heads * head_dim, head_dim, head_dim)


def _gate_then_up(config: Config) -> tuple[int, tuple[int, ...]]:
    return 1, (config["intermediate_size"], config["intermediate_size"])


def _shared_gate_then_up(config: Config) -> tuple[int, tuple[int, ...]]:
    return 1, (config["shared_intermediate_size"], config["shared_intermediate_size"])


def _gate_and_up_in_turns(config: Config) -> tuple[int, tuple[int, ...]]:
    return config["intermediate_size"], (1, 1)


def _latent_kv(config: Config) -> tuple[int, tuple[int, ...]]:
    """For each head: what makes its keys, then what makes its values."""
    return config["num_attention_heads"], (config["qk_nope_head_dim"], config["v_head_dim"])


_GRANITE_MOE = Names(
    top=_TOP,
    layer=_permuted(_LAYER)
    | _table(
        ffn_gate_inp="block_sparse_moe.router.layer",
        ffn_down_exps="block_sparse_moe.output_linear",
        ffn_down_shexp="shared_mlp.output_linear",
    ),
    joins=(
        Join(
            to=Entry(name="block_sparse_moe.input_linear"),
            sources=("ffn_gate_exps", "ffn_up_exps"),
            sizes=_gate_then_up,
        ),
        Join(
            to=Entry(name="shared_mlp.input_linear"),
            sources=("ffn_gate_shexp", "ffn_up_shexp"),
            sizes=_shared_gate_then_up,
        ),
    ),
)
_GPT_OSS = Names(
    top=_TOP,
    layer=_NORMS
    | _ATTENTION
    | _table(post_attention_norm="post_attention_layernorm", ffn_gate_inp="mlp.router")
    | {
        "attn_sinks": Entry(name="self_attn.sinks", weight=""),
        "ffn_gate_exps": Entry(name="", transposed=True),
        "ffn_up_exps": Entry(name="", transposed=True),
        "ffn_down_exps": Entry(
            name="mlp.experts.down_proj", weight="", bias="_bias", transposed=True
        ),
    },
    joins=(
        Join(
            to=Entry(name="mlp.experts.gate_up_proj", weight="", bias="_bias"),
            sources=("ffn_gate_exps", "ffn_up_exps"),
            sizes=_gate_and_up_in_turns,
            axis=-1,
        ),
    ),
)
_DEEPSEEK2 = Names(
    top=_TOP,
    layer=_LAYER
    | _EXPERTS
    | _table(
        attn_q_a="self_attn.q_a_proj",
        attn_q_a_norm="self_attn.q_a_layernorm",
        attn_q_b="self_attn.q_b_proj",
        attn_kv_a_mqa="self_attn.kv_a_proj_with_mqa",
        attn_kv_a_norm="self_attn.kv_a_layernorm",
        attn_kv_b="self_attn.kv_b_proj",
        ffn_gate_shexp="mlp.shared_experts.gate_proj",
        ffn_up_shexp="mlp.shared_experts.up_proj",
        ffn_down_shexp="mlp.shared_experts.down_proj",
    )
    | {
        "exp_probs_b": Entry(name="mlp.gate", bias=".e_score_correction_bias"),
        "attn_k_b": Entry(name="", transposed=True),
    },
    joins=(
        Join(
            to=Entry(name="self_attn.kv_b_proj"),
            sources=("attn_k_b", "attn_v_b"),
            sizes=_latent_kv,
        ),
    ),
)
_INTERNLM2 = Names(
    top=_table(token_embd="model.tok_embeddings", output_norm="model.norm", output="output"),
    layer=_table(
        attn_norm="attention_norm",
        attn_output="attention.wo",
        ffn_norm="ffn_norm",
        ffn_gate="feed_forward.w1",
        ffn_down="feed_forward.w2",
        ffn_up="feed_forward.w3",
    )
    | {stem: Entry(name="", permuted=heads) for stem, heads in _HEADS.items()},
    joins=(
        Join(
            to=Entry(name="attention.wqkv"),
            sources=("attn_q", "attn_k", "attn_v"),
            sizes=_qkv_by_kv_head,
        ),
    ),
)
_GPT2 = Names(
    top=_table(
        token_embd="transformer.wte",
        position_embd="transformer.wpe",
        output_norm="transformer.ln_f",
        output="lm_head",
    ),
    layers="transformer.h.{}.",
    layer=_table(attn_norm="ln_1", ffn_norm="ln_2")
    | {
        stem: Entry(name=name, transposed=True)
        for stem, name in (
            ("attn_qkv", "attn.c_attn"),
            ("attn_output", "attn.c_proj"),
            ("ffn_up", "mlp.c_fc"),
            ("ffn_down", "mlp.c_proj"),
        )
    },
)
_GPTNEOX = Names(
    top=_table(
        token_embd="gpt_neox.embed_in",
        output_norm="gpt_neox.final_layer_norm",
        output="embed_out",
    ),
    layers="gpt_neox.layers.{}.",
    layer=_table(
        attn_norm="input_layernorm",
        attn_output="attention.dense",
        ffn_norm="post_attention_layernorm",
        ffn_up="mlp.dense_h_to_4h",
        ffn_down="mlp.dense_4h_to_h",
    ),
    joins=(
        Join(
            to=Entry(name="attention.query_key_value"),
            sources=("attn_qkv",) * 3,
            sizes=_qkv_by_kv_head,
        ),
    ),
)
_FALCON_TOP = _table(
    token_embd="transformer.word_embeddings", output_norm="transformer.ln_f", output="lm_head"
)
_FALCON_LAYER = _table(
    attn_output="self_attention.dense",
    ffn_up="mlp.dense_h_to_4h",
    ffn_down="mlp.dense_4h_to_h",
)
_FALCON_JOINS = (
    Join(
        to=Entry(name="self_attention.query_key_value"),
        sources=("attn_qkv",) * 3,
        sizes=_qkv_by_kv_head,
    ),
)
_FALCON = Names(
    top=_FALCON_TOP,
    layers="transformer.h.{}.",
    layer=_FALCON_LAYER | _table(attn_norm="input_layernorm"),
    joins=_FALCON_JOINS,
)
_FALCON_TWO_NORMS = replace(
    _FALCON, layer=_FALCON_LAYER | _table(attn_norm="ln_mlp", attn_norm_2="ln_attn")
)

# By the Hugging Face architecture that `gguf.config` finds a file to be.
NAMES: Mapping[str, Names] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _MIXTRAL,
    "SmolLM3ForCausalLM": _LLAMA,
    "GraniteForCausalLM": _LLAMA,
    "GraniteMoeForCausalLM": _GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": _GRANITE_MOE,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen2MoeForCausalLM": _QWEN2_MOE,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA2,
    "Phi3ForCausalLM": _PHI3,
    "Olmo2ForCausalLM": _OLMO2,
    "Olmo3ForCausalLM": _OLMO2,
    "SeedOssForCausalLM": _SEED_OSS,
    "Starcoder2ForCausalLM": _STARCODER2,
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": _GPTNEOX,
    "FalconForCausalLM": _FALCON,
    "FalconTwoNorms": _FALCON_TWO_NORMS,
    "StableLmForCausalLM": _STABLELM,
    "CohereForCausalLM": _COHERE,
    "Cohere2ForCausalLM": _COHERE,
    "InternLM2ForCausalLM": _INTERNLM2,
    "DeepseekV2ForCausalLM": _DEEPSEEK2,
    "DeepseekV3ForCausalLM": _DEEPSEEK2,
    "GptOssForCausalLM": _GPT_OSS,
}


def names_of(config: Config) -> Names:
    """The tables of the model that a config describes."""
    architecture = config["architectures"][0]
    if architecture == "FalconForCausalLM" and config["num_ln_in_parallel_attn"] == 2:
        architecture = "FalconTwoNorms"
    return NAMES[architecture]
