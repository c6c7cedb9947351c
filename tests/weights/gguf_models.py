"""Tiny models of many families as GGUF files, made as llama.cpp's converter makes them.

Names come from the gguf package's own tables. What the converter changes in the tensors is
written here once more, from its side: the reader under test undoes it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

LAYERS = 2
# What the letters in shapes stand for; a head has 16 columns.
SIZES = {"V": 40, "D": 64, "F": 96, "Q": 64, "K": 32, "E": 4, "M": 32, "S": 48, "H": 4, "d": 16}
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16

type Weights = dict[str, np.ndarray]
type Change = Callable[[str, np.ndarray], Weights]  # a tensor -> those that are written


def _shapes(text: str) -> dict[str, str]:
    """Lines of "name: shape"; a name with a slash stands for several."""
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        names, shape = line.split(": ")
        head, _, ends = names.rpartition(".")
        for end in ends.split("/"):
            found[f"{head}.{end}"] = shape
    return found


TOP = "model.embed_tokens.weight: V D\nmodel.norm.weight: D\nlm_head.weight: V D"
TIED = "model.embed_tokens.weight: V D\nmodel.norm.weight: D"
NORMS = "input_layernorm.weight: D\npost_attention_layernorm.weight: D\n"
ATTENTION = """
self_attn.q_proj.weight: Q D
self_attn.k_proj.weight: K D
self_attn.v_proj.weight: K D
self_attn.o_proj.weight: D Q
"""
BIASES = "self_attn.q_proj.bias: Q\nself_attn.k_proj.bias: K\nself_attn.v_proj.bias: K\n"
QK_NORM = "self_attn.q_norm.weight: d\nself_attn.k_norm.weight: d\n"
FFN = "mlp.gate_proj.weight: F D\nmlp.up_proj.weight: F D\nmlp.down_proj.weight: D F\n"
EXPERTS = """
mlp.gate.weight: E D
mlp.experts.{e}.gate_proj.weight: M D
mlp.experts.{e}.up_proj.weight: M D
mlp.experts.{e}.down_proj.weight: D M
"""
LLAMA = NORMS + ATTENTION + FFN
GEMMA2 = LLAMA + "pre_feedforward_layernorm.weight: D\npost_feedforward_layernorm.weight: D\n"
FALCON = """
self_attention.query_key_value.weight: QKV D
self_attention.dense.weight: D Q
mlp.dense_h_to_4h.weight: F D
mlp.dense_4h_to_h.weight: D F
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    arch: MODEL_ARCH
    architecture: str  # Hugging Face's
    layer: str
    top: str = TOP
    layers: str = "model.layers.{}."
    change: Change = lambda name, value: {name: value}
    eps: str = "attention.layer_norm_rms_epsilon"
    keys: Mapping[str, Any] = field(default_factory=dict)  # further ones, or others
    config: Mapping[str, Any] = field(default_factory=dict)  # what must come of them


def weights(case: Case, seed: int = 0) -> Weights:
    """Random tensors by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    sizes = SIZES | {"QKV": SIZES["Q"] + 2 * SIZES["K"]}
    if case.keys.get("attention.head_count_kv") == 1:
        sizes |= {"K": HEAD_DIM, "QKV": SIZES["Q"] + 2 * HEAD_DIM}
    shapes = dict(_shapes(case.top))
    for number in range(LAYERS):
        for name, shape in _shapes(case.layer).items():
            count = SIZES["E"] if "experts.{e}" in name else HEADS
            for e in range(count) if "{e}" in name else (0,):
                shapes[case.layers.format(number) + name.replace("{e}", str(e))] = shape
    return {
        name: rng.standard_normal([sizes.get(s) or int(s) for s in shape.split()], np.float32)
        for name, shape in shapes.items()
    }


def write(case: Case, path: Path, tensors: Weights) -> Path:
    """The GGUF file of a model."""
    arch = MODEL_ARCH_NAMES[case.arch]
    writer = GGUFWriter(path, arch)
    keys = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": SIZES["D"],
        "feed_forward_length": SIZES["F"],
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        case.eps: 1e-5,
        **case.keys,
    }
    for key, value in keys.items():
        adders = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        else:
            adders.get(type(value), writer.add_string)(f"{arch}.{key}", value)
    names = get_tensor_name_map(case.arch, LAYERS)
    for name, value in _stacked(tensors, case).items():
        for written, changed in case.change(name, value).items():
            found = names.get_name(written, try_suffixes=(".weight", ".bias")) or written
            writer.add_tensor(found, np.ascontiguousarray(changed))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stacked(tensors: Weights, case: Case) -> Weights:
    """With the experts (or the heads' norms) of a layer in one tensor."""
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*)\.(experts|norms)\.\d+\.(\w+)\.?(weight)?", name)
        if not match:
            found[name] = value
            continue
        one = (
            f"{match[1]}.experts.{match[3]}.weight"
            if match[2] == "experts"
            else (f"{match[1]}.weight")
        )
        if case.architecture == "MixtralForCausalLM":
            one = one.replace("model.", "").replace("block_sparse_moe", "feed_forward")
        found.setdefault(one, []).append(value)
    return {n: np.stack(v) if isinstance(v, list) else v for n, v in found.items()}


# --- what the converter changes ---


def permuted(name: str, value: np.ndarray) -> Weights:
    match = re.search(r"\.(q|k)_proj\.", name)
    if match:
        heads = HEADS if match[1] == "q" else KV_HEADS
        pairs = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        value = pairs.swapaxes(1, 2).reshape(value.shape)
    return {name: value}


def plus_one(name: str, value: np.ndarray) -> Weights:
    return {name: value + 1 if name.endswith("norm.weight") else value}


def transposed(name: str, value: np.ndarray) -> Weights:
    turned = re.search(r"\.(c_attn|c_proj|c_fc)\.weight", name)
    return {name: value.T if turned else value}


def ungrouped(kv_heads: int) -> Change:
    """Queries, keys and values of each kv head -> all queries, all keys, all values."""

    def change(name: str, value: np.ndarray) -> Weights:
        if "query_key_value" in name:
            queries = HEADS // kv_heads
            grouped = value.reshape(kv_heads, queries + 2, HEAD_DIM, *value.shape[1:])
            parts = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
            value = np.concatenate([p.reshape(-1, *value.shape[1:]) for p in parts])
        return {name: value}

    return change


def internlm2(name: str, value: np.ndarray) -> Weights:
    match = re.fullmatch(r"model\.layers\.(\d+)\.attention\.wqkv\.weight", name)
    if not match:
        return {name: value}
    grouped = value.reshape(KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM, -1)
    q, k, v = (p.reshape(-1, value.shape[1]) for p in np.split(grouped, [2, 3], axis=1))
    start = f"blk.{match[1]}.attn_"
    return {
        f"{start}q.weight": permuted(".q_proj.", q)[".q_proj."],
        f"{start}k.weight": permuted(".k_proj.", k)[".k_proj."],
        f"{start}v.weight": v,
    }


def latent(name: str, value: np.ndarray) -> Weights:
    if "kv_b_proj" not in name:
        return {name: value}
    heads = value.reshape(HEADS, 24 + 16, value.shape[1])
    return {
        name.replace("kv_b", "k_b"): heads[:, :24].swapaxes(1, 2),
        name.replace("kv_b", "v_b"): heads[:, 24:],
    }


def gpt_oss(name: str, value: np.ndarray) -> Weights:
    if name.endswith("sinks"):
        return {f"{name}.weight": value}
    match = re.fullmatch(r"(.*mlp\.experts\.)(gate_up_proj|down_proj)(_bias)?", name)
    if not match:
        return {name: value}
    end = ".bias" if match[3] else ".weight"
    value = value if match[3] else value.swapaxes(1, 2)
    if match[2] == "down_proj":
        return {f"{match[1]}down_proj{end}": value}
    rows = value if match[3] else value.swapaxes(0, 1)  # [2 F, E, D]: gate and up in turns
    gate, up = (rows[:, ::2], rows[:, 1::2]) if match[3] else (rows[::2], rows[1::2])
    if not match[3]:
        gate, up = gate.swapaxes(0, 1), up.swapaxes(0, 1)
    return {f"{match[1]}gate_proj{end}": gate, f"{match[1]}up_proj{end}": up}


def granite_moe(name: str, value: np.ndarray) -> Weights:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.input_linear\.weight", name)
    if not match:
        return permuted(name, value)
    gate, up = np.split(value, 2, axis=-2)
    end = "exps" if match[2] == "block_sparse_moe" else "shexp"
    start = f"blk.{match[1]}.ffn_"
    return {f"{start}gate_{end}.weight": gate, f"{start}up_{end}.weight": up}


# --- the models ---

LAYER_NORM = "attention.layer_norm_epsilon"
MOE_KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
DEEPSEEK = (
    LLAMA.replace("self_attn.k_proj.weight: K D\n", "")
    .replace("self_attn.v_proj.weight: K D\n", "")
    .replace("q_proj.weight: Q D", "q_proj.weight: 128 D")
) + (
    "self_attn.kv_a_proj_with_mqa.weight: 40 D\nself_attn.kv_a_layernorm.weight: 32\n"
    "self_attn.kv_b_proj.weight: 160 32\n"
)
DEEPSEEK_KEYS = {
    **MOE_KEYS,
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.key_length_mla": 32,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 8,
    "expert_shared_count": 1,
    "leading_dense_block_count": 0,
}
A = MODEL_ARCH

CASES: dict[str, Case] = {
    "llama": Case(
        arch=A.LLAMA,
        architecture="LlamaForCausalLM",
        layer=LLAMA + BIASES,
        change=permuted,
        config={"attention_bias": True, "head_dim": 16, "rms_norm_eps": 1e-5},
    ),
    "mixtral": Case(
        arch=A.LLAMA,
        architecture="MixtralForCausalLM",
        layer=NORMS
        + ATTENTION
        + "block_sparse_moe.gate.weight: E D\n"
        + "block_sparse_moe.experts.{e}.w1.weight: F D\n"
        + "block_sparse_moe.experts.{e}.w2.weight: D F\n"
        + "block_sparse_moe.experts.{e}.w3.weight: F D\n",
        change=permuted,
        keys={"expert_count": 4, "expert_used_count": 2},
        config={"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "smollm3": Case(
        arch=A.SMOLLM3,
        architecture="SmolLM3ForCausalLM",
        layer=LLAMA,
        top=TIED,
        change=permuted,
        config={"no_rope_layers": [1, 1], "tie_word_embeddings": True},
    ),
    "granite": Case(
        arch=A.GRANITE,
        architecture="GraniteForCausalLM",
        layer=LLAMA,
        change=permuted,
        keys={"attention.scale": 0.3, "embedding_scale": 3.0, "logit_scale": 2.0},
        config={
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 1.0,
        },
    ),
    "granitemoe": Case(
        arch=A.GRANITE_MOE,
        architecture="GraniteMoeSharedForCausalLM",
        layer=NORMS
        + ATTENTION
        + "block_sparse_moe.input_linear.weight: E 192 D\n"
        + "block_sparse_moe.output_linear.weight: E D F\n"
        + "block_sparse_moe.router.layer.weight: E D\n"
        + "shared_mlp.input_linear.weight: 96 D\n"
        + "shared_mlp.output_linear.weight: D S\n",
        change=granite_moe,
        keys={**MOE_KEYS, "expert_shared_feed_forward_length": 48},
        config={"num_local_experts": 4, "shared_intermediate_size": 48},
    ),
    "qwen2": Case(arch=A.QWEN2, architecture="Qwen2ForCausalLM", layer=LLAMA + BIASES),
    "qwen3": Case(
        arch=A.QWEN3,
        architecture="Qwen3ForCausalLM",
        layer=LLAMA + QK_NORM,
        keys={"attention.key_length": 16, "rope.freq_base": 1e6},
        config={"rope_theta": 1e6},
    ),
    "qwen2moe": Case(
        arch=A.QWEN2MOE,
        architecture="Qwen2MoeForCausalLM",
        layer=NORMS
        + ATTENTION
        + EXPERTS
        + "mlp.shared_expert.gate_proj.weight: S D\n"
        + "mlp.shared_expert.up_proj.weight: S D\nmlp.shared_expert.down_proj.weight: D S\n"
        + "mlp.shared_expert_gate.weight: 1 D\n",
        # llama.cpp's quantiser drops axes of 1.
        change=lambda name, value: {name: value[0] if "expert_gate" in name else value},
        keys=MOE_KEYS,
        config={
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
        },
    ),
    "qwen3moe": Case(
        arch=A.QWEN3MOE,
        architecture="Qwen3MoeForCausalLM",
        layer=NORMS + ATTENTION + QK_NORM + EXPERTS,
        keys=MOE_KEYS,
        config={"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "gemma": Case(
        arch=A.GEMMA,
        architecture="GemmaForCausalLM",
        layer=LLAMA,
        top=TIED,
        change=plus_one,
    ),
    "gemma2": Case(
        arch=A.GEMMA2,
        architecture="Gemma2ForCausalLM",
        layer=GEMMA2,
        top=TIED,
        change=plus_one,
        keys={"attention.sliding_window": 12, "attn_logit_softcapping": 50.0},
        config={
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 50.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": Case(
        arch=A.GEMMA3,
        architecture="Gemma3ForCausalLM",
        layer=GEMMA2 + QK_NORM,
        top=TIED,
        change=plus_one,
        keys={
            "attention.sliding_window": 12,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        config={
            "layer_types": ["sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "phi3": Case(
        arch=A.PHI3,
        architecture="Phi3ForCausalLM",
        layer=NORMS
        + "self_attn.qkv_proj.weight: QKV D\nself_attn.o_proj.weight: D Q\n"
        + "mlp.gate_up_proj.weight: 192 D\nmlp.down_proj.weight: D F\n",
        keys={"attention.sliding_window": 0, "rope.dimension_count": 12},
        config={"partial_rotary_factor": 0.75},
    ),
    "olmo2": Case(
        arch=A.OLMO2,
        architecture="Olmo2ForCausalLM",
        layer=ATTENTION
        + FFN
        + "post_attention_layernorm.weight: D\npost_feedforward_layernorm.weight: D\n"
        + "self_attn.q_norm.weight: Q\nself_attn.k_norm.weight: K\n",
    ),
    "olmo3": Case(
        arch=A.OLMO2,
        architecture="Olmo3ForCausalLM",
        layer=ATTENTION + FFN,
        keys={
            "attention.sliding_window": 12,
            "attention.sliding_window_pattern": [True, False],
        },
        config={"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "seed_oss": Case(
        arch=A.SEED_OSS,
        architecture="SeedOssForCausalLM",
        layer=LLAMA + BIASES,
        config={"attention_bias": True, "attention_out_bias": False},
    ),
    "starcoder2": Case(
        arch=A.STARCODER2,
        architecture="Starcoder2ForCausalLM",
        layer=NORMS
        + ATTENTION
        + BIASES
        + "input_layernorm.bias: D\nmlp.c_fc.weight: F D\nmlp.c_proj.weight: D F\n"
        + "mlp.c_proj.bias: D\n",
        eps=LAYER_NORM,
        config={"norm_epsilon": 1e-5, "use_bias": True},
    ),
    "gpt2": Case(
        arch=A.GPT2,
        architecture="GPT2LMHeadModel",
        top="transformer.wte.weight: V D\ntransformer.wpe.weight: 128 D\n"
        "transformer.ln_f.weight/bias: D",
        layers="transformer.h.{}.",
        layer="ln_1.weight/bias: D\nln_2.weight/bias: D\nattn.c_attn.weight: D 192\n"
        "attn.c_attn.bias: 192\nattn.c_proj.weight: Q D\nmlp.c_fc.weight: D F\n"
        "mlp.c_proj.weight: F D\nmlp.c_proj.bias: D\n",
        change=transposed,
        eps=LAYER_NORM,
        config={"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_positions": 128},
    ),
    "gptneox": Case(
        arch=A.GPTNEOX,
        architecture="GPTNeoXForCausalLM",
        top="gpt_neox.embed_in.weight: V D\ngpt_neox.final_layer_norm.weight/bias: D\n"
        "embed_out.weight: V D",
        layers="gpt_neox.layers.{}.",
        layer="input_layernorm.weight/bias: D\npost_attention_layernorm.weight: D\n"
        "attention.query_key_value.weight: 192 D\nattention.query_key_value.bias: 192\n"
        "attention.dense.weight: D Q\nmlp.dense_h_to_4h.weight: F D\n"
        "mlp.dense_4h_to_h.weight: D F\n",
        change=ungrouped(HEADS),
        eps=LAYER_NORM,
        keys={"attention.head_count_kv": 4, "rope.dimension_count": 4},
        config={"rotary_pct": 0.25, "use_parallel_residual": True},
    ),
    "falcon7b": Case(
        arch=A.FALCON,
        architecture="FalconForCausalLM",
        top="transformer.word_embeddings.weight: V D\ntransformer.ln_f.weight/bias: D",
        layers="transformer.h.{}.",
        layer=FALCON + "input_layernorm.weight/bias: D\n",
        change=ungrouped(1),
        eps=LAYER_NORM,
        keys={"attention.head_count_kv": 1},
        config={"new_decoder_architecture": False, "multi_query": True},
    ),
    "falcon40b": Case(
        arch=A.FALCON,
        architecture="FalconForCausalLM",
        top="transformer.word_embeddings.weight: V D\ntransformer.ln_f.weight/bias: D",
        layers="transformer.h.{}.",
        layer=FALCON + "ln_attn.weight/bias: D\nln_mlp.weight/bias: D\n",
        change=ungrouped(KV_HEADS),
        eps=LAYER_NORM,
        config={"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "stablelm": Case(
        arch=A.STABLELM,
        architecture="StableLmForCausalLM",
        layer=LLAMA.replace("post_attention_layernorm.weight: D\n", "")
        + "self_attn.q_layernorm.norms.{e}.weight: d\n",
        eps=LAYER_NORM,
        keys={"rope.dimension_count": 4},
        config={
            "partial_rotary_factor": 0.25,
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
    ),
    "cohere": Case(
        arch=A.COMMAND_R,
        architecture="CohereForCausalLM",
        top=TIED,
        layer=ATTENTION + FFN + "input_layernorm.weight: D\nself_attn.q_norm.weight: H d\n",
        eps=LAYER_NORM,
        keys={"logit_scale": 0.25},
        config={"logit_scale": 0.25, "use_qk_norm": True},
    ),
    "cohere2": Case(
        arch=A.COHERE2,
        architecture="Cohere2ForCausalLM",
        top=TIED,
        layer=ATTENTION + FFN + "input_layernorm.weight: D\n",
        eps=LAYER_NORM,
        keys={"logit_scale": 0.25, "attention.sliding_window": 12},
        config={"layer_types": ["sliding_attention"] * 2},
    ),
    "internlm2": Case(
        arch=A.INTERNLM2,
        architecture="InternLM2ForCausalLM",
        top="model.tok_embeddings.weight: V D\nmodel.norm.weight: D\noutput.weight: V D",
        layer="attention_norm.weight: D\nattention.wqkv.weight: QKV D\n"
        "attention.wo.weight: D Q\nffn_norm.weight: D\nfeed_forward.w1.weight: F D\n"
        "feed_forward.w2.weight: D F\nfeed_forward.w3.weight: F D\n",
        change=internlm2,
    ),
    "deepseek_v2": Case(
        arch=A.DEEPSEEK2,
        architecture="DeepseekV2ForCausalLM",
        layer=DEEPSEEK + EXPERTS,
        change=latent,
        keys=DEEPSEEK_KEYS,
        config={
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "topk_method": "greedy",
        },
    ),
    "deepseek_v3": Case(
        arch=A.DEEPSEEK2,
        architecture="DeepseekV3ForCausalLM",
        layer=DEEPSEEK.replace(
            "self_attn.q_proj.weight: 128 D",
            "self_attn.q_a_proj.weight: 48 D\nself_attn.q_b_proj.weight: 128 48\n"
            "self_attn.q_a_layernorm.weight: 48",
        )
        + EXPERTS
        + "mlp.gate.e_score_correction_bias: E\n"
        + "mlp.shared_experts.gate_proj.weight: M D\n",
        change=latent,
        keys={
            **DEEPSEEK_KEYS,
            "expert_gating_func": 2,
            "expert_group_count": 2,
            "attention.q_lora_rank": 48,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
        config={
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "q_lora_rank": 48,
            "n_group": 2,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "gpt_oss": Case(
        arch=A.GPT_OSS,
        architecture="GptOssForCausalLM",
        layer=NORMS
        + ATTENTION
        + BIASES
        + "self_attn.sinks: H\nmlp.router.weight: E D\nmlp.router.bias: E\n"
        + "mlp.experts.gate_up_proj: E D 64\nmlp.experts.gate_up_proj_bias: E 64\n"
        + "mlp.experts.down_proj: E M D\nmlp.experts.down_proj_bias: E D\n",
        change=gpt_oss,
        keys={**MOE_KEYS, "attention.sliding_window": 12},
        config={
            "layer_types": ["sliding_attention", "full_attention"],
            "intermediate_size": 32,
        },
    ),
}
