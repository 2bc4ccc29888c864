"""On GPUs: the Triton kernel, here in Triton's interpreter, and that nothing is waited for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashquant import verify
from flashquant.fingerprints import definition


def test_the_sums_of_the_triton_kernel_are_those_of_the_definition(tmp_path):
    pytest.importorskip("triton")
    answer, program = tmp_path / "answer.json", Path(__file__).parent / "programs/fused.py"

    subprocess.run([sys.executable, str(program), str(answer)], check=True, timeout=300)

    found = json.loads(answer.read_text())
    assert len(found) == 16
    assert {name: pair for name, pair in found.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize("shape", [(0,), (3,), (700, 4096)], ids=str)
def test_the_definition_waits_for_no_device(shape):
    """On `meta`, whoever asks for a value fails."""
    sums = definition.sums(torch.empty(shape, dtype=torch.bfloat16, device="meta"))

    assert (sums.shape, sums.device.type) == ((2,), "meta")


def contents():
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=dice).bfloat16()
    yield "weight", weight
    yield "turned", weight.t()
    yield "packed", "a fingerprint of what was packed"
    yield "window", weight[3:50, 7:20]
    yield "scale", torch.full((), 2.0).expand(1)
    yield "nothing", torch.empty(0, 4)
    yield from ((f"norm {i}", torch.full((7,), float(i))) for i in range(50))


def test_all_fingerprints_on_a_device_are_read_at_once_and_are_those_of_the_host(monkeypatch):
    on_the_host = verify.digests(contents())
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(verify, "sums", definition.sums)  # as from a device: tensors
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or tolist(t))

    taken = verify.Fingerprints()
    for item in contents():
        taken.add([item])
    assert reads == []

    assert taken.read() == on_the_host
    assert list(taken.read()) == [name for name, _ in contents()]
    assert reads == [(55, 2)]
