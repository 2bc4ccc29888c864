"""What a report tells of codes: how many changed, and whether scales still hold."""

from __future__ import annotations

import logging

import pytest
import torch

from flashquant.update.code_statistics import Clipping, CodeStatistics

CODES = torch.randint(-127, 128, (64, 300), generator=torch.Generator().manual_seed(0)).char()


def changed_by(fraction: float) -> torch.Tensor:
    other = CODES.clone().flatten()
    count = round(fraction * len(other))
    places = torch.randperm(len(other), generator=torch.Generator().manual_seed(1))[:count]
    other[places] += 1
    return other.view_as(CODES)


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 1.0])
def test_the_fraction_of_changed_codes_is_told_by_a_sample(fraction: float):
    drifts = CodeStatistics()
    drifts.start("w", CODES)

    noted = drifts.note("w", changed_by(fraction), None)
    assert noted is not None
    drift = drifts.settle({"w": noted})["w"]

    assert drift.changed == pytest.approx(fraction, abs=0.04)
    assert drift.size == CODES.numel()
    assert (drift.clipped, drift.peak) == (None, None)


@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (64, 4096), (4096, 128), (7, 1024)])
def test_the_sample_comes_through_every_column(shape: tuple[int, int]):
    drifts = CodeStatistics()
    drifts.start("w", torch.zeros(shape, dtype=torch.int8))

    noted = drifts.note("w", torch.arange(shape[1]).remainder(2).char().repeat(shape[0], 1), None)
    assert noted is not None

    assert drifts.settle({"w": noted})["w"].changed == pytest.approx(0.5, abs=0.01)
    assert 1024 <= len(noted.sample) <= 3 * 1024


def test_of_a_small_weight_every_code_is_compared():
    drifts = CodeStatistics()
    drifts.start("w", CODES[:2])
    other = CODES[:2].clone()
    other[1, 7] += 1

    noted = drifts.note("w", other, None)
    assert noted is not None

    assert drifts.settle({"w": noted})["w"].changed == pytest.approx(1 / 600)


def test_what_did_not_stand_is_not_what_the_next_is_compared_with():
    drifts = CodeStatistics()
    drifts.start("w", CODES)

    drifts.note("w", changed_by(1.0), None)  # rolled back: never settled
    noted = drifts.note("w", CODES, None)
    assert noted is not None

    assert drifts.settle({"w": noted})["w"].changed == 0


def test_the_buffer_of_a_push_may_be_used_again():
    drifts = CodeStatistics()
    buffer = CODES[:2].clone()
    drifts.start("w", buffer)
    buffer.zero_()

    noted = drifts.note("w", CODES[:2], None)
    assert noted is not None

    assert drifts.settle({"w": noted})["w"].changed == 0


def test_the_first_codes_are_compared_with_nothing():
    drifts = CodeStatistics()

    noted = drifts.note("w", CODES, None)
    assert noted is not None

    assert drifts.settle({"w": noted})["w"].changed is None


def test_fp8_codes_are_compared_bit_by_bit():
    drifts = CodeStatistics()
    drifts.start("w", torch.tensor([0.0, float("nan")]).to(torch.float8_e4m3fn))

    noted = drifts.note("w", torch.tensor([-0.0, float("nan")]).to(torch.float8_e4m3fn), None)
    assert noted is not None

    assert drifts.settle({"w": noted})["w"].changed == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_codes_is_passed_over(dtype: torch.dtype):
    assert CodeStatistics().note("norm", torch.ones(8, dtype=dtype), None) is None


def clipping(outside: int, peak: float) -> Clipping:
    return Clipping(torch.tensor(outside), torch.tensor(peak))


def test_clipping_is_counted_and_warned_of_once(caplog: pytest.LogCaptureFixture):
    drifts = CodeStatistics(warn_above=0.01)
    noted = {
        name: note
        for name, outside in (("a", 192), ("b", 384), ("c", 1))
        if (note := drifts.note(name, CODES, clipping(outside, 1 + outside / 1000)))
    }

    with caplog.at_level(logging.WARNING):
        found = drifts.settle(noted)
        drifts.settle(noted)

    assert found["a"].clipped == pytest.approx(0.01)
    assert found["b"].peak == pytest.approx(1.384)
    (record,) = caplog.records
    assert "2.00 % of b has outgrown the frozen scales" in record.getMessage()
    assert "(up to 1.38 times)" in record.getMessage()
