"""Sleep at level 2 takes the device's memory: what is needed afterwards is on the host.

All that a session makes while its model is loaded lies in the same pool as the weights. Here the
pool is every tensor that a session can reach; whatever of it is not on the host is filled with
garbage while the engine sleeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from flashquant.profiles import Calibration, Profile
from flashquant.update import Session
from tests.profiles.test_calibration import checkpoint, entries, opened
from tests.support.fake_engine import CPU, NEW, weights

META = torch.device("meta")


def held(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that something of ours keeps."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from held(inner, seen)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from held(inner, seen)
    elif type(value).__module__.startswith("flashquant"):
        fields = vars(value) if hasattr(value, "__dict__") else {}
        yield from held(dict(fields), seen)


def test_a_profile_keeps_nothing_on_the_device_that_falls_asleep() -> None:
    """`meta` stands for the device."""
    calibration = Calibration(Profile(entries(), "p.pt"), scales="refreshed", device=META)
    for name, tensor in checkpoint().items():
        calibration.note(name, tensor)
    names = [name for name in NEW if name in calibration]
    stored = {
        made: values.device
        for name in names
        for made, values in calibration.stored(name, NEW[name].to(META))
    }
    assert set(stored.values()) == {META}
    assert META in {tensor.device for tensor in held(calibration)}

    calibration.forget_device()

    assert {tensor.device for tensor in held(calibration)} == {CPU}


@pytest.mark.parametrize("scales", ["frozen", "refreshed"])
@pytest.mark.parametrize("prunes", [False, True], ids=["", "prunes"])
def test_updates_after_it_are_what_they_were_before_it(scales: str, prunes: bool) -> None:
    """All that the session read off weights that are lost is garbage."""
    (engine, session), (expected, other) = (opened(scales=scales, prunes=prunes) for _ in range(2))
    for policy in (weights(5), NEW):
        other.reload(policy)
    session.reload(weights(5))
    lost = [*engine.live.values(), *read_off_weights(session)]

    session.sleep(keeps_weights=False)
    for tensor in lost:
        tensor.data.view(torch.uint8).fill_(0xFF)  # as memory is lost: no counter moves
    session.wake_up()
    assert session.status().foreign == ()
    report = session.reload(NEW)

    assert all(torch.equal(engine.live[name], expected.live[name]) for name in engine.live)
    assert report.drift["q.weight"].changed is None  # there is nothing to compare with
    assert session.status().foreign == ()


def read_off_weights(session: Session) -> list[Tensor]:
    """The samples of codes, and what is known of norms and of columns that nobody reads."""
    calibration: Any = session._calibration
    return [
        *held(session._code_statistics),
        *held(calibration.clipping),
        *held(calibration._pruning),
    ]
