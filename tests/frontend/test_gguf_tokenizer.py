"""Tokenizers from GGUF metadata: the demo's, each split pattern, SentencePiece, and bad keys."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.checkpoint import open_checkpoint
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.frontend.gguf_splitters import SPLITTERS
from jaxserve.frontend.gguf_tokenizer import TokenizerParts, tokenizer_from_gguf


@pytest.fixture(scope="module")
def demo() -> TokenizerParts:
    source = open_checkpoint("demo").tokenizer
    assert source is not None
    assert source.gguf is not None
    return tokenizer_from_gguf(source.gguf)


# --- the demo ---


def test_the_demo_speaks_its_chat_format(demo: TokenizerParts) -> None:
    encoded = demo.tokenizer.encode("<|im_start|>user\nHello, it's 1234<|im_end|>\n")
    assert encoded.tokens[:3] == ["<|im_start|>", "user", "Ċ"]
    assert encoded.tokens[-6:] == ["1", "2", "3", "4", "<|im_end|>", "Ċ"]
    assert encoded.ids[:4] == [1, 4093, 198, 19556]
    assert (demo.bos_token, demo.eos_token, demo.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (demo.bos_token_id, demo.eos_token_id, demo.stop_token_ids) == (1, 2, (2,))
    assert demo.special_token_ids == frozenset(range(17))
    assert demo.add_bos is False
    assert demo.chat_template is not None


def test_the_golden_prompts_become_their_token_ids(demo: TokenizerParts) -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text())
    prompts = [p for p in golden["prompts"] if "prompt" in p]
    assert prompts
    for prompt in prompts:
        assert demo.tokenizer.encode(prompt["prompt"]).ids == prompt["prompt_token_ids"]


# Bytes that SmolLM2's vocabulary lacks; such characters are left out, as by Hugging Face's file.
ABSENT = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@given(text=st.text().filter(lambda text: ABSENT.isdisjoint(text.encode())))
def test_every_text_comes_back(demo: TokenizerParts, text: str) -> None:
    ids = demo.tokenizer.encode(text).ids
    assert demo.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= token < 49_152 for token in ids)


def test_building_needs_neither_torch_nor_transformers_nor_jax() -> None:
    code = (
        "import sys; from jaxserve.checkpoint import open_checkpoint as o;"
        "from jaxserve.frontend.gguf_tokenizer import tokenizer_from_gguf as t;"
        "t(o('demo').tokenizer.gguf);"
        "print([m for m in ('torch', 'transformers', 'jax', 'gguf') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- byte-level BPE ---


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    table = {byte: chr(byte) for byte in kept}
    return list((table | {b: chr(256 + i) for i, b in enumerate(others)}).values())


def byte_level(pre: str | None, **changes: Any) -> dict[str, Any]:
    merges = changes.get("merges") or []
    tokens = [*byte_alphabet(), *(m.replace(" ", "") for m in merges), "<a>", "<b>", "whole"]
    types = np.ones(len(tokens), np.int32)
    types[tokens.index("<a>")], types[tokens.index("<b>")] = 3, 4
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [],
        "bos_token_id": tokens.index("<a>"),
    } | changes
    return {f"tokenizer.ggml.{k}": value for k, value in keys.items() if value is not None}


TRICKY = "Hello  world's 12345\n\n you'LL:\t你好!! née<|x|>"
# Words by kind, whose spaces, line ends, tabs and other bytes are written in GPT-2's characters;
# for each kind its splitting was compared with the model's own tokenizer on some 47 texts.
WORDS = {
    "gpt-2": "Hello Ġ Ġworld 's Ġ12345 ĊĊ Ġyou ' LL : ĉ ä½łå¥½ !! ĠnÃ©e <| x |>",
    "smollm": "Hello Ġ Ġworld 's Ġ 1 2 3 4 5 ĊĊ Ġyou ' LL : ĉ ä½łå¥½ !! ĠnÃ©e <| x |>",
    "falcon": "Hello Ġ Ġworld ' s Ġ 123 45 ĊĊ Ġyou ' LL : ĉ ä½łå¥½ !! ĠnÃ©e <| x |>",
    "llama-bpe": "Hello Ġ Ġworld 's Ġ 123 45 ĊĊ Ġyou 'LL : ĉä½łå¥½ !! ĠnÃ©e <| x |>",
    "qwen2": "Hello Ġ Ġworld 's Ġ 1 2 3 4 5 ĊĊ Ġyou 'LL : ĉä½łå¥½ !! ĠnÃ©e <| x |>",
    "qwen35": "Hello Ġ Ġworld 's Ġ 1 2 3 4 5 ĊĊ Ġyou 'LL : ĉä½łå¥½ !! ĠnÃ©e <| x |>",
    "seed-coder": "Hello Ġ Ġworld 's Ġ 1 2 3 4 5 ĊĊ Ġyou 'LL : ĉä½łå¥½ !! ĠnÃ©e <| x |>",
    "gpt-4o": "Hello Ġ Ġworld's Ġ 123 45 ĊĊ Ġyou'LL : ĉä½łå¥½ !! ĠnÃ©e <| x |>",
    "tekken": "Hello Ġ Ġworld 's Ġ 1 2 3 4 5 ĊĊ Ġyou 'LL : ĉä½łå¥½ !! ĠnÃ©e <| x |>",
    "deepseek-llm": "Hello Ġ Ġworld ' s Ġ 12345 Ċ Ċ Ġyou ' LL : ĉ ä½łå¥½ !! Ġn Ã© e <| x |>",
    "deepseek-coder": "Hello Ġ Ġworld ' s Ġ 1 2 3 4 5 Ċ Ċ Ġyou ' LL : ĉ ä½łå¥½ !! ĠnÃ©e <| x |>",
    "deepseek-v3": "Hello Ġ Ġworld 's Ġ 123 45 ĊĊ Ġyou 'LL : ĉ ä½łå¥½ !! ĠnÃ©e <| x |>",
}


@pytest.mark.parametrize("pre", WORDS)
def test_each_kind_splits_text_into_its_words(pre: str) -> None:
    splitter = tokenizer_from_gguf(byte_level(pre)).tokenizer.pre_tokenizer
    assert splitter is not None
    assert [word for word, _ in splitter.pre_tokenize_str(TRICKY)] == WORDS[pre].split(" ")


def test_every_kind_of_splitting_can_be_built() -> None:
    for pre in SPLITTERS:
        tokenizer = tokenizer_from_gguf(byte_level(pre)).tokenizer
        ids = tokenizer.encode(TRICKY, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == TRICKY


DIGITS = ["1 2", "12 3", "4 5", "123 45"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["12345"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "45"]),
        ("llama3", ["123", "45"]),
    ],
)
def test_each_pattern_groups_digits_in_its_way(pre: str, expected: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(byte_level(pre, merges=DIGITS)).tokenizer
    assert tokenizer.encode("12345", add_special_tokens=False).tokens == expected


def test_only_qwen_composes_unicode_first() -> None:
    decomposed, composed = "e\u0301", "é"
    for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe"):
        tokenizer = tokenizer_from_gguf(byte_level(pre)).tokenizer
        back = tokenizer.decode(tokenizer.encode(decomposed).ids)
        assert back == (composed if pre == "qwen2" else decomposed)


def test_only_llama_takes_a_known_word_whole() -> None:
    for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe"):
        tokenizer = tokenizer_from_gguf(byte_level(pre)).tokenizer
        tokens = tokenizer.encode("whole", add_special_tokens=False).tokens
        assert tokens == (["whole"] if pre == "llama-bpe" else list("whole"))


def test_the_begin_token_is_added_as_the_file_or_its_kind_says() -> None:
    for pre, flag, expected in (
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ):
        parts = tokenizer_from_gguf(byte_level(pre, add_bos_token=flag))
        assert parts.add_bos is expected
        assert parts.tokenizer.encode("x").tokens == (["<a>", "x"] if expected else ["x"])
        assert parts.tokenizer.encode("x", add_special_tokens=False).tokens == ["x"]


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    parts = tokenizer_from_gguf(byte_level("gpt-2"))
    ids = parts.tokenizer.encode("x<a>y<b>z").ids
    assert parts.tokenizer.encode("x<a>y<b>z").tokens == ["x", "<a>", "y", "<b>", "z"]
    assert parts.tokenizer.decode(ids) == "xy<b>z"
    assert parts.special_token_ids == {parts.bos_token_id}


# --- SentencePiece ---

PIECES = {
    **{c: -20.0 - i for i, c in enumerate("▁abcd")},
    **{
        p: -float(i)
        for i, p in enumerate(("ab", "▁a", "bc", "abc", "▁ab", "cd", "▁abc", "dd", "▁▁"))
    },
}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    types = np.array([2, 3, 3, *[6] * 256, *[1] * len(PIECES)], np.int32)
    scores = np.array([0.0] * 259 + list(PIECES.values()), np.float32)
    keys: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    return {f"tokenizer.ggml.{k}": value for k, value in keys.items() if value is not None}


def merge_by_score(text: str) -> list[str]:
    """SentencePiece's BPE, literally: join the adjacent pair of the best score, leftmost first."""
    symbols = list(text)
    while True:
        pairs = [(PIECES.get(a + b), -i) for i, (a, b) in enumerate(pairwise(symbols))]
        known = [(score, i) for score, i in pairs if score is not None]
        if not known:
            return symbols
        at = -max(known)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@given(text=st.text(alphabet="abcd ", max_size=12))
def test_pieces_are_joined_by_score(text: str) -> None:
    parts = tokenizer_from_gguf(sentencepiece())
    tokens = parts.tokenizer.encode(text, add_special_tokens=False).tokens
    expected = merge_by_score("▁" + text.replace(" ", "▁")) if text else []
    assert tokens == expected
    assert parts.tokenizer.decode(parts.tokenizer.encode(text).ids) == text


def test_unknown_characters_become_bytes_and_come_back() -> None:
    parts = tokenizer_from_gguf(sentencepiece())
    encoded = parts.tokenizer.encode("aé\n")
    assert encoded.tokens == ["<s>", "▁a", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert parts.tokenizer.decode(encoded.ids) == "aé\n"
    assert parts.add_bos is True


def test_the_space_before_the_text_can_be_left_out() -> None:
    parts = tokenizer_from_gguf(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert parts.tokenizer.encode("ab cd").tokens == ["ab", "▁", "cd"]
    assert parts.tokenizer.decode(parts.tokenizer.encode(" ab").ids) == " ab"


def test_an_end_token_is_added_when_the_file_says_so() -> None:
    parts = tokenizer_from_gguf(sentencepiece(add_eos_token=True, eot_token_id=5))
    assert parts.tokenizer.encode("ab").tokens == ["<s>", "▁ab", "</s>"]
    assert parts.add_eos is True
    assert parts.stop_token_ids == (2, 5)


def test_a_turns_end_stops_an_answer_where_no_key_names_it() -> None:
    metadata = sentencepiece()
    metadata["tokenizer.ggml.tokens"][-1] = "<end_of_turn>"
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert tokenizer_from_gguf(metadata).stop_token_ids == (2,)  # text that looks like it
    metadata["tokenizer.ggml.token_type"][-1] = 3
    assert tokenizer_from_gguf(metadata).stop_token_ids == (2, last)


def test_phi_3_swallows_the_space_after_a_turns_token() -> None:
    for architecture, rest in (("phi3", ["▁", "cd"]), ("llama", ["▁▁", "▁", "<0x0A>", "cd"])):
        metadata = sentencepiece() | {"general.architecture": architecture}
        tokenizer = tokenizer_from_gguf(metadata).tokenizer
        ids = tokenizer.encode("ab</s>  \ncd").ids
        assert [tokenizer.id_to_token(i) for i in ids] == ["<s>", "▁ab", "</s>", *rest]


# --- bad keys ---


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "tokenizer.ggml.tokens is not a list"),
        (byte_level("gpt-2", model="bert"), "'bert' is not supported; supported: gpt2, llama"),
        (byte_level(None), "does not name its split pattern"),
        (byte_level("kimi-k2"), "uses 'kimi-k2'"),
        (byte_level("gpt-2", tokens=[]), "0 tokens"),
        (byte_level("gpt-2", tokens=["a", "a"]), "'a' is there twice"),
        (byte_level("gpt-2", tokens=[1]), "not a list of strings"),
        (byte_level("gpt-2", token_type=np.ones(3, np.int32)), "one number for each token"),
        (byte_level("gpt-2", token_type=np.full(259, 9, np.int32)), "values other than"),
        (byte_level("gpt-2", merges=["ab"]), "'ab' is not two parts"),
        (byte_level("gpt-2", merges=[" bc"]), "' bc' is not two parts"),
        (byte_level("gpt-2", merges=["名 前"]), "tokenizer is not valid"),
        (byte_level("gpt-2", merges=None), "merges is not a list"),
        (byte_level("gpt-2", eos_token_id=10**6), "eos_token_id is 1000000"),
        (byte_level("gpt-2", eos_token_id=-1), "eos_token_id is -1"),
        (byte_level("gpt-2", eos_token_id="x"), "eos_token_id is x"),
        (sentencepiece(scores=None), "scores is not one number"),
        (
            sentencepiece(tokens=["x" * 600], token_type=np.ones(1), scores=np.ones(1)),
            "longer than 512",
        ),
    ],
)
def test_a_tokenizer_that_cannot_work_is_one_clear_error(
    metadata: dict[str, Any], words: str
) -> None:
    with pytest.raises((CheckpointError, UnsupportedError)) as error:
        tokenizer_from_gguf(metadata)
    assert words in str(error.value)
    assert "--tokenizer FOLDER" in str(error.value)
