"""A default device that the program has set is not where our tensors go.

vLLM makes the GPU the default while it creates a model, and a trainer in the same process may for
good. `meta` stands for it: whatever lands there has lost its values.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashquant.plan import Fill, View
from flashquant.profiles import Calibration, Profile, load_profile, save_profile
from flashquant.update import Stage, write
from tests.profiles import test_calibration
from tests.profiles.test_calibration import FIELDS, entries
from tests.support.fake_engine import CPU, NEW, OLD, FakeEngine, serves, serving

META = torch.device("meta")


@pytest.mark.parametrize("file", ["old.pt", "new.safetensors"])
def test_a_profile_is_read_on_the_host(file: str, tmp_path: Path) -> None:
    torch.save(FIELDS, tmp_path / "old.pt")
    save_profile(Profile(entries(), "here"), tmp_path / "new.safetensors")

    with META:
        profile = load_profile(tmp_path / file)
        read = [profile.entries[name] for name in FIELDS]
        Calibration(profile, scales="refreshed", device=CPU)

    assert {v.device.type for entry in read for v in entry.vectors.values()} == {"cpu"}


def test_the_maxima_of_padding_are_numbers() -> None:
    row = View((1, 2), (2, 1), 0)
    stage = Stage(torch.Size((1, 2)), (2, 1), torch.float32)

    with META:
        write(Fill("qkv", row, 0.0), torch.empty(0), stage, CPU)

    assert [maxima.tolist() for maxima in stage.maxima.values()] == [[[0.0]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_an_update_is_the_same(dtype: torch.dtype) -> None:
    engine, expected = FakeEngine(dtype), FakeEngine(dtype)
    serving(expected, NEW)

    session = serving(engine, OLD)
    with META:
        report = session.reload(NEW)

    assert serves(engine, expected.live)
    assert report.digest == session.proofs.digest()


def test_an_update_by_a_profile_is_the_same() -> None:
    (engine, session), (expected, other) = (test_calibration.opened() for _ in range(2))
    other.reload(NEW)

    with META:
        session.reload(NEW)

    assert serves(engine, expected.live)
