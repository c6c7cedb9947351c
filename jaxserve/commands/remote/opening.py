"""Reaches a server for a command."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxserve.commands.parser import UsageError

if TYPE_CHECKING:
    from jaxserve.commands.remote.api import Api


def open_api(
    url: str, *, api_key: str | None = None, headers: Mapping[str, str] | None = None
) -> "Api":
    """A client of the server at `url`; nothing is sent yet.

    Raises:
        UsageError: The URL has the wrong form, or what the client is made of is not installed.
    """
    try:
        from jaxserve.commands.remote.api import Api
    except ModuleNotFoundError as error:
        raise UsageError(
            f"a client needs {error.name}; install it with: pip install 'jaxserve-llm[server]'"
        ) from None
    return Api(url, api_key=api_key, headers=headers)
