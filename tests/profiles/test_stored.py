"""Our file of a profile: what is saved is what is read, and a lie in it is told."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashquant.errors import LocateError, ProfileError
from flashquant.profiles import Base, Entry, Profile, fingerprint, load_profile, save_profile

PROFILE = Profile(
    {
        "up.weight": Entry(torch.int8, torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5])),
        "o.weight": Entry(torch.int8, None, torch.tensor([6.0, 7])),
        "norm.weight": Entry(torch.bfloat16, torch.tensor([0.5, 0.25]), None),
    },
    "made here",
    Base(model="org/w8a8", revision="abc", fingerprint={"norm.weight": "0" * 64}),
)


@pytest.fixture
def path(tmp_path) -> Path:
    save_profile(PROFILE, tmp_path / "profile.safetensors")
    return tmp_path / "profile.safetensors"


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other is None or torch.equal(one, other)


def test_what_is_saved_is_what_is_read(path):
    profile = load_profile(path)

    assert profile.base == PROFILE.base
    assert set(profile.entries) == set(PROFILE.entries)
    for name, entry in PROFILE.entries.items():
        read = profile.entries[name]
        assert (read.kind, read.shape) == (entry.kind, entry.shape)
        assert same(read.input_scale, entry.input_scale)
        assert same(read.output_scale, entry.output_scale)


def test_the_same_profile_is_the_same_file(path, tmp_path):
    save_profile(load_profile(path), tmp_path / "again.safetensors")

    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_profile_that_is_cut_after_an_engine_has_opened_it_is_an_error(path):
    """Its numbers are read at the first push; mapped memory would end the engine by SIGBUS."""
    profile = load_profile(path)

    os.truncate(path, 100)

    with pytest.raises(ProfileError, match=r"profile\.safetensors cannot be read any more"):
        list(profile.entries.values())


def test_vectors_that_share_memory_are_saved(tmp_path):
    shared = torch.ones(3)
    entries = {"a": Entry(torch.int8, shared, shared), "b": Entry(torch.int8, shared, shared)}

    save_profile(Profile(entries, "here"), tmp_path / "p.safetensors")

    assert len(load_profile(tmp_path / "p.safetensors").entries) == 2


def test_only_safetensors_are_written(tmp_path):
    with pytest.raises(ProfileError, match=r"end its name in \.safetensors"):
        save_profile(PROFILE, tmp_path / "profile.pt")


def test_an_empty_profile_is_not_written(tmp_path):
    with pytest.raises(ProfileError, match="nothing to save"):
        save_profile(Profile({}, "here"), tmp_path / "p.safetensors")


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path, monkeypatch):
    def breaks(tensors, unfinished, metadata):
        Path(unfinished).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("flashquant.profiles.stored.save_file", breaks)

    with pytest.raises(OSError, match="disk full"):
        save_profile(PROFILE, tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_is_not_there(tmp_path):
    with pytest.raises(LocateError, match="there is no file"):
        load_profile(tmp_path / "p.safetensors")


def rewrite(path: Path, change) -> None:
    """The same file with another header."""
    raw = path.read_bytes()
    header = json.loads(json.loads(_json_of(raw))["__metadata__"]["flashquant_profile"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"flashquant_profile": json.dumps(header)})


def _json_of(raw: bytes) -> bytes:
    (size,) = struct.unpack("<Q", raw[:8])
    return raw[8 : 8 + size]


def _set(**values):
    return lambda header, _: header.update(values)


def _entry(name, **values):
    return lambda header, _: header["entries"][name].update(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set(format="other"), "header, format: Input should be 'flashquant-profile'"),
        (_set(version=2), "header, version: Input should be 1"),
        (_set(scheme="int5"), "header, scheme: Input should be 'int8_channel', 'int4'"),
        (_set(extra=1), "header, extra: Extra inputs are not permitted"),
        (_set(entries={}), "header, entries: Dictionary should have at least 1 item"),
        (_set(base={"model": "m", "fingerprint": {"a": "b"}}), r"base\.fingerprint\.a: String sh"),
        (_entry("up.weight", kind="int4"), r"entries\.up\.weight\.kind: Input should be 'int8'"),
        (_entry("up.weight", shape=[2, -3]), r"entries\.up\.weight\.shape\.1: Input should be gr"),
        (_entry("up.weight", shape=["2", 3]), r"shape\.0: Input should be a valid integer"),
        (lambda header, _: header["entries"].pop("o.weight"), r"holds 'o\.weight\.output_scale',"),
    ],
)
def test_a_header_that_says_something_impossible_is_refused(path, change, says):
    rewrite(path, change)

    with pytest.raises(ProfileError, match=says):
        load_profile(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_entry("up.weight", shape=[2, 10**10]), r"is \[2, 10000000000\] by the header, \[2, 3\]"),
        (_entry("up.weight", shape=[2]), r"is \[2\] by the header"),
        (lambda _, t: t.pop("up.weight.input_scale"), r"is \[2, 3\] by the header, \[2, None\]"),
        (
            lambda _, t: t.update({"up.weight.input_scale": torch.ones(3).half()}),
            r"up\.weight has an input_scale of torch\.float16 \(3,\); it should be float32",
        ),
        (lambda _, t: t["up.weight.output_scale"].fill_(torch.nan), "2 of 2 numbers that are not"),
        (lambda _, t: t["up.weight.input_scale"].neg_(), r"first -1\.0 at 0"),
        (lambda _, t: t["norm.weight.input_scale"].zero_(), r"first 0\.0 at 0"),
        (_entry("norm.weight", kind="int8"), r"norm\.weight is \[2\] by the header, \[None, 2\]"),
    ],
)
def test_an_entry_that_is_not_what_its_header_says_is_refused(path, change, says):
    rewrite(path, change)
    profile = load_profile(path)

    with pytest.raises(ProfileError, match=says):
        dict(profile.entries)


def claiming(path: Path, header: dict, data: bytes = b"", size: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


TEN_GB = {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}


@pytest.mark.parametrize(
    ("header", "data", "size"),
    [
        ({"a.input_scale": TEN_GB}, b"", None),
        ({"a.input_scale": TEN_GB | {"data_offsets": [0, 4]}}, b"four", None),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"four", None),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, b"four" * 2, None),
        ({}, b"", 10**10),
        ({}, b"", 2**64 - 1),
    ],
    ids=["10 GB", "10 GB in 4 bytes", "past the end", "backwards", "10 GB header", "2^64 header"],
)
def test_an_absurd_claim_is_refused_before_anything_is_made_of_it(tmp_path, header, data, size):
    path = claiming(tmp_path / "p.safetensors", header, data, size)

    with pytest.raises(ProfileError, match="claims what it does not hold"):
        load_profile(path)


def test_a_pickle_under_our_name_is_no_profile(tmp_path):
    torch.save({"a": 1}, tmp_path / "p.safetensors")

    with pytest.raises(ProfileError, match="no safetensors file"):
        load_profile(tmp_path / "p.safetensors")


def test_other_tensors_are_no_profile(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "p.safetensors")

    with pytest.raises(ProfileError, match="holds tensors and no profile"):
        load_profile(tmp_path / "p.safetensors")


def test_a_fingerprint_is_of_the_bytes():
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)

    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t())
    assert fingerprint(tensor) != fingerprint(tensor + 1)
    assert fingerprint(tensor.bfloat16()) == fingerprint(tensor.bfloat16().clone())


HELD = torch.full((2, 3), 95, dtype=torch.uint8)


def test_a_profile_for_int4_is_read_as_it_was_saved(tmp_path):
    entry = Entry(torch.int8, torch.ones(12), None, torch.ones(2), held=HELD)
    save_profile(
        Profile({"up.weight": entry}, "here", scheme="int4_g32"), tmp_path / "p.safetensors"
    )

    profile = load_profile(tmp_path / "p.safetensors")

    assert profile.scheme == "int4_g32"
    assert profile.knows_weight_scales()
    assert same(profile.entries["up.weight"].held, HELD)
    assert profile.entries["up.weight"].shape == (2, 12)


def test_groups_belong_to_int4_alone(tmp_path):
    plain, grouped = (
        Entry(torch.int8, torch.ones(12), None),
        Entry(torch.int8, None, None, held=HELD),
    )
    for scheme, entry in (("int8", grouped), ("int4", plain)):
        save_profile(
            Profile({"up.weight": entry}, "here", scheme=scheme), tmp_path / "p.safetensors"
        )
        with pytest.raises(ProfileError, match=rf"is for {scheme}, and up.weight has held of int4"):
            load_profile(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (HELD.float(), "it should be uint8"),
        (HELD[0], "it should be uint8"),
        (HELD * 0, "reach nothing"),
    ],
)
def test_groups_that_cannot_be_are_refused(held, says):
    with pytest.raises(ProfileError, match=says):
        Entry(torch.int8, None, None, held=held)
