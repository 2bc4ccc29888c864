"""Who can be reloaded, and the conversation with workers in other processes.

target        an engine, a worker or a model, told apart by what they can do
conversation  one update in several workers: all answers, or the one error that matters
executor      a call that fails in one worker leaves no answers of the others behind
replicas      the replicas of one server take the entries of FLASHRL_CONFIG in turn
"""

from __future__ import annotations

from flashquant.patches.remote import executor, replicas
from flashquant.patches.remote.target import apply_delta, manifest, reload_weights, status

__all__ = ["POINTS", "apply_delta", "manifest", "reload_weights", "status"]

POINTS = (*executor.POINTS, *replicas.POINTS)
