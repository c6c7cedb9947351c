"""Incremental text equals text decoded at once; stop strings are found as if by brute force."""

import os

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from jaxserve.frontend.detokenizer import Detokenizer, find_stop, priming_tokens
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
VOCAB = 49_152
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60)
# Byte tokens and pieces of characters: text with invalid and split UTF-8.
low_ids = st.lists(st.integers(17, 300), min_size=1, max_size=60)
words = st.text(st.sampled_from("aé你🙂\u0301 \n"), max_size=12)


def incremental(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], **params: object
) -> str:
    sampling = SamplingParams(**params)  # pyright: ignore[reportArgumentType]
    detokenizer = Detokenizer(tokenizer, sampling, priming_tokens(tokenizer, prompt))
    pieces = []
    for token in output:
        detokenizer.add([token], ended_by_token=False)
        pieces.append(detokenizer.take(finished=False))
    pieces.append(detokenizer.take(finished=True))
    assert "".join(pieces) == detokenizer.text
    return detokenizer.text


@settings(max_examples=300)
@given(prompt=ids, output=st.one_of(ids, low_ids), skip=st.booleans())
def test_incremental_text_is_the_text_at_once(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool
) -> None:
    prompt = [19556, *prompt, 28]  # ends in a whole character
    before = tokenizer.decode(prompt, skip)
    text = tokenizer.decode([*prompt, *output], skip)[len(before) :]
    # A character that never became whole is withheld to the end.
    found = incremental(tokenizer, prompt, output, skip_special_tokens=skip)
    assert text.rstrip(REPLACEMENT) == found.rstrip(REPLACEMENT)


@given(st.lists(words, max_size=6))
def test_text_survives_the_round_trip(tokenizer: Tokenizer, pieces: list[str]) -> None:
    output = [i for piece in pieces for i in tokenizer.encode(piece)]
    assert incremental(tokenizer, [19556], output) == "".join(pieces)


def test_a_character_begun_in_the_prompt_is_completed_without_repeating_the_prompt(
    tokenizer: Tokenizer,
) -> None:
    whole = tokenizer.encode("Hello 🙂")
    for cut in range(2, len(whole)):
        assert incremental(tokenizer, whole[:cut], whole[cut:]) == "🙂"


def test_no_output_holds_half_a_character(tokenizer: Tokenizer) -> None:
    output = tokenizer.encode("好 🙂🙃 né")
    detokenizer = Detokenizer(tokenizer, SamplingParams(), [19556])
    for token in output:
        detokenizer.add([token], ended_by_token=False)
        assert REPLACEMENT not in detokenizer.take(finished=False)


def byte_fallback_tokenizer() -> Tokenizer:
    """Like SentencePiece's: text already given can turn out invalid when a later byte comes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("valid", ["é", "A🙂", "\n"])
def test_bytes_that_are_no_character_spoil_none_beside_them(valid: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    output = [*valid.encode(), 0xE4, 257, 256]
    assert incremental(tokenizer, [256], output) == valid + REPLACEMENT + "b a"
    assert tokenizer.decode(output) == valid + REPLACEMENT + "b a"
    assert incremental(tokenizer, [256], [256]) == " a"


@given(st.lists(st.integers(0, 257), min_size=1, max_size=40))
def test_no_byte_sequence_raises(output: list[int]) -> None:
    incremental(byte_fallback_tokenizer(), [256], output)


def metaspace_tokenizer() -> Tokenizer:
    """As those of the library's own SentencePiece models, which its stream alone decodes."""
    vocab = {piece: i for i, piece in enumerate(("<unk>", "▁", "▁a", "b", "é", "▁你", "🙂", "\n"))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


# 1,000,000 were run when this was written; so many take 2 to 4 minutes a tokenizer.
NUM_SEQUENCES = int(os.environ.get("JAXSERVE_DETOKENIZE_SEQUENCES", "6000"))


@pytest.mark.parametrize("kind", ["bytes", "pieces", "other"])
def test_random_sequences_have_the_text_that_they_have_at_once(
    tokenizer: Tokenizer, kind: str
) -> None:
    found = {
        "bytes": tokenizer,
        "pieces": byte_fallback_tokenizer(),
        "other": metaspace_tokenizer(),
    }[kind]
    assert found.pieces.kind == kind
    size = len(found)
    rng = np.random.default_rng(0)
    for number in range(NUM_SEQUENCES):
        # Every other one of the ids that are bytes and special tokens.
        top = size if number % 2 else min(size, 300)
        output = rng.integers(0, top, rng.integers(1, 40)).tolist()
        skip = bool(number // 2 % 2)
        text = found.pieces.text(skip)
        pieces = [text.push(token) for token in output]
        rest = found.decode(output, skip).removeprefix("".join(pieces))
        assert rest.strip(REPLACEMENT) == "", (output, skip)  # what never became whole
        assert len(rest) <= 3 or kind == "other"


def test_a_model_stuck_in_half_characters_costs_no_more_a_token(tokenizer: Tokenizer) -> None:
    [token] = tokenizer.encode("🙂")[:1]
    text = tokenizer.pieces.text(skip_special=False)
    assert "".join(text.push(token) for _ in range(20_000)).strip(REPLACEMENT) == ""
    assert len(text.push(token)) == 1  # told as soon as known, not withheld with all before it


@pytest.mark.parametrize("skip", [False, True])
def test_a_special_token_inside_a_character_breaks_it_only_when_it_is_shown(skip: bool) -> None:
    backend = byte_fallback_tokenizer().backend
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend)
    output = [257, 0xC3, 258, 0xA9, 257]
    expected = "béb" if skip else f"b{REPLACEMENT}<s>{REPLACEMENT}b"
    assert tokenizer.decode(output, skip) == expected
    text = tokenizer.pieces.text(skip)
    assert "".join(text.push(token) for token in output) == expected


# --- stop strings ---

stops = st.lists(st.text("ab 你", min_size=1, max_size=4), min_size=1, max_size=4)
output_texts = st.lists(st.sampled_from(["a", "b", "ab", "ba", " a", " b", "你", " "]), max_size=14)


def brute_force(
    texts: list[str], stop: list[str], min_tokens: int, include: bool
) -> tuple[str, int, str | None]:
    """Text, kept tokens and stop string, by trying every end in every order."""
    for num, text in enumerate(texts, start=1):
        if num <= min_tokens:
            continue
        before = texts[num - 2] if num > 1 else ""
        for end in range(len(before) + 1, len(text) + 1):
            for string in stop:
                if text[:end].endswith(string):
                    return text[: end if include else end - len(string)], num, string
    return (texts[-1] if texts else ""), len(texts), None


@settings(max_examples=400)
@given(output_texts, stops, st.integers(0, 4), st.booleans(), st.integers(1, 5))
def test_stop_strings_are_found_as_by_brute_force(
    tokenizer: Tokenizer,
    pieces: list[str],
    stop: list[str],
    min_tokens: int,
    include: bool,
    per_step: int,
) -> None:
    output = [i for piece in pieces for i in tokenizer.encode(piece)]
    texts = [tokenizer.decode(output[: n + 1]).rstrip(REPLACEMENT) for n in range(len(output))]
    params = SamplingParams(
        stop=stop,
        min_tokens=min_tokens,
        max_tokens=1000,
        include_stop_str_in_output=include,
    )
    detokenizer = Detokenizer(tokenizer, params)
    num_kept, found, sent = 0, None, ""
    for i in range(0, len(output), per_step):
        kept, found = detokenizer.add(output[i : i + per_step], ended_by_token=False)
        num_kept += kept
        if found is not None:
            break
        sent += detokenizer.take(finished=False)
    sent += detokenizer.take(finished=True)
    expected = brute_force(texts, stop, min_tokens, include)
    assert (detokenizer.text, num_kept, found) == expected
    assert sent == detokenizer.text  # nothing was sent that had to be taken back


def test_of_stop_strings_that_end_together_the_first_in_the_list_wins() -> None:
    assert find_stop("xyz", 3, ["yz", "z"], False) == ("yz", 1)
    assert find_stop("xyz", 3, ["z", "yz"], False) == ("z", 2)
    assert find_stop("xyz", 3, ["xyz", "y"], True) == ("y", 2)
    assert find_stop("xyz", 0, ["z"], False) is None


def test_so_many_characters_are_held_back_that_no_stop_string_is_sent(
    tokenizer: Tokenizer,
) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=["wxyz"]), [19556])
    detokenizer.add(tokenizer.encode("abcde"), ended_by_token=False)
    assert detokenizer.take(finished=False) == "ab"
    assert detokenizer.visible(finished=False) == "ab"
    assert detokenizer.take(finished=True) == "cde"


@pytest.mark.parametrize(("include", "text"), [(False, "Hi"), (True, "Hi<|im_end|>")])
def test_the_text_of_the_ending_token_is_left_out_unless_asked_for(
    tokenizer: Tokenizer, include: bool, text: str
) -> None:
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, params)
    output = [*tokenizer.encode("Hi"), 2]
    assert detokenizer.add(output, ended_by_token=True) == (len(output), None)
    assert detokenizer.text == text
