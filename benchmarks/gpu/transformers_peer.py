"""transformers on the shapes that serve.py runs: the same rows, contexts and token counts.

The model is made from the config with random weights. Tokens are chosen greedily in a loop around
the model with its default KV cache (eager PyTorch, scaled-dot-product attention): less overhead
than `generate`. Standard library, PyTorch and transformers only.
"""
# pyright: reportMissingImports=false

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from benchmarks.gpu.shapes import Shape


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.end_s = time.monotonic() + args.budget_s
        self.shape = Shape.read(args.config, 4 if args.smoke else 2)
        self.record: dict[str, Any] = {
            "benchmark": "serve",
            "engine": "transformers",
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "shape": {"name": self.shape.name},
        }
        config = transformers.AutoConfig.from_pretrained(args.config)
        dtype = torch.float32 if args.smoke else torch.bfloat16
        with torch.device(self.device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            ).eval()

    @property
    def left_s(self) -> float:
        return self.end_s - time.monotonic()

    def save(self, name: str, figures: dict[str, Any]) -> None:
        if name in ("decode", "offline"):
            self.record.setdefault(name, []).append(figures)
        else:
            self.record[name] = figures
        print(name, json.dumps(figures), flush=True)
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(self.record, indent=1) + "\n")

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def run(self, rows: int, num_in: int, num_out: int) -> tuple[float, float]:
        """One static batch; seconds of its prefill and of its num_out - 1 decode steps."""
        ids = torch.randint(3, self.shape.vocab_size, (rows, num_in), device=self.device)
        start = self.now()
        ids, cache = self.step(ids, None)
        first = self.now()
        for _ in range(num_out - 1):
            ids, cache = self.step(ids, cache)
        return first - start, self.now() - first

    def decode(self, rows: int, context: int, steps: int) -> None:
        _, seconds = self.run(rows, context, steps + 1)
        figures = {"rows": rows, "context": context + steps / 2, "step_ms": 1e3 * seconds / steps}
        self.save("decode", figures)

    def prefill(self, num: int, length: int) -> None:
        seconds, _ = self.run(num, length, 1)
        rate = self.shape.prefill_flops([length] * num) / seconds
        figures = {"prompts": num, "length": length, "seconds": seconds, "tflops": rate / 1e12}
        self.save("prefill", figures)

    def offline(self, num: int, num_in: int, num_out: int) -> None:
        prefill_s, decode_s = self.run(num, num_in, num_out)
        seconds = prefill_s + decode_s
        figures = {
            "requests": num,
            "input_tokens": num_in,
            "output_tokens": num_out,
            "seconds": seconds,
            "output_tokens_per_s": num * num_out / seconds,
        }
        self.save("offline", figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=60)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, float32")
    args = parser.parse_args()
    bench = Bench(args)
    with torch.inference_mode():
        bench.run(1, 16, 4)
        rows, context, steps = ((1, 4), 32, 8) if args.smoke else ((1, 16, 64, 256), 512, 24)
        for r in rows:
            if bench.left_s > 5:
                bench.decode(r, context, steps)
        prompts, length = (2, 64) if args.smoke else (8, 2048)
        bench.run(prompts, length, 1)
        bench.prefill(prompts, length)
        if bench.left_s > 5:
            bench.offline(*((4, 32, 8) if args.smoke else (64, 1000, 128)))


if __name__ == "__main__":
    main()
