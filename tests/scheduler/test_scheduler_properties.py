"""Whatever arrives, ends or is preempted: right tokens, no lost block, everyone finishes."""

from random import Random
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.kv_group import most_blocks
from jaxserve.request import Abort, Request
from tests.scheduler.fake_runner import EOS, Engine, expected_output, make_request

MAX_MODEL_LEN = 40
WINDOWS = st.lists(st.sampled_from([None, 1, 2, 3, 5, 9, 16, 40]), min_size=1, max_size=3).map(
    tuple
)


class Case(NamedTuple):
    settings: dict[str, Any]
    steps_ahead: int
    arrivals: dict[int, list[Request | Abort]]  # by step


def longest(case_settings: dict[str, Any]) -> int:
    """The most tokens, prompt and output, of a sequence that can run alone."""
    step_tokens, block_size = (
        case_settings[name] for name in ("max_num_batched_tokens", "block_size")
    )

    def fits(num_tokens: int) -> bool:
        return all(
            count
            > most_blocks(
                window,
                num_tokens=num_tokens - 1,
                step_tokens=step_tokens,
                block_size=block_size,
            )
            for count, window in zip(
                case_settings["num_blocks"], case_settings["windows"], strict=True
            )
        )

    return max(filter(fits, range(2, MAX_MODEL_LEN + 1)))


@st.composite
def requests(draw: st.DrawFn, request_id: str, room: int) -> Request:
    """Prompts share prefixes often; no request is longer than `room` tokens, some as long."""
    num_prompt = draw(st.integers(1, room - 1))
    shared = draw(st.integers(0, num_prompt))
    trunk = draw(st.integers(0, 1))
    prompt = [(trunk + i) % 3 for i in range(shared)]
    prompt += [draw(st.integers(0, 2)) for _ in range(num_prompt - shared)]
    max_tokens = draw(st.integers(1, room - num_prompt))
    return make_request(
        request_id,
        tuple(prompt),
        max_tokens,
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        min_tokens=draw(st.integers(0, max_tokens)),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        eos_token_id=draw(st.sampled_from([None, EOS])),
        stop_token_ids=draw(st.sampled_from([(), (), (3,)])),
        priority=draw(st.integers(-1, 1)),
        cache_salt=draw(st.sampled_from([None, None, "a"])),
        adapter=draw(st.sampled_from([None, None, "b"])),
        needs_host_tokens=draw(st.sampled_from([False, False, True])),
    )


@st.composite
def cases(draw: st.DrawFn, windows: st.SearchStrategy[tuple[int | None, ...]]) -> Case:
    chunked = draw(st.booleans())
    case_settings = {
        "windows": draw(windows),
        "block_size": draw(st.sampled_from([1, 2, 4, 4, 8])),
        "max_num_seqs": draw(st.integers(1, 5)),
        "max_num_batched_tokens": draw(st.sampled_from([1, 2, 3, 5, 8, 48] if chunked else [40])),
        "max_model_len": MAX_MODEL_LEN,
        "enable_prefix_caching": draw(st.booleans()),
        "enable_chunked_prefill": chunked,
        "policy": draw(st.sampled_from(["fcfs", "priority"])),
    }
    num_blocks = draw(st.integers(3, 24))
    # Groups that see less may have fewer blocks.
    num_blocks = tuple(
        num_blocks if window is None else draw(st.integers(3, num_blocks))
        for window in case_settings["windows"]
    )
    case_settings["num_blocks"] = num_blocks
    room = longest(case_settings)
    arrivals: dict[int, list[Request | Abort]] = {}
    for index in range(draw(st.integers(1, 8))):
        request = draw(requests(f"r{index}", room))
        step = draw(st.integers(0, 12))
        arrivals.setdefault(step, []).append(request)
        if draw(st.integers(0, 3)) == 0:
            abort = Abort(
                request_id=request.request_id,
                choice=draw(st.sampled_from([None, 0, 1])),
                finished=draw(st.booleans()),
            )
            arrivals.setdefault(step + draw(st.integers(0, 10)), []).append(abort)
    return Case(
        settings=case_settings,
        steps_ahead=draw(st.sampled_from([0, 1, 1, 2])),
        arrivals=arrivals,
    )


def serve(case: Case) -> tuple[Engine, dict[str, Request], set[tuple[str, int]]]:
    """Runs a case to its end; the page checks of the fake runner see every step."""
    engine = Engine(steps_ahead=case.steps_ahead, **case.settings)
    accepted: dict[str, Request] = {}
    aborted: set[tuple[str, int]] = set()
    for step in range(max(case.arrivals) + 1):
        for command in case.arrivals.get(step, []):
            if isinstance(command, Request):
                accepted[command.request_id] = command
            elif command.request_id in accepted:
                n = accepted[command.request_id].sampling.n
                named = range(n) if command.choice is None else [command.choice]
                aborted |= {(command.request_id, choice) for choice in named}
            engine.add(command)
        if not engine.scheduler.idle or engine.in_flight:
            engine.step()
    engine.run()
    return engine, accepted, aborted


@settings(max_examples=200, deadline=None)
@given(cases(st.just((None,))))
def test_everyone_gets_the_tokens_it_gets_alone(case: Case) -> None:
    check_case(case)


@settings(max_examples=300, deadline=None)
@given(cases(WINDOWS))
def test_everyone_gets_them_too_where_layers_see_different_windows(case: Case) -> None:
    check_case(case)


def check_case(case: Case) -> None:
    engine, accepted, aborted = serve(case)
    for request in accepted.values():
        for choice in range(request.sampling.n):
            if (request.request_id, choice) in aborted:
                tokens = engine.output(request.request_id, choice)
                assert tokens == expected_output(request, choice)[0][: len(tokens)]
            else:
                engine.check_output(request, choice)
    assert all(pool.num_held == 0 for pool in engine.scheduler._blocks.pools)
    assert not engine.scheduler._backlog._choices


def test_after_a_thousand_requests_with_random_aborts_no_block_is_missing() -> None:
    random = Random(0)
    engine = Engine(num_blocks=40, max_num_seqs=16, max_num_batched_tokens=48, steps_ahead=1)
    num_free = engine.num_free
    requests: list[Request] = []
    aborted: set[str] = set()
    while len(requests) < 1000 or not engine.scheduler.idle or engine.in_flight:
        for _ in range(random.randrange(4) if len(requests) < 1000 else 0):
            prompt = (*range(random.randrange(1, 24)), random.randrange(9))
            request = make_request(
                f"r{len(requests)}",
                prompt,
                random.randrange(1, 20),
                n=random.choice([1, 1, 1, 3]),
                eos_token_id=EOS,
            )
            requests.append(request)
            engine.add(request)
        if random.random() < 0.5 and requests:
            request = random.choice(requests[-30:])
            aborted.add(request.request_id)
            engine.add(Abort(request_id=request.request_id))
        engine.step()
    assert engine.num_free == num_free
    stats = engine.scheduler.stats(None)
    assert (stats.num_running, stats.num_waiting, stats.num_allocated_slots) == (0, 0, 0)
    assert stats.num_preemptions > 0, "the pool is small enough to preempt"
    assert len(aborted) > 100
    for request in requests:
        if request.request_id not in aborted:
            for choice in range(request.sampling.n):
                engine.check_output(request, choice)
