"""API keys: every route needs one, but those that watch over the server."""

import hashlib
import hmac
from collections import Counter
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.error_shapes import error_response
from jaxserve.server.errors import APIError

OPEN = frozenset({"/health", "/ready", "/ping"})
PAGES = frozenset({"/", "/docs", "/openapi.json", "/version"})  # open: they hold no data


class Authentication:
    """Refuses requests without one of the keys; does nothing when there are none.

    Puts `tenant` into the state of a request: the same for the same key, and not the key. Keys are
    compared as SHA-256 digests, each in constant time.

    Args:
        keys: Accepted ones, as `Authorization: Bearer KEY` or `x-api-key: KEY`.
        max_concurrent: Requests of one key at a time; more are answered 429.
        on_limit: Called for each of those.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        *,
        protect_metrics: bool = False,
        max_concurrent: int | None = None,
        on_limit: Callable[[], None] = lambda: None,
    ) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open = open_paths(protect_metrics=protect_metrics)
        self._max_concurrent, self._on_limit = max_concurrent, on_limit
        self._num_running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or _is_open(scope, self._open):
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        if tenant is None:
            await error_response(_unauthorized(), scope)(scope, receive, send)
            return
        if _path(scope).startswith("/admin/"):
            await error_response(_forbidden(), scope)(scope, receive, send)
            return
        scope["state"]["tenant"] = tenant
        if self._max_concurrent is not None and self._num_running[tenant] >= self._max_concurrent:
            self._on_limit()
            await error_response(_too_many(self._max_concurrent), scope)(scope, receive, send)
            return
        self._num_running[tenant] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_running[tenant] -= 1
            if not self._num_running[tenant]:
                del self._num_running[tenant]

    def _tenant(self, scope: Scope) -> str | None:
        given = _key(scope)
        if given is None:
            return None
        digest = _digest(given)
        # All of them, so that the time does not tell which.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:32] if any(matches) else None


def open_paths(*, protect_metrics: bool) -> frozenset[str]:
    """Paths that may be read without a key."""
    return OPEN | PAGES | (frozenset() if protect_metrics else {"/metrics"})


def _is_open(scope: Scope, paths: frozenset[str]) -> bool:
    return (_path(scope) in paths and scope["method"] in ("GET", "HEAD")) or (
        # A browser asks before it sends the key.
        scope["method"] == "OPTIONS"
        and any(name == b"access-control-request-method" for name, _ in scope["headers"])
    )


def _path(scope: Scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _key(scope: Scope) -> bytes | None:
    bearer = [value for name, value in scope["headers"] if name == b"authorization"]
    plain = [value for name, value in scope["headers"] if name == b"x-api-key"]
    if len(bearer) == 1:
        scheme, _, key = bearer[0].partition(b" ")
        if scheme.lower() == b"bearer" and key.strip():
            return key.strip()
        return None
    # Anthropic's clients send this one.
    return plain[0] if len(plain) == 1 and not bearer and plain[0] else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized() -> APIError:
    return APIError(
        401,
        "the API key is missing or wrong; send Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def _forbidden() -> APIError:
    """No key may administer the server, so that a route which does has to bring its own right."""
    return APIError(
        403,
        "this API key may use the model, but not administer the server; ask its operator",
        code="insufficient_permissions",
    )


def _too_many(limit: int) -> APIError:
    return APIError(
        429,
        f"this API key has {limit} requests running, which is its limit; wait for one to end",
        code="rate_limit_exceeded",
        retry_after_s=1,
    )
