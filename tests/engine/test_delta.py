"""Codes made by a sender, and what changed of them, on the real engine."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashquant
from flashquant.errors import BrokenDelta, MisfitTensor, StaleBase
from flashquant.patches.seams.loading import deltas_of
from flashquant.sender import BundleStore, Delta, Manifest, Sender
from tests.engine.kernels import want_int4
from tests.engine.processes import CORES, assert_lost, run
from tests.engine.serving import BY_ROW, Serving, needs, serve
from tests.engine.trainer import STEPS, stepped
from tools.models.policies import FP8, SCHEMES, Policies, config_name

pytestmark = pytest.mark.engine

CODES = {"int8": torch.int8, "fp8_channel": torch.float8_e4m3fn}
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture(params=list(CODES))
def live(request: pytest.FixtureRequest, policies: Policies) -> Iterator[Serving]:
    serving = serve(policies.bf16("a"), request.param)
    flashquant.reload_weights(serving.llm, policies.tensors("a"))
    yield serving
    flashquant.reload_weights(serving.llm, policies.tensors("a"))


def test_an_engine_says_the_same_of_what_it_wants_through_every_target(live: Serving) -> None:
    worker = live.llm.llm_engine.model_executor.driver_worker.worker

    manifest = flashquant.manifest(live.llm)

    assert isinstance(manifest, Manifest)
    assert flashquant.manifest(worker) == flashquant.manifest(live.model) == manifest
    assert manifest.tensors[O_PROJ].torch_dtype == CODES[live.scheme]
    assert manifest.tensors[f"{O_PROJ}_scale"].shape == (256, 1)


@pytest.fixture
def other(live: Serving, policies: Policies) -> Serving:
    """Another engine of the scheme, for whole reloads of the same weights."""
    return serve(policies.served("b", live.scheme), config_name(live.scheme))


def test_codes_that_a_sender_made_are_those_that_the_engine_would_make(
    live: Serving, other: Serving, policies: Policies
) -> None:
    """Through the door that takes bf16; half of the bytes."""
    weights = policies.tensors("b")
    whole = flashquant.reload_weights(other.llm, weights)

    sender = Sender(flashquant.manifest(live.llm))
    report = flashquant.reload_weights(live.llm, sender.stream(weights))

    assert report.digest == whole.digest
    assert report.bytes_in < whole.bytes_in
    live.snapshot().assert_same(other.snapshot())


def test_twenty_deltas_in_a_row_are_twenty_whole_reloads(
    live: Serving, other: Serving, policies: Policies
) -> None:
    """The same digest after each; the same tokens and log-probs at the end."""
    weights = policies.tensors("b")
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    whole = sender.bundle(weights)
    flashquant.apply_delta(live.llm, whole)

    for seed in range(20):
        weights = stepped(weights, seed)
        delta = sender.bundle(weights)
        report = flashquant.apply_delta(live.llm, delta)

        assert report.digest == flashquant.reload_weights(other.llm, weights).digest
        assert flashquant.manifest(live.llm).digest == delta.header.digest
        assert not delta.is_whole
        assert delta.nbytes < whole.nbytes

    live.snapshot().assert_same(other.snapshot())
    assert flashquant.status(live.llm).foreign == ()
    flashquant.reload_weights(live.llm, weights)
    assert flashquant.status(live.llm).digest == report.digest


def by_file(live: Serving, delta: Delta, path: Path) -> None:
    delta.save(path)
    flashquant.apply_delta(live.llm, path)


def by_worker(live: Serving, delta: Delta, path: Path) -> None:
    flashquant.apply_delta(live.llm.llm_engine.model_executor.driver_worker.worker, delta)


def as_over_http(live: Serving, delta: Delta, path: Path) -> None:
    """By the name and the path that `flashquant sync` posts to `/collective_rpc`."""
    delta.save(path)
    live.llm.collective_rpc("flashquant_try_apply_delta", args=(str(path),))


def by_transfer_engine(live: Serving, delta: Delta, path: Path) -> None:
    """As `flashquant_file` and `flashquant_gloo` do: in a bracket that others open and finish."""
    from vllm.model_executor.model_loader import reload

    reload.initialize_layerwise_reload(live.model)
    deltas_of(live.model).take(delta)
    reload.finalize_layerwise_reload(live.model, live.llm.llm_engine.model_config)


DOORS = [
    lambda live, delta, path: flashquant.apply_delta(live.llm, delta),
    by_transfer_engine,
    by_file,
    by_worker,
    as_over_http,
]


@pytest.mark.parametrize("scheme", [*SCHEMES, FP8, "int4_g32"])
def test_every_scheme_takes_deltas_by_every_door(
    policies: Policies, scheme: str, tmp_path: Path
) -> None:
    """Where codes cannot be sent, changed floats are. After each, the digest of a whole reload."""
    if scheme.startswith("int4"):
        want_int4(scheme)
    live, other = (
        serve(policies.served(policy, scheme), config_name(scheme)) for policy in ("a", "b")
    )
    weights = policies.tensors("b")
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    flashquant.apply_delta(live.llm, sender.bundle(weights))

    for seed in range(STEPS):
        weights = stepped(weights, seed)
        DOORS[seed % len(DOORS)](live, sender.bundle(weights), tmp_path / "delta.safetensors")

        digest = flashquant.status(live.llm).digest
        assert digest == flashquant.reload_weights(other.llm, weights).digest

    live.snapshot().assert_same(other.snapshot())


@pytest.mark.parametrize("scheme", ["int8", "fp8_channel"])
def test_a_model_with_a_tied_head_takes_deltas(scheme: str, tmp_path: Path) -> None:
    policies = Policies(tmp_path, "tied")
    live, other = (serve(policies.bf16(policy), scheme) for policy in "ab")
    weights = policies.tensors("b")
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    flashquant.apply_delta(live.llm, sender.bundle(weights))

    report = flashquant.apply_delta(live.llm, sender.bundle(stepped(weights, 1)))

    whole = flashquant.reload_weights(other.llm, stepped(weights, 1))
    assert report.digest == whole.digest
    live.snapshot().assert_same(other.snapshot())


def test_a_file_does_as_well_as_an_object_and_a_worker_as_an_llm(
    live: Serving, policies: Policies, tmp_path: Path
) -> None:
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    sender.bundle(policies.tensors("b")).save(tmp_path / "1.safetensors")
    delta = sender.bundle(stepped(policies.tensors("b"), 1))
    worker = live.llm.llm_engine.model_executor.driver_worker.worker

    flashquant.apply_delta(live.llm, tmp_path / "1.safetensors")
    flashquant.apply_delta(worker, delta)

    assert flashquant.manifest(live.model).digest == delta.header.digest


def test_only_the_first_delta_needs_a_whole_bundle_and_only_where_kernels_pack(
    live: Serving, policies: Policies
) -> None:
    """An engine that shows its codes knows by itself which policy it serves."""
    manifest = flashquant.manifest(live.llm)
    sender = Sender(manifest, delta=True)
    first = sender.bundle(policies.tensors("a"))
    delta = sender.bundle(stepped(policies.tensors("a"), 1))
    before = live.snapshot()

    if manifest.digest is None:
        with pytest.raises(StaleBase, match="packed for a kernel"):
            flashquant.apply_delta(live.llm, delta)
        live.snapshot().assert_same(before)
        flashquant.apply_delta(live.llm, first)
    else:
        assert manifest.digest == first.header.digest
    flashquant.apply_delta(live.llm, delta)

    assert flashquant.manifest(live.llm).digest == delta.header.digest


def test_an_engine_that_was_stopped_for_20_steps_catches_up_from_the_folder(
    live: Serving, other: Serving, policies: Policies, tmp_path: Path, caplog: Any
) -> None:
    """By 20 deltas; with one of the next ones gone, by the last whole bundle, which is said."""
    store, weights = BundleStore(tmp_path), policies.tensors("b")
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    store.put(sender.bundle(weights))

    def steps(seeds: range, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        for seed in seeds:
            weights = weights | norms(weights, seed)
            store.put(sender.bundle(weights))
        return weights

    def catch_up() -> list[str]:
        paths = store.path_from(flashquant.manifest(live.llm).digest)
        for path in paths:
            flashquant.apply_delta(live.llm, path)
        return [path.name for path in paths]

    catch_up()
    weights = steps(range(0, 40, 2), weights)
    assert len(catch_up()) == 20
    digest = flashquant.status(live.llm).digest
    assert digest == flashquant.reload_weights(other.llm, weights).digest

    first = store.newest
    weights = steps(range(40, 44, 2), weights)
    store.put(sender.snapshot())
    next(tmp_path.glob(f"*-{first}-*")).unlink()
    with caplog.at_level(logging.WARNING):
        (taken,) = catch_up()
    assert "-whole-" in taken
    assert "by a whole bundle" in caplog.text
    digest = flashquant.status(live.llm).digest
    assert digest == flashquant.reload_weights(other.llm, weights).digest


def norms(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A step that moves the norms alone."""
    return {name: t for name, t in stepped(weights, seed).items() if "norm" in name}


def test_a_bundle_that_cannot_be_applied_leaves_every_bit_as_it_was(
    live: Serving, policies: Policies, tmp_path: Path
) -> None:
    """Skipped, sent twice, cut, spoilt on its way, of another engine; then the good one goes in."""
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    weights = policies.tensors("b")
    flashquant.apply_delta(live.llm, sender.bundle(weights))
    before = live.snapshot()
    good = sender.bundle(stepped(weights, 1))
    later = sender.bundle(stepped(weights, 2))
    file = tmp_path / "cut.safetensors"
    good.save(file)
    file.write_bytes(file.read_bytes()[:-1])
    elsewhere = good.header.model_copy(update={"scheme": "bf16"})

    bad = [later, file, Delta(elsewhere, good.parts), *spoilt(good, 40)]
    for bundle in bad:
        with pytest.raises((StaleBase, BrokenDelta, MisfitTensor)):
            flashquant.apply_delta(live.llm, bundle)
        assert flashquant.status(live.llm).digest == before.digest
    live.snapshot().assert_same(before)

    flashquant.apply_delta(live.llm, good)
    with pytest.raises(StaleBase, match=f"the engine serves {good.header.digest}"):
        flashquant.apply_delta(live.llm, good)
    flashquant.apply_delta(live.llm, later)
    assert flashquant.manifest(live.llm).digest == later.header.digest


def spoilt(delta: Delta, count: int) -> Iterator[Delta]:
    """One bit of a value is another one."""
    dice = random.Random(0)
    values = [name for name, part in delta.parts.items() if "#" not in name or "#values" in name]
    for name in dice.sample(values, min(count, len(values))):
        part = delta.parts[name].clone()
        part.view(-1).view(torch.uint8)[dice.randrange(part.nbytes)] ^= 1 << dice.randrange(8)
        yield Delta(delta.header, delta.parts | {name: part})


def test_after_a_whole_reload_a_delta_is_stale_until_a_snapshot(
    live: Serving, policies: Policies
) -> None:
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    flashquant.apply_delta(live.llm, sender.bundle(policies.tensors("b")))
    flashquant.reload_weights(live.llm, policies.tensors("a"))
    delta = sender.bundle(stepped(policies.tensors("b"), 1))

    with pytest.raises(StaleBase):
        flashquant.apply_delta(live.llm, delta)
    flashquant.apply_delta(live.llm, sender.snapshot())

    assert flashquant.manifest(live.llm).digest == delta.header.digest


@pytest.mark.parametrize(
    "scheme",
    ["int8", pytest.param("fp8_channel", marks=needs(">=0.28", "scales of whole rows over ranks"))],
)
def test_two_ranks_apply_a_delta_together_or_not_at_all(policies: Policies, scheme: str) -> None:
    """Each holds a shard of every tensor, and keeps the whole ones as they were sent."""
    answer = run(
        "deltas",
        "ranks",
        policies.bf16("a"),
        policies.bf16("b"),
        FLASHRL_CONFIG=scheme,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # to send the workers a fault
        VLLM_CPU_OMP_THREADS_BIND=CORES,
        DELTA_STEPS=str(STEPS),
    )

    assert answer["digest before"] is None
    assert answer["digest"][0] == answer["digest"][1]
    assert answer["whole"] == answer["reload"]
    assert answer["failed"][:2] == ["ReloadError", "rank 1: MemoryError: injected"]
    assert answer["after failure"] == answer["whole"]
    assert answer["delta"] == answer["reload of the same"] != answer["whole"]
    assert answer["stale"][0] == "StaleBase"
    assert answer["after stale"] == answer["delta"]
    assert answer["after many"] == answer["reload of these"] != answer["delta"]
    assert_lost(answer["died"], rank=1)


def test_an_async_engine_takes_deltas(policies: Policies) -> None:
    answer = run(
        "deltas",
        "asynchronous",
        policies.bf16("a"),
        policies.bf16("b"),
        FLASHRL_CONFIG=BY_ROW,
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )

    assert answer["delta"] == answer["reload"]
    assert answer["stale"][0] == "StaleBase"
