"""Fingerprints of what cannot be read any more once it is live."""

from __future__ import annotations

import pytest
import torch

from flashquant.patches.layers import packed_digests
from flashquant.patches.layers.packed_digests import PackedDigests
from flashquant.update import UndoLog, digests
from tests.support.modules import created

VALUES = torch.rand(4, 8)
NEW = digests([("", VALUES)])[""]


@pytest.fixture
def blueprint():
    return created(None, weight=torch.zeros(4, 8))


@pytest.fixture
def packed(blueprint, monkeypatch) -> PackedDigests:
    """Of a module whose kernel owns its memory."""
    monkeypatch.setattr(packed_digests, "holds_handles", lambda _: True)
    return PackedDigests([blueprint], {"layer.weight": "old"})


def test_a_fingerprint_is_that_of_before_until_it_is_noted(packed):
    packed.look_at({"layer.weight": VALUES})

    assert packed.of("layer.weight") == "old"
    assert packed.coming("layer.weight") == NEW
    packed.note(UndoLog())
    assert packed.of("layer.weight") == NEW
    assert packed.coming("layer.weight") is None


def test_an_undo_log_puts_it_back(packed):
    undo = UndoLog()
    packed.look_at({"layer.weight": VALUES})
    packed.note(undo)

    undo.restore()

    assert packed.of("layer.weight") == "old"


def test_what_was_dropped_is_not_noted(packed):
    packed.look_at({"layer.weight": VALUES})
    packed.drop()
    packed.note(UndoLog())

    assert packed.of("layer.weight") == "old"


def test_it_stands_for_packed_memory_in_the_contents_of_a_layer(packed, blueprint):
    assert dict(packed.contents(blueprint)) == {"layer.<packed>.weight": "old"}


def test_what_shows_its_bytes_has_no_fingerprint_here(blueprint):
    shown = PackedDigests([blueprint], {"layer.weight": "old"})

    shown.look_at({"layer.weight": VALUES})

    assert shown.coming("layer.weight") is None
    assert dict(shown.contents(blueprint)) == {}


def test_what_is_compared_with_other_names_has_one_all_the_same(blueprint):
    tied = PackedDigests([blueprint], {"layer.weight": "old"}, {"layer.weight"})

    tied.look_at({"layer.weight": VALUES})

    assert tied.coming("layer.weight") == NEW
