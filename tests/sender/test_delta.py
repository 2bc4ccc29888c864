"""A bundle that exists is whole and consistent; any other is refused."""

from __future__ import annotations

import os
import pickle
import random
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flashquant.errors import BrokenDelta
from flashquant.sender import Delta, Sender, TensorSpec
from tests.sender.test_sender import NORM, W, applied, manifest, moved, policy, same


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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_may_be_read_by_whom_the_umask_lets(delta, tmp_path, umask, mode):
    """A server far away is often another user."""
    before = os.umask(umask)
    try:
        delta.save(tmp_path / "1.safetensors")
    finally:
        os.umask(before)

    assert (tmp_path / "1.safetensors").stat().st_mode & 0o777 == mode


def test_a_disk_that_is_full_leaves_the_folder_as_it_was(delta, tmp_path):
    """As far as a file can tell: the system lets no more than a part of it be written."""
    delta.save(tmp_path / "1.safetensors")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match=r"2\.safetensors could not be written"):
            delta.save(tmp_path / "2.safetensors")
        with pytest.raises(OSError, match=r"1\.safetensors could not be written"):
            Sender(manifest()).bundle(policy()).save(tmp_path / "1.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert [path.name for path in tmp_path.iterdir()] == ["1.safetensors"]
    assert Delta.load(tmp_path / "1.safetensors").header == delta.header


def test_what_was_checked_stays_whoever_writes_into_the_file(delta, tmp_path):
    """Places lead to where an engine's memory is written, and back."""
    file = tmp_path / "1.safetensors"
    delta.save(file)
    found, size = Delta.load(file), file.stat().st_size

    with file.open("r+b") as other:
        other.write(b"\xff" * size)

    places = {name: part for name, part in delta.parts.items() if "#" in name}
    assert places
    assert same({name: found.parts[name] for name in places}, places)


def test_a_file_that_is_cut_while_it_is_applied_is_refused(delta, tmp_path):
    """Mapped memory would end the process by SIGBUS."""
    file = tmp_path / "1.safetensors"
    whole = Sender(manifest()).bundle(policy())
    whole.save(file)
    found = Delta.load(file)
    assert found.nbytes == whole.nbytes

    os.truncate(file, file.stat().st_size // 4)

    with pytest.raises(BrokenDelta, match=r"1\.safetensors cannot be read any more .* it was cut"):
        list(map(found.change, found.header.tensors))


def test_a_file_that_is_removed_or_replaced_is_read_as_it_was(delta, tmp_path):
    """As `BundleStore.prune`, and every writer that moves whole files in place, do it."""
    file = tmp_path / "1.safetensors"
    whole = Sender(manifest()).bundle(policy())
    whole.save(file)
    found = Delta.load(file)

    delta.save(file)
    file.unlink()

    assert same(found.parts, whole.parts)
    assert same(pickle.loads(pickle.dumps(found)).parts, whole.parts)


def test_tensors_that_lie_elsewhere_are_taken_as_they_are(delta):
    """Every other element of some memory."""
    apart = {name: torch.stack([part] * 2, -1)[..., 0] for name, part in delta.parts.items()}
    held = Sender(manifest()).bundle(policy()).parts

    found = applied(Delta(delta.header, apart), held)

    assert same(found, dict(Sender(manifest()).stream(moved(policy(), 1))))


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
        ({"shape": (2, 2)}, "changes element|its bitmap is|places of 4 elements"),
        ({"shape": (2**32, 2**32), "form": "whole"}, "is in a bundle's header"),
        ({"shape": (0,)}, "places of 0 elements"),
        ({"changed": 2**70}, "its values are"),
        ({"form": "whole"}, "is in a bundle's header or among its tensors"),
    ],
)
def test_a_header_that_contradicts_its_tensors_is_refused(delta, said, says):
    assert delta.header.tensors[W].form != "whole"

    with pytest.raises(BrokenDelta, match=says):
        said_of(delta, W, **said)


@pytest.mark.parametrize("shape", [(2**32, 2**32), (2**63,), (2**62, 4), (10**30,)])
def test_sizes_that_no_computer_counts_are_another_shape(delta, shape):
    """(2**32, 2**32) has no elements, where 64 bits count them."""
    tensors = manifest().tensors

    with pytest.raises(BrokenDelta, match=r"w\.weight in a bundle"):
        said_of(delta, W, shape=shape).check_fits("int8", tensors)


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
