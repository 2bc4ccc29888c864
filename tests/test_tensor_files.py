"""A safetensors file is read as safetensors reads it, or refused; never mapped."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashquant.tensor_files import BrokenFile, TensorFile

KINDS = [
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
TENSORS = {
    **{f"of {kind}": torch.arange(6).view(2, 3).to(kind) for kind in KINDS},
    "nothing": torch.zeros(0, 5),
    "one": torch.tensor(3.5),
    'ä/"\n': torch.ones(3),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "1.safetensors", metadata={"who": "we"})
    return tmp_path / "1.safetensors"


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()


def theirs(path):
    with safe_open(path, framework="pt") as found:
        return {name: bits(found.get_tensor(name)) for name in found.keys()}  # noqa: SIM118


def test_every_kind_of_tensor_is_what_safetensors_reads(file):
    with TensorFile(file) as found:
        assert found.metadata == {"who": "we"}
        assert {name: bits(tensor) for name, tensor in found.items()} == theirs(file)
        assert {n: (found.form(n).dtype, found.form(n).shape) for n in found} == {
            name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()
        }


def test_what_safetensors_refuses_is_refused_and_the_rest_is_read_alike(file):
    data, dice, both = file.read_bytes(), random.Random(0), set()
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(1500):
        spoilt = bytearray(data)
        for _ in range(dice.choice((1, 2))):
            spoilt[dice.randrange(header)] = dice.choice(b'0123456789,:"{}[]FIBU8 x\xff')
        file.write_bytes(spoilt)
        try:
            expected = theirs(file)
        except (SafetensorError, OSError):
            expected = None
        try:
            found = {name: bits(tensor) for name, tensor in TensorFile(file).items()}
        except BrokenFile:
            found = None
        assert found == expected, bytes(spoilt[:header])
        both.add(found is None)
    assert both == {True, False}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"3",
        b"[" * 100_000,
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"__metadata__": {"a": 3}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": 3}',
    ],
    ids=lambda header: header[:80].decode(),
)
def test_a_header_that_is_none_is_said_to_be_none(header, tmp_path):
    path = tmp_path / "1.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")

    with pytest.raises(BrokenFile, match=r"1\.safetensors: its header is none of safetensors"):
        TensorFile(path)


def test_a_hole_is_zeros_and_a_large_tensor_may_be_one(tmp_path):
    """A sparse file: its size says what it holds."""
    path, numel = tmp_path / "1.safetensors", 1 << 27
    header = json.dumps({"a": {"dtype": "U8", "shape": [numel], "data_offsets": [0, numel]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    os.truncate(path, path.stat().st_size + numel)

    assert not TensorFile(path)["a"].any()


def test_a_file_that_was_cut_is_an_error_and_no_signal(tmp_path):
    save_file({"a": torch.ones(1 << 20)}, tmp_path / "1.safetensors")
    found = TensorFile(tmp_path / "1.safetensors")

    os.truncate(tmp_path / "1.safetensors", 5000)

    with pytest.raises(BrokenFile, match=r"1\.safetensors ends at byte 5000: it was cut"):
        found["a"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(make, tmp_path):
    make(tmp_path / "1.safetensors")

    with pytest.raises(OSError, match=r"seek|directory"):
        TensorFile(tmp_path / "1.safetensors")


def test_descriptors_are_given_back(file):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        TensorFile(file)
    file.write_bytes(b"12345678")
    with pytest.raises(BrokenFile):
        TensorFile(file)

    assert len(os.listdir("/proc/self/fd")) == before
