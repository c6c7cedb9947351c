"""Attention by PyTorch's kernels, and by FlashInfer's if it is there, for `kernels_timed`.

Scaled-dot-product attention and FlexAttention read contiguous keys and values, FlashInfer pages.
Takes workloads as JSON on standard input and prints a line for each result. Calls are captured in a
CUDA graph, with as many copies of keys and values as make the caches useless. Standard library and
PyTorch only.
"""
# pyright: reportMissingImports=false

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

try:
    import torch
    import torch.nn.functional as functional
except ImportError as missing:
    print("RESULT " + json.dumps({"by": "torch", "absent": str(missing)}))
    sys.exit()

CACHE_BYTES = 256 << 20
LOOP_S = 0.02
REPEATS = 9


class Batch:
    """A workload's rows, all of one size, as dense arrays: [B, heads, tokens, head_dim]."""

    def __init__(self, workload: dict[str, Any]) -> None:
        rows = {tuple(row) for row in workload["rows"]}
        if len(rows) > 1:
            raise NotImplementedError("rows of different sizes have no dense batch")
        self.num_queries, self.kv_len = rows.pop()
        self.size = len(workload["rows"])
        self.heads, self.kv_heads = workload["num_heads"], workload["num_kv_heads"]
        self.head_dim = workload["head_dim"]
        self.value_dim = workload["value_dim"]  # of a latent cache: its values lie within its keys
        pair = self.head_dim if self.value_dim else 2 * self.head_dim
        self.kv_bytes = 2 * self.size * self.kv_heads * self.kv_len * pair
        seen = self.num_queries * self.kv_len - self.num_queries * (self.num_queries - 1) // 2
        widths = self.head_dim + (self.value_dim or self.head_dim)
        self.flops = 2 * self.size * self.heads * widths * seen
        self.copies = max(2, -(-CACHE_BYTES // self.kv_bytes))
        self.q = self.normal(self.size, self.heads, self.num_queries, self.head_dim)

    @staticmethod
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shape = (self.size, self.kv_heads, self.kv_len, self.head_dim)
        keys = [self.normal(*shape) for _ in range(self.copies)]
        if self.value_dim:
            return [(k, k[..., : self.value_dim]) for k in keys]
        return [(k, self.normal(*shape)) for k in keys]


def sdpa(batch: Batch) -> list[Callable[[], Any]]:
    """torch.nn.functional.scaled_dot_product_attention on contiguous keys and values."""
    mask: dict[str, Any] = {}
    if batch.num_queries == batch.kv_len:
        mask = {"is_causal": True}
    elif batch.num_queries > 1:
        from torch.nn.attention.bias import causal_lower_right

        mask = {"attn_mask": causal_lower_right(batch.num_queries, batch.kv_len)}

    def call(k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
        return lambda: functional.scaled_dot_product_attention(
            batch.q, k, v, enable_gqa=True, **mask
        )

    return [call(k, v) for k, v in batch.keys_and_values()]


def flex(batch: Batch) -> list[Callable[[], Any]]:
    """FlexAttention, compiled, on contiguous keys and values."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if batch.num_queries > 1:
        history = batch.kv_len - batch.num_queries

        def causal(b: Any, h: Any, query: Any, key: Any) -> Any:
            return query + history >= key

        mask = create_block_mask(causal, None, None, batch.num_queries, batch.kv_len, device="cuda")

    def call(k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
        return lambda: compiled(batch.q, k, v, block_mask=mask, enable_gqa=True)

    return [call(k, v) for k, v in batch.keys_and_values()]


def flashinfer(batch: Batch, page_size: int) -> list[Callable[[], Any]]:
    """FlashInfer's paged decode and prefill."""
    import flashinfer as library

    if batch.value_dim:
        raise NotImplementedError("its kernels of a latent cache are not compared")
    pages_each = -(-batch.kv_len // page_size)
    num_pages = batch.size * pages_each
    shape = (num_pages, 2, page_size, batch.kv_heads, batch.head_dim)
    caches = [batch.normal(*shape) for _ in range(batch.copies)]

    def ints(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device="cuda")

    starts = ints(range(0, num_pages + 1, pages_each))
    pages = torch.randperm(num_pages, device="cuda").int()
    last = ints([batch.kv_len - (pages_each - 1) * page_size] * batch.size)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    heads = (batch.heads, batch.kv_heads, batch.head_dim, page_size)
    q = batch.q.transpose(1, 2).reshape(-1, batch.heads, batch.head_dim).contiguous()
    if batch.num_queries == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(starts, pages, last, *heads, q_data_type=torch.bfloat16)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        tokens = ints(range(0, q.shape[0] + 1, batch.num_queries))
        wrapper.plan(tokens, starts, pages, last, *heads, causal=True, q_data_type=torch.bfloat16)
    return [lambda cache=cache: wrapper.run(q, cache) for cache in caches]


def seconds(calls: list[Callable[[], Any]], floor_s: float) -> tuple[list[float], str]:
    """Seconds a call, some times over, and how they were taken."""
    count = int(min(max(LOOP_S / floor_s, 4), 500))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up, and compile
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def loop() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    how = "CUDA graph"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop()
        replay: Callable[[], None] = graph.replay
    except RuntimeError as error:
        how, replay = f"no CUDA graph ({str(error)[:100]})", loop
        torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / count)
    return times[2:], how


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--by", choices=["torch"])
    parser.add_argument("--smoke", action="store_true")
    parser.parse_args()
    asked = json.load(sys.stdin)
    end_s = time.monotonic() + asked["budget_s"]

    def add(**result: Any) -> None:
        print("RESULT " + json.dumps(result), flush=True)

    if not torch.cuda.is_available():
        add(by="torch", absent="PyTorch sees no GPU")
        return
    # SDPA for every workload first, then what has to be compiled.
    for by, make in (
        ("sdpa", lambda batch, size: sdpa(batch)),
        ("flex", lambda batch, size: flex(batch)),
        ("flashinfer", flashinfer),
    ):
        for workload in asked["workloads"]:
            about = {"by": by, "case": workload["case"], "workload": workload["name"]}
            if time.monotonic() > end_s:
                add(**about, absent="no time left")
                continue
            try:
                if workload["kv_dtype"] is not None:
                    raise NotImplementedError("only caches of the queries' type are compared")
                batch = Batch(workload)
                calls = make(batch, workload["page_size"])
                taken, how = seconds(calls, max(batch.kv_bytes / 3e12, batch.flops / 6e14))
            except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
                add(**about, absent=f"{type(error).__name__}: {str(error)[:300]}")
                continue
            add(
                **about,
                us=1e6 * median(taken),
                us_least=1e6 * min(taken),
                us_most=1e6 * max(taken),
                gb_per_s=batch.kv_bytes / median(taken) / 1e9,
                tflops=batch.flops / median(taken) / 1e12,
                how=how,
                version=torch.__version__,
            )
            del batch, calls
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
