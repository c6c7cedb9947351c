"""Sizes of the demo model's engine, the same in many tests, so that it is compiled once."""

from typing import Any

DEMO: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "cudagraph_capture_sizes": (8,),
    "num_gpu_blocks_override": 40,  # so few that long sequences are preempted
    "layer_loop": "scan",  # quicker to compile
    "forbid_late_compile": True,
    "show_progress": False,
}
