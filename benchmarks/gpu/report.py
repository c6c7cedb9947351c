"""One table per model shape of what serve.py and transformers_peer.py wrote."""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import print_table

NOTES = {
    "qwen3-0.6b-shapes": "A Llama-architecture model with Qwen3-0.6B's sizes: without Qwen3's QK "
    "norms, so not Qwen3 itself.",
}


def by_rows(record: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {d["rows"]: d for d in record.get("decode", []) if "step_ms" in d}


def ratio(ours: float | None, theirs: float | None) -> str | None:
    """How much faster we are, from two times."""
    return f"{theirs / ours:.2f}x" if ours and theirs else None


def report(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Prints one shape's figures; what was not measured is a dash."""
    name = ours["shape"]["name"]
    c = ours["ceilings"]
    bandwidth = f"{c['copy_bytes_per_s'] / 1e12:.3f} TB/s copy, measured"
    print(f"\n{name} on {c['device']} ({bandwidth}), random weights")
    print(NOTES.get(name, ""))
    mine, peer = by_rows(ours), by_rows(theirs)
    rows = []
    for r, d in mine.items():
        other = peer.get(r, {}).get("step_ms")
        share = f"{100 * d['roofline_share']:.0f}"
        cells = (d["step_ms"], d["roofline_ms"])
        times = [f"{x:.2f}" for x in cells]
        host = f"{d['host_ms']:.2f}"
        them = f"{other:.2f}" if other else None
        rows.append([r, int(d["context"]), *times, share, host, them, ratio(cells[0], other)])
    columns = ["rows", "context", "ms/step", "roofline ms", "% of it", "host ms", "transformers",
               "jaxserve is"]  # fmt: skip
    print_table("Decode", columns, rows)
    lines: list[list[object]] = []
    p, q = ours.get("prefill"), theirs.get("prefill")
    if p:
        label = f"prefill {p['prompts']} x {p['length']}, TFLOP/s"
        faster = ratio(p["seconds"], q and q["seconds"])
        lines.append([label, p["tflops"], q and q["tflops"], faster])
    for o in ours.get("offline", []):
        key = (o["requests"], o["input_tokens"], o["output_tokens"])
        same = [
            t for t in theirs.get("offline", [])
            if key == (t["requests"], t["input_tokens"], t["output_tokens"])
        ]  # fmt: skip
        label = f"offline {key[0]} x {key[1]}/{key[2]}, output tokens/s"
        if o["output_tokens"] != o["output_tokens_wanted"]:
            label += f" (shortened from {o['output_tokens_wanted']})"
        speed = same[0]["output_tokens_per_s"] if same else None
        faster = ratio(o["seconds"], same[0]["seconds"] if same else None)
        lines.append([label, o["output_tokens_per_s"], speed, faster])
    start, idle = ours.get("start_up", {}), ours.get("device_idle", {})
    lines.append(["start-up, s", start.get("seconds"), None, None])
    lines.append(["of it compiling, s", start.get("compile s"), None, None])
    gap = idle.get("gap_ms_per_step")
    lines.append(["device idle a step, ms", gap and f"{gap:.3f}", None, None])
    print_table("Throughput", ["", "jaxserve", "transformers", "jaxserve is"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for path in sorted(folder.glob("serve-*.json")):
        peer = folder / path.name.replace("serve-", "transformers-")
        theirs = json.loads(peer.read_text()) if peer.exists() else {}
        report(json.loads(path.read_text()), theirs)


if __name__ == "__main__":
    main()
