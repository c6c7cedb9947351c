"""A tokenizer from the metadata of a GGUF file, without torch and without transformers.

Two kinds exist: "gpt2" is byte-level BPE with a merge list, split beforehand by a named pattern
(`tokenizer.ggml.pre`); "llama" is SentencePiece BPE, whose merges follow from the pieces' scores.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
)

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.frontend.gguf_splitters import SPLITTERS

MAX_VOCAB = 1 << 21
MAX_PIECE_CHARS = 512  # SentencePiece's own default limit is 16
MAX_VOCAB_CHARS = 1 << 23  # of all pieces; a vocabulary of 262,144 has 2 million
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_KINDS = (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE)
_SPACE = "\u2581"  # SentencePiece writes a space so
# Files made from Gemma's chat models name <eos> and, for the most part, not the end of a turn.
_TURN_END = "<end_of_turn>"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """A tokenizer and what a chat needs to know about it. Tokens are None when not defined.

    `tokenizer.encode(text)` adds the begin token itself if `add_bos`;
    `encode(text, add_special_tokens=False)` never does.
    """

    tokenizer: Tokenizer
    bos_token: str | None = None
    bos_token_id: int | None = None
    eos_token: str | None = None
    eos_token_id: int | None = None
    pad_token: str | None = None
    pad_token_id: int | None = None
    unk_token: str | None = None
    unk_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # end of text, of turn, of message
    special_token_ids: frozenset[int] = frozenset()  # left out of decoded text
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> TokenizerParts:
    """Build the tokenizer of a GGUF file.

    Args:
        metadata: As `jaxserve.gguf.read_gguf` returns it.

    Raises:
        CheckpointError: The tokenizer's keys are missing or contradict each other.
        UnsupportedError: A kind of tokenizer or split pattern that is not implemented.
    """
    vocab = _Vocab(metadata)
    kind = vocab.text("model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(vocab)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(vocab), True
    else:
        raise UnsupportedError(
            f"the GGUF tokenizer {str(kind)[:80]!r} is not supported; supported: gpt2, llama. "
            "Pass --tokenizer FOLDER with the model's tokenizer.json"
        )
    _add_tokens(tokenizer, vocab)
    add_bos, add_eos = vocab.flag("add_bos_token", add_bos), vocab.flag("add_eos_token", False)
    bos, eos = vocab.token_id("bos"), vocab.token_id("eos")
    pad, unk = vocab.token_id("padding"), vocab.token_id("unknown")
    _set_template(tokenizer, vocab, bos if add_bos else None, eos if add_eos else None)
    stops = dict.fromkeys(vocab.token_id(key) for key in ("eos", "eot", "eom"))
    turn_end = vocab.ids.get(_TURN_END)
    if turn_end is not None and vocab.kinds[turn_end] == _CONTROL:
        stops[turn_end] = None
    template = metadata.get("tokenizer.chat_template")
    return TokenizerParts(
        tokenizer=tokenizer,
        bos_token=vocab.content(bos),
        bos_token_id=bos,
        eos_token=vocab.content(eos),
        eos_token_id=eos,
        pad_token=vocab.content(pad),
        pad_token_id=pad,
        unk_token=vocab.content(unk),
        unk_token_id=unk,
        stop_token_ids=tuple(stop for stop in stops if stop is not None),
        special_token_ids=frozenset(vocab.of_kind(_CONTROL)),
        add_bos=add_bos and bos is not None,
        add_eos=add_eos and eos is not None,
        chat_template=template if isinstance(template, str) else None,
    )


class _Vocab:
    """The checked `tokenizer.ggml.*` keys."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self.metadata = metadata
        self.tokens = self.strings("tokens")
        if not 1 <= len(self.tokens) <= MAX_VOCAB:
            raise _damaged(f"it has {len(self.tokens)} tokens, 1 to {MAX_VOCAB} are allowed")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(t for number, t in enumerate(self.tokens) if self.ids[t] != number)
            raise _damaged(f"the token {twice[:80]!r} is there twice")
        self.kinds = self.numbers("token_type", default=_NORMAL)
        if not np.isin(self.kinds, _KINDS).all():
            raise _damaged(f"token_type holds values other than {_KINDS[0]} to {_KINDS[-1]}")

    def get(self, key: str) -> object:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str) -> str | None:
        value = self.get(key)
        return value if isinstance(value, str) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return value if isinstance(value, bool) else default

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _damaged(f"tokenizer.ggml.{key} is not a list of strings")
        return value

    def numbers(self, key: str, default: int | None = None) -> np.ndarray:
        """One number per token."""
        value = self.get(key)
        if value is None and default is not None:
            return np.full(len(self.tokens), default)
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise _damaged(f"tokenizer.ggml.{key} is not one number for each token")
        return value

    def token_id(self, key: str) -> int | None:
        value = self.get(f"{key}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            raise _damaged(f"tokenizer.ggml.{key}_token_id is {str(value)[:40]}, not a token")
        return value

    def content(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]

    def of_kind(self, kind: int) -> Iterator[int]:
        return map(int, np.flatnonzero(self.kinds == kind))


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"the GGUF file's tokenizer is not valid: {what}; convert the model again, "
        "or pass --tokenizer FOLDER"
    )


def _bpe(vocab: _Vocab, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab.ids, merges, **options))
    except Exception as error:  # the Rust side raises plain Exception
        raise _damaged(str(error)[:200]) from None


# --- byte-level BPE ---


def _byte_level(vocab: _Vocab) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether its kind begins a prompt with the begin token."""
    name = vocab.text("pre")
    splitter = SPLITTERS.get(name or "")
    if splitter is None:
        came = "does not name its split pattern" if name is None else f"uses {name[:80]!r}"
        raise UnsupportedError(
            f"the GGUF file's tokenizer {came} (tokenizer.ggml.pre); supported: "
            f"{', '.join(SPLITTERS)}. Pass --tokenizer FOLDER with the model's tokenizer.json"
        )
    merges: list[tuple[str, str]] = []
    for merge in vocab.strings("merges"):
        # The space between the parts is the one after the first character.
        left, space, right = merge.partition(" ") if merge[:1] != " " else ("", "", "")
        if not space or not left or not right:
            raise _damaged(f"the merge {merge[:80]!r} is not two parts with a space between")
        merges.append((left, right))
    tokenizer = _bpe(vocab, merges, ignore_merges=splitter.ignore_merges)
    splitter.install(tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitter.add_bos


# --- SentencePiece BPE ---


def _sentencepiece(vocab: _Vocab) -> Tokenizer:
    unknown = vocab.token_id("unknown")
    has_bytes = all(f"<0x{byte:02X}>" in vocab.ids for byte in range(256))
    tokenizer = _bpe(
        vocab,
        _merges_by_score(vocab),
        unk_token=vocab.content(unknown),
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    prefix = vocab.flag("add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    )
    steps: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(vocab: _Vocab) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose piece scores highest: the merge list by that order."""
    scores = vocab.numbers("scores").tolist()
    # Control, unknown and byte tokens never come from text.
    parts = {
        token: number
        for number, (token, kind) in enumerate(zip(vocab.tokens, vocab.kinds.tolist(), strict=True))
        if kind in (_NORMAL, _USER_DEFINED)
    }
    if sum(map(len, parts)) > MAX_VOCAB_CHARS or max(map(len, parts), default=0) > MAX_PIECE_CHARS:
        raise _damaged(
            f"its tokens are longer than {MAX_PIECE_CHARS} characters, or {MAX_VOCAB_CHARS} in all"
        )
    found: list[tuple[float, int, int, int, str, str]] = []
    for piece, number in parts.items():
        score = scores[number]
        for cut in range(1, len(piece)):
            left = parts.get(piece[:cut])
            right = None if left is None else parts.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-score, number, left, right, piece[:cut], piece[cut:]))
    found.sort()
    return [(left, right) for *_, left, right in found]


# --- special tokens ---


# Phi-3's SentencePiece tokens take the space after them along, but these; no key says so.
_PHI3_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def _add_tokens(tokenizer: Tokenizer, vocab: _Vocab) -> None:
    """Control and user-defined tokens are found in text whole, before it is split."""
    phi3 = (vocab.metadata.get("general.architecture"), vocab.text("model")) == ("phi3", "llama")

    def added(kind: int) -> list[AddedToken]:
        tokens = [vocab.tokens[number] for number in vocab.of_kind(kind)]
        return [
            AddedToken(t, normalized=False, rstrip=phi3 and t not in _PHI3_PLAIN) for t in tokens
        ]

    tokenizer.add_special_tokens(added(_CONTROL))
    tokenizer.add_tokens(added(_USER_DEFINED))
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(vocab.tokens):
        raise _damaged("a special token is not in the vocabulary")


def _set_template(tokenizer: Tokenizer, vocab: _Vocab, bos: int | None, eos: int | None) -> None:
    """Let `encode` add the begin and end tokens."""
    if bos is None and eos is None:
        return
    first, last = vocab.content(bos), vocab.content(eos)
    pieces = {token: number for token, number in ((first, bos), (last, eos)) if token is not None}
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *(f"{'$B' if item == '$A' else item}:1" for item in single)],
        special_tokens=list(pieces.items()),
    )
