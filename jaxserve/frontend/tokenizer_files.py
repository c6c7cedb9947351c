"""Where tokenizers come from: a Hugging Face folder, or the metadata of a GGUF file.

Neither torch nor transformers is imported, except, inside a function, for folders that have a
tokenizer but no tokenizer.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.checkpoint import Checkpoint
from jaxserve.errors import CheckpointError
from jaxserve.frontend.tokenizer import Tokenizer

MAX_JSON_BYTES = 256 << 20  # tokenizer.json of a 262k vocabulary has 33 MB
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of a checkpoint: from its folder, or from its GGUF metadata.

    Raises:
        CheckpointError: There is none, or it is damaged.
        UnsupportedError: Its kind is not implemented.
    """
    source = checkpoint.tokenizer
    if source is not None and source.gguf is not None:
        tokenizer = _from_gguf(source.gguf)
    elif source is not None and source.folder is not None:
        tokenizer = _from_folder(source.folder)
    else:
        raise CheckpointError(
            f"model {checkpoint.name!r} has no tokenizer; pass tokenizer=FOLDER (--tokenizer), "
            "or skip_tokenizer_init=True and token ids as prompts"
        )
    tokenizer.name_or_path = checkpoint.name
    tokenizer.chat_template = tokenizer.chat_template or checkpoint.chat_template
    return tokenizer


def _from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    from jaxserve.frontend.gguf_tokenizer import tokenizer_from_gguf

    parts = tokenizer_from_gguf(metadata)
    roles = {
        "bos_token": parts.bos_token,
        "eos_token": parts.eos_token,
        "unk_token": parts.unk_token,
        "pad_token": parts.pad_token,
    }
    return Tokenizer(
        parts.tokenizer,
        special_tokens={role: token for role, token in roles.items() if token is not None},
        special_ids=parts.special_token_ids,
        chat_template=parts.chat_template,
        stop_token_ids=parts.stop_token_ids,
    )


def _from_folder(folder: Path) -> Tokenizer:
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "tokenizer.json"
    if file.is_file():
        _check_size(file)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise CheckpointError(
                f"{file} is not a tokenizer ({str(error)[:200]}); download it again"
            ) from None
    else:
        backend = _converted(folder)
    roles = _roles(config, _read_json(folder / "special_tokens_map.json"))
    # add_bos_token and add_eos_token are not read: as for transformers, tokenizer.json decides.
    _add_tokens(backend, config)
    backend.add_special_tokens(
        [token for token in dict.fromkeys(roles.values()) if backend.token_to_id(token) is None]
    )
    templates = _templates(folder, config)
    return Tokenizer(
        backend,
        special_tokens=roles,
        chat_template=templates.pop("default", None),
        chat_templates=templates,
    )


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json names, in the order of their ids."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict):
        return
    known = backend.get_added_tokens_decoder()
    for key, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if int(key) not in known and isinstance(entry, dict):
            flags = {k: bool(entry.get(k)) for k in ("lstrip", "rstrip", "single_word", "special")}
            normalized = bool(entry.get("normalized", not flags["special"]))
            token = tokenizers.AddedToken(entry["content"], normalized=normalized, **flags)
            add = backend.add_special_tokens if flags["special"] else backend.add_tokens
            add([token])


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """Older formats (SentencePiece, tiktoken), converted by transformers."""
    try:
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        return slow.backend_tokenizer
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and its tokenizer could not be converted "
            f"({type(error).__name__}: {str(error)[:200]}); save it as tokenizer.json"
        ) from error


def _roles(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Role to token. Values are strings, or objects with "content"."""
    found: dict[str, str] = {}
    for role in _ROLES:
        for source in sources:
            value = source.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found.setdefault(role, value)
    return found


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, from the several places where folders keep them."""
    found: dict[str, str] = {}
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in folder.glob("additional_chat_templates/*.jinja")}
    for name, file in files.items():
        if file.is_file():
            _check_size(file)
            found[name] = file.read_text(encoding="utf-8")
    for source in (_read_json(folder / "chat_template.json"), config):
        value = source.get("chat_template")
        if isinstance(value, str):
            found.setdefault("default", value)
        elif isinstance(value, list):
            for entry in value:
                found.setdefault(str(entry["name"]), str(entry["template"]))
    return found


def _check_size(file: Path) -> None:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_JSON_BYTES} bytes; check the file")


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file; empty when there is no file."""
    if not file.is_file():
        return {}
    _check_size(file)
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); download it again") from None
    return value if isinstance(value, dict) else {}
