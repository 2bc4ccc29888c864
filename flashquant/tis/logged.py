"""Logged log-probs of trainer and rollout, one sequence a record.

    {"step": 12, "trainer": [-0.1, ...], "rollout": [-0.2, ...]}          what there must be
    {..., "mask": [1, 0, ...], "entropy": [0.3, ...], "lag": 1}           what there may be

`mask` is 0 where the policy did not choose (a tool's token); `entropy` is of the trainer's
distribution at each token, in nats; `lag` is how many updates older the rollout's weights were than
those the trainer computed with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashquant.errors import CorrectionError


@dataclass(frozen=True)
class Logged:
    """All unmasked tokens, one after another: `[N]` float64, or int64 for numbers of things.

    Attributes:
        trainer: log-probs.
        rollout: log-probs.
        position: of a token in its sequence, masked ones counted.
        sequence: which one.
        step: of each token's sequence.
        entropy: nats, or None where a record lacks it.
        lag: of each token's sequence, or None where a record lacks it.

    """

    trainer: Tensor
    rollout: Tensor
    position: Tensor
    sequence: Tensor
    step: Tensor
    entropy: Tensor | None
    lag: Tensor | None

    @property
    def log_ratio(self) -> Tensor:
        """Trainer's less the rollout's."""
        return self.trainer - self.rollout


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file.

    Raises:
        CorrectionError: there is no such file, or a line is no JSON object.

    """
    if not path.is_file():
        raise CorrectionError(f"{path} is no file. Give a log with one JSON object a line.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorrectionError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise CorrectionError(f"{path}, line {number} is no JSON object")
        found.append(record)
    return found


def gathered_from(records: Iterable[Mapping[str, Any]]) -> Logged:
    """All records together.

    Raises:
        CorrectionError: a record lacks a field, its lists differ in length, a log-prob is not
            finite, or there is no token.

    """
    parts = [_tokens(number, record) for number, record in enumerate(records, 1)]
    if not any(len(part["trainer"]) for part in parts):
        raise CorrectionError("the log has no unmasked token, so there is nothing to compare")
    return Logged(**{name: _joined(parts, name) for name in parts[0]})


def _joined(parts: Sequence[Mapping[str, Any]], name: str) -> Any:
    found = [part[name] for part in parts]
    return None if any(values is None for values in found) else torch.cat(found)


def _tokens(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """Of one record, what is unmasked; None for what it does not say."""
    lists = {name: _list(number, record, name) for name in ("trainer", "rollout")}
    length = len(lists["trainer"])
    for name in ("mask", "entropy"):
        if name in record:
            lists[name] = _list(number, record, name)
    for name, values in lists.items():
        if len(values) != length:
            raise CorrectionError(
                f"record {number} has {length} log-probs of the trainer, and {len(values)} values "
                f"of {name}. Give as many."
            )
    keep = lists["mask"] > 0 if "mask" in lists else torch.ones(length, dtype=torch.bool)
    for name in ("trainer", "rollout", "entropy"):
        if name in lists and not bool(lists[name][keep].isfinite().all()):
            raise CorrectionError(f"record {number}: {name} is not finite at an unmasked token")
    count = int(keep.sum())
    whole = {name: _number(number, record, name) for name in ("step", "lag")}
    return {
        "trainer": lists["trainer"][keep],
        "rollout": lists["rollout"][keep],
        "position": torch.arange(length)[keep],
        "sequence": torch.full((count,), number),
        "step": torch.full((count,), whole["step"] or 0),
        "entropy": lists["entropy"][keep] if "entropy" in lists else None,
        "lag": None if whole["lag"] is None else torch.full((count,), whole["lag"]),
    }


def _list(number: int, record: Mapping[str, Any], name: str) -> Tensor:
    values = record.get(name)
    try:
        found = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CorrectionError(
            f"record {number}: {name} is {type(values).__name__}, but must be a list of numbers"
        ) from error
    if found.dim() != 1:
        raise CorrectionError(f"record {number}: {name} is no list of numbers, one a token")
    return found


def _number(number: int, record: Mapping[str, Any], name: str) -> int | None:
    value = record.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise CorrectionError(f"record {number}: {name} is {value!r}, but is a whole number")
    return value
