"""The write plan: windows, and what a reader sees of them."""

from __future__ import annotations

import pytest
import torch

from flashquant.plan import Fill, Replay, TensorPlan, View, Write, WritePlan
from flashquant.plan.writes import beside, elements_of

K_PROJ = TensorPlan(
    name="k_proj.weight",
    shape=(2, 4),
    dtype=torch.bfloat16,
    steps=(
        Write(
            source="k_proj.weight",
            source_view=View((2, 4), (4, 1), 0),
            target="qkv_proj.weight",
            target_view=View((2, 4), (4, 1), 16),
        ),
    ),
)


def test_a_slice_of_a_reused_bucket_and_a_loose_tensor_show_the_same_window():
    loose = torch.arange(12.0).view(3, 4)
    bucket = torch.full((100,), -1.0)
    bucket[40:52] = loose.flatten()
    window = View(shape=(4, 2), stride=(1, 4), offset=4)

    of_slice = window.into(bucket[40:52].view(3, 4))

    assert torch.equal(of_slice, window.into(loose))
    assert torch.equal(of_slice, loose[1:3].t())


def test_a_window_writes_through_to_the_tensor():
    parameter = torch.zeros(4, 4)

    View(shape=(2, 4), stride=(4, 1), offset=8).into(parameter).fill_(1)

    assert parameter.sum(dim=1).tolist() == [0, 0, 4, 4]


@pytest.mark.parametrize(
    "look", [lambda t: t, lambda t: t.t(), lambda t: t[2:, 1:3], lambda t: t[1].expand(3, -1)]
)
def test_the_window_a_tensor_is_leads_back_to_it(look):
    whole = torch.arange(24).view(6, 4)

    window = View.of(look(whole))

    assert torch.equal(window.into(whole), look(whole))


def test_a_window_can_be_counted_from_where_its_tensor_starts():
    bucket = torch.arange(100)
    tensor = bucket[40:52].view(3, 4)

    window = View.of(tensor[1:], start=40)

    assert window == View((2, 4), (4, 1), 4)
    assert torch.equal(window.into(tensor), tensor[1:])


@pytest.mark.parametrize(("shape", "numel"), [((3, 4), 12), ((), 1), ((0, 4), 0)])
def test_a_window_counts_its_elements(shape, numel):
    assert View(shape, (1,) * len(shape), 0).numel == numel


def test_a_printed_plan_shows_each_landing():
    other = TensorPlan(
        "A_log",
        (2,),
        torch.float32,
        (
            Replay("A_log", "A", View((2,), (1,), 0), reason="aten.exp.default"),
            Fill("A", View((6,), (1,), 2), 0.0),
        ),
    )

    lines = str(WritePlan([K_PROJ, other])).splitlines()

    assert lines == [
        "k_proj.weight (2, 4)  ->  qkv_proj.weight @ 16 shape (2, 4) stride (4, 1) (write)",
        "A_log (2,)  ->  A @ 0 shape (2,) stride (1,) (replay)",
        "A_log (2,)  ->  A @ 2 shape (6,) stride (1,) (fill)",
    ]


def test_a_printed_plan_says_which_name_the_loader_drops():
    dropped = TensorPlan("lm_head.weight", (8, 4), torch.bfloat16, ())

    assert str(WritePlan([dropped])) == "lm_head.weight (8, 4)  ->  dropped by the engine's loader"


def test_plans_of_equal_entries_are_equal():
    same = WritePlan()
    same.add({"k_proj.weight": K_PROJ})

    assert same == WritePlan([K_PROJ])
    assert WritePlan([K_PROJ]) != WritePlan()
    assert WritePlan() != "a plan"


@pytest.mark.parametrize(
    "window", [View((2, 4), (4, 1), 8), View((2, 4), (1, 4), 16), View((4, 2), (4, 1), 16)]
)
def test_plans_that_land_elsewhere_differ(window):
    step = K_PROJ.steps[0]
    moved = Write(step.source, step.source_view, step.target, window)

    elsewhere = TensorPlan(K_PROJ.name, K_PROJ.shape, K_PROJ.dtype, (moved,))

    assert WritePlan([elsewhere]) != WritePlan([K_PROJ])


def test_a_plan_names_each_target_once_in_order():
    views = [View((2,), (1,), offset) for offset in (0, 2, 4)]
    steps = (Fill("b", views[0], 0.0), Fill("a", views[1], 0.0), Fill("b", views[2], 0.0))

    assert TensorPlan("x", (2,), torch.float32, steps).targets == ("b", "a")


def test_only_a_replay_needs_the_loader():
    replay = Replay("k", "qkv", View((2,), (1,), 0), reason="aten.neg_.default")
    replayed = TensorPlan("k", (2,), torch.float32, (*K_PROJ.steps, replay))

    assert replayed.needs_loader
    assert not K_PROJ.needs_loader


def test_a_plan_keeps_the_order_in_which_names_were_first_seen():
    late = TensorPlan("a", (1,), torch.float32, ())
    plan = WritePlan([K_PROJ])

    plan.add({"a": late, "k_proj.weight": K_PROJ})

    assert plan.names == ("k_proj.weight", "a")
    assert len(plan) == 2
    assert "a" in plan
    assert "b" not in plan
    assert plan["a"] is late


def test_scales_go_where_the_rows_of_a_transposed_weight_went():
    """GPT-2: of `[K, N]`, columns 2 and 3 become rows 5 and 6."""
    turned = Write("w", View((2, 3), (1, 4), 2), "fused", View((2, 3), (3, 1), 15))
    codes = TensorPlan("w", (3, 4), torch.bfloat16, (turned,))

    (step,) = beside("w_scale", codes).steps

    assert step.source_view.into(torch.arange(4.0).view(4, 1)).flatten().tolist() == [2, 3]
    assert step.target_view.into(torch.arange(8.0).view(8, 1)).flatten().tolist() == [5, 6]
    assert step.target == "fused_scale"
    assert beside("w_scale", codes).shape == (4, 1)


def test_the_elements_that_plans_fill_are_counted_once_each():
    """And not where a loader does more than copy."""
    again = TensorPlan("k_proj.weight_loader", K_PROJ.shape, K_PROJ.dtype, K_PROJ.steps)
    computed = TensorPlan(
        "a", (2,), torch.float32, (Replay("a", "computed", View((2,), (1,), 0), "exponential"),)
    )
    padding = TensorPlan("b", (1,), torch.float32, (Fill("bias", View((3,), (1,), 0), 0.0),))

    assert elements_of([K_PROJ, again, computed, padding]) == {"qkv_proj.weight": 8, "bias": 3}


def test_scales_of_stacked_experts_go_where_their_rows_went():
    """The second of two halves of each expert, of which this rank holds half the columns."""
    codes = TensorPlan(
        "gate_up_proj",
        (3, 4, 8),
        torch.int8,
        (
            Write(
                "gate_up_proj",
                View((3, 2, 4), (32, 8, 1), 16),
                "w13",
                View((3, 2, 4), (16, 4, 1), 8),
            ),
        ),
    )
    scales, held = torch.arange(12.0).view(3, 4, 1), torch.zeros(3, 4, 1)

    plan = beside("gate_up_proj_scale", codes)
    (step,) = plan.steps
    step.target_view.into(held).copy_(step.source_view.into(scales))

    assert (plan.shape, step.target) == ((3, 4, 1), "w13_scale")
    assert held[:, 2:].equal(scales[:, 2:])
    assert not held[:, :2].any()


@pytest.mark.parametrize("one_by_one", [False, True], ids=["together", "one by one"])
def test_scales_of_stacked_experts_that_are_transposed_go_where_their_columns_went(one_by_one):
    """The second of two halves of each expert, of which this rank holds the second half."""
    whole = torch.arange(3 * 8 * 4).view(3, 8, 4)  # [E, K, N]
    held = torch.zeros(3, 4, 4)
    sources, targets = whole.mT[:, 2:, 4:], held[:, 2:]
    pairs = zip(sources, targets, strict=True) if one_by_one else [(sources, targets)]
    steps = tuple(Write("up", View.of(s), "w13", View.of(t)) for s, t in pairs)
    scales, placed = torch.arange(12.0).view(3, 4, 1), torch.zeros(3, 4, 1)

    plan = beside("up_scale", TensorPlan("up", (3, 8, 4), torch.int8, steps))
    for step in plan.steps:
        step.target_view.into(placed).copy_(step.source_view.into(scales))

    assert plan.shape == (3, 4, 1)
    assert placed[:, 2:].equal(scales[:, 2:])
    assert not placed[:, :2].any()
