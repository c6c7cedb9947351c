"""jaxserve on one model shape with random weights: what a step costs, and why.

Start-up and compile time, decode steps at several numbers of rows beside the least time that the
memory allows, prefill in TFLOP/s, offline throughput, and how long the device idles between steps.
Each figure is printed and saved as soon as it is there; what no time is left for is left out.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import StepLog, step_figures, write_json
from benchmarks.gpu.shapes import Shape
from jaxserve import LLM, SamplingParams
from jaxserve.outputs import RequestOutput
from jaxserve.step import StepStats


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    rows: tuple[int, ...] = (1, 16, 64, 256)
    context: int = 512
    decode_steps: int = 48
    prefill: tuple[int, int] = (8, 2048)  # prompts, tokens
    offline: tuple[int, int, int] = (256, 1000, 1000)  # requests, tokens in, tokens out
    beside_peer: tuple[int, int, int] = (64, 1000, 128)
    max_model_len: int = 2304
    max_num_batched_tokens: int = 2048


SMOKE = Sizes(
    rows=(1, 4),
    context=32,
    decode_steps=8,
    prefill=(2, 64),
    offline=(8, 32, 16),
    beside_peer=(4, 32, 8),
    max_model_len=256,
    max_num_batched_tokens=64,
)


class Bench:
    """One engine, and the record of what was measured on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.sizes = SMOKE if args.smoke else Sizes()
        self.end_s = time.monotonic() + args.budget_s
        dtype = "float32" if args.smoke else "bfloat16"
        self.shape = Shape.read(args.config, 4 if args.smoke else 2)
        self.ceilings = json.loads(args.ceilings.read_text())
        self.record: dict[str, Any] = {"shape": asdict(self.shape), "ceilings": self.ceilings}
        start = time.perf_counter()
        self.llm = LLM(
            model=str(args.config),
            load_format="dummy",
            dtype=dtype,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=self.sizes.max_model_len,
            max_num_seqs=max(self.sizes.rows),
            max_num_batched_tokens=self.sizes.max_num_batched_tokens,
            **args.args,
        )
        self.save("start_up", {"seconds": time.perf_counter() - start, **self.llm.summary()})
        self.log = StepLog(self.llm)

    @property
    def left_s(self) -> float:
        return self.end_s - time.monotonic()

    def save(self, name: str, figures: Any) -> None:
        """Adds to the record; lists grow."""
        if name in ("decode", "offline"):
            self.record.setdefault(name, []).append(figures)
        else:
            self.record[name] = figures
        print(name, json.dumps(figures, default=str), flush=True)
        text = json.loads(json.dumps(self.record, default=str))
        write_json(self.args.json, benchmark="serve", engine="jaxserve", **text)

    def generate(
        self, num: int, num_in: int, num_out: int
    ) -> tuple[list[RequestOutput], list[StepStats]]:
        """Random prompts, all at once; also the steps that they took."""
        rng = random.Random(f"{num}-{num_in}-{num_out}-{time.monotonic_ns()}")
        prompts = [
            {"prompt_token_ids": rng.choices(range(3, self.shape.vocab_size), k=num_in)}
            for _ in range(num)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False
        )
        self.log.take()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return outputs, self.log.take()

    def decode(self, rows: int) -> None:
        """Steps in which all rows decode: between the last first token and the first last token."""
        s = self.sizes
        # Rows that came first decode while the others' prompts are computed.
        num_prefill_steps = -(-rows * s.context // (s.max_num_batched_tokens - rows))
        outputs, stats = self.generate(rows, s.context, s.decode_steps + num_prefill_steps)
        steps = [x for x in stats if x.num_prefill_tokens == 0 and x.num_decode_tokens == rows]
        times = [o.metrics for o in outputs if o.metrics is not None]
        window_s = min(t.last_token_s for t in times) - max(t.first_token_s for t in times)
        if not steps or window_s <= 0:
            self.save("decode", {"rows": rows, "error": "rows were never all decoding"})
            return
        written = [x.num_written_slots for x in steps if x.num_running == rows]  # not the last
        context = statistics.fmean(written) / rows if written else float(s.context)
        step_s = window_s / len(steps)
        least_s = self.shape.decode_bytes(rows, context) / self.ceilings["copy_bytes_per_s"]
        self.save(
            "decode",
            {
                "rows": rows,
                "context": context,
                "steps": len(steps),
                "step_ms": 1e3 * step_s,
                "roofline_ms": 1e3 * least_s,
                "roofline_share": least_s / step_s,
                "host_ms": 1e3 * statistics.fmean(x.host_s for x in steps),
            },
        )

    def prefill(self) -> None:
        """Prompts only: one token comes out of each."""
        num, length = self.sizes.prefill
        outputs, stats = self.generate(num, length, 1)
        times = [o.metrics for o in outputs if o.metrics is not None]
        wall_s = max(t.last_token_s for t in times) - min(t.scheduled_s for t in times)
        rate = self.shape.prefill_flops([length] * num) / wall_s
        figures = {
            "prompts": num,
            "length": length,
            "seconds": wall_s,
            "tokens_per_s": num * length / wall_s,
            "tflops": rate / 1e12,
            "share_of_product_rate": rate / self.ceilings["bfloat16_flops_per_s"],
            "steps": len(stats),
        }
        self.save("prefill", figures)

    def offline(self, num: int, num_in: int, num_out: int, reserve_s: float) -> None:
        """Throughput; the output is shortened if all of it would take longer than is left."""
        wanted = num_out
        slow = max((d.get("step_ms", 0) for d in self.record.get("decode", [])), default=0) / 1e3
        prefill_s = num * num_in / self.record["prefill"]["tokens_per_s"]
        if slow:
            # Rows grow from 512 to 2000 tokens: allow for steps twice as long as those seen.
            affordable = (self.left_s - reserve_s - 2 * prefill_s) / (2 * slow)
            num_out = min(num_out, int(affordable))
        if num_out < 8:
            print(f"offline {num} x {num_in}/{wanted} is left out: no time", flush=True)
            return
        start = time.perf_counter()
        outputs, stats = self.generate(num, num_in, num_out)
        wall_s = time.perf_counter() - start
        count = sum(len(o.outputs[0].token_ids) for o in outputs)
        figures = {
            "requests": num,
            "input_tokens": num_in,
            "output_tokens": num_out,
            "output_tokens_wanted": wanted,
            "seconds": wall_s,
            "output_tokens_per_s": count / wall_s,
            "total_tokens_per_s": (count + num * num_in) / wall_s,
            **step_figures(stats),
        }
        self.save("offline", figures)

    def device_idle(self) -> None:
        """The share of a run of decode steps in which the device did nothing, by the profiler."""
        import jax

        rows = max(self.sizes.rows)
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level = 0  # the host must not be slower than it is
        options.python_tracer_level = 0
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                self.generate(rows, 16, 24)
            files = list(Path(folder).rglob("*.xplane.pb"))
            spans = sorted(device_spans(files[0])) if files else []
        if not spans:
            self.save("device_idle", {"error": "the profiler saw no events of a device"})
            return
        # The last half is decode only: prompts are short.
        first, last = spans[0][0], max(end for _, end in spans)
        middle = (first + last) / 2
        busy, at = 0.0, middle
        for start, end in spans:
            start = max(start, at)
            if end > start:
                busy += end - start
                at = end
        share = 1 - busy / (last - middle)
        decode = [d for d in self.record["decode"] if d.get("rows") == rows and "step_ms" in d]
        gap = share * decode[0]["step_ms"] if decode else None
        self.save("device_idle", {"rows": rows, "idle_share": share, "gap_ms_per_step": gap})


def device_spans(path: Path) -> Iterator[tuple[float, float]]:
    """Start and end (ns) of everything that ran on the device's streams."""
    from jax.profiler import ProfileData

    for plane in ProfileData.from_file(str(path)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield event.start_ns, event.start_ns + event.duration_ns


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--ceilings", type=Path, required=True, help="what ceilings.py wrote")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=150)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, float32")
    parser.add_argument("--args", type=json.loads, default={}, help="JSON: arguments of LLM")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    bench = Bench(args)
    s = bench.sizes
    try:
        bench.generate(2, 16, 4)
        for rows in s.rows:
            bench.decode(rows)
        bench.prefill()
        bench.offline(*s.beside_peer, reserve_s=0)
        bench.device_idle()
        bench.offline(*s.offline, reserve_s=5)
    finally:
        bench.llm.shutdown()


if __name__ == "__main__":
    main()
