"""`LLM` as vLLM's users know it, over an engine that follows a script."""

import asyncio
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import jaxserve
from jaxserve import LLM, BeamSearchParams, SamplingParams
from jaxserve.checkpoint import Checkpoint, open_checkpoint
from jaxserve.client import Client
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, EngineDeadError, RequestError, UnsupportedError
from jaxserve.frontend.beam_search import beam_search
from jaxserve.frontend.engine_args import engine_config
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.tokenizer_files import load_tokenizer
from jaxserve.outputs import BeamSearchSequence, Logprob
from jaxserve.request import Request
from tests.frontend.fake_engine import FakeEngine

EOS = 2


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo", load_format="dummy")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


def echo(request: Request, choice: int) -> Sequence[int]:
    """The prompt, then EOS; longer prompts take longer."""
    return [*request.prompt_token_ids, EOS]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(echo, vocab_size=49_152)


@pytest.fixture
def llm(engine: FakeEngine, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[LLM]:
    client = Client(EngineConfig(), engine, checkpoint, tokenizer)
    engine.start()
    with LLM.from_client(client) as found:
        yield found
    assert engine.num_shutdowns == 1


def texts(outputs: Sequence[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["a b c d e", "a", {"prompt": "a b c"}, {"prompt_token_ids": [66, 67]}, [66]]
    outputs = llm.generate(prompts, use_tqdm=False)
    assert texts(outputs)[:3] == ["a b c d e", "a", "a b c"]
    assert [output.prompt for output in outputs] == ["a b c d e", "a", "a b c", None, None]
    assert all(output.finished for output in outputs)
    assert len(llm.engine_stats()) > 0


@pytest.mark.parametrize("prompts", ["Hi", [19556], np.array([19556]), {"prompt": "Hi"}])
def test_one_prompt_gives_a_list_of_one(llm: LLM, prompts: Any) -> None:
    assert len(llm.generate(prompts, use_tqdm=False)) == 1


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_parameters_for_all_or_one_each(llm: LLM) -> None:
    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=9)
    prompts = ["a b c", "a b c"]
    assert texts(llm.generate(prompts, short, use_tqdm=False)) == ["a", "a"]
    assert texts(llm.generate(prompts, [short, long], use_tqdm=False)) == ["a", "a b c"]
    with pytest.raises(RequestError, match="2 prompts and 1 sampling_params"):
        llm.generate(prompts, [short], use_tqdm=False)
    with pytest.raises(RequestError, match="priorities"):
        llm.generate(prompts, short, use_tqdm=False, priority=[1])


def test_a_bad_prompt_aborts_those_already_added(llm: LLM, engine: FakeEngine) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["a " * 99, "b " * 99, ""], SamplingParams(max_tokens=100), use_tqdm=False)
    assert len(engine.aborts) == 2
    assert engine.num_running == llm.client.num_unfinished == 0
    assert texts(llm.generate(["still here"], use_tqdm=False)) == ["still here"]


def test_an_interrupt_aborts_everything(
    llm: LLM, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.client, "next_message", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a " * 99, "b " * 99], SamplingParams(max_tokens=100), use_tqdm=False)
    assert engine.num_running == llm.client.num_unfinished == 0
    assert texts(llm.generate(["still here"], use_tqdm=False)) == ["still here"]


def test_the_engines_death_is_raised(llm: LLM, engine: FakeEngine) -> None:
    engine.script = lambda request, choice: [5] * 999
    engine.delay_s = 0.01
    import threading

    threading.Timer(0.05, engine.die).start()
    with pytest.raises(EngineDeadError, match="boom"):
        llm.generate(["a", "b"], SamplingParams(max_tokens=200), use_tqdm=False)
    with pytest.raises(EngineDeadError):
        llm.generate("a", use_tqdm=False)


def test_it_works_inside_a_running_event_loop(llm: LLM) -> None:
    async def go() -> list[str]:
        return texts(llm.generate("a b", use_tqdm=False))

    assert asyncio.run(go()) == ["a b"]


def test_progress_is_shown_and_can_be_replaced(llm: LLM, capsys: pytest.CaptureFixture) -> None:
    llm.generate(["a", "b"])
    err = capsys.readouterr().err
    assert "2/2" in err
    assert "output:" in err
    llm.generate(["a"], use_tqdm=False)
    assert capsys.readouterr().err == ""
    seen: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            seen.append(options["total"])

        def set_postfix_str(self, text: str, refresh: bool) -> None: ...

        def update(self, num: int) -> None:
            seen.append(num)

        def close(self) -> None:
            seen.append("closed")

    llm.generate(["a", "b"], use_tqdm=Bar)
    assert seen == [2, 1, 1, "closed"]


def test_chat_applies_the_template(llm: LLM) -> None:
    one = [{"role": "user", "content": "Hi"}]
    (output,) = llm.chat(one, use_tqdm=False)
    assert output.prompt == llm.get_tokenizer().apply_chat_template(
        one, tokenize=False, add_generation_prompt=True
    )
    assert output.prompt_token_ids.count(1) == 3  # no begin token besides the template's
    assert len(llm.chat([one, one], use_tqdm=False)) == 2
    (output,) = llm.chat(one, use_tqdm=False, chat_template="{{ messages[0].content }}!{{ x }}",
                         chat_template_kwargs={"x": 5})  # fmt: skip
    assert output.prompt == "Hi!5"
    last = [*one, {"role": "assistant", "content": "Well,"}]
    (output,) = llm.chat(
        last, use_tqdm=False, add_generation_prompt=False, continue_final_message=True
    )
    assert output.prompt is not None
    assert output.prompt.endswith("Well,")
    for bad in ([], "Hi", {"role": "user"}, [[]], [["x"]]):
        with pytest.raises(RequestError):
            llm.chat(bad, use_tqdm=False)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="tokenize"):
        llm.chat(one, use_tqdm=False, chat_template_kwargs={"tokenize": True})


def test_what_else_users_call(llm: LLM) -> None:
    assert llm.get_tokenizer().eos_token_id == EOS
    assert llm.get_default_sampling_params() == SamplingParams()
    assert llm.reset_prefix_cache() is True
    assert llm.summary() == {"model": "fake"}
    assert (llm.vocab_size, llm.max_model_len) == (49_152, 256)
    llm.shutdown()
    with pytest.raises(EngineDeadError):
        llm.generate("a", use_tqdm=False)


def test_beam_search_runs_over_generate(llm: LLM) -> None:
    (output,) = llm.beam_search("a", BeamSearchParams(beam_width=2, max_tokens=3))
    assert len(output.sequences) == 2
    best = output.sequences[0]
    assert best.text == llm.get_tokenizer().decode(best.tokens, True)
    with pytest.raises(RequestError, match="logprobs=40"):
        llm.beam_search("a", BeamSearchParams(beam_width=20, max_tokens=1))


# --- beam search by itself ---

PROBS = {0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}  # 2 is EOS


def next_tokens(sequences: list[list[int]]) -> list[dict[int, Logprob]]:
    """Depends on the last token, so that greedy is not best."""
    shift = [(sequence[-1] * 3) % 4 for sequence in sequences]
    return [{(token + s) % 4: Logprob(math.log(p)) for token, p in PROBS.items()} for s in shift]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_wide_beam_finds_the_best_of_all_sequences(penalty: float, ignore_eos: bool) -> None:
    def every(tokens: list[int], total: float, left: int) -> Iterator[tuple[float, list[int]]]:
        ended = len(tokens) > 1 and tokens[-1] == EOS and not ignore_eos
        if left == 0 or ended:
            length = len(tokens) - (tokens[-1] == EOS)
            yield total / length**penalty, tokens
            return
        for token, logprob in next_tokens([tokens])[0].items():
            yield from every([*tokens, token], total + logprob.logprob, left - 1)

    params = BeamSearchParams(
        beam_width=64, max_tokens=3, length_penalty=penalty, ignore_eos=ignore_eos
    )
    (found,) = beam_search([[1]], params, next_tokens, eos_token_id=EOS, max_model_len=99)
    expected = sorted(every([1], 0.0, 3), key=lambda item: -item[0])
    scores = [round(score, 9) for score, _ in expected[:64]]

    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.tokens[-1] == EOS)
        return round(beam.cum_logprob / length**penalty, 9)

    assert [score(beam) for beam in found.sequences] == scores


def test_beams_end_at_the_context_and_keep_to_the_allowed_tokens() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=9, allowed_token_ids=[1, 3])
    first, second = beam_search(
        [[1], [1, 3]], params, next_tokens, eos_token_id=EOS, max_model_len=5
    )
    for output in (first, second):
        assert all(len(beam.tokens) == 5 for beam in output.sequences)
        assert all(set(beam.tokens) <= {1, 3} for beam in output.sequences)


# --- arguments ---


def test_vllms_arguments_are_taken_where_they_change_nothing() -> None:
    given = {"tensor_parallel_size": 1, "swap_space": 4, "enforce_eager": True, "dtype": "float32",
             "max_model_len": 64, "quantization": None, "tokenizer_mode": "auto"}  # fmt: skip
    config = engine_config("demo", given, disable_log_stats=True)
    assert (config.model, config.max_model_len, config.disable_log_stats) == ("demo", 64, True)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"max_model_length": 5}, ConfigError, "did you mean 'max_model_len'"),
        ({"xyzzy": 5}, ConfigError, "unknown argument 'xyzzy'"),
        ({"tensor_parallel_size": 2}, UnsupportedError, "tensor_parallel_size=2"),
        ({"quantization": "awq"}, UnsupportedError, "quantization='awq'"),
        ({"trust_remote_code": True}, ConfigError, "never runs code"),
        ({"max_model_len": 0}, ConfigError, "max_model_len"),
    ],
)
def test_other_arguments_are_refused(given: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        LLM("demo", **given)


FORGETFUL = """
from jaxserve import LLM
from jaxserve.checkpoint import open_checkpoint
from jaxserve.client import Client
from jaxserve.config import EngineConfig
from tests.frontend.fake_engine import FakeEngine
engine = FakeEngine(lambda request, choice: [5], vocab_size=9)
engine.start()
llm = LLM.from_client(Client(EngineConfig(), engine, open_checkpoint("demo"), None))
llm.generate([[1]], use_tqdm=False)
stop = engine.shutdown
engine.shutdown = lambda: (stop(), print("stopped", engine._thread.is_alive()))
"""


def test_a_script_that_forgets_to_shut_down_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("stopped False\n", "")


def test_an_llm_that_nobody_holds_stops_its_engine(
    engine: FakeEngine, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    LLM.from_client(Client(EngineConfig(), engine, checkpoint, tokenizer))
    assert engine.num_shutdowns == 1


def test_importing_jaxserve_is_light() -> None:
    code = (
        "import sys, jaxserve\n"
        "print(jaxserve.__version__, sorted(n for n in ('jax', 'numpy', 'tokenizers', 'jinja2')"
        " if n in sys.modules))\n"
        "from jaxserve import *\n"
        "print(LLM.__name__, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["0.1.0 []", "LLM False"]
    assert set(jaxserve.__all__) <= set(dir(jaxserve))
    with pytest.raises(AttributeError, match="nothing"):
        _ = jaxserve.nothing
