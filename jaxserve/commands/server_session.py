"""A server from its settings to its end."""

import sys
import time
from typing import TYPE_CHECKING

from jaxserve.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.server_config import ServerConfig


def serve_model(engine: EngineConfig, config: "ServerConfig") -> int:
    """Loads the model and serves it until a signal; the exit code."""
    from jaxserve.server.app import check_parsers
    from jaxserve.server.logs import configure_logging
    from jaxserve.server.serve import address, open_socket, run

    configure_logging(level=config.log_level, log_format=config.log_format, secrets=config.api_keys)
    check_parsers(config)  # before the model, which takes its time
    start = time.monotonic()
    sock = open_socket(config)  # before the model, so that a taken port shows at once
    where = address(config, sock)
    try:
        from jaxserve.async_llm import AsyncLLM
        from jaxserve.commands.session import show, with_progress
        from jaxserve.server.app import make_app

        llm = AsyncLLM.from_engine_args(with_progress(engine, quiet=False))
    except BaseException:
        sock.close()
        raise
    try:
        app = make_app(llm, config)
        show(llm, quiet=False)

        def tell() -> None:
            names = ", ".join(app.context.names)
            hint = " (--host 0.0.0.0 listens on all addresses)" if config.is_loopback else ""
            print(
                f"jaxserve: serving {names} at {where} after "
                f"{time.monotonic() - start:.1f} s{hint}",
                file=sys.stderr,
                flush=True,
            )
            if not config.is_loopback and not config.api_keys:
                print(
                    "jaxserve: warning: anyone who reaches this address can use it; --api-key "
                    "asks for a key",
                    file=sys.stderr,
                    flush=True,
                )

        return run(app, sock, tell)
    finally:
        llm.shutdown()
