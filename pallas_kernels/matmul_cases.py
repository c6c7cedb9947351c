"""Shapes of real models' weights by name, shared by tests, benchmarks and tile tuning."""

from typing import NamedTuple

from pallas_kernels.quantized import Format


class MatmulCase(NamedTuple):
    """One weight, or the experts of a layer. On one device."""

    in_dim: int
    out_dim: int
    format: Format | None = "int8"  # None: bfloat16
    block: tuple[int | None, int] = (None, 1)
    zeros: bool = False
    num_experts: int | None = None  # None: a dense layer
    top_k: int = 1  # experts a token goes to


MATMUL_CASES = {
    "tiny": MatmulCase(256, 384),
    "llama-8b/gate-up": MatmulCase(4096, 14336),
    "llama-8b/down": MatmulCase(14336, 4096),
    "llama-8b/qkv": MatmulCase(4096, 6144),
    "llama-8b/gate-up/fp8": MatmulCase(4096, 14336, "float8_e4m3fn"),
    "llama-8b/down/fp8": MatmulCase(14336, 4096, "float8_e4m3fn"),
    "llama-8b/gate-up/int4": MatmulCase(4096, 14336, "int4"),
    "llama-8b/gate-up/awq": MatmulCase(4096, 14336, "int4", (128, 1), zeros=True),
    "llama-8b/gate-up/int8-block32": MatmulCase(4096, 14336, "int8", (32, 1)),
    "llama-70b/down/tp8": MatmulCase(3584, 8192),
    "deepseek-v3/q-b": MatmulCase(1536, 24576, "float8_e4m3fn", (128, 128)),
    "deepseek-v3/kv-a": MatmulCase(7168, 576, "float8_e4m3fn", (128, 128)),
    "qwen3-30b-a3b/gate-up": MatmulCase(2048, 768, None, num_experts=128, top_k=8),
    "qwen3-30b-a3b/down": MatmulCase(768, 2048, None, num_experts=128, top_k=8),
    "qwen3-30b-a3b/gate-up/int8": MatmulCase(2048, 768, num_experts=128, top_k=8),
    "mixtral-8x7b/gate-up": MatmulCase(4096, 14336, None, num_experts=8, top_k=2),
    "mixtral-8x7b/gate-up/int8": MatmulCase(4096, 14336, num_experts=8, top_k=2),
    "mixtral-8x7b/down/int4": MatmulCase(14336, 4096, "int4", num_experts=8, top_k=2),
    "deepseek-v3/expert-up/ep32": MatmulCase(
        7168, 2048, "float8_e4m3fn", (128, 128), num_experts=8, top_k=8
    ),
}
