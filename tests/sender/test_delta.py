"""A bundle that exists is whole and consistent; any other is refused."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flashquant.errors import BrokenDelta
from flashquant.sender import Delta, Sender, TensorSpec
from tests.sender.test_sender import NORM, W, manifest, moved, policy, same


@pytest.fixture
def delta():
    sender = Sender(manifest(), delta=True)
    sender.bundle(policy())
    return sender.bundle(moved(policy(), 1))


def test_a_file_gives_back_what_was_saved(delta, tmp_path):
    delta.save(tmp_path / "1.safetensors")

    found = Delta.load(tmp_path / "1.safetensors")

    assert found.header == delta.header
    assert same(found.parts, delta.parts)
    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]


def test_any_safetensors_reader_reads_it(delta, tmp_path):
    delta.save(tmp_path / "1.safetensors")

    assert same(load_file(tmp_path / "1.safetensors"), delta.parts)


def test_every_cut_is_seen(delta, tmp_path):
    file = tmp_path / "1.safetensors"
    delta.save(file)
    data = file.read_bytes()

    for size in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(BrokenDelta, match="no whole bundle"):
            Delta.load(file)


def test_flipped_bits_are_refused_or_change_no_more_than_values(delta, tmp_path):
    """What passes here, the digest of the policy that comes out refuses."""
    file, dice = tmp_path / "1.safetensors", random.Random(0)
    delta.save(file)
    data = file.read_bytes()

    for _ in range(300):
        spoilt = bytearray(data)
        spoilt[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        file.write_bytes(spoilt)
        try:
            found = Delta.load(file)
        except BrokenDelta:
            continue
        assert found.header != delta.header or not same(found.parts, delta.parts)


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"flashquant": "{}"}, {"flashquant": "["}, {"other": "1"}],
)
def test_a_file_without_a_header_of_ours_is_refused(metadata, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors", metadata=metadata)

    with pytest.raises(BrokenDelta, match="no whole bundle"):
        Delta.load(tmp_path / "1.safetensors")


def test_a_header_with_more_in_it_is_refused(delta, tmp_path):
    """What it does not know, it cannot do."""
    with pytest.raises(ValueError, match="sharding"):
        type(delta.header).model_validate(delta.header.model_dump() | {"sharding": 2})
    with pytest.raises(ValueError, match="format"):
        type(delta.header).model_validate(delta.header.model_dump() | {"format": 2})


def said_of(delta, name, **said):
    """The same bundle, whose header says something else of one tensor."""
    change = delta.header.tensors[name].model_copy(update=said)
    tensors = delta.header.tensors | {name: change}
    return Delta(delta.header.model_copy(update={"tensors": tensors}), delta.parts)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"changed": 1}, "its values are"),
        ({"dtype": "bfloat16"}, "its values are"),
        ({"shape": (2, 2)}, "changes element|its bitmap is"),
        ({"form": "whole"}, "is in a bundle's header or among its tensors"),
    ],
)
def test_a_header_that_contradicts_its_tensors_is_refused(delta, said, says):
    assert delta.header.tensors[W].form != "whole"

    with pytest.raises(BrokenDelta, match=says):
        said_of(delta, W, **said)


def test_tensors_too_many_or_too_few_are_refused(delta):
    first = next(iter(delta.parts))
    few = {name: part for name, part in delta.parts.items() if name != first}

    for parts in (few, delta.parts | {"more": torch.zeros(1)}):
        with pytest.raises(BrokenDelta, match="header or among its tensors"):
            Delta(delta.header, parts)


def test_a_bundle_without_a_base_has_to_be_whole(delta):
    with pytest.raises(BrokenDelta, match="no base"):
        Delta(delta.header.model_copy(update={"base": None}), delta.parts)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (TensorSpec(shape=(2, 48), dtype="int8", scales=f"{W}_scale"), "the engine wants int8"),
        (TensorSpec(shape=(64, 48), dtype="bfloat16"), "wants bfloat16"),
    ],
)
def test_a_bundle_for_another_engine_is_refused(delta, spec, says):
    tensors = manifest().tensors

    delta.check_fits("int8", tensors)
    with pytest.raises(BrokenDelta, match=says):
        delta.check_fits("int8", tensors | {W: spec})
    with pytest.raises(BrokenDelta, match="wants none"):
        delta.check_fits("int8", {n: s for n, s in tensors.items() if n != W})
    with pytest.raises(BrokenDelta, match="in int8, and the engine serves fp8_channel"):
        delta.check_fits("fp8_channel", tensors)


def test_a_whole_bundle_that_lacks_a_tensor_is_refused():
    whole = Sender(manifest()).bundle(policy())
    tensors = {name: said for name, said in whole.header.tensors.items() if name != NORM}
    parts = {name: part for name, part in whole.parts.items() if name != NORM}
    less = Delta(whole.header.model_copy(update={"tensors": tensors}), parts)

    with pytest.raises(BrokenDelta, match=r"lacks norm\.weight"):
        less.check_fits("int8", manifest().tensors)


def test_a_header_is_small(delta, tmp_path):
    delta.save(tmp_path / "1.safetensors")

    with safe_open(tmp_path / "1.safetensors", framework="pt") as file:
        assert len(file.metadata()["flashquant"]) < 150 * len(delta.header.tensors) + 300
