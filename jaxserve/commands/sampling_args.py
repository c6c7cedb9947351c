"""The sampling flags, with the names of `SamplingParams`."""

import argparse
from collections.abc import Set
from typing import Any

from jaxserve.commands.parser import UsageError, number, whole_number
from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams

_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"type": number}, "randomness, 0 to 2; 0 always takes the likeliest token"),
    "top_p": ({"type": number}, "sample from the likeliest tokens that together have this share"),
    "top_k": ({"type": whole_number}, "sample from so many likeliest tokens; 0 or -1 is off"),
    "min_p": ({"type": number}, "drop tokens below this share of the likeliest one"),
    "presence_penalty": ({"type": number}, "-2 to 2, once for each token already put out"),
    "frequency_penalty": ({"type": number}, "-2 to 2, for each time a token was put out"),
    "repetition_penalty": ({"type": number}, "above 0; 1 is off"),
    "max_tokens": ({"type": whole_number}, "length of an answer, at most"),
    "min_tokens": ({"type": whole_number}, "length of an answer, at least"),
    "seed": ({"type": whole_number}, "the same seed gives the same answer"),
    "stop": ({"action": "append"}, "end at this text; may be given several times"),
    "stop_token_ids": (
        {"type": whole_number, "action": "append"},
        "end at this token id; may be given several times",
    ),
    "bad_words": ({"action": "append"}, "never write this; may be given several times"),
    "ignore_eos": ({"action": "store_true"}, "go on past the end-of-text token"),
    "n": ({"type": whole_number}, "answers a prompt"),
    "logprobs": ({"type": whole_number}, "log-probabilities of so many tokens a position"),
    "prompt_logprobs": ({"type": whole_number}, "the same for the prompt"),
}
SINGLE_ANSWER = {"n", "logprobs", "prompt_logprobs"}  # flags that a conversation does not have


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, without: Set[str] = frozenset()
) -> None:
    """Adds the sampling flags. Only given flags are set."""
    group = parser.add_argument_group("sampling (default: the model's generation config)")
    for name, (options, text) in _FLAGS.items():
        if name not in without:
            shape: dict[str, Any] = {}
            if options.get("action") != "store_true":
                shape["metavar"] = "X"
            flag = f"--{name.replace('_', '-')}"
            group.add_argument(
                flag, dest=name, default=argparse.SUPPRESS, help=text, **options, **shape
            )


def sampling_params(args: argparse.Namespace, defaults: dict[str, Any]) -> SamplingParams:
    """The sampling parameters of a command line, over `defaults`.

    Raises:
        UsageError: A value is not allowed.
    """
    given = {name: value for name, value in vars(args).items() if name in _FLAGS}
    try:
        return SamplingParams(**(defaults | given))
    except RequestError as error:
        raise UsageError(str(error)) from error


def request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as fields of a request to a server; it has the defaults.

    Raises:
        UsageError: A value is not allowed.
    """
    sampling_params(args, {})
    return {name: value for name, value in vars(args).items() if name in _FLAGS}


def given_fields(params: SamplingParams) -> dict[str, Any]:
    """What a model's default sampling parameters change; to be laid under the flags."""
    plain = SamplingParams()
    return {
        name: value for name in _FLAGS if (value := getattr(params, name)) != getattr(plain, name)
    }
