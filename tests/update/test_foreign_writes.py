"""Somebody writes into live weights past every door, and is seen."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import Parameter

from flashquant.update import digests
from flashquant.update.foreign_writes import ForeignWrites


@pytest.fixture
def norm() -> Parameter:
    return Parameter(torch.zeros(4), requires_grad=False)


@pytest.fixture
def head() -> Parameter:
    return Parameter(torch.zeros(2, 4).to(torch.float8_e4m3fn), requires_grad=False)


@pytest.fixture
def witness(norm: Parameter, head: Parameter) -> ForeignWrites:
    return ForeignWrites({"norm": [("norm.weight", norm)], "head": [("head.weight", head)]})


def test_nothing_is_reported_where_nothing_was_written(witness, head):
    witness.look()
    witness.compare(digests([("head.weight", head)]))
    witness.compare(digests([("head.weight", head)]))

    assert witness.foreign == ()


def test_a_copy_into_a_parameter_is_seen_by_its_version(witness, head, caplog):
    with torch.no_grad():
        head.copy_(torch.ones(2, 4))
    with caplog.at_level(logging.ERROR):
        witness.look()
        witness.look()

    assert witness.foreign == ("head.weight",)
    assert [
        record.getMessage()
        for record in caplog.records
        if "head.weight" in record.msg % record.args
    ]
    assert len(caplog.records) == 1  # once


def test_a_copy_into_its_data_is_seen_by_its_bytes(witness, head):
    witness.compare(digests([("head.weight", head)]))
    head.data.copy_(torch.ones(2, 4))
    witness.look()
    assert witness.foreign == ()

    witness.compare(digests([("head.weight", head)]))

    assert witness.foreign == ("head.weight",)


def test_an_update_of_our_own_is_not_reported(witness, head):
    witness.compare(digests([("head.weight", head)]))
    head.detach().copy_(torch.ones(2, 4))
    witness.settle(["head"])

    witness.look()
    witness.compare(digests([("head.weight", head)]))

    assert witness.foreign == ()


def test_an_update_of_its_layer_puts_it_right_and_of_another_does_not(witness, head):
    head.detach().copy_(torch.ones(2, 4))
    witness.look()

    witness.settle(["norm"])
    assert witness.foreign == ("head.weight",)
    witness.settle(["head"])
    assert witness.foreign == ()


def test_a_roll_back_puts_nothing_right(witness, head):
    """The undo log brings back what it found."""
    head.detach().copy_(torch.ones(2, 4))
    witness.look()

    witness.rebase()

    assert witness.foreign == ("head.weight",)


def test_bytes_that_were_noted_are_compared_whatever_was_pushed_or_taken_back_since(
    witness, norm, head
):
    """A write through `.data`, a push of another layer and one that failed: it is seen all the
    same."""
    witness.compare(digests([("norm.weight", norm), ("head.weight", head)]))
    head.data.copy_(torch.ones(2, 4))

    witness.settle(["norm"])
    witness.rebase()
    witness.compare(digests([("norm.weight", norm), ("head.weight", head)]))

    assert witness.foreign == ("head.weight",)


def test_a_push_of_a_part_of_a_layer_leaves_the_rest_to_whoever_wrote_it(head):
    """A bias goes live alone; the weight beside it is what somebody made of it."""
    bias = Parameter(torch.zeros(2), requires_grad=False)
    items = [("head.weight", head), ("head.bias", bias)]
    witness = ForeignWrites({"head": items})
    witness.compare(digests(items))
    head.data.copy_(torch.ones(2, 4))
    bias.detach().copy_(torch.ones(2))

    witness.settle(["head"], {"head": {"head.weight"}}, {"head.bias"})
    witness.compare(digests(items))
    assert witness.foreign == ("head.weight",)
    witness.settle(["head"], {"head": {"head.weight"}}, {"head.bias"})
    assert witness.foreign == ("head.weight",)

    witness.settle(["head"])
    assert witness.foreign == ()


def test_a_layer_is_looked_at_before_an_update_of_our_own_overwrites_it(witness, head):
    """Or a push that fails would put back what somebody wrote, and call it its own."""
    with torch.no_grad():
        head.copy_(torch.ones(2, 4))

    witness.look_at("head")
    witness.rebase(["head"])
    witness.look()

    assert witness.foreign == ("head.weight",)


def test_tensors_without_a_version_are_left_to_their_bytes(norm):
    with torch.inference_mode():
        unversioned = torch.zeros(4)

    assert ForeignWrites({"norm": [("norm.weight", unversioned)]}).foreign == ()
