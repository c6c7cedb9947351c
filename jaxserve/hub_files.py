"""Which files of a repository on the Hugging Face hub are fetched, and how a user names it.

Configs, tokenizer, and safetensors or one GGUF model; never pickles, code, or second copies of the
weights.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import CheckpointError

MAX_INDEX_BYTES = 32 << 20
INDEX = "model.safetensors.index.json"
_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZER = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|vocab\.txt|merges\.txt|[\w.-]+\.model|[\w.-]+\.tiktoken"
    r"|chat_template\.(?:jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
)
_NOT_WEIGHTS = re.compile(r"consolidated.*|adapter_.*|.*(?:optimizer|scheduler|training).*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?::([^:]+))?")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANT = re.compile(r"(?:^|[-._/])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32|FP16))$", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """What a user names: a repository, and which GGUF file of it if any."""

    repo: str
    variant: str | None = None  # a file's name, or a quantisation such as Q4_K_M

    def __str__(self) -> str:
        return self.repo if self.variant is None else f"{self.repo}:{self.variant}"


def parse_name(reference: str) -> HubName | None:
    """`org/name`, `org/name:Q4_K_M` or `org/name:file.gguf`; None if it cannot be on the hub."""
    match = _NAME.fullmatch(reference)
    if match is None or "--" in match[1] or ".." in match[1] or match[1].endswith(".git"):
        return None
    return HubName(repo=match[1], variant=match[2])


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which files of a repository are served."""

    name: HubName
    load_format: str
    tokenizer_only: bool

    def choose(self, files: Iterable[str]) -> list[str]:
        """The files to fetch; with an index, its shards come on top.

        Raises:
            CheckpointError: There is nothing to serve, or more than one choice.
        """
        files = sorted(files)
        ggufs = [f for f in files if f.lower().endswith(".gguf") and "mmproj" not in f.lower()]
        small = [f for f in files if f in _CONFIGS or _TOKENIZER.fullmatch(f)]
        if self.name.variant is not None:
            return self._gguf(ggufs)
        if self.tokenizer_only and any(_TOKENIZER.fullmatch(f) for f in small):
            return small
        has_folder = "config.json" in files and self.load_format != "gguf"
        if ggufs and not (has_folder and _weights(files)):
            return self._gguf(ggufs)
        if not has_folder:
            raise CheckpointError(
                f"{self.name.repo} on the hub has neither config.json nor a GGUF file, "
                "so there is no model to serve; check the name"
            )
        if self.load_format == "dummy" or self.tokenizer_only:
            return small
        weights = _weights(files)
        if not weights:
            pickle = next((f for f in files if f.endswith(_PICKLES)), None)
            raise CheckpointError(
                f"{self.name.repo} on the hub has no .safetensors file"
                + (
                    f", only {pickle}; pickle files can run code and are never read: look for a "
                    "conversion to safetensors or GGUF"
                    if pickle
                    else "; check the name, or use --load-format dummy"
                )
            )
        return small + weights

    def _gguf(self, ggufs: list[str]) -> list[str]:
        """One GGUF model: the only one, or the one that is named; all parts of a split one."""
        models: dict[str, list[str]] = {}
        for file in ggufs:
            models.setdefault(_SPLIT.sub(".gguf", file), []).append(file)
        variant = self.name.variant
        if variant is not None:
            found = {m: f for m, f in models.items() if variant in (m, *f)}
            found = found or {m: f for m, f in models.items() if _quant(m) == variant.upper()}
        else:
            found = models
        if len(found) == 1:
            return next(iter(found.values()))
        quants = [_quant(model) for model in models]
        unique = all(quants) and len(set(quants)) == len(quants)
        choices = [
            f"{self.name.repo}:{quant if unique else model}"
            for quant, model in zip(quants, models, strict=True)
        ]
        came = f"no GGUF file {variant!r}" if not found else f"{len(found)} GGUF models"
        what = f"; name one, such as {', '.join(choices[:12])}" if choices else ", and no other"
        raise CheckpointError(f"{self.name.repo} on the hub has {came}{what}")


def _weights(files: Sequence[str]) -> list[str]:
    """The index if there is one, else model.safetensors, else every safetensors file at the top."""
    for name in (INDEX, "model.safetensors"):
        if name in files:
            return [name]
    return [
        f
        for f in files
        if f.endswith(".safetensors") and "/" not in f and not _NOT_WEIGHTS.fullmatch(f)
    ]


def _quant(model: str) -> str | None:
    match = _QUANT.search(model[: -len(".gguf")])
    return match[1].upper() if match else None


def indexed_shards(index: Path, name: HubName) -> list[str]:
    """The shards that an index names: plain names of safetensors files only."""
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("it is too large")
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        bad = [s for s in shards if "/" in s or "\\" in s or not s.endswith(".safetensors")]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{INDEX} of {name.repo} cannot be read ({type(error).__name__}: {str(error)[:200]}); "
            "check the repository"
        ) from None
    if bad:
        raise CheckpointError(
            f"{INDEX} of {name.repo} names the shard {bad[0][:200]!r}; only .safetensors files "
            "beside it are allowed: check where this model came from"
        )
    return sorted(shards)
