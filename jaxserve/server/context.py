"""What every handler has: the engine, the settings, and whether the server is draining."""

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from jaxserve.async_llm import AsyncLLM
from jaxserve.frontend.chat_process import ChatProcess
from jaxserve.server.errors import APIError, invalid
from jaxserve.server.telemetry import Telemetry
from jaxserve.server_config import ServerConfig


@dataclass(slots=True)
class Context:
    """One for an application.

    Attributes:
        names: Under which the model is served; the first is told in answers.
        draining: SIGTERM came: no new work is taken.
    """

    llm: AsyncLLM
    config: ServerConfig
    names: tuple[str, ...]
    fingerprint: str
    telemetry: Telemetry
    chat_process: ChatProcess
    created_s: int = field(default_factory=lambda: int(time.time()))
    not_ready: bool = False  # a signal came: new work is still taken for a moment
    draining: bool = False

    @classmethod
    def of(cls, request: Request) -> "Context":
        return request.scope["state"]["context"]

    def close(self) -> None:
        """Ends what watches the engine and what renders templates. May be called again."""
        self.telemetry.close()
        self.chat_process.close()

    def check_model(self, name: str | None, *, required: bool = True) -> str:
        """The name to answer with.

        Raises:
            APIError: It is missing (400), or another model's (404).
        """
        if name is None:
            if required:
                raise invalid(
                    f"model is missing; send it: {', '.join(self.names)}",
                    "model",
                    "missing_required_parameter",
                )
            return self.names[0]
        if name not in self.names:
            raise APIError(
                404,
                f"the model {name[:100]!r} does not exist; use {' or '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name
