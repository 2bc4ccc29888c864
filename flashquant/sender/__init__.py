"""The trainer's side: torch only, no vLLM.

manifest   what an engine wants to be sent; the engine tells
sender     a trainer's weights as codes and scales, or as a bundle of what changed
delta      such a bundle: a typed header and plain tensors, in safetensors
store      a folder of bundles, from which an engine that missed some catches up
changes    what differs between two tensors, in few bytes
"""

from __future__ import annotations

from flashquant.sender.changes import Change
from flashquant.sender.delta import Delta, DeltaHeader, TensorChange
from flashquant.sender.manifest import Manifest, TensorSpec, dtype_name, policy_digest
from flashquant.sender.sender import Sender
from flashquant.sender.store import BundleStore

__all__ = [
    "BundleStore",
    "Change",
    "Delta",
    "DeltaHeader",
    "Manifest",
    "Sender",
    "TensorChange",
    "TensorSpec",
    "dtype_name",
    "policy_digest",
]
