"""A KV connector that keeps keys and values in files, and drops them when it is told to."""

from __future__ import annotations

import shutil
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class Dropping(ExampleConnector):  # type: ignore[misc]  # vLLM's, untyped
    """vLLM's example, which cannot be told to."""

    def reset_cache(self) -> bool:
        shutil.rmtree(self._storage_path, ignore_errors=True)
        return True


def connected(storage: str) -> dict[str, Any]:
    """The argument of an engine that has one."""
    return {
        "kv_connector": Dropping.__name__,
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": storage},
    }
