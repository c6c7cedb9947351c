"""Errors a user can cause; each message says what came, what is allowed and what to do."""


class JaxserveError(Exception):
    """Base of every error that jaxserve raises on purpose."""


class ConfigError(JaxserveError, ValueError):
    """An engine argument has a value that cannot work."""


class CheckpointError(JaxserveError, ValueError):
    """A model file or folder is missing, damaged, or does not hold what its config promises."""


class UnsupportedError(JaxserveError, ValueError):
    """The input is well formed, but jaxserve does not implement what it asks for."""


class RequestError(JaxserveError, ValueError):
    """One request is invalid; it is refused and every other request goes on.

    Args:
        message: What came, what is allowed, what to do.
        param: Name of the offending field, as the OpenAI error object reports it.
        code: Machine-readable reason, e.g. "context_length_exceeded".
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineDeadError(JaxserveError, RuntimeError):
    """The engine has stopped; requests that were running did not finish."""
