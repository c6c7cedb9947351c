"""What a GGUF header means in Hugging Face terms: tensor names, config.json, generation config.

An architecture is data: one `GGUFArchitecture`. GGUF pitfalls handled here: llama's q and k rows
are stored in the order of rotated pairs and must be un-permuted per head; a missing output tensor
means tied embeddings; epsilons are float32 roundings; Llama 3's rope scaling is a tensor of
factors instead of parameters.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.gguf import GGUFHeader

ROPE_FACTORS = "rope_freqs.weight"  # no Hugging Face tensor: becomes config["rope_scaling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFArchitecture:
    """How one `general.architecture` maps to Hugging Face."""

    config: Mapping[str, Any]  # constants of config.json
    top: Mapping[str, str]  # GGUF name without .weight/.bias -> Hugging Face name
    layer: Mapping[str, str]  # the same inside blk.{i}. and model.layers.{i}.
    permuted: Mapping[str, str] = field(default_factory=dict)  # layer part -> key of its heads


_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
        },
        top=_TOP,
        layer={
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
    ),
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # others: no dtype of their own
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)\.(weight|bias)")

# generation_config.json name -> GGUF key
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
}


def gguf_architecture(header: GGUFHeader) -> GGUFArchitecture:
    """The table of a file's architecture; UnsupportedError when there is none."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{header.path} has no general.architecture; it is not a model: use another file"
        )
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{header.path} has the GGUF architecture {name[:80]!r}; supported: "
            f"{', '.join(ARCHITECTURES)}. Use the model's Hugging Face folder instead"
        )
    return ARCHITECTURES[name]


def hf_name(architecture: GGUFArchitecture, name: str) -> tuple[str, str | None]:
    """The Hugging Face name of a GGUF tensor, and the config key of its heads if permuted.

    A name without an entry in the tables is returned as it is, so that loading reports it.
    """
    match = _BLOCK.fullmatch(name)
    if match and (part := architecture.layer.get(match[2])):
        hf = f"model.layers.{match[1]}.{part}.{match[3]}"
        return hf, architecture.permuted.get(match[2])
    stem, _, kind = name.rpartition(".")
    if stem in architecture.top:
        return f"{architecture.top[stem]}.{kind}", None
    return name, None


class _Metadata:
    """Typed access to a file's metadata, with an error that names the file and the key."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.values = header.metadata
        self.arch = str(header.metadata.get("general.architecture"))

    def integer(self, key: str, *, default: int | None = None) -> int:
        value = self.values.get(f"{self.arch}.{key}", default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one number per layer, all the same
        if isinstance(value, np.ndarray):
            raise UnsupportedError(
                f"{self.header.path}: {self.arch}.{key} differs from layer to layer, which is "
                "not supported; use a model with equal layers"
            )
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self._bad(key, value, "a positive integer")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.values.get(f"{self.arch}.{key}", default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type]
            raise self._bad(key, value, "a positive number")
        # Numbers are stored as float32: 9.999999747378752e-06 was 1e-05.
        return float(f"{value:.7g}")

    def _bad(self, key: str, value: object, wanted: str) -> CheckpointError:
        came = "is missing" if value is None else f"is {str(value)[:80]!r}"
        return CheckpointError(
            f"{self.header.path}: the key {self.arch}.{key} {came}, not {wanted}; "
            "convert the model again"
        )


def hf_config(header: GGUFHeader, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """The config.json that this GGUF file's model has in Hugging Face form.

    Args:
        header: The file's header, of a supported architecture.
        rope_factors: Content of the `rope_freqs.weight` tensor, if the file has one.
    """
    architecture, meta = gguf_architecture(header), _Metadata(header)
    if meta.values.get(f"{meta.arch}.expert_count", 0) not in (0, 1):
        raise UnsupportedError(
            f"{header.path} is a mixture of experts of GGUF architecture {meta.arch!r}, which is "
            "not supported; use a dense model"
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path} has no matrix token_embd.weight; use another file")
    heads, hidden = meta.integer("attention.head_count"), meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", default=max(1, hidden // heads))
    if meta.integer("attention.value_length", default=head_dim) != head_dim:
        raise UnsupportedError(f"{header.path}: heads of k and v differ in size; use another model")
    if meta.integer("rope.dimension_count", default=head_dim) != head_dim:
        raise UnsupportedError(
            f"{header.path}: only a part of each head is rotated, which is not supported "
            "for a GGUF file; use the model's Hugging Face folder"
        )
    theta = meta.number("rope.freq_base", default=10000.0)
    tensors = header.tensors
    config = {
        **architecture.config,
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(meta, rope_factors, theta, head_dim),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "torch_dtype": _FLOATS.get(_main_encoding(header)),
    }
    window = header.metadata.get(f"{meta.arch}.attention.sliding_window")
    if window:
        config["sliding_window"] = meta.integer("attention.sliding_window")
    return config | _token_ids(header, config["vocab_size"])


def _main_encoding(header: GGUFHeader) -> str:
    """The encoding of most matrices' bytes."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.encoding] = sizes.get(tensor.encoding, 0) + tensor.nbytes
    return max(sizes, key=sizes.__getitem__, default="")


def hf_generation_config(header: GGUFHeader, vocab_size: int) -> dict[str, Any]:
    """The generation_config.json of this file: end tokens and recommended sampling."""
    config = _token_ids(header, vocab_size)
    ends = [config["eos_token_id"]] if "eos_token_id" in config else []
    for key in ("eot", "eom"):  # end of turn, end of message: a chat's answer ends there too
        token = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int and 0 <= token < vocab_size and token not in ends:
            ends.append(token)
    if len(ends) > 1:
        config["eos_token_id"] = ends
    for name, key in _SAMPLING.items():
        value = header.metadata.get(key)
        if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
            config[name] = value if isinstance(value, int) else float(f"{value:.7g}")
    return config


def _token_ids(header: GGUFHeader, vocab_size: int) -> dict[str, Any]:
    ids = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise CheckpointError(
                f"{header.path}: tokenizer.ggml.{key}_token_id is {str(value)[:80]!r}, the "
                f"vocabulary has {vocab_size} tokens; convert the model again"
            )
        ids[f"{name}_token_id"] = value
    return ids


def _rope_scaling(
    meta: _Metadata, factors: np.ndarray | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    kind = meta.values.get(f"{meta.arch}.rope.scaling.type", "none")
    if factors is not None:
        return _llama3_scaling(meta, factors, theta, head_dim)
    if f"{meta.arch}.rope.scale_linear" in meta.values:  # files of 2023
        factor = meta.number("rope.scale_linear")
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta.number("rope.scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": meta.number("rope.scaling.factor"),
            "original_max_position_embeddings": meta.integer(
                "rope.scaling.original_context_length"
            ),
        }
    raise UnsupportedError(
        f"{meta.header.path} has rope scaling {str(kind)[:40]!r}; supported: none, linear, yarn. "
        "Use the model's Hugging Face folder"
    )


def _llama3_scaling(
    meta: _Metadata, factors: np.ndarray, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Recover Llama 3's scaling parameters from the factors, and check that they give them."""
    largest = float(factors.max())
    if (factors == 1).all():
        return None
    if factors.shape == (head_dim // 2,) and math.isfinite(largest) and largest > 1:
        low, high, original = 1.0, 4.0, 8192  # of every Llama 3 release
        wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        if np.allclose(1 / factors, (1 - smooth) / largest + smooth, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": round(largest, 4),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedError(
        f"{meta.header.path}: {ROPE_FACTORS} holds rope factors that are not Llama 3's; "
        "use the model's Hugging Face folder"
    )
