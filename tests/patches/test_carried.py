"""Tensors on their way to workers in other processes arrive as they were sent, or are refused."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from flashquant.errors import MisfitTensor, ReloadError
from flashquant.patches.remote import carried as module
from flashquant.patches.remote.carried import carried
from flashquant.plan import named_tensors

WEIGHTS = {f"w{number}": torch.full((3, 4), float(number)) for number in range(5)}


def arrived(weights):
    with carried(weights) as path:
        return {name: tensor.clone() for name, tensor in named_tensors(path)}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(params=[1, 1 << 20], ids=["a file each", "one file"])
def size(request):
    with mock.patch.object(module, "_AT_ONCE", request.param):
        yield


def test_one_buffer_for_all_tensors(size):
    """A trainer fills it again as soon as the next tensor is asked for."""
    buffer = torch.empty(3, 4)
    assert_same(arrived((name, buffer.copy_(t)) for name, t in WEIGHTS.items()), WEIGHTS)


def test_memory_that_several_names_share(size):
    """A tied head, one flat parameter, fused shards that overlap: safetensors refuses those."""
    flat = torch.cat([tensor.flatten() for tensor in WEIGHTS.values()])
    views = {name: flat[12 * n :][:12].view(3, 4) for n, name in enumerate(WEIGHTS)}
    assert_same(arrived({**views, "head": views["w0"]}), {**WEIGHTS, "head": WEIGHTS["w0"]})

    overlapping = {"first": flat[:16], "second": flat[8:24]}
    assert_same(arrived(overlapping), overlapping)


@pytest.mark.parametrize(
    "sent",
    [
        torch.ones(4).expand(3, 4),
        torch.rand(4, 3).t(),
        torch._neg_view(torch.rand(3, 4)),
        AsyncCollectiveTensor(torch.rand(3, 4)),
        torch.rand(3, 4).requires_grad_(),
    ],
    ids=["expanded", "transposed", "negated", "wrapped", "with gradients"],
)
def test_values_are_what_arrives_however_they_lie(sent):
    assert torch.equal(arrived({"w": sent})["w"], sent.detach() + 0)


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (np.ones(3), "is a ndarray; send a torch.Tensor"),
        (None, "is a NoneType"),
        (torch.ones(3, device="meta"), "meta device"),
        (torch.ones(3).to_sparse(), "dense"),
    ],
    ids=["another library's", "nothing", "meta", "sparse"],
)
def test_what_holds_no_values_is_refused_by_name(sent, says):
    with pytest.raises(MisfitTensor, match=f"^w .*{says}"):
        arrived({**WEIGHTS, "w": sent})


def test_a_name_that_comes_twice_is_refused():
    """The last one used to win, where an engine in the same process refuses."""
    with pytest.raises(MisfitTensor, match="w0 arrived twice"):
        arrived([*WEIGHTS.items(), ("w0", torch.zeros(3, 4))])


def test_a_path_is_read_where_it_lies(tmp_path):
    with carried(tmp_path) as path:
        assert Path(path) == tmp_path


def test_nothing_is_no_weights_and_no_error():
    assert arrived({}) == {}
    assert arrived(iter(())) == {}


def test_what_the_iterator_raises_leaves_no_files(size):
    made = []

    def folder(**options):
        made.append(tempfile.TemporaryDirectory(**options))
        return made[-1]

    def dying():
        yield from WEIGHTS.items()
        raise ReloadError("the trainer died")

    with (
        mock.patch.object(module, "tempfile", mock.Mock(TemporaryDirectory=folder)),
        pytest.raises(ReloadError, match="the trainer died"),
    ):
        arrived(dying())
    assert not Path(made[0].name).exists()
