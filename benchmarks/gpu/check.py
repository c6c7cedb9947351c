"""Are the logits on this device those of the CPU? Tiny models, before anything is timed.

Two checks, by log-probabilities of the whole vocabulary at every position:

1. tests/golden/tiny_llama: against PyTorch's float32 results, which lie beside each model.
2. A model with heads of 128, as large models have them, so that the kernels that serve those run:
   float32 and bfloat16 here against float32 on the CPU, prompts and decoded tokens.

Exit status 1 if any difference is over its limit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table, write_json

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tiny_llama"
LIMITS = {"float32": 1e-3, "bfloat16": 0.15}
WIDE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 512,
    "torch_dtype": "float32",
}
WIDE_LENGTHS = (1, 15, 16, 17, 130, 300)

Row = tuple[str, str, float, float]  # name, dtype, found, allowed


def write_wide_model(folder: Path) -> None:
    """A random checkpoint, the same on every machine."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    c = WIDE
    D, F, H = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * H, c["num_key_value_heads"] * H

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return rng.uniform(0.5, 1.5, D).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(c["vocab_size"], D) * np.float32(D**0.5),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(c["vocab_size"], D),
    }
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        weights |= {
            at + "input_layernorm.weight": norm(),
            at + "post_attention_layernorm.weight": norm(),
            at + "self_attn.q_proj.weight": matrix(q, D),
            at + "self_attn.k_proj.weight": matrix(kv, D),
            at + "self_attn.v_proj.weight": matrix(kv, D),
            at + "self_attn.o_proj.weight": matrix(D, q),
            at + "mlp.gate_proj.weight": matrix(F, D),
            at + "mlp.up_proj.weight": matrix(F, D),
            at + "mlp.down_proj.weight": matrix(D, F),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(c))


def score(model: Path, dtype: str, work: dict[str, Any]) -> dict[str, np.ndarray]:
    """Log-probabilities [T - 1, V] of each sequence, and [T, V] of tokens decoded after it.

    Decoded tokens come one step each, so they check the decode path.
    """
    from jaxserve import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_logprobs=-1,
        max_num_seqs=8,
        max_model_len=work["max_model_len"],
        max_num_batched_tokens=64,
        num_gpu_blocks_override=256,
        gpu_memory_utilization=0.2,  # several of these at once
        show_progress=False,
    )
    vocab_size = work["vocab_size"]
    arrays = {}
    try:
        prompts = [{"prompt_token_ids": ids} for ids in work["sequences"]]
        sampling = SamplingParams(
            temperature=0,
            max_tokens=work["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=-1,
            logprobs=-1,
        )
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        for i, output in enumerate(outputs):
            assert output.prompt_logprobs is not None
            choice = output.outputs[0]
            positions = [*output.prompt_logprobs[1:], *(choice.logprobs or [])]
            table = np.full((len(positions), vocab_size), np.nan, np.float32)
            for row, entry in zip(table, positions, strict=True):
                for token_id, value in (entry or {}).items():
                    row[token_id] = value.logprob
            arrays[f"logprobs_{i}"] = table
            arrays[f"token_ids_{i}"] = np.array(choice.token_ids, np.int32)
    finally:
        llm.shutdown()
    return arrays


def score_elsewhere(
    model: Path, dtype: str, work: dict[str, Any], platform: str | None
) -> dict[str, np.ndarray]:
    """`score` in a process of its own, on the CPU if `platform` says so."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        env = os.environ | ({"JAX_PLATFORMS": platform} if platform else {})
        job = json.dumps({"model": str(model), "dtype": dtype, "work": work, "out": str(out)})
        command = [sys.executable, "-m", "benchmarks.gpu.check", "--job", "-"]
        subprocess.run(command, input=job, text=True, env=env, cwd=ROOT, check=True)
        with np.load(out) as arrays:
            return dict(arrays)


def check_golden(name: str) -> list[Row]:
    """Against what PyTorch found, prompts only."""
    with np.load(GOLDEN / name / "expected.npz") as expected:
        arrays = dict(expected)
    work = {
        "sequences": [arrays[f"tokens_{i}"].tolist() for i in range(2)],
        "max_tokens": 1,
        "max_model_len": 64,
        "vocab_size": arrays["logits_0"].shape[1],
    }
    got = score_elsewhere(GOLDEN / name, "float32", work, None)
    worst = max(
        difference(got[f"logprobs_{i}"], log_softmax(arrays[f"logits_{i}"])) for i in range(2)
    )
    return [(f"{name}, against PyTorch", "float32", worst, LIMITS["float32"])]


def check_wide(pool: ThreadPoolExecutor) -> list[Row]:
    """Against this code on the CPU: prompts and decoded tokens, as long as both chose the same."""
    rng = np.random.default_rng(1)
    work = {
        "sequences": [rng.integers(3, WIDE["vocab_size"], n).tolist() for n in WIDE_LENGTHS],
        "max_tokens": 24,
        "max_model_len": 512,
        "vocab_size": WIDE["vocab_size"],
    }
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_wide_model(model)
        there = pool.submit(score_elsewhere, model, "float32", work, "cpu")
        here = {d: pool.submit(score_elsewhere, model, d, work, None) for d in LIMITS}
        reference = there.result()
        found = {dtype: job.result() for dtype, job in here.items()}
    return [
        ("heads of 128, against the CPU", dtype, furthest(found[dtype], reference, work), limit)
        for dtype, limit in LIMITS.items()
    ]


def furthest(
    got: dict[str, np.ndarray], reference: dict[str, np.ndarray], work: dict[str, Any]
) -> float:
    """The largest difference over all positions that were computed from equal tokens."""
    worst = 0.0
    for i, ids in enumerate(work["sequences"]):
        mine, theirs = got[f"token_ids_{i}"], reference[f"token_ids_{i}"]
        split = np.flatnonzero(mine != theirs)
        # The position that chose another token was itself still computed from equal ones.
        count = len(ids) + int(split[0]) if len(split) else len(ids) - 1 + len(mine)
        a, b = got[f"logprobs_{i}"][:count], reference[f"logprobs_{i}"][:count]
        worst = max(worst, difference(a, b))
    return worst


def difference(a: np.ndarray, b: np.ndarray) -> float:
    n = min(len(a), len(b))
    worst = float(np.abs(a[:n] - b[:n]).max()) if n else 0.0
    return worst if np.isfinite(worst) else float("inf")


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--golden", default="gqa", help="model of tests/golden/tiny_llama")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.load(sys.stdin)
        arrays: dict[str, Any] = dict(score(Path(job["model"]), job["dtype"], job["work"]))
        np.savez(job["out"], **arrays)
        return
    # Each takes a processor's worth of compiling; on a small machine one after the other.
    with ThreadPoolExecutor(4 if (os.cpu_count() or 1) >= 8 else 1) as pool:
        golden = pool.submit(check_golden, args.golden)
        rows = check_wide(pool)
        rows = [*golden.result(), *rows]
    bad = [row for row in rows if not row[2] <= row[3]]
    table = [(f"{n}, {d}", f"{w:.2e}", f"{x:g}", "ok" if w <= x else "TOO FAR")
             for n, d, w, x in rows]  # fmt: skip
    print_table("Log-probabilities: largest difference", ["", "found", "allowed", ""], table)
    if args.json:
        checks = [dict(zip(("name", "dtype", "worst", "limit"), row, strict=True)) for row in rows]
        write_json(args.json, benchmark="check", checks=checks, passed=not bad)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
