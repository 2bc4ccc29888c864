"""Watching a loader: what it does with meta tensors is what it does with real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashquant.errors import ReloadError, UnknownWeight
from flashquant.plan import Fill, Replay, TensorPlan, View, Write, replay
from flashquant.plan.trace import trace, trace_one

ROWS = {"q": (0, 4), "k": (4, 2), "v": (6, 2)}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def loads(write: Callable[[str, Tensor], object]):
    """A loader that calls `write` for every pair, as the engine's own loop does."""

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, loaded in weights:
            write(name, loaded)

    return load


def fused(qkv: Tensor):
    """q, k and v side by side in one parameter."""

    def write(name: str, loaded: Tensor) -> None:
        start, rows = ROWS[name]
        window = qkv.narrow(0, start, rows)
        if window.shape != loaded.shape:
            raise AssertionError  # as vLLM's loaders do: without a word
        window.copy_(loaded)

    return loads(write)


def steps_of(write: Callable[[Tensor], object], incoming: Tensor, **targets: Tensor):
    """The steps of one tensor named "w", whose loader is `write`."""
    plans = trace_one(loads(lambda _, loaded: write(loaded)), "w", incoming, targets)
    return plans["w"].steps


def test_fused_shards_land_side_by_side():
    qkv = meta(8, 4)

    plans = trace(fused(qkv), {"v": meta(2, 4), "q": meta(4, 4), "k": meta(2, 4)}, {"qkv": qkv})

    assert {name: plan.steps[0].target_view for name, plan in plans.items()} == {
        "q": View((4, 4), (4, 1), 0),
        "k": View((2, 4), (4, 1), 16),
        "v": View((2, 4), (4, 1), 24),
    }


def test_a_plan_tells_source_target_shape_and_dtype():
    qkv = meta(8, 4, dtype=torch.int8)

    plans = trace_one(fused(qkv), "k", meta(2, 4), {"qkv": qkv})

    step = Write("k", View((2, 4), (4, 1), 0), "qkv", View((2, 4), (4, 1), 16))
    assert plans == {"k": TensorPlan("k", (2, 4), torch.bfloat16, (step,))}


def test_a_loader_that_transposes_reads_a_transposed_window():
    param = meta(3, 5)

    (step,) = steps_of(lambda loaded: param.copy_(loaded.t()), meta(5, 3), w=param)

    assert step.source_view == View((3, 5), (1, 3), 0)
    assert step.target_view == View((3, 5), (5, 1), 0)


def test_a_loader_that_writes_through_a_transpose_has_a_transposed_target():
    param = meta(3, 5)

    (step,) = steps_of(lambda loaded: param.t().copy_(loaded), meta(5, 3), w=param)

    assert step.target_view == View((5, 3), (1, 5), 0)


def test_a_tensor_parallel_loader_reads_its_own_rows():
    param = meta(2, 4)

    (step,) = steps_of(lambda loaded: param.copy_(loaded.narrow(0, 6, 2)), meta(8, 4), w=param)

    assert step.source_view == View((2, 4), (4, 1), 24)


def test_a_tensor_parallel_loader_reads_its_own_columns():
    param = meta(4, 2)

    (step,) = steps_of(lambda loaded: param.copy_(loaded[:, 2:4]), meta(4, 8), w=param)

    assert step.source_view == View((4, 2), (8, 1), 2)


@pytest.mark.parametrize(
    "pad", [lambda rows: rows.fill_(0), lambda rows: rows.zero_(), lambda rows: rows.fill_(0.0)]
)
def test_padding_becomes_a_fill_of_the_tensor_it_follows(pad):
    param = meta(6, 4)

    def write(loaded: Tensor) -> None:
        param[:5].copy_(loaded)
        pad(param[5:])

    steps = steps_of(write, meta(5, 4), vocab=param)

    assert [type(step) for step in steps] == [Write, Fill]
    assert steps[1] == Fill("vocab", View((1, 4), (4, 1), 20), 0.0)


def test_a_fill_keeps_its_value():
    param = meta(6, dtype=torch.float32)

    def write(loaded: Tensor) -> None:
        param[:5].copy_(loaded)
        param[5:].fill_(-2.5)

    assert steps_of(write, meta(5), w=param)[1].value == -2.5


def test_one_tensor_may_land_in_two_parameters():
    gate, up = meta(2, 4), meta(2, 4)

    def write(loaded: Tensor) -> None:
        gate.copy_(loaded[:2])
        up.copy_(loaded[2:])

    steps = steps_of(write, meta(4, 4), gate=gate, up=up)

    assert [(step.target, step.source_view.offset) for step in steps] == [("gate", 0), ("up", 8)]


@pytest.mark.parametrize(
    "compose",
    [
        lambda loaded: -torch.exp(loaded),
        lambda loaded: loaded.float(),
        lambda loaded: loaded[[1, 0, 3, 2]],
        lambda loaded: torch.cat([loaded[2:], loaded[:2]]),
    ],
    ids=["arithmetic", "another dtype", "indexing", "cat"],
)
def test_a_loader_that_composes_takes_the_fallback(compose):
    param = meta(4)

    (step,) = steps_of(lambda loaded: param.copy_(compose(loaded)), meta(4), w=param)

    assert isinstance(step, Replay)
    assert step == Replay("w", "w", View((4,), (1,), 0), step.reason)
    assert step.reason


def test_an_incoming_tensor_that_was_changed_takes_the_fallback():
    param = meta(4)

    (step,) = steps_of(lambda loaded: param.copy_(loaded.neg_()), meta(4), w=param)

    assert isinstance(step, Replay)


def test_the_bits_of_an_incoming_tensor_are_not_its_values():
    param = meta(4, dtype=torch.uint8)
    incoming = meta(4, dtype=torch.float8_e4m3fn)

    (step,) = steps_of(lambda loaded: param.copy_(loaded.view(torch.uint8)), incoming, w=param)

    assert isinstance(step, Replay)


def test_the_reason_of_a_composed_copy_is_what_composed_it():
    param = meta(4)

    (step,) = steps_of(lambda loaded: param.copy_(loaded.exp()), meta(4), w=param)

    assert step.reason == "aten.exp.default"


@pytest.mark.parametrize(
    ("transform", "reason"),
    [
        (lambda param: param.neg_(), "aten.neg_.default"),
        (lambda param: param.add_(1), "aten.add_.Tensor"),
        (lambda param: torch.neg(param, out=param), "aten.neg.out"),
    ],
)
def test_a_transform_after_the_copy_is_noticed_and_named(transform, reason):
    param = meta(4)

    def write(loaded: Tensor) -> None:
        param.copy_(loaded)
        transform(param)

    steps = steps_of(write, meta(4), w=param)

    assert [type(step) for step in steps] == [Write, Replay]
    assert steps[1].reason == reason


def test_a_broadcast_is_no_copy_of_a_window():
    param = meta(4)

    (step,) = steps_of(lambda loaded: param.copy_(loaded), meta(1), w=param)

    assert isinstance(step, Replay)


def waiting(param: Tensor):
    """A loader that keeps codes until their scales come, as some do of a checkpoint in fp8."""
    kept: dict[str, Tensor] = {}

    def write(name: str, loaded: Tensor) -> None:
        kept[name] = loaded
        if len(kept) == 2:
            param.copy_(kept.pop("codes") * kept.pop("scales"))

    return loads(write)


@pytest.mark.parametrize("name", ["codes", "scales"])
def test_what_a_loader_keeps_for_a_later_call_is_refused_by_name(name):
    param, both = meta(4), {"codes": meta(4), "scales": meta(4)}

    assert "codes" not in trace(waiting(param), both, {"w": param})
    with pytest.raises(ReloadError, match=f"takes '{name}' together with another tensor only"):
        trace_one(waiting(param), name, meta(4), {"w": param})


def test_a_loader_that_writes_less_for_real_than_it_was_seen_to_is_refused():
    param, memory = meta(4), torch.zeros(4)
    plan = trace_one(loads(lambda _, t: param.copy_(t + 1)), "w", meta(4), {"w": param})["w"]

    replay(loads(lambda _, t: memory.copy_(t + 1)), plan, torch.ones(4), {"w": memory})

    assert memory.tolist() == [2, 2, 2, 2]
    with pytest.raises(ReloadError, match="did not write 'w' of it"):
        replay(loads(lambda _, t: None), plan, torch.ones(4), {"w": memory})


def test_a_name_that_the_loader_drops_has_no_steps():
    assert steps_of(lambda loaded: None, meta(4), w=meta(4)) == ()


def test_what_a_loader_does_outside_the_parameters_is_its_own_business():
    assert steps_of(lambda loaded: meta(4).copy_(loaded).neg_(), meta(4), w=meta(4)) == ()


def test_a_name_the_loader_does_not_know_is_told_by_name():
    with pytest.raises(UnknownWeight, match=r"knows no weight 'z'"):
        trace_one(fused(meta(8, 4)), "z", meta(2, 4), {})


def test_vllms_own_words_for_an_unknown_name_are_understood():
    def load(weights):
        raise ValueError("There is no module or parameter named 'z' in Qwen2ForCausalLM")

    with pytest.raises(UnknownWeight, match=r"knows no weight 'model\.z'"):
        trace_one(load, "model.z", meta(2), {})


def test_a_bare_assertion_becomes_an_error_with_name_and_shape():
    qkv = meta(8, 4)

    with pytest.raises(ReloadError, match=r"refused 'k' with shape \(3, 4\) \(AssertionError\)"):
        trace_one(fused(qkv), "k", meta(3, 4), {"qkv": qkv})


def test_a_loaders_own_words_are_passed_on():
    def load(weights):
        raise RuntimeError("expected 2 experts")

    with pytest.raises(ReloadError, match="RuntimeError: expected 2 experts"):
        trace_one(load, "w", meta(2), {})


@pytest.mark.parametrize(
    ("name", "shape"), [("k", (3, 4)), ("z", (2, 4))], ids=["refused", "unknown"]
)
def test_of_several_tensors_only_the_one_that_is_not_accepted_is_left_out(name, shape):
    targets = {"qkv": meta(8, 4)}
    load = fused(targets["qkv"])
    accepted = {"q": meta(4, 4), "v": meta(2, 4)}

    plans = trace(load, {name: meta(*shape), **accepted}, targets)

    assert plans == trace(load, accepted, targets)
    assert plans.keys() == accepted.keys()


def test_an_index_beyond_the_tensor_is_a_refusal_like_any_other():
    param = meta(8, 4)

    with pytest.raises(ReloadError, match=r"refused 'w' with shape \(8,\) \(IndexError"):
        steps_of(lambda loaded: param.copy_(loaded.narrow(1, 0, 4)), meta(8), w=param)


def test_a_write_through_a_view_of_another_dtype_is_refused():
    param = meta(8, dtype=torch.int16)

    with pytest.raises(ReloadError, match=r"through a view of dtype torch.int8"):
        steps_of(
            lambda loaded: param.view(torch.int8)[8:].copy_(loaded),
            meta(8, dtype=torch.int8),
            w=param,
        )


def fills_first(param: Tensor):
    def write(loaded: Tensor) -> None:
        param.zero_()
        param[:4].copy_(loaded)

    return write


def test_a_fill_before_any_copy_is_refused():
    param = meta(6)

    with pytest.raises(ReloadError, match="fills 'w' before it copies into it"):
        steps_of(fills_first(param), meta(4), w=param)


def test_a_fill_before_any_copy_is_not_given_to_the_tensor_before():
    first, second = meta(4), meta(6)
    writes = {"a": first.copy_, "b": fills_first(second)}

    plans = trace(
        loads(lambda name, loaded: writes[name](loaded)),
        {"a": meta(4), "b": meta(4)},
        {"first": first, "second": second},
    )

    assert plans.keys() == {"a"}
    assert plans["a"].targets == ("first",)


def replaces(param: Tensor):
    def write(loaded: Tensor) -> None:
        param.data = loaded

    return write


def test_a_parameter_whose_memory_is_replaced_is_refused():
    param = torch.nn.Parameter(meta(4), requires_grad=False)

    with pytest.raises(ReloadError, match="replaced the memory of 'w'"):
        steps_of(replaces(param), meta(4), w=param)


def test_a_parameter_whose_memory_was_replaced_is_watched_again():
    param = torch.nn.Parameter(meta(4), requires_grad=False)
    with pytest.raises(ReloadError):
        steps_of(replaces(param), meta(4), w=param)

    (step,) = steps_of(lambda loaded: param.copy_(loaded), meta(4), w=param)

    assert isinstance(step, Write)


def test_a_write_from_nothing_is_refused():
    param = meta(4)

    with pytest.raises(ReloadError, match="wrote 'w' from nothing"):
        steps_of(lambda loaded: param.add_(1), meta(4), w=param)


def test_a_loader_that_reads_ahead_is_planned_as_one_that_does_not():
    qkv = meta(8, 4)
    incoming = {"q": meta(4, 4), "k": meta(2, 4)}

    def reads_ahead(weights):
        fused(qkv)(sorted(weights, key=lambda pair: pair[0]))

    ahead = trace(reads_ahead, incoming, {"qkv": qkv})

    assert ahead == trace(fused(qkv), incoming, {"qkv": qkv})


@st.composite
def sharded(draw: st.DrawFn):
    """A fused parameter, its split into shards, and the order in which they are loaded."""
    axis = draw(st.integers(0, 1))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    other, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = [other, other]
    shape[axis] = sum(sizes) + draw(st.integers(0, 2))  # the rest is padding
    order = draw(st.permutations(range(len(sizes))))
    return axis, sizes, tuple(shape), order, ranks, draw(st.integers(0, ranks - 1))


@given(
    case=sharded(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
    replay_order=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=150)
def test_replaying_the_plan_equals_loading_for_real(case, transposed, seed, replay_order):
    axis, sizes, shape, order, ranks, rank = case

    def loader(param: Tensor):
        def write(name: str, loaded: Tensor) -> None:
            index = int(name)
            if transposed:
                loaded = loaded.t()
            mine = loaded.narrow(axis, rank * sizes[index], sizes[index])
            param.narrow(axis, sum(sizes[:index]), sizes[index]).copy_(mine)
            if index == 0:
                param.narrow(axis, sum(sizes), shape[axis] - sum(sizes)).fill_(7)

        return loads(write)

    incoming = _random_shards(axis, sizes, shape, ranks, transposed, seed)
    incoming = {str(index): incoming[index] for index in order}
    real, replayed = torch.full(shape, -1.0), torch.full(shape, -1.0)
    on_meta = torch.empty(shape, device="meta")

    loader(real)(incoming.items())
    metas = {name: meta(*tensor.shape) for name, tensor in incoming.items()}
    plans = trace(loader(on_meta), metas, {"w": on_meta})
    names = list(incoming)
    replay_order.shuffle(names)
    _replay({name: plans[name] for name in names}, incoming, replayed)

    assert torch.equal(replayed, real)


def _random_shards(axis, sizes, shape, ranks, transposed, seed) -> list[Tensor]:
    """Whole, unsharded tensors, each a slice of one bucket."""
    shapes = [list(shape) for _ in sizes]
    for whole, size in zip(shapes, sizes, strict=True):
        whole[axis] = size * ranks
    bucket = torch.rand(
        sum(rows * columns for rows, columns in shapes) + 3,
        generator=torch.Generator().manual_seed(seed),
    )
    start, tensors = 3, []
    for rows, columns in shapes:
        flat = bucket[start : start + rows * columns]
        tensors.append(flat.view(columns, rows) if transposed else flat.view(rows, columns))
        start += rows * columns
    return tensors


def _replay(plans: Mapping[str, TensorPlan], incoming: Mapping[str, Tensor], into: Tensor) -> None:
    for name, plan in plans.items():
        for step in plan.steps:
            window = step.target_view.into(into)
            if isinstance(step, Fill):
                window.fill_(step.value)
            else:
                assert isinstance(step, Write)
                window.copy_(step.source_view.into(incoming[name]))
