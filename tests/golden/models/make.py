"""Makes the cases beside it: a JSON file and what transformers computes of it, for each model.

The tests read the cases and never run this script. To make them again, in a virtual environment
of its own (Python 3.11 or newer):

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tests/golden/models/make.py [NAME ...]

For each case a model is built from its config and saved, to learn which tensors a checkpoint has;
their values come from `weights.write_checkpoint`, and the model that transformers loads from that
folder is what is recorded. NAME.json: config, seed, tensors. NAME.npz, for each sequence i:
tokens_i [T], positions_i [P] and logits_i [P, V] float32 at these positions; greedy [G], the
tokens that greedy decoding adds to sequence 1. A seed is taken only if greedy decoding is a fair
test: at each of its steps the best logit leads by GAP or more.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from cases import CASES, Case
from derived_cases import CASES as DERIVED_CASES
from moe_cases import CASES as MOE_CASES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weights import raw_integers, write_checkpoint

ALL = CASES | DERIVED_CASES | MOE_CASES
NUM_GREEDY = 20
GAP = 4e-3  # of logits, whose standard deviation is about 1
MAX_SEEDS = 40
HERE = Path(__file__).parent


def saved_shapes(config: dict[str, Any], folder: Path) -> dict[str, tuple[tuple[int, ...], float]]:
    """Names of the tensors that transformers writes -> shape, and their value if it is one."""
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model_class, parsed = class_and_config(config, folder)
    model_class(parsed).save_pretrained(folder)
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name).float()
                same = tensor.numel() and bool((tensor == tensor.flatten()[0]).all())
                value = float(tensor.flatten()[0]) if same else float("nan")
                found[name] = (tuple(tensor.shape), value)
    return found


def class_and_config(config: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    parsed = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config["architectures"][0]), parsed


def rule(case: Case, name: str, shape: tuple[int, ...], value: float, tied: bool) -> list[Any]:
    """How a tensor's values are made: encoding, shape and two numbers (see weights.py)."""
    for pattern, a, b in case.rules:
        if re.search(pattern, name):
            return [case.encoding, list(shape), a, b]
    if name.endswith("_blocks"):
        return ["U8", list(shape), 0, 256]
    if name.endswith("_scales"):
        return ["U8", list(shape), 122, 125]  # powers of two from 1/32 to 1/8
    if value == 1.0 or (len(shape) == 1 and "norm" in name and value != 0.0):
        return [case.encoding, list(shape), 1.0, 0.2]
    if re.search(r"embed|wte|word_emb|tok_emb", name):
        # A tied head would else find the last token again.
        return [case.encoding, list(shape), 0.0, 0.12 if tied else 1.0]
    if len(shape) < 2 or value == 0.0:
        return [case.encoding, list(shape), 0.0, 0.2]
    return [case.encoding, list(shape), 0.0, round((3 / shape[-1]) ** 0.5, 6)]


def load(case: Case, folder: Path) -> Any:
    """The model that transformers makes of a folder; nothing may be missing or left over."""
    extra = {name for name, _ in case.extra}
    config = json.loads((folder / "config.json").read_text())
    if case.reference is not None or case.rename is not None:
        config = case.reference or case.config
        tensors = load_file(folder / "model.safetensors")
        folder = folder / "reference"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        renamed = case.rename(tensors) if case.rename else tensors
        renamed = {n: np.ascontiguousarray(t) for n, t in renamed.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    model_class, parsed = class_and_config(config, folder)
    options: dict[str, Any] = {}
    if "quantization_config" in config:
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model, info = model_class.from_pretrained(
        folder,
        config=parsed,
        dtype=torch.float32,
        attn_implementation=case.attention,
        output_loading_info=True,
        **options,
    )
    left = {k: set(v) - extra for k, v in info.items() if set(v) - extra}
    if left:
        raise SystemExit(f"loading: {left}")
    return model.eval().float()


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:  # [T] -> [T, V]
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    return model(input_ids=ids, use_cache=False).logits[0].float().numpy()


def positions_of(length: int) -> np.ndarray:
    """A few positions from all over a sequence."""
    return np.unique([length // 4, length // 2, length - 2, length - 1])


def greedy(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """The greedy continuation, and the least lead that its tokens had."""
    least = float("inf")
    start = len(tokens)
    for _ in range(NUM_GREEDY):
        last = logits_of(model, tokens)[-1]
        second, best = np.sort(last)[-2:]
        least = min(least, float(best - second) / float(last.std()))
        tokens = np.append(tokens, np.argmax(last))
    return tokens[start:].astype(np.int32), least


def make(name: str, case: Case, out: Path) -> str:
    """Writes one case; returns what to print of it."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = saved_shapes(case.reference or case.config, Path(folder))
        saved_config = json.loads((Path(folder) / "config.json").read_text())
    values = {name: value for name, (_, value) in shapes.items()}
    named = {name: shape for name, (shape, _) in shapes.items()}
    if case.names is not None:
        named = case.names(named)
    text = saved_config.get("text_config", saved_config)
    tied = text.get("tie_word_embeddings", False)
    tensors = {
        n: rule(case, n, shape, values.get(n, values.get(f"transformer.{n}", float("nan"))), tied)
        for n, shape in named.items()
    }
    tensors |= {n: [case.encoding, list(shape), 0.0, 1.0] for n, shape in case.extra}
    vocab_size = text["vocab_size"]
    config = case.config | (case.more or {})
    for seed in range(MAX_SEEDS):
        recorded: dict[str, Any] = {"config": config, "seed": seed, "tensors": tensors}
        if case.reference is None and not case.more:
            recorded["saved_config"] = saved_config
        if case.max_model_len:
            recorded["max_model_len"] = case.max_model_len
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(recorded, Path(folder))
            model = load(case, Path(folder))
        sequences = [
            (3 + raw_integers(seed, f"tokens {i}", n) % np.uint64(vocab_size - 10)).astype(np.int32)
            for i, n in enumerate(case.lengths)
        ]
        tokens, lead = greedy(model, sequences[1])
        if lead >= GAP and len(set(tokens.tolist())) >= 4:
            break
    else:
        raise SystemExit(f"{name}: no seed is fair")
    arrays: dict[str, np.ndarray] = {"greedy": tokens}
    for i, sequence in enumerate(sequences):
        positions = positions_of(len(sequence)).astype(np.int32)
        arrays[f"tokens_{i}"] = sequence
        arrays[f"positions_{i}"] = positions
        arrays[f"logits_{i}"] = logits_of(model, sequence)[positions]
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise SystemExit(f"{name}: not a number")
    np.savez_compressed(out / f"{name}.npz", **arrays)
    (out / f"{name}.json").write_text(as_json(recorded))
    size = sum((out / f"{name}.{kind}").stat().st_size for kind in ("npz", "json"))
    std = arrays["logits_2"].std()
    return f"seed {seed:2} lead {lead:.4f} std {std:6.3f} {size / 1000:5.1f} kB"


def as_json(recorded: dict[str, Any]) -> str:
    """One line a tensor."""
    lines = [f"  {json.dumps(n)}: {json.dumps(t)}" for n, t in recorded["tensors"].items()]
    rest = {k: v for k, v in recorded.items() if k != "tensors"}
    head = json.dumps(rest, indent=1)[:-2]
    return head + ',\n "tensors": {\n' + ",\n".join(lines) + "\n }\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases to make; all by default")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    failed = []
    for name in args.names or ALL:
        try:
            print(f"{name:28}", make(name, ALL[name], args.out), flush=True)
        except (Exception, SystemExit) as error:  # the others are made all the same
            print(f"{name:28} FAILED {type(error).__name__}: {error}", flush=True)
            failed.append(name)
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
