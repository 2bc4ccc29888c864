"""The live model as the tensors that a sender delivers."""

from __future__ import annotations

import pytest
import torch

from flashquant.errors import ReloadError
from flashquant.schemes import fingerprint, int8_channel
from flashquant.sender import Manifest, policy_digest
from flashquant.update import Deltas
from tests.support.fake_engine import NEW, OLD, FakeEngine, only, serving

CODES = ("q.weight", "k.weight")


def as_sent(weights):
    """What a sender makes of a policy for an int8 engine."""
    sent = {"norm.weight": weights["norm.weight"]}
    for name in CODES:
        sent[name], sent[f"{name}_scale"] = int8_channel(weights[name])
    return sent


def digest_of(weights):
    return policy_digest({name: fingerprint(value) for name, value in weights.items()})


def test_an_int8_engine_wants_codes_and_their_scales_and_the_rest_as_it_is():
    session = serving(FakeEngine(torch.int8))

    tensors = Deltas(session).manifest().tensors

    assert {name: (spec.shape, spec.torch_dtype) for name, spec in tensors.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in as_sent(OLD).items()
    }
    assert [tensors[name].scales for name in CODES] == ["q.weight_scale", "k.weight_scale"]
    assert Deltas(session).manifest().scheme == "int8"


def test_its_digest_is_that_of_what_a_sender_sends_of_the_live_policy():
    """Of a fused parameter, each tensor by itself."""
    session = serving(FakeEngine(torch.int8))

    before = Deltas(session).manifest()
    session.reload(NEW)

    assert (before.digest, before.version) == (digest_of(as_sent(OLD)), 0)
    after = Deltas(session).manifest()
    assert (after.digest, after.version) == (digest_of(as_sent(NEW)), 1)


def test_a_bf16_engine_wants_what_the_trainer_has():
    session = serving(FakeEngine(torch.bfloat16))

    manifest = Deltas(session).manifest()

    kept = {name: value for name, value in OLD.items() if name != "lm_head.weight"}
    assert manifest.tensors.keys() == kept.keys()
    assert manifest.digest == digest_of(kept)


def test_it_travels_as_json():
    manifest = Deltas(serving(FakeEngine(torch.int8))).manifest()

    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_there_is_no_digest_of_a_policy_that_is_half_there():
    """A shard waits; an update is under way."""
    session = serving(FakeEngine(torch.int8))

    session.push(only("q.weight"))
    assert Deltas(session).manifest().digest is None
    session.push(only("k.weight"))
    whole = Deltas(session).manifest().digest
    assert whole is not None
    session.begin()
    assert Deltas(session).manifest().digest is None
    with pytest.raises(ReloadError):
        session.push([("nobody.weight", NEW["norm.weight"])])
    assert Deltas(session).manifest().digest == whole  # rolled back, though nobody has closed it


def test_there_is_no_digest_where_a_loader_does_more_than_copy():
    """What is live is then not what was sent."""
    session = serving(FakeEngine(torch.int8, norm=lambda loaded: loaded + 1))

    assert Deltas(session).manifest().digest is None


def test_an_engine_without_a_checkpoint_says_that_it_knows_no_names_yet():
    session = serving(FakeEngine(torch.int8), start={})

    with pytest.raises(ReloadError, match="without a checkpoint"):
        Deltas(session).manifest()

    session.reload({name: NEW[name] for name in ("q.weight", "k.weight", "norm.weight")})
    assert Deltas(session).manifest().digest == digest_of(as_sent(NEW))
