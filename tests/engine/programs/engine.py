"""What the programs have in common: the options of their small engines, and how they answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.support.gpu import SHARE

RESULT_FILE = "RESULT_FILE"
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 16 << 20,
    "max_model_len": 128,
    "dtype": "bfloat16",
    **SHARE,
}
PROMPT = {"prompt_token_ids": list(range(5, 45))}


def in_the_cache(worker: Any) -> int:
    """Bytes of the undo log of an open update that lie in a worker's KV cache."""
    from flashquant.patches.seams.loading import session_of

    update = session_of(worker.get_model()).transactions.current
    return 0 if update is None else update.undo.cache_bytes


def print_result(result: Any) -> None:
    """Print one JSON object, or write it into the file that a test asks for.

    Standard output is shared with vLLM's other processes, whose lines come in between.
    """
    text = json.dumps(result)
    if (file := os.environ.get(RESULT_FILE)) is not None:
        Path(file).write_text(text)
    else:
        print(text)
