"""The tokenizer of a model: a thin layer over `tokenizers`, with Hugging Face's method names."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from jaxserve.errors import RequestError
from jaxserve.frontend.chat import render_chat
from jaxserve.frontend.token_text import TokenPieces

_REPLACEMENT = "\ufffd"  # what bytes that are not UTF-8 decode to
_SPACE = "\u2581"  # how SentencePiece writes a space


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: Does the work.
        special_tokens: Role ("bos_token", ...) to token, as chat templates see them.
        special_ids: Tokens that `skip_special_tokens` leaves out; None: those the backend knows.
        chat_template: Jinja source.
        chat_templates: Further templates by name; "tool_use" is taken when tools are given.
        stop_token_ids: Tokens besides EOS that end a turn.
    """

    is_fast = True

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        special_ids: Iterable[int] | None = None,
        chat_template: str | None = None,
        chat_templates: Mapping[str, str] | None = None,
        stop_token_ids: Sequence[int] = (),
        name_or_path: str = "",
    ) -> None:
        self.backend = backend
        # Truncation or padding saved in a file would silently shorten or fill prompts.
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens_map = dict(special_tokens or {})
        self.chat_template = chat_template
        self.chat_templates = dict(chat_templates or {})
        self.stop_token_ids = tuple(stop_token_ids)
        self.name_or_path = name_or_path
        if special_ids is None:
            added = backend.get_added_tokens_decoder()
            special_ids = {i for i, token in added.items() if token.special}
            for token in self.special_tokens_map.values():
                token_id = backend.token_to_id(token)
                special_ids |= set() if token_id is None else {token_id}
        self.pieces = TokenPieces(backend)
        self.all_special_ids: list[int] = sorted(special_ids)
        self._decoded: dict[int, str] = {}
        self.render_chat = render_chat  # a server puts a process in its place
        self._max_token_chars: int | None = None
        self._lock = threading.Lock()

    # Text and ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            RequestError: The text holds half of a surrogate pair, which is no Unicode.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            if not isinstance(text, str):
                raise RequestError(f"a text is a {type(text).__name__}; use a string") from None
            raise RequestError(
                f"the text is not valid Unicode ({error}); send well-formed UTF-8", param="prompt"
            ) from None

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids; invalid UTF-8 becomes U+FFFD."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if _REPLACEMENT in text and self.pieces.kind == "pieces":
            return self.pieces.decode(ids, skip_special_tokens)  # keeps the valid characters
        return text

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """`decode` of each."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def __call__(
        self, text: str | list[str], add_special_tokens: bool = True
    ) -> dict[str, list[Any]]:
        """`input_ids` and `attention_mask`, as Hugging Face's tokenizers return them."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows = [self.encode(item, add_special_tokens) for item in text]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text, as the vocabulary writes them."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).tokens

    def decode_token(self, token_id: int) -> str:
        """Text of one token by itself, with the space before it where it has one; cached."""
        text = self._decoded.get(token_id)
        if text is None:
            text = self.backend.decode([token_id], skip_special_tokens=False)
            piece = self.backend.id_to_token(token_id) or ""
            if piece.startswith(_SPACE) and not text.startswith(" "):
                text = " " + text  # decoders strip the space at the start of a text
            self._decoded[token_id] = text
        return text

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The vocabulary's own spelling of one id, or of each."""
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(int(i)) for i in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of one token, or of each; unknown ones get the unknown token's, or None."""
        if isinstance(tokens, str):
            found = self.backend.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """A conversation as the model's prompt: token ids, or text with `tokenize=False`.

        Raises:
            RequestError: There is no template, or it refuses the conversation.
        """
        template = chat_template or self.chat_template
        if chat_template is None and tools:
            template = self.chat_templates.get("tool_use", template)
        elif chat_template in self.chat_templates:
            template = self.chat_templates[chat_template]
        text = self.render_chat(
            template,
            conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens=self.special_tokens_map,
            template_kwargs=kwargs,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Tokens without the added ones; `len()` counts all."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def max_token_chars(self) -> int:
        """The longest token, in characters: a text of n characters has >= n / this tokens."""
        with self._lock:
            if self._max_token_chars is None:
                self._max_token_chars = max(map(len, self.get_vocab()), default=1)
            return self._max_token_chars

    @property
    def all_special_tokens(self) -> list[str]:
        return [token for token in map(self.backend.id_to_token, self.all_special_ids) if token]

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens_map.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens_map.get("pad_token")

    @property
    def unk_token(self) -> str | None:
        return self.special_tokens_map.get("unk_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._role_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._role_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._role_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._role_id("unk_token")

    def __repr__(self) -> str:
        return f"Tokenizer({self.name_or_path!r}, {len(self)} tokens)"
