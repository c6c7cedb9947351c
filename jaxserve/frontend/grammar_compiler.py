"""From `StructuredOutputsParams` to a grammar that is known to compile, in a bounded time."""

import hashlib
import json
import queue
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import EngineDeadError, RequestError, UnsupportedError
from jaxserve.frontend import grammar_worker
from jaxserve.frontend.json_schema import SchemaError, read_schema
from jaxserve.frontend.lark import LarkWriter
from jaxserve.frontend.structural_tag import StructuralTagError, structural_grammar
from jaxserve.structured_outputs import PARAM, StructuredOutputsParams

MAX_CACHED_BYTES = 8 << 20  # of compiled grammars
MAX_CHOICES = 10_000
MAX_WAITING = 64  # grammars that are being compiled, or wait for it
START_TIMEOUT_S = 120.0  # building the tokenizer of the largest vocabularies takes seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the grammar library needs to know of a tokenizer."""

    tokenizer_json: Callable[[], str]
    num_tokens: int
    end_token_ids: tuple[int, ...]  # allowed where an output may end
    special_tokens: Callable[[], Mapping[str, int]] = dict  # ids of those that are no text, by name
    token_id: Callable[[str], int | None] = lambda name: None


@dataclass(frozen=True, slots=True)
class _Job:
    kind: str
    text: str
    options: dict[str, Any]

    @property
    def code(self) -> str:
        return "invalid_json_schema" if self.kind == "json" else "invalid_value"

    def key(self) -> bytes:
        return hashlib.sha256(json.dumps([self.kind, self.text, self.options]).encode()).digest()


class GrammarCompiler:
    """Checks grammars in a process of its own, which starts with the first one. Thread-safe.

    Args:
        timeout_s: For one grammar.
        max_bytes: Of a grammar's text.
    """

    def __init__(self, vocabulary: Vocabulary, *, timeout_s: float, max_bytes: int) -> None:
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._cache: OrderedDict[bytes, str] = OrderedDict()
        self._num_cached_bytes = 0
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False

    def compile(self, params: StructuredOutputsParams) -> str:
        """The grammar, as llguidance reads it. Blocks, for not much longer than the time limit.

        Raises:
            RequestError: It is not sound, is too large or complex, or nothing can match it.
        """
        return self.begin(params).result()

    def begin(self, params: StructuredOutputsParams) -> "Future[str]":
        """`compile` without waiting; what is wrong at first sight is raised at once."""
        job = self._job(params)
        key = job.key()
        result: Future[str] = Future()
        result.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        with self._lock:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
                result.set_result(known)
                return result
            if self._num_waiting >= MAX_WAITING:
                raise RequestError(
                    f"{self._num_waiting} grammars are being compiled; try again later",
                    param=PARAM,
                    code="server_overloaded",
                )
            self._num_waiting += 1

        def done(answer: "Future[dict[str, Any]]") -> None:
            with self._lock:
                self._num_waiting -= 1
            error = answer.exception()
            if error is not None:
                result.set_exception(error)
            elif "grammar" in (found := answer.result()):
                self._remember(key, found["grammar"])
                result.set_result(found["grammar"])
            else:
                result.set_exception(self._refusal(params, job, found["error"]))

        try:
            pending = self._running_worker().submit(job, self._timeout_s)
        except BaseException:
            with self._lock:
                self._num_waiting -= 1
            raise
        pending.add_done_callback(done)
        return result

    def start(self) -> None:
        """Starts the process, and returns when it is ready for grammars.

        Raises:
            UnsupportedError: llguidance is not installed, or cannot read this tokenizer.
            RequestError: The process cannot start.
        """
        self._running_worker().wait()

    def close(self) -> None:
        """Ends the process. May be called again."""
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _running_worker(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise EngineDeadError("the grammar compiler has been shut down")
            if self._worker is None or self._worker.may_be_replaced:
                self._worker = _Worker(self._vocabulary)
            return self._worker

    def _remember(self, key: bytes, grammar: str) -> None:
        with self._lock:
            if key in self._cache:
                return
            self._cache[key] = grammar
            self._num_cached_bytes += len(grammar)
            while self._num_cached_bytes > MAX_CACHED_BYTES:
                _, old = self._cache.popitem(last=False)
                self._num_cached_bytes -= len(old)

    def _job(self, params: StructuredOutputsParams) -> _Job:
        """What to compile; everything that is cheap to check is checked."""
        options: dict[str, Any] = {}
        if params.disable_any_whitespace:
            options["whitespace_flexible"] = False
        if params.whitespace_pattern is not None:
            options["whitespace_pattern"] = params.whitespace_pattern
        kind = params.kind
        if params.structural_tag is not None:
            return _Job(kind, self._structural(params.structural_tag, params, options), {})
        if kind in ("json", "json_object"):
            try:
                schema = read_schema(
                    params.json if params.json is not None else {"type": "object"},
                    max_bytes=self._max_bytes,
                    closed=params.disable_additional_properties,
                )
            except SchemaError as error:
                raise RequestError(
                    f"{PARAM}.json: {error}", param=PARAM, code="invalid_json_schema"
                ) from None
            job = _Job("json", schema, options)
        elif kind == "choice":
            choices = list(dict.fromkeys(params.choice or ()))
            if len(choices) > MAX_CHOICES:
                raise RequestError(
                    f"{PARAM}.choice has {len(choices)} strings; at most {MAX_CHOICES} are allowed",
                    param=PARAM,
                    code="invalid_value",
                )
            job = _Job(kind, json.dumps(choices, ensure_ascii=False), {})
        else:
            job = _Job(kind, params.regex or params.grammar or "", {})
        self._check_text(params, job)
        return job

    def _structural(
        self, text: str, params: StructuredOutputsParams, options: dict[str, Any]
    ) -> str:
        vocabulary = self._vocabulary
        writer = LarkWriter(vocabulary.special_tokens(), vocabulary.end_token_ids)
        try:
            return structural_grammar(
                text,
                writer,
                token_id=vocabulary.token_id,
                json_options=options,
                max_bytes=self._max_bytes,
                closed=params.disable_additional_properties,
            )
        except StructuralTagError as error:
            raise RequestError(
                f"{PARAM}.structural_tag: {error}", param=PARAM, code="invalid_value"
            ) from None

    def _check_text(self, params: StructuredOutputsParams, job: _Job) -> None:
        try:
            size = len(job.text.encode()) + len((params.whitespace_pattern or "").encode())
        except UnicodeEncodeError as error:
            raise self._refusal(params, job, f"it is not valid Unicode ({error})") from None
        if size > self._max_bytes:
            raise self._refusal(
                params, job, f"it has {size} bytes, and at most {self._max_bytes} are allowed"
            )

    def _refusal(self, params: StructuredOutputsParams, job: _Job, why: str) -> RequestError:
        advice = {
            "json": "correct the schema, or make it simpler",
            "regex": "use Rust's regex syntax, without look-around, and a simpler pattern",
            "choice": "use fewer or shorter strings",
            "grammar": "use Lark as llguidance reads it, or GBNF, and a simpler grammar",
            "structural_tag": "correct it, or use fewer and simpler formats",
        }[job.kind]
        return RequestError(
            f"{PARAM}.{params.kind} is refused: {why}; {advice}", param=PARAM, code=job.code
        )


class _Worker:
    """The process, and the thread that reads its answers."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        require_llguidance()
        self.alive = True
        self._error: Exception = RuntimeError("none yet")  # once it is not alive
        self._ready: Future[None] = Future()
        self._jobs: dict[int, Future[dict[str, Any]]] = {}
        self._number = 0
        self._lock = threading.Lock()
        # Written by a thread, for a full pipe must not hold up whoever submits.
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-P", grammar_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a grammar that makes the library panic writes there
            start_new_session=True,  # Ctrl-C in a terminal is for us alone
        )
        threading.Thread(
            target=self._write, args=(vocabulary,), name="jaxserve-grammar-out", daemon=True
        ).start()
        threading.Thread(target=self._read, name="jaxserve-grammar-in", daemon=True).start()

    def submit(self, job: _Job, timeout_s: float) -> "Future[dict[str, Any]]":
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            if not self.alive:
                raise self._error
            self._number += 1
            number = self._number
            self._jobs[number] = answer
        message = {"id": number, "kind": job.kind, "text": job.text, "options": job.options}
        self._outgoing.put(json.dumps({**message, "timeout_s": timeout_s}).encode() + b"\n")
        return answer

    @property
    def may_be_replaced(self) -> bool:
        """Whether it has ended by accident; another would do better then."""
        return not self.alive and not isinstance(self._error, UnsupportedError)

    def wait(self) -> None:
        self._ready.result(START_TIMEOUT_S)

    def close(self) -> None:
        self._outgoing.put(None)
        self._process.kill()
        self._process.wait()

    def _write(self, vocabulary: Vocabulary) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise RuntimeError("the process has no stdin")
        first = {
            "tokenizer": vocabulary.tokenizer_json(),
            "vocab_size": vocabulary.num_tokens,
            "end_token_ids": list(vocabulary.end_token_ids),
        }
        data: bytes | None = json.dumps(first).encode() + b"\n"
        try:
            with stdin:
                while data is not None:
                    stdin.write(data)
                    stdin.flush()
                    data = self._outgoing.get()
        except OSError:  # it has ended; the reader tells
            pass

    def _read(self) -> None:
        stdout = self._process.stdout
        if stdout is None:
            raise RuntimeError("the process has no stdout")
        with stdout:
            for line in stdout:
                message = json.loads(line)
                if message.get("ready"):
                    self._ready.set_result(None)
                elif "ready" in message:
                    self._end(
                        UnsupportedError(
                            "structured outputs do not work with this model's tokenizer: "
                            f"{message['error']}; use another tokenizer.json"
                        )
                    )
                else:
                    with self._lock:
                        answer = self._jobs.pop(message["id"])
                    answer.set_result(message)
        self._process.wait()
        self._end(
            RequestError(
                "the process that compiles grammars ended unexpectedly; try again",
                param=PARAM,
                code="server_overloaded",
            )
        )

    def _end(self, error: Exception) -> None:
        with self._lock:
            if not self.alive:
                return
            self.alive, self._error = False, error
            jobs, self._jobs = list(self._jobs.values()), {}
        self._outgoing.put(None)
        for job in jobs:
            job.set_exception(error)
        if not self._ready.done():
            self._ready.set_exception(error)


def require_llguidance() -> None:
    """Raises UnsupportedError, with what to do, where it is not installed."""
    from importlib.util import find_spec

    if find_spec("llguidance") is None:
        raise UnsupportedError(
            "structured outputs need the package llguidance, which is not installed; "
            "pip install 'jaxserve-llm[structured]'"
        )
