"""What vLLM asks about the class of a model before it makes one."""

from __future__ import annotations


def inspect_models_here() -> None:
    """Let vLLM answer that where it is asked, and not in an interpreter started for it.

    It remembers the answer in the user's cache; where that is empty, or another version's, each
    architecture costs one more import of vLLM.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda ask: ask()
