"""The table of architectures in jaxserve/models/README.md, made from the specs of the golden cases.

python -m tests.models.features   # prints it
"""

import json
from collections.abc import Iterator
from pathlib import Path

from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.latent_attention import LatentAttentionSpec
from jaxserve.layers.moe import MoESpec
from jaxserve.models import registry
from jaxserve.models.spec import DecoderSpec

CASES = Path(__file__).parent.parent / "golden" / "models"


def table() -> str:
    """One row an architecture: its module, and what its golden cases ask of the decoder."""
    found: dict[str, dict[str, None] | None] = dict.fromkeys(registry.FAMILIES)
    for path in sorted(CASES.glob("*.json")):
        config = json.loads(path.read_text())["config"]
        name = config["architectures"][0]
        if name in found:
            asked = dict.fromkeys(features(registry.spec_from_config(config)))
            found[name] = (found[name] or {}) | asked
    rows = [
        f"| `{name}` | {_module(name)} | {asked} |"
        for name, asked in sorted((name, _told(name, found)) for name in found)
    ]
    return "\n".join(["| Architecture | Module | Asks for |", "|---|---|---|", *rows])


def _module(name: str) -> str:
    return registry.FAMILIES[name].__name__.rpartition(".")[2]


def _told(name: str, found: dict[str, dict[str, None] | None]) -> str:
    asked = found[name]
    if asked is None:
        others = [n for n in found if _module(n) == _module(name) and found[n] is not None]
        return f"an older name within its module, which is tested by {', '.join(others)}"
    return ", ".join(sorted(asked)) or "nothing beyond Llama"


def features(spec: DecoderSpec) -> Iterator[str]:
    """What a decoder has beyond Llama's."""
    block = spec.block
    yield from _when(block.parallel, "parallel residual")
    yield from _when(not block.attention_in, "norms after, not before")
    yield from _when(block.attention_in and block.attention_out, "norms before and after")
    yield from _when(block.residual_scale != 1, "scaled residual")
    yield from _when(spec.norm.kind == "layer", "layer norm")
    yield from _when(spec.norm.plus_one, "norm weights less 1")
    yield from _when(spec.embedding_scale != 1, "scaled embeddings")
    yield from _when(spec.embedding_norm, "norm of embeddings")
    yield from _when(spec.position_rows > 0, "learned positions")
    yield from _when(spec.logit_scale != 1, "scaled logits")
    yield from _when(spec.logit_soft_cap is not None, "soft cap of logits")
    yield from _when(spec.head_bias, "head bias")
    attentions = [layer.attention for layer in spec.layers]
    yield from _when(len(spec.kv_groups) > 1, "several KV groups")
    yield from _when(any(a.window for a in attentions), "sliding window")
    for attention in dict.fromkeys(attentions):
        rope = attention.rope
        if isinstance(attention, LatentAttentionSpec):
            yield "MLA"
        else:
            yield from _when(attention.qk_norm is not None, "QK-norm")
            yield from _when(attention.q_bias or attention.output_bias, "attention bias")
            yield from _when(attention.soft_cap is not None, "soft cap of attention")
            yield from _when(attention.sinks, "sinks")
            yield from _when(attention.alibi is not None, "ALiBi")
            yield from _when(attention.clip is not None, "clipped QKV")
            yield from _when(attention.temperature is not None, "temperature by position")
            yield from _when(rope is None and not spec.position_rows, "layers without rope")
            partial = rope is not None and rope.head_dim < attention.head_dim
            yield from _when(partial, "partial rope")
        if rope is not None:
            yield from _when(rope.interleaved, "interleaved rope")
            yield from _when(rope.kind != "default", f"rope {rope.kind}")
    yield from _when(len(spec.ropes) > 1, "several ropes")
    for layer in spec.layers:
        yield from _ffn_features(layer.ffn)


def _ffn_features(ffn: FFNSpec | MoESpec) -> Iterator[str]:
    if isinstance(ffn, FFNSpec):
        yield from _when(not ffn.gated, "plain MLP")
        yield from _when(ffn.activation not in ("silu", "swish"), ffn.activation)
        yield from _when(ffn.bias, "MLP bias")
        return
    router = ffn.router
    yield f"MoE ({router.scoring}{', grouped' if router.num_groups > 1 else ''})"
    yield from _when(router.correction, "router correction")
    yield from _when(ffn.shared is not None, "shared experts")
    yield from _when(ffn.clamped is not None, "clamped SwiGLU")


def _when(condition: bool, name: str) -> Iterator[str]:
    if condition:
        yield name


if __name__ == "__main__":
    print(table())
