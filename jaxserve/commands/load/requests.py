"""The requests of a load: random words or tokens, or a file of prompts."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.commands.parser import UsageError, number, whole_number

if TYPE_CHECKING:
    import numpy as np

    from jaxserve.frontend.tokenizer import Tokenizer

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")
_FILES = ("sharegpt", "custom")
# Of ShareGPT, as everybody's benchmarks do: what is too short says nothing, what is too long fits
# no small model.
_MIN_TOKENS, _MAX_PROMPT, _MAX_TOTAL = 4, 1024, 2048
# So common that vocabularies made of English texts have each, with a space before it, as one token.
_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water "
    "been call who its now find long down day did get come made may part over new sound take "
    "only little work know place year live me back give most very after thing our just name good"
)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A prompt, and how many tokens are asked for.

    Attributes:
        num_prompt_tokens: None where no tokenizer counts; the server's usage tells it then.
    """

    prompt: str
    output_len: int
    num_prompt_tokens: int | None = None


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose and shape the requests; vLLM's names and defaults."""
    group = parser.add_argument_group("requests")
    add = group.add_argument
    add("--dataset-name", choices=DATASETS, default="random", help="where prompts come from")
    add("--dataset-path", metavar="FILE", help="file of sharegpt (JSON) or custom (JSON lines "
        'with "prompt" and, if you like, "output_tokens")')  # fmt: skip
    add("--num-prompts", type=whole_number, default=1000, metavar="N", help="requests of a run")
    for flag, default, text in (
        ("--random-input-len", 1024, "tokens of a prompt"),
        ("--random-output-len", 128, "tokens of an answer"),
        ("--random-prefix-len", 0, "tokens that all prompts begin with, besides"),
        ("--prefix-repetition-prefix-len", 256, "tokens of a prefix"),
        ("--prefix-repetition-suffix-len", 256, "tokens after it"),
        ("--prefix-repetition-num-prefixes", 10, "different prefixes"),
        ("--prefix-repetition-output-len", 128, "tokens of an answer"),
        ("--custom-output-len", 256, "tokens of an answer; -1: the file's output_tokens"),
    ):
        add(flag, type=whole_number, default=default, metavar="N", help=text)
    add("--random-range-ratio", type=number, default=0.0, metavar="R",
        help="lengths are uniform in [len * (1 - R), len * (1 + R)]")  # fmt: skip
    for flag, text in (
        ("--sharegpt-output-len", "tokens of an answer (default: as in the file)"),
        ("--input-len", "the same as the dataset's own flag"),
        ("--output-len", "the same as the dataset's own flag"),
    ):
        add(flag, type=whole_number, metavar="N", help=text)


class Dataset:
    """Makes the requests of runs.

    Args:
        args: Of `add_dataset_arguments`, and `seed`.
        tokenizer: Counts tokens. Without, a random prompt is made of words of one token each.

    Raises:
        UsageError: A value is not allowed, or the file cannot be read.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: "Tokenizer | None") -> None:
        self._args = args
        self._tokenizer = tokenizer
        self._entries: list[LoadRequest] = []
        _spread_lengths(args)
        _check(args)
        match args.dataset_name:
            case "sharegpt":
                self._entries = list(self._of_sharegpt())
            case "custom":
                self._entries = list(self._of_lines())
        if args.dataset_name in _FILES and not self._entries:
            raise UsageError(f"--dataset-path {args.dataset_path}: no usable prompt is in it")

    def make(self, num: int, salt: int) -> list[LoadRequest]:
        """`num` requests; equal for equal seeds and salts.

        Random prompts of other salts share no prefix with these, so that no cache answers from an
        earlier run. Prompts of a file are drawn in an order of their own, the same in each run;
        a file of fewer is repeated.
        """
        import numpy as np

        rng = np.random.default_rng([self._args.seed & (2**63 - 1), salt + 2**20])
        match self._args.dataset_name:
            case "random":
                return list(self._random(num, rng))
            case "prefix_repetition":
                return list(self._prefixes(num, rng))
        order = np.random.default_rng(self._args.seed & (2**63 - 1)).permutation(len(self._entries))
        return [self._entries[order[i % len(order)]] for i in range(num)]

    def count(self, text: str) -> int | None:
        """Tokens of a text; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _random(self, num: int, rng: "np.random.Generator") -> Iterator[LoadRequest]:
        args = self._args
        prefix = self._text(args.random_prefix_len, rng) if args.random_prefix_len else ""
        draw = _lengths(args.random_range_ratio, rng)
        for _ in range(num):
            prompt = prefix + self._text(draw(args.random_input_len), rng)
            yield LoadRequest(prompt, draw(args.random_output_len), self.count(prompt))

    def _prefixes(self, num: int, rng: "np.random.Generator") -> Iterator[LoadRequest]:
        args = self._args
        prefixes = [
            self._text(args.prefix_repetition_prefix_len, rng)
            for _ in range(args.prefix_repetition_num_prefixes)
        ]
        for i in rng.permutation(num):
            suffix = self._text(args.prefix_repetition_suffix_len, rng)
            prompt = prefixes[i % len(prefixes)] + suffix
            yield LoadRequest(prompt, args.prefix_repetition_output_len, self.count(prompt))

    def _text(self, num_tokens: int, rng: "np.random.Generator") -> str:
        """A random text of so many tokens."""
        if self._tokenizer is None:
            words = _WORDS.split()
            return "".join(f" {words[i]}" for i in rng.integers(0, len(words), num_tokens))
        return _decodable(self._tokenizer, num_tokens, rng)

    def _of_sharegpt(self) -> Iterator[LoadRequest]:
        args = self._args
        if self._tokenizer is None:
            raise UsageError("--dataset-name sharegpt needs --tokenizer, to count tokens by")
        try:
            talks = json.loads(_read(args.dataset_path))
        except ValueError as error:
            raise UsageError(f"--dataset-path {args.dataset_path} is not JSON ({error})") from None
        for talk in talks if isinstance(talks, list) else []:
            turns = talk.get("conversations") if isinstance(talk, dict) else None
            if not isinstance(turns, list) or len(turns) < 2:
                continue
            prompt, answer = (str(turn.get("value", "")) for turn in turns[:2])
            num_prompt = self.count(prompt) or 0
            num_output = args.sharegpt_output_len or self.count(answer) or 0
            if (
                min(num_prompt, num_output) >= _MIN_TOKENS
                and num_prompt <= _MAX_PROMPT
                and num_prompt + num_output <= _MAX_TOTAL
            ):
                yield LoadRequest(prompt, num_output, num_prompt)

    def _of_lines(self) -> Iterator[LoadRequest]:
        args = self._args
        for i, line in enumerate(_read(args.dataset_path).splitlines(), 1):
            if not line.strip():
                continue
            where = f"--dataset-path {args.dataset_path}, line {i}"
            try:
                entry = json.loads(line)
                prompt = entry["prompt"]
                output_len = args.custom_output_len
                if output_len == -1:
                    output_len = entry["output_tokens"]
            except (ValueError, LookupError, TypeError):
                raise UsageError(
                    f'{where} is not an object with "prompt"'
                    + (' and "output_tokens"' if args.custom_output_len == -1 else "")
                ) from None
            if not isinstance(prompt, str) or not isinstance(output_len, int) or output_len < 1:
                raise UsageError(f"{where}: prompt is no text, or output_tokens no length")
            yield LoadRequest(prompt, output_len, self.count(prompt))


def _spread_lengths(args: argparse.Namespace) -> None:
    """--input-len and --output-len stand for the flags of all datasets."""
    if args.input_len is not None:
        args.random_input_len = args.input_len
    if args.output_len is not None:
        args.random_output_len = args.sharegpt_output_len = args.output_len
        args.custom_output_len = args.prefix_repetition_output_len = args.output_len


def _check(args: argparse.Namespace) -> None:
    for name in (
        "num_prompts", "random_input_len", "random_output_len", "prefix_repetition_prefix_len",
        "prefix_repetition_suffix_len", "prefix_repetition_num_prefixes",
        "prefix_repetition_output_len",
    ):  # fmt: skip
        if getattr(args, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name)} is too small; use 1 or more"
            )
    if not 0 <= args.random_range_ratio < 1:
        raise UsageError(f"--random-range-ratio {args.random_range_ratio} is not in [0, 1)")
    if args.custom_output_len < 1 and args.custom_output_len != -1:
        raise UsageError(f"--custom-output-len {args.custom_output_len}: use 1 or more, or -1")
    if (args.dataset_name in _FILES) != (args.dataset_path is not None):
        need = "needs" if args.dataset_path is None else "has no use for"
        raise UsageError(f"--dataset-name {args.dataset_name} {need} --dataset-path")


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--dataset-path {path} cannot be read ({error})") from None


def _lengths(ratio: float, rng: "np.random.Generator") -> Callable[[int], int]:
    def draw(middle: int) -> int:
        low, high = int(middle * (1 - ratio)), -int(-middle * (1 + ratio) // 1)
        return int(rng.integers(max(1, low), high + 1))

    return draw


def _decodable(tokenizer: "Tokenizer", num_tokens: int, rng: "np.random.Generator") -> str:
    """A text that the tokenizer reads as so many tokens: what is decoded is not always read back
    as the same tokens, so it is cut or lengthened, a few times over."""
    special = set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens))

    def draw(num: int) -> list[int]:
        ids: list[Any] = rng.integers(0, tokenizer.vocab_size, num).tolist()
        return [token for token in ids if token not in special]

    ids = draw(num_tokens)
    text = ""
    for _ in range(10):
        text = tokenizer.decode(ids)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == num_tokens:
            break
        ids = ids[:num_tokens] + draw(max(0, num_tokens - len(ids)))
    return text
