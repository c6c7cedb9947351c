"""A tiny random Llama on disk, and a way to run token ids through a real engine."""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxserve.checkpoint import open_checkpoint
from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.request import Request, TokenDelta, TokenLogprobs
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import StepStats

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
# Few, small buckets, and nothing hidden: a compile in traffic ends the engine.
SMALL: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "cudagraph_capture_sizes": (8,),
    "block_size": 8,
    "num_gpu_blocks_override": 160,
    "forbid_late_compile": True,
    "show_progress": False,
}


def write_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A Llama whose greedy tokens vary, so that a wrong cache shows."""
    rng = np.random.default_rng(seed)
    c = TINY_CONFIG
    size, ffn, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv = size // heads * c["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 2 / columns**0.5, (rows, columns)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(c["vocab_size"], size),
        "model.norm.weight": np.ones(size, np.float32),
    }
    for i in range(c["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (size, size),
            "self_attn.k_proj": (kv, size),
            "self_attn.v_proj": (kv, size),
            "self_attn.o_proj": (size, size),
            "mlp.gate_proj": (ffn, size),
            "mlp.up_proj": (ffn, size),
            "mlp.down_proj": (size, ffn),
        }
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = np.ones(size, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(c))
    return folder


@dataclass
class Answer:
    """All that came for one choice of a request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0

    def add(self, delta: TokenDelta) -> None:
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)


type Answers = dict[tuple[str, int], Answer]


def request(name: str, prompt: Iterable[int], **changes: Any) -> Request:
    """A request in the form that the frontend hands over; greedy, 12 tokens."""
    top = {"seed", "cache_salt", "priority", "eos_token_id", "bad_words_token_ids"}
    sampling = {"temperature": 0.0, "max_tokens": 12, **changes}
    params = SamplingParams(**{k: v for k, v in sampling.items() if k not in top})
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=params,
        max_tokens=params.max_tokens or 1,
        stop_token_ids=tuple(params.stop_token_ids or ()),
        arrival_s=time.monotonic(),
        **{"eos_token_id": None, **{k: v for k, v in changes.items() if k in top}},
    )


@contextmanager
def running(model: str | Path, **changes: Any) -> Iterator[Engine]:
    """A started engine on `model`."""
    config = EngineConfig(model=str(model), **{**SMALL, **changes})
    engine = Engine(config, open_checkpoint(str(model)))
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown()


def answer(engine: Engine, requests: list[Request]) -> tuple[Answers, list[StepStats]]:
    """Submits all requests at once and collects everything that comes back."""
    for one in requests:
        engine.submit(one)
    return collect(engine, [(r.request_id, i) for r in requests for i in range(r.sampling.n)])


def collect(engine: Engine, choices: Iterable[tuple[str, int]]) -> tuple[Answers, list[StepStats]]:
    """Reads the outbox until all these choices have ended."""
    answers: Answers = defaultdict(Answer)
    stats, left = [], set(choices)
    while left:
        output = engine.outbox.get(timeout=120)
        assert output.error is None, output.error
        if output.stats is not None:
            stats.append(output.stats)
        for delta in output.deltas:
            key = (delta.request_id, delta.choice)
            answers[key].add(delta)
            if delta.finish_reason is not None:
                left.discard(key)
    return answers, stats
