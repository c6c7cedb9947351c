"""The two pages: the playground at / and the API's documentation at /docs.

Each is one file with its style and script inside. Its Content-Security-Policy names their digests,
so nothing else can run or be loaded, whatever a model writes.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


async def playground(request: Request) -> Response:
    return _page("index.html")


async def docs(request: Request) -> Response:
    return _page("docs.html")


def _page(name: str) -> Response:
    text, policy = _load(name)
    return Response(
        text,
        media_type="text/html",
        headers={
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )


@cache
def _load(name: str) -> tuple[str, str]:
    """A page, and its policy."""
    text = (files("jaxserve.server") / "web" / name).read_text("utf-8")
    digests: dict[str, list[str]] = {"style": [], "script": []}
    for tag, body in _INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        digests[tag].append(f"'sha256-{digest}'")
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"style-src {' '.join(digests['style'])}; script-src {' '.join(digests['script'])}"
    )
    return text, policy
