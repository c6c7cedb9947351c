"""A line an event, with its request's id; nothing forged, nothing secret, no text unasked."""

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxserve.errors import ConfigError
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.logs import configure_logging, escape, request_id
from jaxserve.server.request_log import AccessLog, RequestLog, current
from tests.server.observed import make_client, run
from tests.server.test_metrics import call

logger = logging.getLogger("jaxserve.test")
NASTY = "a\r\nINFO forged \x1b[31mred\x00 \u2028\u202e\ud800\x85\x7f b"
type Start = Callable[..., io.StringIO]


@pytest.fixture
def start() -> Iterator[Start]:
    """Configures logging into a string; what was before comes back."""
    names = ("", "jaxserve", "uvicorn", "uvicorn.error", "uvicorn.access")
    loggers = [logging.getLogger(name) for name in names]
    saved = [(x, x.handlers[:], x.level, x.propagate) for x in loggers]

    def go(log_format: Literal["text", "json"] = "json", **options: Any) -> io.StringIO:
        stream = io.StringIO()
        configure_logging(log_format=log_format, stream=stream, **options)
        return stream

    yield go
    for found, handlers, level, propagate in saved:
        found.handlers[:] = handlers
        found.setLevel(level)
        found.propagate = propagate


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_text_lines_have_time_level_name_id_message_and_fields(start: Start) -> None:
    stream = start("text")
    token = request_id.set("abc")
    logger.info("hello %s", "world", extra={"ms": 1.5, "path": "/v1"})
    request_id.reset(token)
    logger.warning("bye")
    first, second = stream.getvalue().splitlines()
    assert first.split(" ", 2)[2] == "INFO jaxserve.test [abc] hello world ms=1.5 path='/v1'"
    assert second.endswith("Z WARNING jaxserve.test bye")
    assert len(first.split(" ")[0]) == len("2026-11-25")


def test_json_lines_have_the_same(start: Start) -> None:
    stream = start()
    logger.info("hi", extra={"request_id": "x", "ms": 1.5, "bad": float("nan"), "level": "fake"})
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "jaxserve.test",
        "message": "hi",
        "request_id": "x",
        "ms": 1.5,
        "bad": "nan",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_users_send_forges_no_line_and_no_terminal_code(
    start: Start, log_format: Literal["text", "json"]
) -> None:
    stream = start(log_format)
    logger.info(
        "path %s", NASTY, extra={"request_id": NASTY, "path": NASTY, "deep": [{"k": NASTY}]}
    )
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text[:-1].isprintable()
    try:
        raise ValueError(NASTY)
    except ValueError:
        logger.exception("failed")
    more = stream.getvalue()[len(text) :]
    if log_format == "json":
        assert "\\u2028" in more
        assert json.loads(more)["exception"].startswith("Traceback")
    else:
        first, *rest = more.splitlines()
        assert first.endswith("failed")
        assert all(line.startswith("  | ") for line in rest)
        assert any("forged" in line for line in rest)
        assert all(line.isprintable() for line in rest)


def test_escaping_leaves_what_is_printable() -> None:
    assert escape("Grüße, 世界 🙂 \\n") == "Grüße, 世界 🙂 \\n"
    assert escape("a\nb\x1b\u2028") == "a\\nb\\x1b\\u2028"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_secrets_never_show(start: Start, log_format: Literal["text", "json"]) -> None:
    stream = start(log_format, secrets=["sk-canary", "sk-canary-tail", ""])
    logger.info("key %s", "sk-canary-tail", extra={"header": {"sk-canary": ["Bearer sk-canary"]}})
    try:
        raise ValueError("not sk-canary")
    except ValueError:
        logger.exception("sk-canary")
    assert "canary" not in stream.getvalue()
    assert "-tail" not in stream.getvalue()[: stream.getvalue().index("Traceback")]
    assert stream.getvalue().count("***") >= 5


def test_levels_hold_for_us_and_others_only_warn(start: Start) -> None:
    stream = start(level="debug")
    logger.debug("ours")
    logging.getLogger("uvicorn.error").info("uvicorn's")
    logging.getLogger("uvicorn.access").error("not this")
    logging.getLogger("somebody").info("nor this")
    logging.getLogger("somebody").warning("but this")
    assert [line["message"] for line in lines(stream)] == ["ours", "uvicorn's", "but this"]
    with pytest.raises(ConfigError, match="log_level"):
        configure_logging(level="loud")
    with pytest.raises(ConfigError, match="log_format"):
        configure_logging(log_format="xml")  # pyright: ignore[reportArgumentType]


# --- Requests ---


def new_app(client: Any = None, engine: Any = None, **options: Any) -> AccessLog:
    async def answer(request: Request) -> Response:
        logger.info("inside")
        body = await request.body()
        if client is not None:
            states = [client.submit("Say canary", SamplingParams()) for _ in range(2)]
            await asyncio.to_thread(run, client, engine, states)
        if body == b"fail":
            raise RuntimeError("surprise")
        return PlainTextResponse(request.scope["state"]["request_id"])

    async def stream(request: Request) -> Response:
        async def parts() -> Any:
            yield b"a"
            logger.info("streaming")

        return StreamingResponse(parts())  # pyright: ignore[reportArgumentType]

    routes = [
        Route("/v1/completions", answer, methods=["POST"]),
        Route("/stream", stream),
        Route("/health", answer, methods=["GET", "POST"]),
    ]
    return AccessLog(Starlette(routes=routes), **options)


def post(app: Any, path: str, body: bytes = b"", headers: Any = ()) -> dict[str, Any]:
    """One POST with headers; status, headers and body of the answer."""
    got: dict[str, Any] = {"body": b""}

    async def with_headers(scope: Any, receive: Any, send: Any) -> None:
        async def keep(message: Any) -> None:
            got["headers"] = got.get("headers") or dict(message.get("headers", ()))
            got["body"] += message.get("body", b"")
            await send(message)

        await app({**scope, "headers": [*scope["headers"], *headers]}, receive, keep)

    got["status"] = asyncio.run(call(with_headers, path, "POST", body))
    return got


def test_each_request_has_one_access_line_and_its_id_is_everywhere(start: Start) -> None:
    stream = start()
    client, engine = make_client("one two")
    RequestLog().watch(client.observers)
    answer = post(
        new_app(client, engine), "/v1/completions", b"{}", [(b"x-request-id", b"My-id_1.2")]
    )
    inside, access = lines(stream)
    assert answer["body"] == b"My-id_1.2"
    assert answer["headers"][b"x-request-id"] == b"My-id_1.2"
    assert {inside["request_id"], access["request_id"]} == {"My-id_1.2"}
    assert access["message"] == "request"
    assert (access["method"], access["path"], access["status"]) == ("POST", "/v1/completions", 200)
    assert access["ms"] > 0
    assert access["output_tokens"] == 2 * 3
    assert access["prompt_tokens"] == 2 * len(engine.requests[0].prompt_token_ids)
    assert request_id.get() is None
    assert current.get() is None
    assert "canary" not in stream.getvalue()


@pytest.mark.parametrize(
    "given", [b"", b"a b", b"x" * 129, b"a\r\nb", "é".encode(), b"<script>", b"\xff"]
)
def test_an_id_that_could_do_harm_is_replaced(start: Start, given: bytes) -> None:
    stream = start()
    answer = post(new_app(), "/v1/completions", headers=[(b"x-request-id", given)])
    new = answer["headers"][b"x-request-id"].decode()
    assert len(new) == 32
    assert {line["request_id"] for line in lines(stream)} == {new}


def test_streams_failures_and_polls_are_logged_as_they_should_be(start: Start) -> None:
    stream = start()
    app = new_app(quiet={"/health"}, echo_id=False)
    assert asyncio.run(call(app, "/stream")) == 200
    streaming, access = lines(stream)
    assert streaming["request_id"] == access["request_id"]
    assert "prompt_tokens" not in access
    assert asyncio.run(call(app, "/health")) == 200
    assert lines(stream)[2]["message"] == "inside"
    assert len(lines(stream)) == 3
    answer = post(app, "/health", b"fail")
    assert answer["status"] == 500
    assert lines(stream)[-1]["status"] == 500
    post(app, "/" + NASTY.encode("ascii", "ignore").decode() + "x" * 1000)
    last = lines(stream)[-1]
    assert last["status"] == 404
    assert len(last["path"]) == 256 + 3
    num = len(lines(stream))
    post(new_app(enabled=False), "/nowhere")
    assert len(lines(stream)) == num


def test_the_query_string_is_not_logged(start: Start) -> None:
    stream = start()
    app = new_app()

    async def with_query(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "query_string": b"api_key=canary"}, receive, send)

    asyncio.run(call(with_query, "/stream"))
    assert "canary" not in stream.getvalue()


@pytest.mark.parametrize("log_requests", [False, True])
@pytest.mark.parametrize("log_outputs", [False, True])
def test_texts_are_logged_only_when_asked_for(
    start: Start, log_requests: bool, log_outputs: bool
) -> None:
    stream = start()
    client, engine = make_client("forty-two, roughly")
    log = RequestLog(log_requests=log_requests, log_outputs=log_outputs, max_log_len=7)
    log.watch(client.observers)
    states = [
        client.submit("What\nis it?", SamplingParams(seed=3), request_id="a"),
        client.submit([5, 6, 7, 8, 9, 10, 11, 12], SamplingParams(), request_id="b"),
    ]
    run(client, engine, states)
    found = lines(stream)
    received = {line["request_id"]: line for line in found if line["message"] == "received"}
    generated = {line["request_id"]: line for line in found if line["message"] == "generated"}
    assert len(found) == len(received) + len(generated)
    assert received.keys() == ({"a", "b"} if log_requests else set())
    assert generated.keys() == ({"a", "b"} if log_outputs else set())
    if log_requests:
        assert received["a"]["prompt"] == "What\nis"
        assert (received["a"]["seed"], received["a"]["n"]) == (3, 1)
        assert received["b"]["prompt_token_ids"] == [5, 6, 7, 8, 9, 10, 11]
    if log_outputs:
        assert generated["a"]["output"] == "forty-t"
        assert generated["a"]["finish_reason"] == "stop"
        assert generated["a"]["output_tokens"] == states[0].summaries()[0].num_tokens
