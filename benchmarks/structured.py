"""What structured outputs cost: masks, compilation, and tokens a second with and without them.

Run: python -m benchmarks.structured [--json PATH]. The demo model; rounds of each workload take
turns in one process, so that a busy machine troubles all alike, and the median is shown. Output
lengths are fixed: grammars that cannot end before, and ignore_eos for rows without one.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import StepLog, print_table, step_figures, write_json
from jaxserve import LLM, SamplingParams, StructuredOutputsParams
from jaxserve.errors import JaxserveError
from jaxserve.frontend.matchers import MatcherFactory
from jaxserve.frontend.processor import grammar_vocabulary
from jaxserve.request import Grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 4},
    },
    "required": ["name", "age", "mail", "tags"],
    "additionalProperties": False,
}
LONG = {"type": "array", "items": PERSON, "minItems": 1000}
FORMS: dict[str, StructuredOutputsParams] = {
    "JSON schema": StructuredOutputsParams(json=LONG),
    "any JSON object": StructuredOutputsParams(json_object=True),
    "regex": StructuredOutputsParams(regex=r"([a-z]{3,9} ){1000}end"),
    "Lark": StructuredOutputsParams(
        grammar='start: sum\nsum: term ("+" term)*\nterm: N | "(" sum ")"\nN: /[0-9]{1,4}/'
    ),
}


def masks(llm: LLM, num_tokens: int) -> list[dict[str, Any]]:
    """Times of one matcher by itself, without a model: random tokens among those allowed."""
    from jaxserve.checkpoint import open_checkpoint

    vocabulary = grammar_vocabulary(open_checkpoint("demo"), llm.get_tokenizer())
    compiler = llm.client.processor.require_grammars()
    if vocabulary is None:
        raise JaxserveError("the model has no tokenizer")
    factory = MatcherFactory(vocabulary)
    start = time.perf_counter()
    factory.start()
    tokenizer_s = time.perf_counter() - start
    compiler.start()
    found = []
    for name, form in FORMS.items():
        start = time.perf_counter()
        grammar = Grammar(text=compiler.compile(form))
        checked = time.perf_counter()
        matcher = factory.make(grammar.text)
        made = time.perf_counter()
        rng, words, times = np.random.default_rng(0), np.zeros(factory.num_words, np.uint32), []
        for _ in range(num_tokens):
            begun = time.perf_counter()
            matcher.fill(words)
            filled = time.perf_counter()
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            token = int(rng.choice(allowed))
            choosing = time.perf_counter() - filled
            matcher.accept([token])
            times.append(1e6 * (time.perf_counter() - begun - choosing))
            if matcher.ended:
                matcher = factory.make(grammar.text)
        found.append(
            {
                "form": name,
                "check_ms": 1e3 * (checked - start),
                "compile_ms": 1e3 * (made - checked),
                "mask_median_us": statistics.median(times),
                "mask_mean_us": statistics.fmean(times),
                "mask_p99_us": float(np.quantile(times, 0.99)),
                "mask_max_us": max(times),
                "tokenizer_s": tokenizer_s,
            }
        )
    return found


def throughput(llm: LLM, num_rows: int, num_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Output tokens a second of a full batch: no row, half of the rows, or all with a grammar."""

    def sampling(index: int, bound: bool) -> SamplingParams:
        return SamplingParams(
            max_tokens=num_tokens,
            seed=index,
            ignore_eos=not bound,
            structured_outputs=FORMS["JSON schema"] if bound else None,
        )

    prompts = [f"People, as JSON, list {i}:" for i in range(num_rows)]
    shares = {"no row": 0, "half of the rows": 2, "all rows": 1}
    rates: dict[str, list[float]] = {name: [] for name in shares}
    figures: dict[str, dict[str, Any]] = {}
    log = StepLog(llm)
    for _ in range(rounds + 1):
        for name, every in shares.items():
            params = [sampling(i, bool(every) and i % every == 0) for i in range(num_rows)]
            log.take()
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            elapsed = time.perf_counter() - start
            rates[name].append(sum(len(o.outputs[0].token_ids) for o in outputs) / elapsed)
            figures[name] = step_figures(log.take())
    return [
        {
            "rows with a grammar": name,
            "tokens_per_s": statistics.median(rates[name][1:]),  # the first warms up
            "rounds": rates[name][1:],
            **figures[name],
        }
        for name in shares
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each output")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with LLM(
        "demo",
        max_model_len=512,
        max_num_seqs=args.rows,
        max_num_batched_tokens=args.rows,
        forbid_late_compile=True,
        show_progress=False,
    ) as llm:
        found = masks(llm, 500)
        rates = throughput(llm, args.rows, args.tokens, args.rounds)
    print_table(
        "One grammar, vocabulary of 49,152",
        ("form", "check ms", "compile ms", "mask us", "mean", "p99", "max"),
        [list(row.values())[:7] for row in found],
    )
    print_table(
        f"{args.rows} rows of {args.tokens} tokens",
        ("rows with a grammar", "tokens/s", "steps", "host ms/step", "device ms/step"),
        [
            (
                row["rows with a grammar"],
                row["tokens_per_s"],
                row["num_steps"],
                row["host_ms_per_step"],
                row["device_ms_per_step"],
            )
            for row in rates
        ],
    )
    if args.json is not None:
        write_json(args.json, masks=found, throughput=rates)


if __name__ == "__main__":
    main()
