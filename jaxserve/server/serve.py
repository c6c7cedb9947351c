"""Runs the application: sockets, signals, draining.

SIGTERM or SIGINT: not ready any more; after a delay (load balancers lag) no new work; what runs may
end within the grace time; then exit code 0. A second signal ends at once.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from jaxserve.errors import ConfigError
from jaxserve.server.app import Application
from jaxserve.server.errors import SHUTTING_DOWN, APIError
from jaxserve.server.guarded_http import guarded_protocol
from jaxserve.server_config import ServerConfig

logger = logging.getLogger(__name__)

BACKLOG = 2048
POLL_S = 0.05


def open_socket(config: ServerConfig) -> socket.socket:
    """The listening socket, bound before the model loads, so that a taken port shows at once.

    Raises:
        ConfigError: It cannot be bound.
    """
    if config.uds is not None:
        return _unix_socket(config.uds)
    try:
        info = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(
            f"host {config.host!r} cannot be resolved ({error.strerror or error}); pass an address "
            "of this machine with --host"
        ) from None
    sock = socket.socket(info[0], socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(info[4])
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"port {config.port} of {config.host} cannot be used ({error.strerror}); pass another "
            "with --port, or end the program that has it"
        ) from None
    return sock


def _unix_socket(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    place = Path(path)
    try:
        if place.is_socket() and not _answers(path):
            place.unlink()  # left behind by a server that was killed
        sock.bind(path)
        place.chmod(0o600)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"the Unix socket {path!r} cannot be made ({error.strerror}); pass another with --uds"
        ) from None
    return sock


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def address(config: ServerConfig, sock: socket.socket) -> str:
    """Where the server is, as a URL."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    scheme = "https" if config.ssl_certfile else "http"
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{config.root_path}"


async def serve(
    app: Application,
    sock: socket.socket,
    *,
    on_ready: Callable[[], None] | None = None,
    handle_signals: bool = True,
) -> None:
    """Serves until a signal, or until the task is cancelled, and drains.

    Args:
        on_ready: Called when connections are accepted.
        handle_signals: Not in a notebook, whose signals are its own.
    """
    config = app.context.config
    server = uvicorn.Server(_uvicorn_config(app, config))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT) if handle_signals else ()
    for number in signals:
        loop.add_signal_handler(number, _on_signal, stop, server)
    try:
        await server.startup(sockets=[sock])
        if on_ready is not None:
            on_ready()
        ticking = asyncio.create_task(server.main_loop())
        stopping = asyncio.create_task(stop.wait())
        dying = asyncio.create_task(_engine_death(app))
        try:
            await asyncio.wait({ticking, stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
            await _drain(app, server)
        finally:
            server.should_exit = True
            for task in (ticking, stopping, dying):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await server.shutdown(sockets=[sock])
    finally:
        app.context.close()
        for number in signals:
            loop.remove_signal_handler(number)
        sock.close()
        if config.uds is not None:
            Path(config.uds).unlink(missing_ok=True)


def _uvicorn_config(app: Application, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="none",
        http=guarded_protocol(config.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=65,  # longer than the usual 60 of a proxy in front
        timeout_graceful_shutdown=1,  # `_drain` has waited already
        root_path=config.root_path,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
        ssl_ciphers=config.ssl_ciphers or "TLSv1",
    )


def _on_signal(stop: asyncio.Event, server: uvicorn.Server) -> None:
    if stop.is_set():
        server.force_exit = True
    stop.set()


async def _engine_death(app: Application) -> None:
    """Returns when the engine is dead: nothing can be served any more."""
    while app.context.llm.is_running:
        await asyncio.sleep(0.5)
    logger.error("the engine is dead: %s", app.context.llm.dead_error)


async def _drain(app: Application, server: uvicorn.Server) -> None:
    """Waits for running requests to end, within the grace time."""
    context = app.context
    config = context.config
    context.not_ready = True
    if config.shutdown_delay_s and not server.force_exit:
        await asyncio.sleep(config.shutdown_delay_s)
    context.draining = True
    logger.info("draining: %d requests are running", context.llm.client.num_unfinished)
    deadline = asyncio.get_running_loop().time() + config.shutdown_timeout_s
    while (
        server.server_state.tasks
        and not server.force_exit
        and context.llm.is_running
        and asyncio.get_running_loop().time() < deadline
    ):
        await asyncio.sleep(POLL_S)
    error = APIError(503, "the server is shutting down", code=SHUTTING_DOWN)
    num_cut = context.llm.fail_all(error)
    if num_cut:
        logger.warning("%d requests did not end within the grace time", num_cut)
        await asyncio.sleep(0.5)  # for their clients to be told


def run(app: Application, sock: socket.socket, on_ready: Callable[[], None]) -> int:
    """Serves in an event loop of its own; the exit code: 1 when the engine died, else 0."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(app, sock, on_ready=on_ready))
    return 0 if app.context.llm.is_running else 1
