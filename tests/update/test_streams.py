"""Chunks on streams by turns, as vLLM's packed NCCL transfer hands them over."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer import packed_tensor

from flashquant.errors import ReloadError
from flashquant.update import Session
from tests.support.fake_engine import NEW, OLD, FakeEngine, fresh, only, serves, serving
from tests.support.streams import Races, StandInStream, StandInStreams

Chunk = Sequence[tuple[str, Tensor]]
CHUNKS: list[Chunk] = [
    only("q.weight"),
    only("k.weight"),
    only("norm.weight"),
    only("lm_head.weight"),
]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> StandInStreams:
    monkeypatch.setenv("FLASHQUANT_NATIVE", "0")  # what is computed in C is not followed
    return StandInStreams().installed(monkeypatch)


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.device = torch.device("cuda", 0)
    return engine


def into(buffer: Tensor, values: Tensor) -> Tensor:
    """A view of a buffer, which holds these values now."""
    return buffer[: values.nbytes].view(values.dtype).view(values.shape).copy_(values)


def received(session: Session, streams: StandInStreams, chunks: Sequence[Chunk]) -> None:
    """Two streams by turns, each with a buffer of its own that is filled anew."""
    names = ("first", "second")
    buffers = [(streams.new(name), torch.empty(64, dtype=torch.uint8)) for name in names]
    for turn, chunk in enumerate(chunks):
        stream, buffer = buffers[turn % 2]
        stream.synchronize()
        with streams.on(stream):
            session.push([(name, into(buffer, values)) for name, values in chunk])
    for stream, _ in buffers:
        stream.synchronize()


@pytest.mark.parametrize("bracket", [True, False])
def test_layers_that_chunks_have_in_common_are_in_order(
    engine: FakeEngine, streams: StandInStreams, bracket: bool
) -> None:
    session = serving(engine)
    with Races(streams) as races:
        if bracket:
            session.begin()
        received(session, streams, CHUNKS)
        if bracket:
            session.finish()
    assert races.found == []
    assert serves(engine, fresh(NEW))


@pytest.mark.skipif(
    "device" not in inspect.signature(packed_tensor.packed_nccl_broadcast_consumer).parameters,
    reason="this vLLM receives on a GPU only",
)
def test_vllms_packed_transfer_is_such_a_caller(
    engine: FakeEngine, streams: StandInStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own code, of which only the broadcast is left out."""
    monkeypatch.setattr("torch.cuda.Stream", lambda *_, **__: streams.new(f"{next(count)}"))
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: None)
    count, session, trainer = itertools.count(), serving(engine), iter(NEW.values())

    def broadcast(into: Tensor, src: int) -> None:
        into.copy_(next(trainer).flatten().view(torch.uint8))

    with Races(streams) as races:
        session.begin()
        packed_tensor.packed_nccl_broadcast_consumer(
            iter((name, (list(v.shape), v.dtype)) for name, v in NEW.items()),
            SimpleNamespace(broadcast=broadcast),
            src=0,
            post_unpack_func=session.push,
            buffer_size_bytes=1,  # a chunk a tensor
            device="cpu",
        )
        session.finish()
    assert len(streams.named) > 1
    assert races.found == []
    assert serves(engine, fresh(NEW))


def test_what_is_taken_back_on_another_stream_is_in_order(
    engine: FakeEngine, streams: StandInStreams
) -> None:
    session = serving(engine)
    bad = [("norm.weight", torch.full((4,), float("nan")).bfloat16())]
    with Races(streams) as races:
        session.begin()
        with pytest.raises(ReloadError):
            received(session, streams, [*CHUNKS[:2], bad])
    assert races.found == []
    assert serves(engine, fresh(OLD))


def test_a_caller_on_the_engines_own_stream_waits_for_nothing(
    engine: FakeEngine, streams: StandInStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = serving(engine)
    monkeypatch.setattr("tests.support.streams.StandInStream.wait_stream", None)
    session.reload(NEW)
    assert serves(engine, fresh(NEW))


def test_a_step_is_waited_for_on_a_stream_that_vllm_has_made_since_the_start(
    engine: FakeEngine, streams: StandInStreams
) -> None:
    """It may still run when the next tensors come, from a trainer's stream."""
    session, steps, trainers = serving(engine), streams.new("steps"), streams.new("trainer's")
    with Races(streams) as races:
        session.push(list(OLD.items()))
        step(session, engine, streams, steps)
        with streams.on(trainers):
            session.push(list(NEW.items()))
        step(session, engine, streams, steps)
    assert races.found == []


def step(
    session: Session, engine: FakeEngine, streams: StandInStreams, stream: StandInStream
) -> None:
    """All that is live is read."""
    with streams.on(stream):
        session.check_servable()
        for live in engine.live.values():
            torch.neg(live)
