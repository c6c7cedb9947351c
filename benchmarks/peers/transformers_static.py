"""transformers: `generate` on fixed, left-padded batches, requests sorted by output length."""
# pyright: reportMissingImports=false

import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import protocol
import torch
import transformers

PAD = 2


class Stamps(transformers.generation.streamers.BaseStreamer):
    """When each token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run(model: torch.nn.Module, requests: protocol.Requests, batch_size: int) -> dict:
    """All requests, longest output first; each batch runs until its longest output is done."""
    start_s = time.perf_counter()
    order = sorted(range(len(requests)), key=lambda i: -requests[i]["max_tokens"])
    outputs: list[list[int]] = [[] for _ in requests]
    times, reserved, used = [], 0, 0
    for at in range(0, len(order), batch_size):
        batch = [requests[i] for i in order[at : at + batch_size]]
        width = max(len(r["prompt_token_ids"]) for r in batch)
        length = max(r["max_tokens"] for r in batch)
        pads = [width - len(r["prompt_token_ids"]) for r in batch]
        ids = [[PAD] * pad + r["prompt_token_ids"] for pad, r in zip(pads, batch)]  # noqa: B905
        stamps = Stamps() if len(batch) == 1 else None
        generated = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=PAD
            ),
            streamer=stamps,
        )
        for i, row in zip(order[at : at + batch_size], generated.tolist()):  # noqa: B905
            outputs[i] = row[width : width + requests[i]["max_tokens"]]
        if stamps:
            times.append((stamps.times[1], stamps.times[-1], length))
        # The KV cache holds `width + step` places a row; padding and finished rows use none.
        for step in range(length):
            reserved += len(batch) * (width + step)
            for pad, r in zip(pads, batch):  # noqa: B905
                used += width - pad + step if step < r["max_tokens"] else 0
    result = {"token_ids": outputs, "kv_waste": 1 - used / reserved}
    if len(times) == len(requests):
        result |= protocol.latency(times, start_s)
    return result


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa", **args.args
    ).eval()
    about = {
        "engine": f"transformers, batches of {args.batch_size}",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "start_up_s": time.perf_counter() - start,
    }
    with torch.inference_mode():
        protocol.serve(about, args.workloads, lambda work: run(model, work, args.batch_size))


if __name__ == "__main__":
    main()
