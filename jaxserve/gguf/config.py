"""What a GGUF header means in Hugging Face terms: config.json and generation config.

GGUF pitfalls handled here: a missing output tensor means tied embeddings; epsilons are float32
roundings; Llama 3's and Phi-3's rope scaling are tensors of factors.
"""

import math
from collections.abc import Mapping

import numpy as np

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.gguf.families import Config, gguf_family
from jaxserve.gguf.header import GGUFHeader
from jaxserve.gguf.keys import GGUFKeys, rounded
from jaxserve.gguf.rope import rope_scaling

type Factors = Mapping[str, np.ndarray]


_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # others: no dtype of their own

# generation_config.json name -> GGUF key
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
}


def hf_config(header: GGUFHeader, factors: Factors) -> Config:
    """The config.json that this GGUF file's model has in Hugging Face form.

    Args:
        header: The file's header, of a supported architecture.
        factors: Contents of the tensors of rope factors that the file has, by their names.
    """
    family, keys, tensors = gguf_family(header), GGUFKeys(header), header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path} has no matrix token_embd.weight; use another file")
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    # Without key_length a head is a share of the model's width: granite's table has no other.
    head_dim = keys.integer("attention.key_length", default=max(1, hidden // heads))
    if not family.latent:
        _check_heads(keys, head_dim)
    theta = keys.number("rope.freq_base", default=10000.0)
    eps = "attention.layer_norm_epsilon" if family.layer_norm else None
    config: Config = {
        "architectures": [family.architecture],
        **family.config,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        family.eps: keys.number(eps or "attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": any(f"blk.0.attn_{p}.bias" in tensors for p in ("q", "qkv")),
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "torch_dtype": _FLOATS.get(_main_encoding(header)),
        "num_experts_in_file": keys.integer("expert_count", default=0, least=0),
    }
    rotated = keys.integer("rope.dimension_count", default=head_dim)
    if rotated != head_dim and not family.latent:
        if not family.partial_rope:
            raise UnsupportedError(
                f"{header.path}: only a part of each head is rotated, which is not supported "
                f"for the GGUF architecture {keys.arch!r}; use the model's Hugging Face folder"
            )
        config["partial_rotary_factor"] = _share(rotated, head_dim)
    config["rope_scaling"] = rope_scaling(keys, factors, theta=theta, rotated=rotated)
    if keys.get("attention.sliding_window"):  # 0 says that there is none
        config["sliding_window"] = keys.integer("attention.sliding_window")
    if family.finish is not None:
        config |= family.finish(keys, config)
    del config["num_experts_in_file"]
    return config | _token_ids(header, config["vocab_size"])


def _check_heads(keys: GGUFKeys, head_dim: int) -> None:
    if keys.integer("attention.value_length", default=head_dim) != head_dim:
        raise UnsupportedError(
            f"{keys.header.path}: heads of k and v differ in size; use another model"
        )


def _share(rotated: int, head_dim: int) -> float:
    """A factor f for which int(head_dim * f) is `rotated`, as readers compute it."""
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, math.inf)


def _main_encoding(header: GGUFHeader) -> str:
    """The encoding of most matrices' bytes."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.encoding] = sizes.get(tensor.encoding, 0) + tensor.nbytes
    return max(sizes, key=sizes.__getitem__, default="")


def hf_generation_config(header: GGUFHeader, vocab_size: int) -> Config:
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
            config[name] = value if isinstance(value, int) else rounded(value)  # type: ignore[arg-type]
    return config


def _token_ids(header: GGUFHeader, vocab_size: int) -> Config:
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
