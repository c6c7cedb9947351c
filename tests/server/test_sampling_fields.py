"""What each sampling field does to the demo model's answer; one token is a tenth of a second."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from tests.server.running import RunningServer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "Once upon a time there was a little girl who lived in a"
EOS, MARK = 2, 1  # <|im_end|> and <|im_start|>


class Got(NamedTuple):
    """One choice, whichever route it is from."""

    text: str
    ids: list[int]
    prompt_ids: list[int]
    finish: str
    stop: int | str | None
    raw: dict[str, Any]
    choice: dict[str, Any]


type Ask = Callable[..., Got]


@pytest.fixture(scope="module")
def client(real: RunningServer) -> Iterator[httpx.Client]:
    with real.http() as made:
        yield made


@pytest.fixture(scope="module")
def ask(client: httpx.Client) -> Ask:
    known: dict[str, Got] = {}

    def send(route: str = COMPLETIONS, **fields: Any) -> Got:
        """The answer; the same request is sent once."""
        body = {"model": "demo", "max_tokens": 6, "temperature": 0, "return_token_ids": True}
        if route == COMPLETIONS:
            body["prompt"] = PROMPT
        else:
            body["messages"] = [{"role": "user", "content": PROMPT}]
        text = json.dumps([route, body | fields])
        if text not in known:
            known[text] = _got(client.post(route, json=body | fields))
        return known[text]

    return send


def _got(answer: httpx.Response) -> Got:
    assert answer.status_code == 200, answer.text
    raw = answer.json()
    choice = raw["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    prompt_ids = (choice if "text" in choice else raw)["prompt_token_ids"]
    return Got(
        text, choice["token_ids"], prompt_ids, choice["finish_reason"], choice["stop_reason"],
        raw, choice,
    )  # fmt: skip


@pytest.mark.parametrize("field", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}], ids=str)
def test_a_narrow_choice_is_the_greedy_one_at_any_temperature(
    ask: Ask, field: dict[str, Any]
) -> None:
    first = ask()
    assert (first.finish, len(first.ids)) == ("length", 6)
    assert first.raw["usage"]["prompt_tokens"] == len(first.prompt_ids)
    assert ask(temperature=2, seed=3, **field).ids == first.ids
    assert ask(temperature=2, seed=3).ids != first.ids


def test_a_repetition_penalty_lets_nothing_come_twice(ask: Ask) -> None:
    new = ask(repetition_penalty=1e6, max_tokens=8)
    assert len({*new.ids, *new.prompt_ids}) == len(new.ids) + len(set(new.prompt_ids))


def test_tokens_are_pushed_allowed_and_banned(ask: Ask) -> None:
    assert set(ask(logit_bias={"100": 100}, max_tokens=3).ids) == {100}
    assert set(ask(allowed_token_ids=[100, 200], max_tokens=3).ids) <= {100, 200}
    free = ask()
    word = free.text.split()[0]
    assert word not in ask(bad_words=[word]).text


def test_stop_strings_cut_and_stop_tokens_end(ask: Ask) -> None:
    free = ask()
    word = free.text.split()[2]
    cut = ask(stop=word)
    assert (cut.finish, cut.stop) == ("stop", word)
    assert cut.text == free.text[: free.text.index(word)]
    kept = ask(stop=[word], include_stop_str_in_output=True)
    assert kept.text == cut.text + word
    token = free.ids[3]
    place = free.ids.index(token)
    ended = ask(stop_token_ids=[token])
    assert (ended.finish, ended.stop, ended.ids) == ("stop", token, free.ids[: place + 1])
    assert free.text.startswith(ended.text)
    shown = ask(stop_token_ids=[token], include_stop_str_in_output=True)
    assert len(shown.text) > len(ended.text)
    assert shown.raw["usage"]["completion_tokens"] == place + 1  # the token counts


def test_the_end_is_obeyed_ignored_and_put_off(ask: Ask) -> None:
    ends = {"logit_bias": {str(EOS): 100}}
    at_once = ask(**ends)
    assert (at_once.text, at_once.ids, at_once.finish, at_once.stop) == ("", [EOS], "stop", None)
    on = ask(**ends, ignore_eos=True)
    assert (on.ids, on.finish) == ([EOS] * 6, "length")
    later = ask(**ends, min_tokens=3)
    assert len(later.ids) == 4
    assert EOS not in later.ids[:3]
    assert (later.ids[-1], later.finish) == (EOS, "stop")
    last = ask(**ends, max_tokens=1)
    assert last.finish == "stop"  # the end is seen before the length


def test_special_tokens_are_hidden_unless_asked_for(ask: Ask) -> None:
    marks = {"logit_bias": {str(MARK): 100}, "max_tokens": 2}
    assert ask(**marks).text == ""
    assert ask(**marks, skip_special_tokens=False).text == "<|im_start|>" * 2


def test_long_prompts_are_cut_on_the_side_that_is_asked_for(ask: Ask) -> None:
    whole = ask().prompt_ids
    assert ask(truncate_prompt_tokens=4).prompt_ids == whole[-4:]
    right = ask(truncate_prompt_tokens=4, truncation_side="right")
    assert right.prompt_ids == whole[:4]
    assert right.raw["usage"]["prompt_tokens"] == 4
    assert ask(truncate_prompt_tokens=-1).prompt_ids == whole  # what the model takes


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_prompt_logprobs_stand_where_vllm_puts_them(ask: Ask, route: str) -> None:
    got = ask(route, prompt_logprobs=2, max_tokens=1)
    positions = (got.choice if route == COMPLETIONS else got.raw)["prompt_logprobs"]
    assert len(positions) == len(got.prompt_ids)
    assert positions[0] is None
    for token, entries in zip(got.prompt_ids[1:], positions[1:], strict=True):
        assert next(iter(entries)) == str(token)  # the prompt's own comes first
        assert 2 <= len(entries) <= 3
        assert {entry["rank"] for entry in entries.values()} >= {1, 2}
        assert all(entry["decoded_token"] is not None for entry in entries.values())


def test_logprobs_are_those_before_any_field_changed_them(ask: Ask) -> None:
    fields: dict[str, Any] = {"max_tokens": 1, "logit_bias": {"100": 100}}
    logprobs = ask(**fields, logprobs=3).choice["logprobs"]
    of_text = list(logprobs["top_logprobs"][0].values())
    assert len(of_text) == 4  # the chosen one, and the three best
    assert of_text[0] == logprobs["token_logprobs"][0]
    entry = ask(CHAT, **fields, logprobs=True, top_logprobs=3).choice["logprobs"]["content"][0]
    of_chat = [top["logprob"] for top in entry["top_logprobs"]]
    assert len(of_chat) == 3  # of which the chosen one is one
    assert of_chat[0] == entry["logprob"]
    for values in (of_text, of_chat):
        assert values[0] < -5  # unlikely, as the bias is not in it
        assert values[1:] == sorted(values[1:], reverse=True)


def test_forms_hold_in_chats(ask: Ask) -> None:
    one: dict[str, Any] = {"structured_outputs": {"choice": ["red", "green"]}}
    assert ask(CHAT, **one, max_tokens=9).text in ("red", "green")
    schema = {"name": "a", "schema": {"enum": ["x", "y"]}}
    form = {"type": "json_schema", "json_schema": schema}
    assert json.loads(ask(response_format=form, max_tokens=9).text) in ("x", "y")
    assert ask(response_format={"type": "json_object"}).text.lstrip().startswith("{")


def test_seeds_repeat_and_a_later_choice_has_a_seed_of_its_own(ask: Ask) -> None:
    drawn = ask(temperature=1, seed=5, n=2)
    ids = [choice["token_ids"] for choice in drawn.raw["choices"]]
    assert ids[0] != ids[1]
    assert ask(temperature=1, seed=5).ids == ids[0]
    assert ask(temperature=1, seed=6).ids == ids[1]  # the second choice has seed + 1
    assert drawn.raw["usage"]["prompt_tokens"] == len(drawn.prompt_ids)  # counted once
    assert drawn.raw["usage"]["completion_tokens"] == sum(map(len, ids))
