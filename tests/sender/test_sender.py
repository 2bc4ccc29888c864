"""What a sender makes of a trainer's weights, whole and as changes."""

from __future__ import annotations

import json

import pytest
import torch

from flashquant.errors import IncompleteUpdate, MisfitTensor, ReloadError, UnknownWeight
from flashquant.schemes import fp8_channel, int8_channel
from flashquant.sender import Manifest, Sender, TensorSpec

W, NORM, EMBED, HEAD = "w.weight", "norm.weight", "embed.weight", "lm_head.weight"
SHAPES = {W: (64, 48), "b.weight": (32, 48), NORM: (48,), EMBED: (128, 48)}
QUANTIZE = {"int8": int8_channel, "float8_e4m3fn": fp8_channel}


def manifest(codes="int8", rounds_to=None):
    tensors = {}
    for name, shape in SHAPES.items():
        if name in (NORM, EMBED):
            tensors[name] = TensorSpec(shape=shape, dtype="bfloat16")
            continue
        scales = f"{name}_scale"
        tensors[name] = TensorSpec(shape=shape, dtype=codes, scales=scales, rounds_to=rounds_to)
        tensors[scales] = TensorSpec(shape=(shape[0], 1), dtype="float32")
    tied = {HEAD: EMBED}
    return Manifest(scheme="int8", version=0, digest=None, tensors=tensors, tied=tied)


def policy(seed=0):
    dice = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=dice).bfloat16() * 0.02 for name, shape in SHAPES.items()
    }


def moved(weights, seed):
    dice = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() * (1 + 1e-3 * torch.randn(tensor.shape, generator=dice))).bfloat16()
        for name, tensor in weights.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8))
        for n in one
    )


def applied(delta, base):
    """What a receiver holds after it."""
    return base | {
        name: delta.rebuilt(name, base[name].clone() if name in base else torch.empty(0))
        for name in delta.header.tensors
    }


@pytest.mark.parametrize("codes", list(QUANTIZE))
def test_codes_are_those_of_the_definition_and_the_rest_passes(codes):
    weights = policy()

    sent = dict(Sender(manifest(codes)).stream(weights))

    for name in (W, "b.weight"):
        expected = QUANTIZE[codes](weights[name])
        assert same(
            {"codes": sent[name], "scales": sent[f"{name}_scale"]},
            {"codes": expected[0], "scales": expected[1]},
        )
    assert torch.equal(sent[NORM], weights[NORM])


def test_float32_is_quantized_in_its_own_precision_unless_the_engine_rounds_it():
    """As a fresh engine would: vLLM's online schemes hold bf16 first."""
    weights = {name: tensor.float() * 1.001 for name, tensor in policy().items()}

    own = dict(Sender(manifest()).stream(weights))
    rounded = dict(Sender(manifest(rounds_to="bfloat16")).stream(weights))

    assert torch.equal(own[W], int8_channel(weights[W])[0])
    assert torch.equal(rounded[W], int8_channel(weights[W].bfloat16())[0])
    assert not torch.equal(own[W], rounded[W])
    assert own[NORM].dtype == torch.bfloat16


def test_codes_that_the_trainer_made_itself_pass():
    made = dict(Sender(manifest()).stream(policy()))

    assert same(dict(Sender(manifest()).stream(made)), made)


def test_a_sharded_tensor_is_gathered():
    class Sharded:
        def full_tensor(self):
            return policy()[NORM]

    assert torch.equal(dict(Sender(manifest()).stream({NORM: Sharded()}))[NORM], policy()[NORM])


def test_a_manifest_may_come_as_plain_data():
    plain = json.loads(manifest().model_dump_json())

    assert same(dict(Sender(plain).stream(policy())), dict(Sender(manifest()).stream(policy())))


@pytest.mark.parametrize("kind", ["bundle", "stream"])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"nobody.weight": torch.zeros(2)}, UnknownWeight, "nobody.weight is none of the 6"),
        ({W: torch.zeros(3, 48)}, MisfitTensor, "has shape"),
        ({W: torch.full((64, 48), torch.nan)}, MisfitTensor, "NaN"),
        ({NORM: torch.full((48,), torch.inf)}, MisfitTensor, "NaN or infinite"),
        ({W: torch.zeros(64, 48, dtype=torch.int32)}, MisfitTensor, r"is torch\.int32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, change, error, says):
    with pytest.raises(error, match=says):
        dict(Sender(manifest()).stream(policy() | change)) if kind == "stream" else Sender(
            manifest()
        ).bundle(policy() | change)


def test_the_first_bundle_is_whole_and_the_next_ones_hold_what_changed():
    sender, weights = Sender(manifest(), delta=True), policy()
    first = sender.bundle(weights)
    held = applied(first, {})
    assert first.is_whole
    assert same(held, dict(Sender(manifest()).stream(weights)))

    for seed in range(20):
        weights = moved(weights, seed)
        before, delta = held, sender.bundle(weights)
        held = applied(delta, held)

        assert not delta.is_whole
        assert delta.nbytes < first.nbytes
        assert same(held, dict(Sender(manifest()).stream(weights)))
        assert not same(held, before)


def test_each_bundle_starts_where_the_last_one_ended():
    sender, weights = Sender(manifest(), delta=True), policy()

    bundles = [sender.bundle(moved(weights, seed)) for seed in range(3)]

    assert [b.header.base for b in bundles] == [None, *(b.header.digest for b in bundles[:-1])]
    assert [b.header.version for b in bundles] == [1, 2, 3]
    assert len({b.header.digest for b in bundles}) == 3


def test_an_optimizer_that_writes_in_place_changes_nothing_that_was_kept():
    """A bf16 tensor passes as it is: it must not be the trainer's own memory."""
    sender, weights = Sender(manifest(), delta=True), policy()
    first = sender.bundle(weights)
    held = applied(first, {})
    kept = held[NORM].clone()

    weights[NORM].add_(0.5)

    assert torch.equal(held[NORM], kept)
    assert NORM in sender.bundle(weights).header.tensors


def test_bundles_hold_nothing_that_their_sender_goes_on_writing():
    sender = Sender(manifest(), delta=True)
    bundles = [sender.bundle(policy()), sender.bundle(moved(policy(), 1)), sender.snapshot()]
    before = [{name: part.clone() for name, part in bundle.parts.items()} for bundle in bundles]

    for seed in (2, 3):
        sender.bundle(moved(policy(), seed))

    for bundle, parts in zip(bundles, before, strict=True):
        assert same(bundle.parts, parts)


def test_nothing_changed_is_an_empty_bundle():
    sender = Sender(manifest(), delta=True)
    first, second = sender.bundle(policy()), sender.bundle(policy())

    assert (second.header.tensors, second.nbytes) == ({}, 0)
    assert second.header.base == second.header.digest == first.header.digest


def test_a_bundle_that_fails_leaves_the_last_one_the_last():
    sender, weights = Sender(manifest(), delta=True), policy()
    first = sender.bundle(weights)
    bad = moved(weights, 1) | {EMBED: torch.full((128, 48), torch.nan)}

    with pytest.raises(MisfitTensor, match="NaN"):
        sender.bundle(bad)
    with pytest.raises(IncompleteUpdate, match=NORM):
        sender.bundle({name: t for name, t in moved(weights, 1).items() if name != NORM})

    after = sender.bundle(moved(weights, 2))
    assert after.header.base == first.header.digest
    assert same(
        applied(after, applied(first, {})), dict(Sender(manifest()).stream(moved(weights, 2)))
    )


def test_a_snapshot_is_the_last_bundle_whole():
    sender, weights = Sender(manifest(), delta=True), policy()
    sender.bundle(weights)
    last = sender.bundle(moved(weights, 1))

    snapshot = sender.snapshot()

    assert snapshot.is_whole
    assert snapshot.header.digest == last.header.digest
    assert same(applied(snapshot, {}), dict(Sender(manifest()).stream(moved(weights, 1))))
    with pytest.raises(ReloadError, match="delta=True"):
        Sender(manifest()).snapshot()


def test_a_tied_head_may_come_and_has_to_equal():
    weights = policy()
    with_head = {HEAD: weights[EMBED].clone(), **weights}

    bundle = Sender(manifest()).bundle(with_head)

    assert HEAD not in bundle.header.tensors
    with pytest.raises(MisfitTensor, match=r"lm_head\.weight differs from embed"):
        Sender(manifest()).bundle(with_head | {HEAD: weights[EMBED] + 1})


def test_a_name_that_comes_twice_is_refused():
    pairs = [*policy().items(), (NORM, policy()[NORM])]

    with pytest.raises(MisfitTensor, match=r"norm\.weight came twice"):
        Sender(manifest()).bundle(pairs)


def test_the_sender_brings_no_vllm():
    """It runs in a trainer's environment."""
    import subprocess
    import sys

    code = "import sys, flashquant.sender; assert 'vllm' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
