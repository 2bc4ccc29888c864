"""Bundles under fire: after any fault an engine serves all of the old policy or all of the new one.

One live engine a scheme, on which bundles of a chain come one after the other. Each fault is
followed by a look at the digest of everything the kernels read, and by the good bundle, whose
digest is that of a whole reload. `--hypothesis-profile long`: 1,000 faults and more.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import flashquant
from flashquant.errors import ReloadError
from flashquant.sender import BundleStore, Delta, Sender
from tests.engine.faults import INJECTED
from tests.engine.serving import Serving, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

SCHEMES = ("int8", "fp8_channel", "fp8_vllm", "bf16")
FAULTS = settings().max_examples * 3 // 10  # on each engine
COMPARED = 25  # how many faults lie between two looks at all bits


class Bundles(NamedTuple):
    """What is there to spoil: the next bundle, the one before it, and the one after it."""

    before: Delta
    good: Delta
    after: Delta


Fault = Callable[[random.Random, Path, Bundles], Any]


def _cut(dice: random.Random, file: Path, bundles: Bundles) -> Path:
    data = file.read_bytes()
    file.write_bytes(data[: dice.randrange(len(data))])
    return file


def _flipped(dice: random.Random, file: Path, bundles: Bundles) -> Path:
    """Anywhere: in the header, in JSON, in places, in values."""
    data = bytearray(file.read_bytes())
    for _ in range(dice.choice([1, 1, 1, 2, 9])):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)
    return file


def _blanked(dice: random.Random, file: Path, bundles: Bundles) -> Path:
    """A stretch that was never written, as after a crash of the system."""
    data = bytearray(file.read_bytes())
    start = dice.randrange(len(data))
    stop = min(len(data), start + dice.randrange(1, 5000))
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return file


def _reordered(dice: random.Random, file: Path, bundles: Bundles) -> Delta:
    return bundles.after


def _duplicated(dice: random.Random, file: Path, bundles: Bundles) -> Delta:
    return bundles.before


def _wrong_base(dice: random.Random, file: Path, bundles: Bundles) -> Delta:
    """It says that it fits, and is another one."""
    header = bundles.after.header.model_copy(update={"base": bundles.good.header.base})
    return Delta(header, bundles.after.parts)


def _hostile_places(dice: random.Random, file: Path, bundles: Bundles) -> Path:
    """Places behind the end, too few, too many; a wrong width: written by no `Delta`."""
    from safetensors.torch import save_file

    parts = {name: part.clone() for name, part in bundles.good.parts.items()}
    name = dice.choice([name for name in parts if "#gaps" in name or "#bitmap" in name])
    gaps = parts[name]
    size = dice.randrange(1, 9)
    parts[name] = dice.choice(
        [
            torch.full_like(gaps, torch.iinfo(gaps.dtype).max),
            gaps.to(torch.int64).add_(dice.randrange(1, 200)).to(gaps.dtype),
            torch.cat([gaps, gaps[:size]]),
            gaps[:-1],
            gaps.to(torch.int64),
            torch.tensor([2**32 - 2] * size, dtype=torch.uint32),
            torch.tensor([-1] * gaps.numel(), dtype=torch.int32),
            gaps[None],
            gaps.flip(0),
        ]
    )
    save_file(parts, file, metadata={"flashquant": bundles.good.header.model_dump_json()})
    return file


def _swapped(dice: random.Random, file: Path, bundles: Bundles) -> Delta:
    """The parts of two tensors that look alike trade places; or the values of one do."""
    parts = dict(bundles.good.parts)
    first = dice.choice([name for name in parts if "#values" in name])
    alike = [n for n in parts if n != first and _form(parts[n]) == _form(parts[first])]
    if alike:
        second = dice.choice(alike)
        parts[first], parts[second] = parts[second], parts[first]
    if not alike or torch.equal(_bits(parts[first]), _bits(bundles.good.parts[first])):
        parts[first] = (_bits(parts[first]) ^ 1).view(parts[first].dtype)
    return Delta(bundles.good.header, parts)


def _killed_sender(dice: random.Random, file: Path, bundles: Bundles) -> Path | None:
    """It died while it wrote: what it leaves is no bundle to anybody who follows the folder."""
    data = file.read_bytes()
    file.unlink()
    store = BundleStore(file.parent / "folder")
    store.put(bundles.before)
    left = store.folder / f".{bundles.good.header.digest}.safetensors.x1"
    left.write_bytes(data[: dice.randrange(len(data))])
    assert store.path_from(bundles.before.header.digest) == []
    return left


def _failing(where: str, calls: int) -> Fault:
    """A call inside of the engine fails: one of the first half of those that a bundle causes."""

    def fault(dice: random.Random, file: Path, bundles: Bundles) -> Any:
        error = dice.choice([MemoryError, KeyboardInterrupt, RuntimeError])
        left = count(-dice.randrange(-(-calls // 2)))
        original = resolve_name(where)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 0:
                raise error("injected")
            return original(*args, **kwargs)

        return mock.patch(where, call)

    return fault


def _counted(calls: Counter[str], where: str) -> Any:
    original = resolve_name(where)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[where] += 1
        return original(*args, **kwargs)

    return mock.patch(where, call)


FAULTS_BY_NAME: dict[str, Fault] = {
    "cut": _cut,
    "flipped": _flipped,
    "blanked": _blanked,
    "reordered": _reordered,
    "duplicated": _duplicated,
    "wrong base": _wrong_base,
    "hostile places": _hostile_places,
    "swapped": _swapped,
    "killed sender": _killed_sender,
}
CALLS = {
    "fails while it writes": "flashquant.update.deltas.noted_in_place",
    "fails while it checks": "flashquant.update.deltas.check_finite",
    "fails while it reads": "flashquant.update.checkpoint.Checkpoint.read",
    "fails as it commits": "flashquant.update.transaction.Transactions._stand",
    "fails as it makes anew": "flashquant.patches.layers.processed.ProcessedLayer.refresh",
    "fails as it packs": "flashquant.patches.layers.processed.ProcessedLayer._process",
}


def _form(part: Tensor) -> tuple[Any, ...]:
    return part.dtype, tuple(part.shape)


def _bits(part: Tensor) -> Tensor:
    return part.view(torch.uint8)


def stepped(weights: dict[str, Tensor], dice: random.Random) -> dict[str, Tensor]:
    """A step that changes a few elements of most tensors."""
    torch_dice = torch.Generator().manual_seed(dice.randrange(1 << 30))
    return {
        name: torch.where(torch.rand(t.shape, generator=torch_dice) < 0.01, t * 1.25, t)
        for name, t in weights.items()
    }


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


def apply(live: Serving, spoilt: Any, good: Delta) -> bool:
    """Whether a fault went through as if it were none."""
    try:
        if not isinstance(spoilt, Delta | Path):
            with spoilt:
                flashquant.apply_delta(live.llm, good)
        else:
            flashquant.apply_delta(live.llm, spoilt)
    except (ReloadError, MemoryError, KeyboardInterrupt, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("scheme", SCHEMES)
def test_after_any_fault_an_engine_serves_the_old_or_the_new_and_takes_the_next(
    policies: Policies, scheme: str, tmp_path: Path
) -> None:
    """All are refused: each fault has something to strike, in every scheme."""
    live = serve(policies.bf16("a"), scheme)
    dice = random.Random(f"{scheme} 22")
    weights = policies.tensors("b")
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    flashquant.apply_delta(live.llm, sender.bundle(weights))
    chain = [sender.bundle(weights := stepped(weights, dice)) for _ in range(3)]
    calls: Counter[str] = Counter()
    with ExitStack() as counting:
        for where in CALLS.values():
            counting.enter_context(_counted(calls, where))
        flashquant.apply_delta(live.llm, chain[0])
    failing = {n: _failing(w, calls[w]) for n, w in CALLS.items() if calls[w]}
    faults, tally = FAULTS_BY_NAME | failing, Counter[str]()
    before, names = live.snapshot(), list(faults)
    for turn in range(FAULTS):
        bundles = Bundles(*chain)
        file = tmp_path / f"{turn}.safetensors"
        bundles.good.save(file)
        name = names[turn % len(names)]
        old = flashquant.status(live.llm).digest
        if turn % COMPARED == 0:
            before = live.snapshot()

        through = apply(live, faults[name](dice, file, bundles), bundles.good)

        served = flashquant.manifest(live.llm).digest
        assert served == (bundles.good if through else bundles.before).header.digest, name
        if not through:
            assert flashquant.status(live.llm).digest == old, name
            if turn % COMPARED == 0:
                live.snapshot().assert_same(before)
            flashquant.apply_delta(live.llm, bundles.good)
        assert flashquant.manifest(live.llm).digest == bundles.good.header.digest
        tally[f"{name}, {'harmless' if through else 'refused'}"] += 1
        file.unlink(missing_ok=True)
        if (tmp_path / "folder").exists():
            shutil.rmtree(tmp_path / "folder")
        weights = stepped(weights, dice)
        chain = [*chain[1:], sender.bundle(weights)]
    INJECTED[f"deltas-{scheme}"] += FAULTS
    print(json.dumps({scheme: tally}, indent=1))

    by_delta = flashquant.apply_delta(live.llm, chain[1]).digest
    flashquant.apply_delta(live.llm, chain[2])
    whole = flashquant.reload_weights(live.llm, weights)
    assert by_delta != whole.digest == flashquant.status(live.llm).digest
    flashquant.apply_delta(live.llm, sender.snapshot())
    assert flashquant.status(live.llm).digest == whole.digest
    assert [kind for kind in tally if kind.endswith("harmless")] == []  # each has a place to strike
    flashquant.reload_weights(live.llm, policies.tensors("a"))
