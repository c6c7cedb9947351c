"""A decoder's arithmetic, from its config.json: bytes and operations (standard library only)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama-like decoder whose weights and KV take `bytes_a_value` each."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_a_value: int = 2

    @classmethod
    def read(cls, folder: Path, bytes_a_value: int = 2) -> Self:
        c = json.loads((folder / "config.json").read_text())
        return cls(
            name=folder.name,
            num_layers=c["num_hidden_layers"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_heads=c["num_attention_heads"],
            num_kv_heads=c["num_key_value_heads"],
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            vocab_size=c["vocab_size"],
            bytes_a_value=bytes_a_value,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes_a_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_a_value

    def decode_bytes(self, rows: int, context: float) -> float:
        """What a decode step must read: every matrix once, and each row's KV.

        The embedding is left out (one line a row), and so are writes and activations: this is a
        lower bound on the traffic.
        """
        weights = (self.layer_weights + self.head_weights) * self.bytes_a_value
        return weights + rows * context * self.kv_bytes_a_token

    def prefill_flops(self, lengths: Sequence[int]) -> float:
        """Operations that prompts of these lengths need: causal, one row of logits each."""
        tokens = sum(lengths)
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * pairs
        return 2 * self.layer_weights * tokens + attention + 2 * self.head_weights * len(lengths)
