"""The playground and the documentation page in a real browser, over a scripted engine."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from jaxserve.request import Request
from jaxserve.server_config import ServerConfig
from tests.server.conftest import Start
from tests.server.running import RunningServer, engine_of, until

NAMES = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
ARGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PHONE, DESKTOP = (390, 844), (1280, 800)
METRICS = """\
jaxserve:kv_cache_usage_perc{model_name="demo",engine="0"} 0.25
jaxserve:num_requests_running{model_name="demo",engine="0"} 3.0
jaxserve:num_requests_waiting{model_name="demo",engine="0"} 2.0
"""
COUNTING = " ".join(f"word{i}" for i in range(60))


def test_ci_has_a_browser() -> None:
    if not os.environ.get("CI"):
        pytest.skip("outside of CI the tests of the pages run where chromium is installed")
    assert CHROMIUM, "chromium is missing; make tools installs it"


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: make tools, or set CHROMIUM to its path"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGS))
        yield chromium
        chromium.close()


type Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens a page of a server; in the end nothing may have been complained of."""
    opened: list[Page] = []
    complaints: list[str] = []

    def go(
        server: RunningServer,
        path: str = "/",
        *,
        size: tuple[int, int] = DESKTOP,
        metrics: str | None = METRICS,
        expected: str = "\n",
        **options: Any,
    ) -> Page:
        def note(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and expected not in message.text:
                complaints.append(message.text)

        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if metrics is not None:

            def fulfill(route: Route) -> None:
                route.fulfill(status=200, body=metrics)

            page.route("**/metrics", fulfill)
        page.goto(server.url + path)
        opened.append(page)
        return page

    yield go
    for page in opened:
        page.context.close()
    assert not complaints


def send(page: Page, text: str) -> None:
    box = page.get_by_label("Message", exact=True)
    box.fill(text)
    box.press("Enter")


def answer_of(page: Page) -> str:
    return page.locator(".assistant .text").last.inner_text()


@needs_browser
def test_words_appear_one_after_another(start: Start, visit: Visit) -> None:
    page = visit(start(COUNTING, delay_s=0.02))
    expect(page.get_by_label("Model")).to_have_value("demo")
    send(page, "Count")
    seen: list[str] = []

    def grown() -> bool:
        text = answer_of(page)
        if not seen or seen[-1] != text:
            seen.append(text)
        return "word59" in text

    page.locator(".assistant").wait_for()
    until(grown)
    assert len(seen) >= 5
    assert all(later.startswith(before) for before, later in itertools.pairwise(seen))
    foot = page.locator(".assistant .foot")
    expect(foot).to_contain_text("first token")
    expect(foot).to_contain_text("tokens/s")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    expect(page.get_by_role("status")).to_have_text("The answer is complete.")


@needs_browser
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_in_the_engine(start: Start, visit: Visit, how: str) -> None:
    server = start("word ", ends=False, delay_s=0.02, max_model_len=50_000)
    page = visit(server)
    send(page, "Go")
    until(lambda: "word word" in answer_of(page))
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".assistant .foot")).to_contain_text("stopped")
    until(lambda: engine_of(server).num_running == 0)
    text = answer_of(page)
    page.wait_for_timeout(200)
    assert answer_of(page) == text
    send(page, "Go on")
    expect(page.locator(".assistant")).to_have_count(2)


@needs_browser
def test_keys_of_the_message_box(start: Start, visit: Visit) -> None:
    server = start()
    page = visit(server)
    box = page.get_by_label("Message", exact=True)
    box.press("Enter")  # empty: nothing is sent
    box.fill("One")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    expect(box).to_have_value("One\ntwo")
    box.press("Enter")
    expect(page.locator(".user .text")).to_have_text("One\ntwo")
    expect(page.locator(".assistant .text")).to_have_text("Hello there.")
    assert len(engine_of(server).requests) == 1


@needs_browser
def test_settings_reach_the_engine(start: Start, visit: Visit) -> None:
    server = start()
    page = visit(server)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System prompt").fill("Be brief.")
    values = {"Temperature": "0.5", "Top p": "0.9", "Top k": "7", "Min p": "0.1", "Seed": "11",
              "Max tokens": "5", "Presence penalty": "0.5", "Frequency penalty": "-0.5",
              "Repetition penalty": "1.5"}  # fmt: skip
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    send(page, "Hi")
    expect(page.locator(".assistant .text")).to_contain_text("Hello")
    request: Request = engine_of(server).requests[0]
    got = request.sampling
    assert (got.temperature, got.top_p, got.top_k, got.min_p) == (0.5, 0.9, 7, 0.1)
    assert (got.seed, request.max_tokens) == (11, 5)
    assert (got.presence_penalty, got.frequency_penalty) == (0.5, -0.5)
    assert got.repetition_penalty == 1.5
    prompt = server.llm.get_tokenizer().decode(list(request.prompt_token_ids))
    assert "Be brief." in prompt
    page.reload()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Temperature").fill("9")
    send(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("Temperature is not allowed")
    assert len(engine_of(server).requests) == 1


@needs_browser
def test_a_conversation_goes_on_and_a_new_one_knows_nothing_of_it(
    start: Start, visit: Visit
) -> None:
    server = start("Red.")
    page = visit(server)
    for i, text in enumerate(("My colour?", "And yours?")):
        send(page, text)
        expect(page.locator(".assistant .text")).to_have_text(["Red."] * (i + 1))
        expect(page.get_by_role("button", name="Again")).to_have_count(1)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    send(page, "Hello")
    expect(page.locator(".assistant .text")).to_have_text("Red.")
    decode = server.llm.get_tokenizer().decode
    prompts = [decode(list(request.prompt_token_ids)) for request in engine_of(server).requests]
    assert all(part in prompts[1] for part in ("My colour?", "Red.", "And yours?"))
    assert "colour" not in prompts[2]


@needs_browser
def test_what_a_model_writes_is_text(start: Start, visit: Visit) -> None:
    hostile = (
        "<img src=x onerror=\"document.title='owned'\"> **bold** `a<b`\n\n```html\n"
        "<script>document.title='owned'</script>\n```\n\n1. one\n2. two\n"
    )
    page = visit(start(hostile))
    send(page, "Hi")
    expect(page.get_by_role("button", name="Again")).to_be_visible()
    text = page.locator(".assistant .text")
    expect(text.locator("pre code")).to_have_text("<script>document.title='owned'</script>")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("p code")).to_have_text("a<b")
    expect(text.locator("ol li")).to_have_text(["one", "two"])
    assert page.locator("img").count() == 0
    assert page.title() == "jaxserve"


@needs_browser
def test_reasoning_is_shown_apart(start: Start, visit: Visit) -> None:
    server = start(
        "<think>Two and two.</think>Four.",
        server=ServerConfig(port=0, reasoning_parser="deepseek_r1"),
    )
    page = visit(server)
    send(page, "Sum?")
    expect(page.locator(".assistant .text")).to_have_text("Four.")
    thoughts = page.locator(".think div")
    expect(thoughts).to_be_hidden()
    page.get_by_text("Thoughts").click()
    expect(thoughts).to_have_text("Two and two.")


@needs_browser
def test_errors_are_told_in_words_and_can_be_tried_again(start: Start, visit: Visit) -> None:
    server = start(refuse_after=0)
    page = visit(server, expected="Failed to load resource")
    send(page, "Hi")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The server is busy")
    engine_of(server).refuse_after = None
    alert.get_by_role("button", name="Try again").click()
    expect(page.locator(".assistant .text")).to_have_text("Hello there.")
    expect(alert).to_have_count(0)


@needs_browser
def test_a_server_that_is_gone_is_told_so(start: Start, visit: Visit) -> None:
    server = start()
    page = visit(server, expected="Failed to load resource")
    expect(page.get_by_label("Model")).to_be_enabled()
    server.stop()
    send(page, "Hi")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")


@needs_browser
def test_an_api_key_is_asked_for_and_forgotten_with_the_tab(start: Start, visit: Visit) -> None:
    server = start(server=ServerConfig(port=0, api_keys=("secret",)))
    page = visit(server, expected="Failed to load resource")
    expect(page.get_by_role("alert")).to_contain_text("needs an API key")
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    expect(page.get_by_label("Model")).to_have_value("demo")
    expect(page.get_by_role("alert")).to_have_count(0)
    send(page, "Hi")
    expect(page.locator(".assistant .text")).to_have_text("Hello there.")
    assert page.evaluate("localStorage.length + document.cookie.length") == 0


@needs_browser
@pytest.mark.parametrize("prefix", ["jaxserve:", "vllm:"])
def test_load_comes_from_the_metrics(start: Start, visit: Visit, prefix: str) -> None:
    page = visit(start(), metrics=METRICS.replace("jaxserve:", prefix))
    load = page.locator("#load")
    expect(load).to_be_visible()
    assert load.inner_text().split() == ["KV", "25", "%", "3", "running", "2", "waiting"]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_pages_fit_and_can_be_read(
    start: Start, visit: Visit, size: tuple[int, int], scheme: str
) -> None:
    long = (
        "x" * 300 + "\n\n```python\n" + "y" * 300 + "\n```\n\n|a|b|\n|-|-|\n|" + "z" * 200 + "|1|"
    )
    server = start(long)
    page = visit(server, size=size, color_scheme=scheme)
    send(page, "w" * 300)
    expect(page.get_by_role("button", name="Again")).to_be_visible()
    fits(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) > 0.5) is (scheme == "light")
    for selector in ("#load", ".foot", "#model", ".text p", ".code span", ".hint", ".tool"):
        if page.locator(selector).first.is_visible():
            assert contrast(page, selector) >= 4.5, selector
    page.get_by_role("button", name="Settings", exact=True).click()
    fits(page)
    assert contrast(page, "aside small") >= 4.5
    documentation = visit(server, "/docs", size=size, color_scheme=scheme)
    documentation.get_by_text("Answer a conversation", exact=True).click()
    expect(documentation.get_by_text("The conversation so far.").first).to_be_visible()
    fits(documentation)


def fits(page: Page) -> None:
    widths = page.evaluate(
        "[document.documentElement.scrollWidth, innerWidth, "
        "...['scroll', 'settings'].map((id) => document.getElementById(id))"
        ".filter(Boolean).map((e) => e.scrollWidth - e.clientWidth)]"
    )
    assert widths[0] <= widths[1]
    assert not any(widths[2:])


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance of `rgb(r, g, b)`."""
    numbers = color[color.index("(") + 1 : -1].split(",")[:3]
    channels = [float(number) / 255 for number in numbers]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Page, selector: str) -> float:
    """Of an element's text to what lies behind it."""
    front, back = page.locator(selector).first.evaluate(
        "(e) => { const front = getComputedStyle(e).color; "
        "const clear = (n) => getComputedStyle(n).backgroundColor === 'rgba(0, 0, 0, 0)'; "
        "while (clear(e)) e = e.parentElement; "
        "return [front, getComputedStyle(e).backgroundColor]; }"
    )
    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@needs_browser
def test_pages_work_under_a_root_path(start: Start, browser: Browser) -> None:
    """As behind a proxy that takes the prefix off."""
    server = start(server=ServerConfig(port=0, root_path="/llm"))
    page = browser.new_context().new_page()
    asked: list[str] = []

    def proxy(route: Route) -> None:
        asked.append(route.request.url.removeprefix("http://proxy.test"))
        path = asked[-1].removeprefix("/llm")
        assert path != asked[-1]
        given = route.request.post_data_buffer
        with httpx.Client() as http:
            answer = http.request(
                route.request.method,
                server.url + path,
                content=given,
                headers={"content-type": "application/json"},
            )
        route.fulfill(status=answer.status_code, headers=dict(answer.headers), body=answer.content)

    page.route("http://proxy.test/**", proxy)
    page.goto("http://proxy.test/llm/")
    send(page, "Hi")
    expect(page.locator(".assistant .text")).to_have_text("Hello there.")
    page.goto("http://proxy.test/llm/docs")
    expect(page.get_by_text("/v1/chat/completions").first).to_be_visible()
    assert "/llm/v1/chat/completions" in asked
    page.context.close()
