"""Small model files for tests: GGUF bytes written by hand, and a tiny Llama in both formats."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import save_file

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"} | {
    U64: "Q",
    I64: "q",
    F64: "d",
}

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 3, 64, 96, 4, 2, 40
HEAD_DIM = HIDDEN // HEADS


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(kind: int, value: Any) -> bytes:
    """A value without its type; an array is (item type, items)."""
    if kind == STRING:
        return gguf_string(value)
    if kind == ARRAY:
        item, items = value
        return struct.pack("<IQ", item, len(items)) + b"".join(gguf_value(item, v) for v in items)
    return struct.pack("<" + _FORMATS[kind], value)


def gguf_key(key: str, kind: int, value: Any) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + gguf_value(kind, value)


def gguf_tensor(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor's entry; `dims` are innermost first, as in the file."""
    head = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return gguf_string(name) + head + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    keys: Sequence[tuple[str, int, Any]],
    tensors: Mapping[str, tuple[Sequence[int], GGMLQuantizationType, bytes]],
    *,
    version: int = 3,
) -> bytes:
    """A whole file; tensors are name -> (shape outermost first, type, data)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    out += b"".join(gguf_key(*key) for key in keys)
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        out += gguf_tensor(name, list(reversed(shape)), int(kind), len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    return out + b"\0" * (-len(out) % 32) + data


def llama_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


def llama_weights(*, tied: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    kv = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"model.layers.{i}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"model.layers.{i}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.post_attention_layernorm.weight": (HIDDEN,),
            f"model.layers.{i}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"model.layers.{i}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"model.layers.{i}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_folder(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any] | None = None,
    num_shards: int = 1,
) -> Path:
    """A Hugging Face folder with one file or several shards and their index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or llama_config()))
    if num_shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {n: w for i, (n, w) in enumerate(weights.items()) if i % num_shards == shard}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

LLAMA_KEYS: list[tuple[str, int, Any]] = [
    ("general.architecture", STRING, "llama"),
    ("llama.block_count", U32, LAYERS),
    ("llama.context_length", U32, 128),
    ("llama.embedding_length", U32, HIDDEN),
    ("llama.feed_forward_length", U32, FFN),
    ("llama.attention.head_count", U32, HEADS),
    ("llama.attention.head_count_kv", U32, KV_HEADS),
    ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
    ("llama.rope.dimension_count", U32, HEAD_DIM),
    ("llama.rope.freq_base", F32, 10000.0),
    ("tokenizer.ggml.bos_token_id", U32, 1),
    ("tokenizer.ggml.eos_token_id", U32, 2),
]


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's halves -> the rotated pairs of GGUF's llama."""
    paired = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2)
    return paired.reshape(weight.shape)


def llama_gguf(
    weights: Mapping[str, np.ndarray],
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    keys: Sequence[tuple[str, int, Any]] = (),
    extra: Mapping[str, tuple[Sequence[int], GGMLQuantizationType, bytes]] | None = None,
) -> bytes:
    """The same model as GGUF: matrices in `kind`, vectors in F32; `keys` replace or add."""
    tensors = {}
    for name, weight in weights.items():
        stem, _, suffix = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            prefix = f"blk.{number}."
        part = _GGUF_NAMES[stem]
        if part in ("attn_q", "attn_k"):
            weight = _permute(weight, HEADS if part == "attn_q" else KV_HEADS)
        of = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        tensors[f"{prefix}{part}.{suffix}"] = (weight.shape, of, quantize(weight, of).tobytes())
    replaced = {key: (kind, value) for key, kind, value in [*LLAMA_KEYS, *keys]}
    return gguf_bytes([(k, *v) for k, v in replaced.items()], tensors | dict(extra or {}))
