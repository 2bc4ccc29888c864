"""The trainer's side: torch only, no vLLM.

manifest   what an engine wants to be sent; the engine tells
"""

from __future__ import annotations

from flashquant.sender.manifest import Manifest, TensorSpec, dtype_name, policy_digest

__all__ = ["Manifest", "TensorSpec", "dtype_name", "policy_digest"]
