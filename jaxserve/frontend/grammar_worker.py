"""A process that compiles users' grammars, where they can neither hang nor crash anything else.

Native compilation cannot be interrupted in a thread, and some grammars take it minutes, gigabytes
or the whole stack. So a process of its own builds the tokenizer once and forks a child for each
grammar; a child that is late is killed, and one that dies is an error of its grammar alone.

Run as a script, with pipes as stdin and stdout, one JSON object a line. First comes
{"tokenizer", "vocab_size", "end_token_ids"}, answered by {"ready": true}; then jobs
{"id", "kind", "text", "options", "timeout_s"}, each answered by {"id", "grammar"} or
{"id", "error"}. It ends with its stdin. Imports nothing of jaxserve, so that it starts quickly.
"""

import contextlib
import gc
import json
import os
import resource
import selectors
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

MAX_CHILDREN = 4
MAX_CHILD_BYTES = 1 << 30  # of address space, beyond what the tokenizer takes
MAX_ERROR_CHARS = 400
NUM_PROBES, NUM_PROBE_TOKENS = 2, 24
NICE = 5  # behind the engine
MARGIN_S = 0.1  # of a time limit: to start a child, to end it and to answer


def make_tokenizer(tokenizer_json: str, vocab_size: int, end_token_ids: list[int]) -> Any:
    """llguidance's view of a tokenizer, padded to `vocab_size`. Takes a second at 49k tokens."""
    import llguidance

    return llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=end_token_ids)


def make_matcher(tokenizer: Any, grammar: str) -> Any:
    """A matcher with limits on what one step of it may cost; its `get_error()` may be set."""
    import llguidance

    limits = llguidance.LLParserLimits(
        max_lexer_states=50_000,  # up to 2 kB each
        verbose_errors=False,  # else errors show the state of the parser
    )
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def to_grammar(kind: str, text: str, options: Any) -> str:
    """Any kind of grammar in llguidance's own form."""
    import llguidance

    if kind == "json":
        return llguidance.LLMatcher.grammar_from_json_schema(text, None, options)
    if kind == "choice":
        quoted = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        return "start: " + " | ".join(quoted)
    if kind == "structural_tag":
        return _structural(json.loads(text))
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    return llguidance.grammar_from("grammar", text)  # Lark, or GBNF


def _structural(parts: dict[str, Any]) -> str:
    """A grammar that calls others, which may be Lark or GBNF."""
    from llguidance.gbnf_to_lark import any_to_lark

    grammars = [{"name": "structural_tag", "lark_grammar": parts["lark"]}]
    for name, text in parts["grammars"].items():
        grammars.append({"name": name, "lark_grammar": any_to_lark(text)})
    return json.dumps({"grammars": grammars})


def compile_grammar(tokenizer: Any, kind: str, text: str, options: dict[str, Any]) -> str:
    """A grammar in llguidance's form, tried out.

    Raises:
        ValueError: It is not well formed, too complex, or nothing can match it.
    """
    grammar = to_grammar(kind, text, options)
    matcher = make_matcher(tokenizer, grammar)
    for seed in range(NUM_PROBES):
        _raise(matcher)
        probe(matcher, seed)
        matcher.reset()
    return grammar


def probe(matcher: Any, seed: int) -> None:
    """Walks along some tokens that are allowed, because some limits are met only there."""
    state = 12345 + seed
    for _ in range(NUM_PROBE_TOKENS):
        if matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        _raise(matcher)
        if mask == 0:
            raise ValueError("nothing can match it")
        state = (state * 1103515245 + 12345) % (1 << 31)
        start = state % mask.bit_length()
        above = mask >> start << start
        lowest = (above & -above).bit_length() - 1
        matcher.consume_token(lowest)
    _raise(matcher)


def _raise(matcher: Any) -> None:
    if matcher.is_error():
        error = matcher.get_error()
        if error.startswith("NoExtension"):
            error = "nothing can match it"
        raise ValueError(error)


@dataclass(slots=True)
class _Child:
    pid: int
    job_id: int
    timeout_s: float
    deadline_s: float
    answer: bytearray = field(default_factory=bytearray)


class _Server:
    """The loop of the process: jobs from stdin, answers from children, deadlines."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._jobs: deque[dict[str, Any]] = deque()
        self._children: dict[int, _Child] = {}  # by the pipe that its answer comes from
        self._buffer = bytearray()
        self._tokenizer: Any = None
        self._open = True

    def run(self) -> None:
        self._selector.register(0, selectors.EVENT_READ)
        while self._open:
            now = time.monotonic()
            waits = [child.deadline_s - now for child in self._children.values()]
            for key, _ in self._selector.select(max(0.0, min(waits)) if waits else None):
                self._read_jobs() if key.fd == 0 else self._read_answer(key.fd)
            now = time.monotonic()
            for fd, child in list(self._children.items()):
                if child.deadline_s <= now:
                    self._end(fd, f"it takes longer than {child.timeout_s:g} s to compile")
            while self._jobs and len(self._children) < MAX_CHILDREN:
                self._fork(self._jobs.popleft())
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)

    def _read_jobs(self) -> None:
        data = os.read(0, 1 << 20)
        self._open = bool(data)
        self._buffer += data
        if b"\n" not in data:  # a tokenizer comes in hundreds of pieces
            return
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        for line in lines:
            message = json.loads(line)
            if "tokenizer" in message:
                self._start(message)
            else:
                self._jobs.append(message)

    def _start(self, message: dict[str, Any]) -> None:
        try:
            self._tokenizer = make_tokenizer(
                message["tokenizer"], message["vocab_size"], message["end_token_ids"]
            )
        except Exception as error:
            _send({"ready": False, "error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]})
            self._open = False
            return
        gc.collect()
        gc.freeze()  # children do not write to these pages
        _send({"ready": True})

    def _fork(self, job: dict[str, Any]) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _answer(self._tokenizer, job, writer)
            finally:
                os._exit(0)
        os.close(writer)
        timeout_s = job["timeout_s"]
        deadline_s = time.monotonic() + max(timeout_s - MARGIN_S, timeout_s / 2)
        self._children[reader] = _Child(pid, job["id"], timeout_s, deadline_s)
        self._selector.register(reader, selectors.EVENT_READ)

    def _read_answer(self, fd: int) -> None:
        data = os.read(fd, 1 << 20)
        if data:
            self._children[fd].answer += data
        else:
            self._end(fd, "it takes too much memory to compile")

    def _end(self, fd: int, otherwise: str) -> None:
        """Passes a child's answer on, or says why there is none."""
        child = self._children.pop(fd)
        self._selector.unregister(fd)
        os.close(fd)
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        try:
            answer = json.loads(child.answer)
        except ValueError:
            answer = {"error": otherwise}
        _send({**answer, "id": child.job_id})


def _answer(tokenizer: Any, job: dict[str, Any], writer: int) -> None:
    """What a child does."""
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    for kind, limit in (
        (resource.RLIMIT_AS, used + MAX_CHILD_BYTES),
        (resource.RLIMIT_CPU, int(job["timeout_s"]) + 2),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    try:
        grammar = compile_grammar(tokenizer, job["kind"], job["text"], job["options"])
        answer = {"grammar": grammar}
    except Exception as error:
        text = str(error).replace("<non-verbose/>", "")
        lines = "; ".join(line.strip() for line in text.splitlines() if line.strip())
        answer = {"error": lines[:MAX_ERROR_CHARS] or type(error).__name__}
    with open(writer, "wb") as file:
        file.write(json.dumps(answer).encode())


def _send(message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    sys.setrecursionlimit(2000)
    os.nice(NICE)
    with contextlib.suppress(BrokenPipeError):
        _Server().run()
