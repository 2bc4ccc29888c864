"""An update that is prepared while the engine generates: old weights to the last, then the new."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

import flashquant
from flashquant.errors import IncompleteUpdate, MisfitTensor
from flashquant.patches.layers import Carry
from flashquant.update import footprints
from tests.engine.serving import Serving, choosing, serve
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

CASES = [
    ("bf16", "portable"),
    ("int8", "amx"),
    ("int8", "portable"),
    ("fp8_vllm", "native"),
    ("fp8_channel", "native"),
    ("int4", "native"),
    ("mxfp8", "native"),
    ("nvfp4", "native"),
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "tied")


class Pair:
    """An engine on policy A, and one that was started on B."""

    def __init__(self, scheme: str, kernels: str, policies: Policies) -> None:
        self.live, self.fresh = (serve(policies.bf16(policy), scheme, kernels) for policy in "ab")
        self.a, self.b = policies.tensors("a"), policies.tensors("b")
        flashquant.reload_weights(self.live.llm, self.a)

    def assert_serves(self, policy: Serving) -> None:
        self.live.snapshot().assert_same(policy.start)


@pytest.fixture(params=CASES, ids="-".join)
def pair(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Pair]:
    scheme, kernels = request.param
    with choosing(kernels):
        yield Pair(scheme, kernels, policies)


def test_the_engine_generates_with_its_old_weights_until_they_are_swapped(pair: Pair) -> None:
    """Bit for bit the old policy between any two tensors, then bit for bit the new one."""
    session, before = pair.live.session, footprints(pair.live.tensors().items())
    session.begin(prepares=True)
    for turn, named in enumerate(pair.b.items()):
        session.push([named])
        if turn % 7 == 0:
            assert pair.live.outputs() == pair.live.start.outputs

    pair.assert_serves(pair.live)
    report = session.close()

    pair.assert_serves(pair.fresh)
    assert footprints(pair.live.tensors().items()) == before
    assert report.prepare_seconds > 0
    assert report.pause_seconds < report.seconds


def test_one_call_prepares_and_swaps(pair: Pair) -> None:
    report = flashquant.reload_weights(pair.live.llm, pair.b, prepare=True)

    pair.assert_serves(pair.fresh)
    assert report.digest == pair.fresh.start.digest
    assert "paused for" in str(report)


def test_without_undo_nothing_is_torn_by_what_fails_before_the_swap(pair: Pair) -> None:
    name = list(pair.b)[-1]
    bad = {**pair.b, name: torch.full_like(pair.b[name], torch.nan)}

    with pytest.raises(MisfitTensor, match="NaN"):
        flashquant.reload_weights(pair.live.llm, bad, prepare=True, atomic=False)

    assert not flashquant.status(pair.live.llm).torn
    pair.assert_serves(pair.live)
    flashquant.reload_weights(pair.live.llm, pair.b, prepare=True, atomic=False)
    pair.assert_serves(pair.fresh)


def test_half_a_layer_is_refused_and_forgotten(pair: Pair) -> None:
    some = {name: t for name, t in pair.b.items() if "k_proj" not in name}

    with pytest.raises(IncompleteUpdate):
        flashquant.reload_weights(pair.live.llm, some, prepare=True)

    pair.assert_serves(pair.live)
    flashquant.reload_weights(pair.live.llm, pair.b)
    pair.assert_serves(pair.fresh)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_swap_that_fails_is_taken_back(pair: Pair, at: int) -> None:
    left, apply = [at], Carry.apply

    def fails(carry: Carry) -> int:
        written = apply(carry)
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("injected")
        return written

    with (
        mock.patch.object(Carry, "apply", fails),
        pytest.raises(RuntimeError, match="injected"),
    ):
        flashquant.reload_weights(pair.live.llm, pair.b, prepare=True)

    pair.assert_serves(pair.live)
    flashquant.reload_weights(pair.live.llm, pair.b, prepare=True)
    pair.assert_serves(pair.fresh)


def test_another_update_takes_the_place_of_one_that_was_never_finished(pair: Pair) -> None:
    pair.live.session.begin(prepares=True)
    pair.live.session.push(list(pair.b.items())[:9])

    flashquant.reload_weights(pair.live.llm, pair.a)

    pair.assert_serves(pair.live)
