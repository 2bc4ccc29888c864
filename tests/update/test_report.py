"""Reports: numbers with units, one line a human can read."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from flashquant.update import Drift, ReloadReport, Status


def a_report(**changes: Any) -> ReloadReport:
    report = ReloadReport(
        version=7,
        tensors=290,
        bytes_in=988_100_000,
        bytes_out=494_640_000,
        undo_bytes=0,
        seconds=0.4123,
        phases={"quantize": 0.21, "write": 0.1801},
        layers=tuple(f"layers.{i}" for i in range(24)),
        ignored=(),
        pending=(),
        digest=None,
        ranks=(None,),
    )
    return replace(report, **changes)


@pytest.fixture
def report() -> ReloadReport:
    return a_report()


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
        foreign=(),
        direct=(),
        staged=("model.layers.0.qkv_proj", "model.layers.0.o_proj"),
        fallback=("lm_head",),
    )


def test_a_status_says_who_else_wrote(status):
    assert "MODIFIED OUTSIDE FLASHQUANT: norm.weight" in str(
        replace(status, foreign=("norm.weight",))
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


def test_a_status_says_that_an_update_was_begun_and_not_finished(status):
    """Of several workers, that of the one into which something came last."""
    told = [replace(status, quiet=quiet) for quiet in (None, 312.4, 298.9)]

    assert "an update is open, nothing has come of it for 299 s" in str(Status.of_workers(told))
    assert "open" not in str(Status.of_workers([status, status]))


def test_a_torn_model_says_so(status):
    assert "refuses to serve" in str(replace(status, torn=True))


@pytest.mark.parametrize("noun", ["report", "status"])
def test_a_report_is_frozen_and_crosses_processes(noun, request):
    value = request.getfixturevalue(noun)

    with pytest.raises(FrozenInstanceError):
        value.version = 8
    assert pickle.loads(pickle.dumps(value)) == value


def test_the_undo_log_is_told_where_there_was_one(report):
    told = replace(report, undo_bytes=494_640_000)

    assert ", undo log 494.6 MB, " in f"{told}, "
    assert ", undo log 494.6 MB, 490.0 MB of it in the KV cache" in str(
        replace(told, undo_cache_bytes=490_000_000)
    )


def test_one_worker_is_its_engine(report, status):
    alone = replace(report, digest="d" * 32, ranks=("d" * 32,))

    assert ReloadReport.of_workers([alone]) == alone
    assert Status.of_workers([status]) == status


def test_the_digest_of_an_engine_depends_on_the_rank_that_holds_it(report):
    one, other = replace(report, ranks=("a",)), replace(report, ranks=("b",))

    digests = {ReloadReport.of_workers(order).digest for order in ([one, other], [other, one])}

    assert len(digests) == 2


def test_without_a_digest_of_every_rank_there_is_none_of_the_engine(report):
    reports = [replace(report, ranks=("a",)), replace(report, ranks=(None,))]

    assert ReloadReport.of_workers(reports).digest is None


def test_what_another_stage_of_a_pipeline_takes_is_not_ignored(report):
    stages = [
        replace(report, ignored=("lm_head.weight", of_the_other))
        for of_the_other in ("layers.1.w", "layers.0.w")
    ]

    assert ReloadReport.of_workers(stages).ignored == ("lm_head.weight",)


def test_a_report_has_the_layers_of_all_stages_and_those_of_all_ranks_once(report):
    def of(*layers: str, changed: float) -> ReloadReport:
        drift = {f"{layer}.weight": Drift(100, changed) for layer in layers}
        return replace(report, layers=layers, drift=drift)

    whole = ReloadReport.of_workers(
        [of("layers.0", changed=0.1), of("layers.0", changed=0.5), of("layers.1", changed=0.3)]
    )

    assert whole.layers == ("layers.0", "layers.1")
    assert whole.changed == pytest.approx(0.2)
    assert "2 layers in" in str(whole)


def test_a_status_has_the_layers_of_all_stages_and_those_of_all_ranks_once(status):
    def of(layer: str) -> Status:
        return replace(
            status,
            **dict.fromkeys(("direct", "staged", "fallback"), (layer,)),
            in_bf16={f"{layer}.router": "router"},
            overrides={f"{layer}.down_proj": "fp8_channel"},
            drafts={f"{layer}.draft": 3},
            pending={layer: ("w",)},
        )

    engine = Status.of_workers([of("layers.0"), of("layers.0"), of("layers.1")])

    for layers in (engine.direct, engine.staged, engine.fallback, tuple(engine.pending)):
        assert layers == ("layers.0", "layers.1")
    assert sorted(engine.in_bf16) == ["layers.0.router", "layers.1.router"]
    assert sorted(engine.overrides) == ["layers.0.down_proj", "layers.1.down_proj"]
    assert sorted(engine.drafts) == ["layers.0.draft", "layers.1.draft"]


def test_an_engine_is_torn_or_asleep_if_one_of_its_workers_is(status):
    engine = Status.of_workers([status, replace(status, torn=True, asleep=True)])

    assert engine.torn
    assert engine.asleep
    assert "asleep" in str(engine)


def test_parameters_of_several_workers_carry_their_rank(status):
    engine = Status.of_workers([replace(status, parameters={"w": part}) for part in "ab"])

    assert engine.parameters == {"rank 0: w": "a", "rank 1: w": "b"}
