"""Makes tiny_llama/: random Llama checkpoints of a few layers, and their logits by transformers.

The tests read the folders and never run this script. To make them again, in a virtual environment
of its own:

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/golden/make_tiny.py

Each folder is what `save_pretrained` writes, plus expected.npz: tokens_0, logits_0 [T, V],
tokens_1, logits_1. The logits are float32 whatever the weights are stored as.
"""

import argparse
import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,  # wide enough that every weight matters to the logits
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
# name -> (dtype on disk, changes to BASE)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("float32", {}),
    "mha_untied": ("float16", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "mqa_deep": ("bfloat16", {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "rope_llama3": ("bfloat16", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "rope_llama3_old_config": ("bfloat16", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "rope_linear": ("bfloat16", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "rope_yarn": ("bfloat16", {"rope_scaling": YARN}),
    "bias": ("bfloat16", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("bfloat16", {"head_dim": 32, "tie_word_embeddings": False}),
    "sharded": ("bfloat16", {"tie_word_embeddings": False}),
}
LENGTHS = (40, 13)  # tokens of the two sequences


def make(name: str, seed: int, folder: Path) -> int:
    """Writes one variant; returns its size in bytes."""
    dtype, changes = VARIANTS[name]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(BASE | changes)))
    for key, weight in model.named_parameters():
        if "norm" in key:  # all ones until now
            weight.uniform_(0.5, 1.5)
        elif key.endswith(".bias"):  # all zeros until now
            weight.normal_(std=0.3)
    shutil.rmtree(folder, ignore_errors=True)
    shard_size = "130KB" if name == "sharded" else "1GB"
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
    if name.endswith("_old_config"):
        write_old_config(folder, changes["rope_scaling"])
    # Loaded again, so that the logits are those of what is on disk.
    loaded = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = {}
    for i, length in enumerate(LENGTHS):
        tokens = torch.randint(3, BASE["vocab_size"], (length,))
        expected[f"tokens_{i}"] = tokens.numpy().astype(np.int32)
        expected[f"logits_{i}"] = loaded(input_ids=tokens[None], use_cache=False).logits[0].numpy()
    np.savez_compressed(folder / "expected.npz", **expected)
    return sum(path.stat().st_size for path in folder.iterdir())


def write_old_config(folder: Path, rope_scaling: dict[str, Any]) -> None:
    """The config as transformers 4 wrote it: rope_theta and rope_scaling on the top level."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = rope_scaling
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny_llama")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for seed, name in enumerate(VARIANTS):
        size = make(name, seed, args.out / name)
        print(f"{name:24} {size / 1000:6.1f} kB")


if __name__ == "__main__":
    main()
