"""Reports: numbers with units, one line a human can read."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import pytest

from flashquant.report import ReloadReport, Status


@pytest.fixture
def report() -> ReloadReport:
    return ReloadReport(
        version=7,
        tensors=290,
        bytes_in=988_100_000,
        bytes_out=494_640_000,
        undo_bytes=0,
        seconds=0.4123,
        phases={"quantize": 0.21, "write": 0.1801},
        layers_committed=24,
        ignored=(),
        pending=(),
        digest=None,
        ranks=(None,),
    )


@pytest.fixture
def status() -> Status:
    return Status(
        scheme="int8",
        version=7,
        torn=False,
        asleep=False,
        pending={},
        digest="3f2a90c1d4e85b6a" * 2,
        ranks=("3f2a90c1d4e85b6a" * 2,),
        parameters={},
        direct=(),
        staged=("model.layers.0.qkv_proj", "model.layers.0.o_proj"),
        fallback=("lm_head",),
    )


def test_a_report_reads_in_megabytes_and_milliseconds(report):
    assert str(report) == (
        "reload 7: 290 tensors, 988.1 MB in, 494.6 MB out, "
        "24 layers in 412.3 ms (quantize 210.0 ms, write 180.1 ms)"
    )


def test_a_report_names_what_was_dropped_and_what_is_missing(report):
    partial = replace(report, ignored=("lm_head.weight",), pending=("k_proj.weight",))

    assert str(partial).endswith(", ignored lm_head.weight, waiting for k_proj.weight")


def test_a_long_list_of_names_is_counted_not_printed(report):
    names = tuple(f"layers.{i}.weight" for i in range(300))

    text = str(replace(report, pending=names))

    assert "layers.2.weight and 297 more" in text
    assert len(text) < 300


def test_a_report_without_phases_prints_no_empty_brackets(report):
    assert str(replace(report, phases={})).endswith("24 layers in 412.3 ms")


def test_a_status_counts_layers_by_road_and_names_the_fallbacks(status):
    assert str(status) == (
        "int8 at version 7: 0 direct, 2 staged, 1 fallback (lm_head), digest 3f2a90c1d4e8"
    )


def test_a_status_says_which_layer_waits_for_what(status):
    waiting = replace(status, pending={"model.layers.0.qkv_proj": ("k_proj.weight",)})

    assert "model.layers.0.qkv_proj waits for k_proj.weight" in str(waiting)


def test_a_torn_model_says_so(status):
    assert "refuses to serve" in str(replace(status, torn=True))


@pytest.mark.parametrize("noun", ["report", "status"])
def test_a_report_is_frozen_and_crosses_processes(noun, request):
    value = request.getfixturevalue(noun)

    with pytest.raises(FrozenInstanceError):
        value.version = 8
    assert pickle.loads(pickle.dumps(value)) == value
