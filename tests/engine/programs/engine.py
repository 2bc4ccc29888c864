"""What the programs have in common: the options of their small engines, and how they answer."""

from __future__ import annotations

import json
from typing import Any

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 16 << 20,
    "max_model_len": 128,
    "dtype": "bfloat16",
}
PROMPT = {"prompt_token_ids": list(range(5, 45))}


def print_result(result: Any) -> None:
    """Print one JSON object, on a line that other processes' logs cannot be taken for."""
    print("RESULT", json.dumps(result), flush=True)
