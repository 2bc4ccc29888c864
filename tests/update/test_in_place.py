"""The short way ends where the general path does, and refuses what that refuses."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.replay import Engine, serving
from flashquant.errors import MisfitTensor, ReloadError
from flashquant.schemes import int8_channel
from flashquant.update import Session
from flashquant.update.in_place import InPlaceWrite

Serving = tuple[Session, Engine]
TENSORS = 6  # of three layers


@pytest.fixture(params=["bfloat16", "int8"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def live(dtype: str) -> Serving:
    """A session for which every name has come once, the general path."""
    session, engine = serving("fused", dtype, TENSORS)
    session.reload(engine.weights(1))
    return session, engine


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that came in place."""
    names, take = [], InPlaceWrite.take

    def noting(self, sent, update):
        taken = take(self, sent, update)
        names.extend(self.names[:1] if taken else ())
        return taken

    monkeypatch.setattr(InPlaceWrite, "take", noting)
    return names


def held(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.live.items()}


def serves(engine: Engine, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in engine.live.items())


@functools.cache
def right(dtype: str, seed: int) -> dict[str, Tensor]:
    """What a session holds that takes a policy the general path."""
    session, engine = serving("fused", dtype, TENSORS)
    session.reload(engine.weights(seed))
    return held(engine)


def test_a_tensor_takes_the_short_way_from_the_second_time_on(live, dtype, short):
    session, engine = live
    weights = engine.weights(2)

    report = session.reload(weights)

    assert short == list(weights)
    assert serves(engine, right(dtype, 2))
    assert (report.tensors, len(report.layers)) == (TENSORS, TENSORS // 2)
    assert report.bytes_in == sum(tensor.nbytes for tensor in weights.values())
    assert report.bytes_out == report.undo_bytes == sum(t.nbytes for t in engine.live.values())


def test_a_report_tells_of_codes_what_it_would_have_told(live, dtype, short, monkeypatch):
    session, engine = live
    told = session.reload(engine.weights(2)).drift
    monkeypatch.setattr(InPlaceWrite, "take", lambda self, sent, update: False)
    session.reload(engine.weights(1))

    assert session.reload(engine.weights(2)).drift == told
    assert len(told) == (TENSORS if dtype == "int8" else 0)


def test_the_same_codes_count_as_unchanged(live):
    session, engine = live

    assert {drift.changed for drift in session.reload(engine.weights(1)).drift.values()} <= {0.0}


WRONG = {
    "NaN": lambda t: torch.where(torch.arange(t.numel()).view_as(t) == 5, torch.nan, t),
    "infinite": lambda t: torch.where(torch.arange(t.numel()).view_as(t) == 5, -torch.inf, t),
    "a row too many": lambda t: torch.cat([t, t[:1]]),
    "another shape": lambda t: t.view(-1),
    "int64": lambda t: t.long(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "no tensor": lambda t: None,
    "an array": lambda t: t.float().numpy(),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("at", [0, 3, TENSORS - 1])
def test_what_is_wrong_is_refused_in_the_same_words_and_taken_back(dtype, wrong, at, monkeypatch):
    said = []
    for way in ("long", "short"):
        session, engine = serving("fused", dtype, TENSORS)
        session.reload(engine.weights(1))
        if way == "long":
            monkeypatch.setattr(InPlaceWrite, "take", lambda self, sent, update: False)
        weights = engine.weights(2)
        weights[list(weights)[at]] = wrong(list(weights.values())[at])
        with pytest.raises(MisfitTensor) as refused:
            session.reload(weights)
        assert serves(engine, right(dtype, 1))
        said.append(str(refused.value))
        monkeypatch.undo()

    assert said[0] == said[1]


def test_a_sharded_tensor_is_refused(live, dtype, short):
    session, engine = live
    weights = engine.weights(2)
    name = next(iter(weights))
    sharded = torch.Tensor._make_wrapper_subclass(DTensor, (8, 64), dtype=torch.bfloat16)

    with pytest.raises(MisfitTensor, match="sharded"):
        session.reload({**weights, name: sharded})

    assert serves(engine, right(dtype, 1))


def test_a_name_that_comes_twice_is_refused(live, dtype):
    session, engine = live
    weights = list(engine.weights(2).items())

    with pytest.raises(MisfitTensor, match="twice"):
        session.reload([*weights, weights[0]])

    assert serves(engine, right(dtype, 1))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_trainer_that_fails_leaves_what_was_there(live, dtype, short, error):
    session, engine = live

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from list(engine.weights(2).items())[:3]
        raise error

    with pytest.raises(error):
        session.reload(stream())

    assert len(short) == 3
    assert serves(engine, right(dtype, 1))
    session.reload(engine.weights(2))
    assert serves(engine, right(dtype, 2))


def test_half_of_a_layer_is_taken_back(live, dtype, short):
    session, engine = live

    session.begin()
    session.push(list(engine.weights(2).items())[:3])
    with pytest.raises(ReloadError, match="half arrived"):
        session.finish()

    assert len(short) == 3
    assert serves(engine, right(dtype, 1))


def test_what_was_taken_back_completes_nothing_afterwards(live, dtype, short):
    """Its other half, pushed by itself, waits: an old shard and a new one would be a mixture."""
    session, engine = live
    half, rest = list(engine.weights(2).items())[2:4]

    session.begin()
    session.push([half])
    session.abandon()
    session.push([rest])

    assert short == [half[0]]
    assert serves(engine, right(dtype, 1))
    assert len(session.status().pending) == 1


def test_a_push_that_fails_leaves_the_shard_that_waited(live, dtype):
    """What it overwrote in the stage, codes made there among it, is put back."""
    session, engine = live
    first, second = list(engine.weights(2).items())[:2]
    newer, broken = list(engine.weights(3).items())[:2]

    session.push([first])
    with pytest.raises(MisfitTensor, match="NaN"):
        session.push([newer, (broken[0], broken[1] * torch.nan)])
    session.push([second])

    layer = {name: t for name, t in right(dtype, 2).items() if name.startswith("layers.0")}
    assert layer
    assert all(torch.equal(engine.live[name], tensor) for name, tensor in layer.items())


def test_a_push_that_fails_leaves_no_shard_behind(live, dtype):
    """Or the other half of the layer, pushed by itself, would go live with it: a mixture."""
    session, engine = live
    first, broken = list(engine.weights(2).items())[:2]
    second = list(engine.weights(3).items())[1]

    with pytest.raises(MisfitTensor, match="NaN"):
        session.push([first, (broken[0], broken[1] * torch.nan)])
    session.push([second])

    assert serves(engine, right(dtype, 1))
    parameters = tuple(name for name in engine.live if name.startswith("layers.0."))
    assert session.status().pending == {"layers.0": parameters}


def test_what_a_roll_back_writes_is_no_foreign_write(live, dtype):
    session, engine = live
    stream = [*list(engine.weights(2).items())[:2], ("layers.1.0.weight", None)]

    with pytest.raises(MisfitTensor):
        session.reload(stream)

    assert session.status().foreign == ()
    assert serves(engine, right(dtype, 1))


@pytest.mark.parametrize("dtype", ["int8"])  # bf16 parameters round float32: the general path
def test_another_dtype_is_learned_from_its_first_tensor(live, dtype, short):
    session, engine = live
    weights = {name: tensor.float() for name, tensor in engine.weights(2).items()}

    session.reload(weights)
    assert short == []
    session.reload(weights)

    assert short == list(weights)
    assert serves(engine, right(dtype, 2))


OTHERS = {
    "another dtype": lambda t: t.float(),
    "columns apart": lambda t: t.t().contiguous().t(),
    "rows apart": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_does_not_fit_takes_the_long_way_beside_it(live, dtype, short, other):
    session, engine = live
    weights = {
        name: tensor if index % 2 else other(tensor)
        for index, (name, tensor) in enumerate(engine.weights(2).items())
    }

    session.reload(weights)

    assert len(short) == TENSORS // 2
    assert serves(engine, right(dtype, 2))


def test_codes_that_are_pushed_as_codes_are_looked_at_the_long_way():
    """Nobody makes them here, but a report tells of them all the same."""
    session, engine = serving("fused", "int8", TENSORS)
    stored = {
        one: values
        for name, tensor in engine.weights(2).items()
        for one, values in zip((name, f"{name}_scale"), int8_channel(tensor), strict=True)
    }
    session.reload(stored)

    report = session.reload(stored)

    assert {drift.changed for drift in report.drift.values()} == {0.0}
    assert report.drift.keys() == engine.weights(2).keys()
    assert serves(engine, right("int8", 2))


@pytest.mark.parametrize("prepare", [True, False])
def test_it_is_for_brackets_only(live, dtype, short, prepare):
    session, engine = live
    if prepare:
        session.reload(engine.weights(2), prepare=True)
    else:
        session.push(engine.weights(2).items())

    assert short == []
    assert serves(engine, right(dtype, 2))


def test_the_memory_of_a_tensor_may_be_used_again(live, dtype, short):
    session, engine = live
    buffer = torch.empty(8, 64, dtype=torch.bfloat16)

    session.reload((name, buffer.copy_(tensor)) for name, tensor in engine.weights(2).items())

    assert len(short) == TENSORS
    assert serves(engine, right(dtype, 2))


def test_without_kernels_the_definitions_do_the_work(dtype, short, monkeypatch):
    monkeypatch.setattr("flashquant.schemes.native.kernels", lambda: None)
    session, engine = serving("fused", dtype, TENSORS)
    session.reload(engine.weights(1))
    weights = engine.weights(2)

    session.reload(weights)
    assert short == list(weights)
    assert serves(engine, right(dtype, 2))

    weights["layers.1.1.weight"] = WRONG["NaN"](weights["layers.1.1.weight"])
    with pytest.raises(MisfitTensor, match=r"layers\.1\.1\.weight holds NaN"):
        session.reload(weights)
    assert serves(engine, right(dtype, 2))


def test_on_a_device_a_doubt_waits_for_the_end_of_the_update(dtype, short, monkeypatch):
    """As long as the device has not answered, nothing stands."""
    quick = importlib.import_module("flashquant.update.in_place").storing

    def waiting(*args):
        store = quick(*args)
        return lambda weight: torch.tensor(store(weight))

    monkeypatch.setattr("flashquant.update.in_place.storing", waiting)
    session, engine = serving("fused", dtype, TENSORS)
    session.reload(engine.weights(1))
    weights = engine.weights(2)
    weights["layers.0.0.weight"] = WRONG["infinite"](weights["layers.0.0.weight"])

    with pytest.raises(MisfitTensor, match=r"layers\.0\.0\.weight holds NaN"):
        session.reload(weights)

    assert len(short) == TENSORS
    assert serves(engine, right(dtype, 1))
