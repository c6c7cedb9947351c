"""jaxserve through its Python API, as one of the engines that `offline.py` compares."""

import time

import protocol

from benchmarks.common import StepLog, step_figures
from jaxserve import LLM, SamplingParams

DEFAULTS = {"max_model_len": 1024, "max_num_seqs": 64}


def run(llm: LLM, requests: protocol.Requests) -> dict:
    """All requests at once, until the last is finished."""
    prompts = [{"prompt_token_ids": r["prompt_token_ids"]} for r in requests]
    sampling = [
        SamplingParams(temperature=0, max_tokens=r["max_tokens"], ignore_eos=True, detokenize=False)
        for r in requests
    ]
    log = StepLog(llm)
    log.take()
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    wall_s = time.perf_counter() - start
    times, arrivals = [], []
    for output in outputs:
        m = output.metrics
        assert m is not None
        arrivals.append(m.arrival_s)
        times.append((m.first_token_s, m.last_token_s, len(output.outputs[0].token_ids)))
    return {
        "wall_s": wall_s,
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        **protocol.latency(times, min(arrivals)),
        "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        **step_figures(log.take()),
    }


def main() -> None:
    args = protocol.parser(__doc__).parse_args()
    start = time.perf_counter()
    llm = LLM(
        model=args.model,
        dtype=args.dtype,
        skip_tokenizer_init=True,
        **(DEFAULTS | args.args),
    )
    about = {"engine": "jaxserve", "start_up_s": time.perf_counter() - start}
    try:
        protocol.serve(about, args.workloads, lambda requests: run(llm, requests))
    finally:
        llm.shutdown()


if __name__ == "__main__":
    main()
