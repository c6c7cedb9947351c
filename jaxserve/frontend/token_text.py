"""The text that each further token adds to a text, exactly that of all tokens decoded at once.

Three ways, by the tokenizer's decoder:

- byte-level BPE: a token is bytes, and the text is their UTF-8;
- SentencePiece with byte fallback: a token is a piece of text, or one byte of a character;
- any other: the tokenizers library's own stream.

Bytes that are not UTF-8 become U+FFFD. With byte fallback it is one for each such byte, and the
characters beside them stay, as SentencePiece has it; the tokenizers library would give up on all
bytes that follow one another, the valid ones included, which a stream cannot take back.
"""

import codecs
import json
from collections.abc import Iterable
from typing import Protocol

import tokenizers
from tokenizers import decoders
from tokenizers.decoders import DecodeStream

_SPACE = "\u2581"  # how SentencePiece writes a space
_INVALID_PREFIX = "Invalid prefix encountered"
_EACH_BYTE = "jaxserve-each-byte"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _each_byte)
_utf8 = codecs.getincrementaldecoder("utf-8")


class TokenText(Protocol):
    """A growing text."""

    def push(self, token_id: int) -> str:
        """What a token adds; a character that is not complete is withheld."""
        ...


class TokenPieces:
    """What the tokens of one tokenizer are, found once each; shared by all texts.

    Attributes:
        kind: "bytes", "pieces", or "other": which of the three ways is the tokenizer's.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.kind, self.strips = _kind(backend.decoder)
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | bytes] = {}

    def text(self, skip_special: bool) -> TokenText:
        """A text without tokens."""
        if self.kind == "bytes":
            return _ByteLevelText(self, skip_special)
        if self.kind == "pieces":
            return _ByteFallbackText(self, skip_special)
        return _StreamText(self.backend, skip_special)

    def decode(self, token_ids: Iterable[int], skip_special: bool) -> str:
        """The text of all tokens at once, for the kinds whose `kind` is known."""
        text = self.text(skip_special)
        parts = [text.push(token_id) for token_id in token_ids]
        if isinstance(text, _ByteLevelText | _ByteFallbackText):
            parts.append(text.flush())
        return "".join(parts)

    def bytes_of(self, token_id: int) -> bytes:
        """Of a token of byte-level BPE."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id) or ""
            try:
                found = bytes(_BYTES[char] for char in token)
            except KeyError:  # an added token, which is text
                found = token.encode("utf-8", "replace")
            self._bytes[token_id] = found
        return found

    def piece_of(self, token_id: int) -> str | bytes:
        """Of a token of SentencePiece: its text, or its one byte."""
        found = self._pieces.get(token_id)
        if found is None:
            token = self.backend.id_to_token(token_id) or ""
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                try:
                    found = bytes.fromhex(token[3:5])
                except ValueError:
                    found = token
            else:
                found = token.replace(_SPACE, " ")
            self._pieces[token_id] = found
        return found


def _kind(decoder: object) -> tuple[str, bool]:
    """Which way a decoder goes, and whether it strips a space at the text's start."""
    if decoder is None:
        return "other", False
    state = json.loads(decoder.__getstate__())  # type: ignore[attr-defined]
    if isinstance(decoder, decoders.ByteLevel):
        return "bytes", False
    if state.get("type") != "Sequence":
        return "other", False
    steps = state["decoders"]
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    plain = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return ("pieces", steps != plain) if steps in (plain, [*plain, strip]) else ("other", False)


def _byte_table() -> dict[str, int]:
    """GPT-2's printable character -> the byte that it stands for."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_table()


class _ByteLevelText:
    def __init__(self, pieces: TokenPieces, skip_special: bool) -> None:
        self._bytes_of = pieces.bytes_of
        self._skipped = pieces.special if skip_special else frozenset()
        self._utf8 = _utf8("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteFallbackText:
    def __init__(self, pieces: TokenPieces, skip_special: bool) -> None:
        self._piece_of = pieces.piece_of
        self._skipped = pieces.special if skip_special else frozenset()
        self._utf8 = _utf8(_EACH_BYTE)
        self._strips = pieces.strips

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._piece_of(token_id)
        if isinstance(piece, bytes):
            text = self._utf8.decode(piece)
        else:
            text = self._utf8.decode(b"", final=True) + piece  # a character ends with its bytes
        if text and self._strips:
            self._strips = False
            text = text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _StreamText:
    def __init__(self, backend: tokenizers.Tokenizer, skip_special: bool) -> None:
        self._backend = backend
        self._skip_special = skip_special
        self._stream = DecodeStream(skip_special_tokens=skip_special)
        self._pending: list[int] = []  # tokens whose text is withheld

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            new = self._stream.step(self._backend, token_id)
        except Exception as error:  # the Rust side raises plain Exception
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            new = self._restart()
        if new:
            self._pending.clear()
        return new or ""

    def _restart(self) -> str:
        """Some decoders change text already given when bytes turn out invalid: start anew there."""
        text = ""
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        for token_id in self._pending:
            try:
                text += self._stream.step(self._backend, token_id) or ""
            except Exception as error:
                if not str(error).startswith(_INVALID_PREFIX):
                    raise
                self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        return text
