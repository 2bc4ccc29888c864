"""On GPUs: the Triton kernel, here in Triton's interpreter, and that nothing is waited for."""

from __future__ import annotations

import importlib
import json
import logging
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from flashquant.schemes.fingerprints import definition, digests, quick


def test_the_sums_of_the_triton_kernel_are_those_of_the_definition(tmp_path):
    pytest.importorskip("triton")
    answer, program = tmp_path / "answer.json", Path(__file__).parent / "programs/fused.py"

    subprocess.run([sys.executable, str(program), str(answer)], check=True, timeout=300)

    found = json.loads(answer.read_text())
    assert len(found) == 21
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


@pytest.mark.parametrize("at_a_time", [1, 7, 100])
def test_all_fingerprints_on_a_device_are_read_at_once_and_are_those_of_the_host(
    at_a_time, monkeypatch
):
    on_the_host = digests.digests(contents())
    reads = []
    tolist = torch.Tensor.tolist
    # As from a device: tensors.
    monkeypatch.setattr(
        digests, "sums", lambda many: torch.stack([definition.sums(t) for t in many])
    )
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or tolist(t))

    taken = digests.Fingerprints()
    items = list(contents())
    for start in range(0, len(items), at_a_time):
        taken.add(items[start : start + at_a_time])
    assert reads == []

    assert taken.read() == on_the_host
    assert list(taken.read()) == [name for name, _ in contents()]
    assert reads == [(55, 2)]


@pytest.fixture
def fused():
    pytest.importorskip("triton")
    return importlib.import_module("flashquant.schemes.fingerprints.fused")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_for_gpus_and_loads_16_bytes_at_once(
    fused, capability, monkeypatch, tmp_path
):
    """For one that need not be there: its code is read."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"table_ptr": "*i64", "total_ptr": "*i64", "n_tensors": "i32", "halvings": "i32"}
    fixed = {"ROWS": fused._ROWS, "TURNS": fused._TURNS}
    types |= dict.fromkeys(fixed, "constexpr")
    divisible = {(place,): [["tt.divisibility", 16]] for place in range(2)}
    source = ASTSource(fused._add_sums, types, fixed, divisible)

    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=fused._OPTIONS)

    loads = Counter(re.findall(r"ld\.global[.\w]*", made.asm["ptx"]))
    assert loads.pop("ld.global.b64") == 4  # of the table
    assert set(loads) == {"ld.global.v2.b64"}
    assert len(re.findall(r"atom\.global[.\w]*add\.u64", made.asm["ptx"])) == 2


@pytest.mark.parametrize(
    ("size", "start"), [(4096, 0), (4096, 16), (4096, 8), (100, 0), (1, 0), (12_345, 3)]
)
def test_many_tensors_take_one_launch_whatever_they_are(fused, size, start, monkeypatch):
    launched = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda table, total, *_, **__: launched.append((grid, table))

    monkeypatch.setattr(fused, "_add_sums", Recorded())
    kept = []
    aligned = fused._aligned
    monkeypatch.setattr(fused, "_aligned", lambda tensor: kept.append(aligned(tensor)) or kept[-1])

    fused.sums([torch.ones(size + start, dtype=torch.uint8)[start:]] * 5)

    (((programs,), table),) = launched
    assert programs == 5  # no more than a program each
    assert table.tolist() == [[n, w.data_ptr(), w.nbytes // 8] for n, w in enumerate(kept)]
    assert all(w.data_ptr() % 16 == 0 and 0 <= w.nbytes - size < 16 for w in kept)


@pytest.mark.parametrize("failure", [RuntimeError("Failed to find C compiler"), None])
def test_a_kernel_that_cannot_be_compiled_or_differs_leaves_the_work_to_torch(
    fused, failure, monkeypatch, caplog
):
    def difference(device):
        if failure is not None:
            raise failure
        return "77 bytes"

    monkeypatch.setattr(fused, "difference", difference)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    quick._on_gpu.cache_clear()

    with caplog.at_level(logging.ERROR):
        assert quick._on_gpu(torch.device("cuda", 1)) is None
    quick._on_gpu.cache_clear()

    assert ("Failed to find C compiler" if failure else "the sums of 77 bytes") in caplog.text
