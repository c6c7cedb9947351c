"""The flags of commands that talk to a server."""

import argparse


def add_remote_arguments(parser: argparse.ArgumentParser, *, default_url: str | None) -> None:
    """Adds --url, --model-name and --api-key; vLLM's names."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url",
        metavar="URL",
        default=default_url,
        help="where the server is" + ("" if default_url else " (default: a model in this process)"),
    )
    group.add_argument("--model-name", metavar="NAME", help="its model (default: its first)")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="better in the environment: JAXSERVE_API_KEY or OPENAI_API_KEY",
    )
