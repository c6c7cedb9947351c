"""Weights of 4 and 8 bits in Hugging Face folders: each is joined with the tensor of its scales.

Families' names then find them where a checkpoint of 16 bits has them. The formats: MXFP4 as GPT-OSS
keeps it; float8 and int8 with a scale for each block, channel, group or tensor, as DeepSeek-V3
(`weight_scale_inv`), compressed-tensors, fbgemm and ModelOpt do (`weight_scale`). In all of them
a value is what is stored *times* its scale.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.model_index import TensorInfo

SCALED = "_SCALED"  # behind the stored encoding of a tensor that has scales
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
_SCALE_ENCODINGS = ("F32", "F16", "BF16", "F8_E8M0")
_SCALE_NAMES = ("_scale_inv", "_scale")
# Of activations and of the KV cache: weights are widened, so that nothing is computed in 8 bits.
_OTHER_SCALES = re.compile(r"(.*\.)?(input|activation|output|prob|[qkv])_scale(_ub|_inv)?")
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "dense")
_MAX_NAMES = 8

type Tensors = dict[str, TensorInfo]
type Blocks = tuple[int, int]  # rows and columns that share a scale


def with_scales(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of a folder, those of 4 and 8 bits joined with their scales.

    Raises:
        UnsupportedError: config.json tells of a quantisation that is not read.
        CheckpointError: Scales are missing, or do not fit.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization is None:
        return _with_eight_bits(_with_mxfp4(tensors), None)
    if not isinstance(quantization, Mapping):
        raise CheckpointError("quantization_config of config.json is no object; check the file")
    block = _block_of(quantization)
    found = _with_eight_bits(_with_mxfp4(tensors), block)
    bare = [name for name, info in found.items() if info.encoding in _EIGHT_BITS]
    if bare:
        raise CheckpointError(
            f"{len(bare)} weights of 8 bits have no scales: {_listed(bare)}; download the model "
            "again"
        )
    return {name: info for name, info in found.items() if not _OTHER_SCALES.fullmatch(name)}


def _block_of(quantization: Mapping[str, Any]) -> Blocks | None:
    """Rows and columns of a block as config.json tells; None: it tells of none.

    Raises:
        UnsupportedError: It tells of another kind of quantisation.
    """
    method = str(quantization.get("quant_method", "compressed-tensors")).replace(
        "_tensors", "-tensors"
    )
    if method not in _METHODS:
        raise _refused(f"quant_method={method[:80]!r}", _METHODS)
    if method == "modelopt" and quantization.get("quant_algo") != "FP8":
        raise _refused(f"quant_algo={str(quantization.get('quant_algo'))[:80]!r}", ("FP8",))
    if method != "compressed-tensors":
        return _pair(quantization.get("weight_block_size"))
    form = quantization.get("format", "dense")
    if form not in _FORMATS:
        raise _refused(f"format={str(form)[:80]!r}", _FORMATS)
    sparsity = quantization.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _refused(f"sparsity_config format={str(sparsity['format'])[:80]!r}", ("dense",))
    blocks: set[Blocks] = set()
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("num_bits", 8) != 8 or not weights.get("symmetric", True):
            raise _refused(f"weights={str(dict(weights))[:200]}", ("8 bits, symmetric",))
        structure = weights.get("block_structure")
        if isinstance(structure, str):
            structure = [int(size) for size in structure.split("x") if size.isdecimal()]
        if block := _pair(structure or [1, weights.get("group_size") or 0]):
            blocks.add(block)
    if len(blocks) > 1:
        raise _refused(f"config_groups with blocks of {sorted(blocks)}", ("blocks of one size",))
    return next(iter(blocks), None)


def _pair(value: object) -> Blocks | None:
    match value:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case _:
            return None


def _refused(came: str, allowed: tuple[str, ...]) -> UnsupportedError:
    return UnsupportedError(
        f"quantization_config of config.json has {came}; supported: {', '.join(allowed)}. Use "
        "another form of this model, such as GGUF"
    )


def _with_mxfp4(tensors: Tensors) -> Tensors:
    """Pairs X_blocks [E, out, n, 16] and X_scales [E, out, n] as one tensor X [E, 32 n, out].

    That is how checkpoints that are not quantized keep X, and so what families' names expect.
    """
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        joined = name.removesuffix("_blocks")
        blocks, scales = tensors[name], tensors.get(f"{joined}_scales")
        if scales is None or (blocks.encoding, scales.encoding) != ("U8", "U8"):
            continue
        if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, 16) or joined in tensors:
            continue
        experts, rows, count, _ = blocks.shape
        del tensors[name], tensors[scales.name]
        tensors[joined] = replace(
            blocks,
            name=joined,
            shape=(experts, 32 * count, rows),
            transposed=True,
            encoding="MXFP4_BLOCKS",
            scales=scales,
        )
    return tensors


def _with_eight_bits(tensors: Tensors, block: Blocks | None) -> Tensors:
    """Pairs X and X_scale(_inv), which stays out of sight from then on."""
    found = dict(tensors)
    problems = []
    for name, info in tensors.items():
        if info.encoding not in _EIGHT_BITS or len(info.shape) < 2:
            continue
        scales = next((tensors[name + s] for s in _SCALE_NAMES if name + s in tensors), None)
        if scales is None:
            continue
        sizes = _sizes(info.shape, scales.shape, block)
        if sizes is None or scales.encoding not in _SCALE_ENCODINGS:
            problems.append(f"{scales.name} is {scales.encoding} {scales.shape}")
            continue
        del found[scales.name]
        encoding = info.encoding + SCALED
        found[name] = replace(info, encoding=encoding, scales=scales, scale_block=sizes)
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors of scales fit neither their weights nor blocks of {block}: "
            f"{_listed(problems)}; download the model again"
        )
    return found


def _sizes(shape: tuple[int, ...], scales: tuple[int, ...], block: Blocks | None) -> Blocks | None:
    """Rows and columns of `shape` that share a scale; None if `scales` does not fit."""
    lead = shape[:-2]
    if len(scales) < 2 and math.prod(lead) == 1:  # one for all, or one a row
        scales = (*lead, *(scales or (1,)), 1)
    if scales[:-2] != lead:
        return None
    found = list(_axis_sizes(shape[-2:], scales[-2:], block))
    return (found[0], found[1]) if all(found) else None


def _axis_sizes(
    shape: tuple[int, ...], scales: tuple[int, ...], block: Blocks | None
) -> Iterator[int]:
    for axis, (size, count) in enumerate(zip(shape, scales, strict=True)):
        if count == size:
            yield 1
        elif count == 1:
            yield size
        else:
            wide = block[axis] if block else 0
            yield wide if wide and -(-size // wide) == count else 0


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    shown = (n[:200] if n.isprintable() else repr(n[:200]) for n in names[:_MAX_NAMES])
    return ", ".join(shown) + more
