"""Complete one or several prompts, all at once; results are printed in the prompts' order."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.commands.engine_args import add_engine_arguments, add_model_argument, engine_config
from jaxserve.commands.parser import UsageError
from jaxserve.commands.sampling_args import (
    add_sampling_arguments,
    given_fields,
    sampling_params,
)

if TYPE_CHECKING:
    from jaxserve.outputs import Logprob, RequestOutput

MAX_TOKENS = 128  # unless --max-tokens is given

USAGE = "[MODEL] [PROMPT ...] [flags]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "prompts",
        metavar="PROMPT",
        nargs="*",
        help="texts to complete (default: the lines of stdin)",
    )
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="a file with one prompt a line; - is stdin"
    )
    parser.add_argument(
        "--chat", action="store_true", help="treat each prompt as a message to an assistant"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    parser.add_argument("--quiet", action="store_true", help="print the results only")
    add_sampling_arguments(parser)
    add_engine_arguments(parser, without={"seed"})


def run(args: argparse.Namespace) -> int:
    from jaxserve.commands.session import open_llm

    if args.model_flag is not None and args.model is not None:
        args.prompts, args.model = [args.model, *args.prompts], None  # the model has been named
    config = engine_config(args)
    sampling_params(args, {})  # wrong values are told before the model loads
    if args.system is not None and not args.chat:
        raise UsageError("--system needs --chat; add it, or write the system text in the prompt")
    prompts = _prompts(args)
    llm = open_llm(config, quiet=args.quiet)
    try:
        defaults = llm.get_default_sampling_params()
        sampling = sampling_params(args, {"max_tokens": MAX_TOKENS} | given_fields(defaults))
        show = sys.stderr.isatty() and not args.quiet and len(prompts) > 1
        if args.chat:
            system = [{"role": "system", "content": args.system}] if args.system else []
            messages = [[*system, {"role": "user", "content": text}] for text in prompts]
            outputs = llm.chat(messages, sampling, use_tqdm=show)
        else:
            outputs = llm.generate(prompts, sampling, use_tqdm=show)
    finally:
        llm.shutdown()
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if args.json:
            print(json.dumps(_as_json(i, prompt, output), ensure_ascii=False))
        else:
            _print_plain(i, prompt, output, headed=len(prompts) > 1)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, else of --prompt-file, else of stdin."""
    if args.prompts:
        if args.prompt_file is not None:
            raise UsageError("prompts are given and --prompt-file, too; leave one of them out")
        prompts = args.prompts
    elif args.prompt_file not in (None, "-"):
        try:
            text = Path(args.prompt_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(
                f"--prompt-file {args.prompt_file} cannot be read: {reason}; pass a text file "
                "with one prompt a line"
            ) from error
        prompts = [line for line in text.splitlines() if line.strip()]
    elif args.prompt_file is None and sys.stdin.isatty():
        raise UsageError(
            "no prompt: write `jaxserve generate MODEL PROMPT ...`, use --prompt-file FILE, or "
            "pipe one prompt a line into stdin"
        )
    else:
        prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise UsageError("no prompt was given; write one after MODEL, or one a line in the file")
    if "" in prompts:
        raise UsageError("a prompt is empty; pass at least one character in each")
    return prompts


def _print_plain(i: int, prompt: str, output: "RequestOutput", *, headed: bool) -> None:
    if output.prompt_logprobs is not None:
        rows = json.dumps(_logprobs(output.prompt_logprobs), ensure_ascii=False)
        print(f"prompt logprobs: {rows}")
    for choice in output.outputs:
        if headed or len(output.outputs) > 1:
            which = f"{i + 1}" + (f".{choice.index + 1}" if len(output.outputs) > 1 else "")
            print(f"[{which}] {prompt}")
        print(choice.text)
        if choice.logprobs is not None:
            print(f"logprobs: {json.dumps(_logprobs(choice.logprobs), ensure_ascii=False)}")
        if headed or len(output.outputs) > 1:
            print()


def _as_json(i: int, prompt: str, output: "RequestOutput") -> dict[str, Any]:
    choices = []
    for choice in output.outputs:
        found: dict[str, Any] = {
            "text": choice.text,
            "token_ids": list(choice.token_ids),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if choice.logprobs is not None:
            found["logprobs"] = _logprobs(choice.logprobs)
        choices.append(found)
    result = {
        "index": i,
        "prompt": prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "outputs": choices,
    }
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = _logprobs(output.prompt_logprobs)
    return result


def _logprobs(
    positions: "Sequence[Mapping[int, Logprob] | None]",
) -> list[list[dict[str, Any]]]:
    """Per position, the token that is there and then the likeliest ones."""
    return [
        [
            {"token": entry.decoded_token, "id": token, "logprob": round(entry.logprob, 4)}
            for token, entry in (position or {}).items()
        ]
        for position in positions
    ]
