"""Errors about a chat request, told in the names of the API that it was made for."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jaxserve.errors import RequestError
from jaxserve.server.errors import APIError, as_api_error


@contextmanager
def told_as(names: Mapping[str, str]) -> Iterator[None]:
    """Replaces names in the errors of what runs within.

    Args:
        names: A regular expression to what stands in its place, in the field's name and at the
            beginning of words of the message.
    """
    try:
        yield
    except (APIError, RequestError) as error:
        answer = as_api_error(error)
        if answer is None:
            raise
        message, param = str(answer), answer.param
        for pattern, name in names.items():
            message = re.sub(rf"(?<![\w.-])(?:{pattern})(?!\w)", name, message)
            param = param and re.sub(rf"^(?:{pattern})(?!\w)", name, param)
        raise APIError(
            answer.status, message, param=param, code=answer.code, headers=answer.headers
        ) from error
