"""Which parameters wait for each other before any of them goes live."""

from __future__ import annotations

import pytest
import torch

from flashquant.patches.layers.readiness import (
    belong_together,
    half_arrived,
    lacking_to_process,
    lacking_with_partners,
    partners,
)
from flashquant.plan import View
from flashquant.update import Stage

ROWS = [View((1, 2), (2, 1), 2 * row) for row in range(2)]


def stages(**rows: int) -> dict[str, Stage]:
    """Parameters of two rows, of which so many have arrived."""
    made = {name: Stage(torch.Size((2, 2)), (2, 1), torch.float32) for name in rows}
    for name, count in rows.items():
        for view in ROWS[:count]:
            made[name].arrived(view)
    return made


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "weight_zero_point"])
def test_a_scale_belongs_to_its_codes_whichever_is_asked_about(name: str) -> None:
    assert belong_together("weight", name)
    assert belong_together(name, "weight")


@pytest.mark.parametrize("name", ["bias", "weight", "weights"])
def test_names_that_do_not_follow_the_weights_do_not_belong_to_it(name: str) -> None:
    assert not belong_together("weight", name)


def test_half_a_parameter_is_waited_for() -> None:
    assert half_arrived(stages(weight=1, bias=0, norm=2)) == ("weight",)


@pytest.mark.parametrize(("codes", "scales"), [(2, 0), (0, 1), (0, 2)])
def test_codes_and_scales_wait_for_each_other(codes: int, scales: int) -> None:
    of = stages(weight=codes, weight_scale=scales, bias=0)

    lacking = set(lacking_with_partners(of, partners(of)))

    assert lacking == {n for n, rows in (("weight", codes), ("weight_scale", scales)) if rows < 2}


def test_a_bias_that_is_passed_through_goes_alone() -> None:
    of = stages(weight=0, bias=2)

    assert lacking_to_process(of, alone={"bias"}, kept=()) == ()


def test_what_is_processed_waits_for_all_that_cannot_be_read_back() -> None:
    of = stages(weight=2, other=0, bias=0)

    assert lacking_to_process(of, alone={"bias"}, kept=()) == ("other",)


def test_what_is_live_in_checkpoint_format_is_read_from_there() -> None:
    of = stages(weight=2, other=0)

    assert lacking_to_process(of, alone=(), kept={"other"}) == ()


@pytest.mark.parametrize("arrived", ["weight", "weight_scale"])
def test_kept_codes_do_not_go_with_new_scales_nor_kept_scales_with_new_codes(arrived: str) -> None:
    of = stages(weight=0, weight_scale=0) | stages(**{arrived: 2})
    (other,) = {"weight", "weight_scale"} - {arrived}

    assert lacking_to_process(of, alone=(), kept={"weight", "weight_scale"}) == (other,)


def test_a_layer_in_which_nothing_has_arrived_waits_for_nothing() -> None:
    assert lacking_to_process(stages(weight=0, bias=0), alone=(), kept=()) == ()
