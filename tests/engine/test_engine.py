"""The engine under aborts, refusals and faults: nothing leaks, nobody waits for ever."""

import random
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.checkpoint import open_checkpoint
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.errors import CheckpointError, ConfigError, EngineDeadError, RequestError
from jaxserve.request import Abort
from tests.engine.harness import SMALL, answer, collect, request, running, write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_a_thousand_requests_with_random_aborts_leak_no_page(model: Path) -> None:
    rng = random.Random(3)
    shared = [rng.randrange(300) for _ in range(30)]
    with running(model, num_gpu_blocks_override=60) as engine:
        _, stats = answer(engine, [request("first", [1, 2, 3])])
        num_free = stats[-1].num_free_blocks
        waiting: set[tuple[str, int]] = set()
        for i in range(1000):
            n = rng.choice([1, 1, 1, 3])
            prompt = shared[: rng.randrange(30)] + [rng.randrange(300)] * rng.randrange(1, 40)
            one = request(
                f"{i}", prompt, n=n, temperature=1.0, seed=i, max_tokens=rng.randrange(1, 20)
            )
            engine.submit(one)
            if rng.random() < 0.3:
                choice = rng.choice([None, rng.randrange(n)])
                engine.abort(Abort(request_id=f"{i}", choice=choice))
                waiting |= {(f"{i}", c) for c in range(n) if choice is not None and c != choice}
            else:
                waiting |= {(f"{i}", c) for c in range(n)}
            if len(waiting) > 40:  # let some finish, so that aborts meet every state
                some = rng.sample(sorted(waiting), 30)
                collect_any(engine, waiting, some)
        collect_any(engine, waiting, waiting.copy())
        _, stats = answer(engine, [request("last", [1, 2, 3])])
        assert stats[-1].num_free_blocks == num_free
        assert stats[-1].num_used_blocks == stats[-1].num_running == stats[-1].num_waiting == 0


def collect_any(engine: Engine, waiting: set, until: Any) -> None:
    """Reads the outbox until those in `until` have ended."""
    left = set(until) & waiting
    while left:
        output = engine.outbox.get(timeout=60)
        assert output.error is None, output.error
        for delta in output.deltas:
            if delta.finish_reason is not None:
                left.discard((delta.request_id, delta.choice))
                waiting.discard((delta.request_id, delta.choice))


def test_an_abort_frees_the_pages_at_once(model: Path) -> None:
    with running(model) as engine:
        engine.submit(request("long", [5] * 40, max_tokens=80))
        while not engine.outbox.get(timeout=60).deltas:
            pass
        engine.abort(Abort(request_id="long"))
        _, stats = answer(engine, [request("short", [1, 2, 3], max_tokens=3)])
        assert stats[-1].num_used_blocks == 0


def test_requests_that_can_never_fit_are_refused_when_submitted(model: Path) -> None:
    with running(model, num_gpu_blocks_override=6) as engine:
        with pytest.raises(RequestError, match="5 .*blocks|blocks.*5|40"):
            engine.submit(request("r", [1] * 60, max_tokens=30))
        with pytest.raises(RequestError, match="128"):
            engine.submit(request("r", [1] * 128, max_tokens=30))
        answer(engine, [request("fits", [1] * 20, max_tokens=8)])


def test_a_full_queue_refuses(model: Path) -> None:
    with running(model, max_num_queued_reqs=3, max_num_seqs=1) as engine:
        refused = 0
        accepted = []
        for i in range(30):
            try:
                engine.submit(request(f"{i}", [1, 2], max_tokens=20))
                accepted.append((f"{i}", 0))
            except RequestError as error:
                assert error.code == "server_overloaded"
                refused += 1
        assert refused >= 30 - 3 - 2
        collect(engine, accepted)
        answer(engine, [request("later", [1, 2])])


def test_a_row_whose_logits_are_not_numbers_ends_alone() -> None:
    # The head is not tied, so a poisoned embedding reaches only who has that token.
    untied = Path(__file__).parent.parent / "golden" / "tiny_llama" / "mha_untied"
    good = request("good", [1, 2, 3], logit_bias={7: -1000.0})
    with running(untied) as engine:
        want, _ = answer(engine, [good])
        assert want["good", 0].finish_reason == "length"
        weights = engine.runner._weights
        place = engine.runner._model.names.index("embedding.weight")
        weights[place] = weights[place].at[7].set(jnp.nan)
        got, stats = answer(engine, [good, request("bad", [1, 7, 3])])
    assert got["bad", 0].finish_reason == "error"
    assert got["good", 0].token_ids == want["good", 0].token_ids
    assert got["good", 0].finish_reason == "length"
    assert stats[-1].num_used_blocks == 0


def test_a_broken_step_ends_the_engine_and_tells_everyone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model) as engine:
        monkeypatch.setattr(engine.runner, "wait", lambda _: 1 / 0)
        engine.submit(request("r", [1, 2, 3]))
        output = engine.outbox.get(timeout=60)
        assert output.error is not None
        assert "ZeroDivisionError" in output.error
        with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
            engine.submit(request("next", [1]))


def test_a_compile_in_live_traffic_is_counted_and_forbidden(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model) as engine:
        launch = engine.runner.launch

        def compile_then_launch(plan: Any) -> Any:
            jax.jit(lambda x: x * 17.25 + 3)(np.ones(3)).block_until_ready()
            return launch(plan)

        monkeypatch.setattr(engine.runner, "launch", compile_then_launch)
        engine.submit(request("r", [1, 2, 3]))
        while (output := engine.outbox.get(timeout=60)).error is None:
            pass
        assert "compilations in live traffic" in output.error
        assert engine.num_late_compiles >= 1


def test_no_bucket_and_no_sampling_parameter_compiles_in_live_traffic(model: Path) -> None:
    with running(model, cudagraph_capture_sizes=None) as engine:
        everything = {
            "temperature": 1.0,
            "top_k": 5,
            "top_p": 0.9,
            "min_p": 0.01,
            "logprobs": 20,
            "prompt_logprobs": 2,
            "repetition_penalty": 1.1,
            "logit_bias": {3: 1.0},
            "min_tokens": 2,
            "stop_token_ids": [4],
            "bad_words_token_ids": ((5, 6),),
            "allowed_token_ids": list(range(250)),
        }
        for length in (1, 2, 3, 5, 9, 17, 33, 100):
            plain, full = request("a", [3] * length), request("b", [4] * length, **everything)
            answer(engine, [plain, full])
        assert engine.num_late_compiles == 0


def test_an_idle_engine_waits_without_spinning(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model) as engine:
        answer(engine, [request("r", [1, 2, 3])])
        calls = []
        schedule = engine.scheduler.schedule
        monkeypatch.setattr(engine.scheduler, "schedule", lambda: (calls.append(1), schedule())[1])
        threading.Event().wait(0.3)
        assert len(calls) <= 2


def test_a_second_engine_works_after_the_first_has_gone(model: Path) -> None:
    tokens = []
    for _ in range(2):
        with running(model) as engine:
            got, _ = answer(engine, [request("r", [9, 8, 7])])
            tokens.append(got["r", 0].token_ids)
            weights, state = engine.runner._weights, engine.runner._state
        assert all(x.is_deleted() for x in jax.tree.leaves((weights, state)))
        with pytest.raises(EngineDeadError):
            engine.submit(request("late", [1]))
    assert tokens[0] == tokens[1]


def test_the_prefix_cache_can_be_reset(model: Path) -> None:
    with running(model) as engine:
        prompt = list(range(50))
        answer(engine, [request("a", prompt)])
        got, _ = answer(engine, [request("b", prompt)])
        assert got["b", 0].num_cached_tokens == 48
        assert engine.reset_prefix_cache()
        got, _ = answer(engine, [request("c", prompt)])
        assert got["c", 0].num_cached_tokens == 0
        engine.submit(request("busy", prompt, max_tokens=70))
        while not engine.outbox.get(timeout=60).deltas:
            pass
        assert not engine.reset_prefix_cache()
        collect(engine, [("busy", 0)])


def test_an_fp8_cache_takes_a_quarter_of_a_float32_one_and_is_near_it(model: Path) -> None:
    prompt = request("a", range(5, 60), max_tokens=1, logprobs=20, prompt_logprobs=0)
    found = {}
    for kv_cache_dtype in ("auto", "fp8", "fp8_e5m2", "bfloat16"):
        with running(model, kv_cache_dtype=kv_cache_dtype) as engine:
            answers, _ = answer(engine, [prompt])
            scores = answers["a", 0].prompt_logprobs or ()
            values = np.array([each.logprobs[0] for each in scores if each is not None])
            found[kv_cache_dtype] = engine.runner.group_pages[0].bytes_a_page, values
    size, exact = found["auto"]
    share = {name: size // other for name, (other, _) in found.items()}
    assert share == {"auto": 1, "fp8": 4, "fp8_e5m2": 4, "bfloat16": 2}
    distance = {name: np.abs(values - exact).mean() for name, (_, values) in found.items()}
    assert 0 < distance["bfloat16"] < distance["fp8"] < distance["fp8_e5m2"] < 0.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_model_len": 10_000}, "max_model_len=10000.*256"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens=4.*max_num_seqs=8"),
        ({"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 1000}, "KV cache"),
        ({"num_gpu_blocks_override": 1}, "num_gpu_blocks_override=1"),
        ({"attention_backend": "tpu"}, "tpu"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_change(
    model: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Engine(EngineConfig(model=str(model), **{**SMALL, **changes}), open_checkpoint(str(model)))


def test_missing_weights_are_all_named(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.2"):
        Engine(EngineConfig(model=str(folder), **SMALL), open_checkpoint(str(folder)))
