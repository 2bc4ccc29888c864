"""An engine with a KV connector that keeps what it is told to drop, in processes of its own.

Usage: python -m tests.engine.programs.keeping STARTS_ON STORAGE
Prints one JSON object when the engine has started; what it warned of is in FLASHRL_LOGGING_FILE.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.engine.programs.engine import OPTIONS, print_result


def connected(storage: str) -> dict[str, Any]:
    """The argument of an engine that has one."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": storage},
    }


def main(starts_on: str, storage: str) -> dict[str, Any]:
    from vllm import LLM

    llm = LLM(starts_on, kv_transfer_config=connected(storage), **OPTIONS)
    return {"started": llm is not None}


if __name__ == "__main__":
    print_result(main(*sys.argv[1:]))
