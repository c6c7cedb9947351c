"""Log-probabilities carry the text of their tokens, whole characters only."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.logprobs import decode_in_context, to_logprobs, to_prompt_logprobs
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.outputs import Logprob
from jaxserve.request import TokenLogprobs


@given(st.text(st.sampled_from("aé你🙂🙃 \n"), max_size=20))
def test_the_tokens_texts_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode("Hello" + text)
    pieces = [decode_in_context(tokenizer, token, ids[:i]) for i, token in enumerate(ids)]
    assert "".join(pieces) == "Hello" + text


def test_the_chosen_token_is_first_and_keeps_its_rank(tokenizer: Tokenizer) -> None:
    entry = TokenLogprobs((905, 19556, 28), (-3.0, -0.1, -0.2), 7)
    assert to_logprobs(entry, tokenizer, []) == {
        905: Logprob(-3.0, 7, " world"),
        19556: Logprob(-0.1, 1, "Hello"),
        28: Logprob(-0.2, 2, ","),
    }
    entry = TokenLogprobs((28, 19556, 28), (-0.2, -0.1, -0.2), 2)
    found = to_logprobs(entry, None, [])
    assert [*found.items()] == [(28, Logprob(-0.2, 2)), (19556, Logprob(-0.1, 1))]


def test_the_first_prompt_token_has_none(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🙂")
    entries = [None, *(TokenLogprobs((i,), (-1.0,), 1) for i in ids[1:])]
    found = to_prompt_logprobs(entries, tokenizer, ids)
    assert found[0] is None
    texts = [entry[i].decoded_token for i, entry in zip(ids[1:], found[1:], strict=True) if entry]
    assert texts[-1] == "🙂"
    assert set(texts[:-1]) <= {""}
