"""A profile at work on a session: what is stored, and what fits."""

from __future__ import annotations

import pytest
import torch

from flashquant.errors import MisfitTensor, ProfileError
from flashquant.profiles import Base, Calibration, Entry, Profile, calibration, fingerprint
from flashquant.schemes import smoothed
from flashquant.update import Session
from tests.support.fake_engine import CPU, NEW, FakeEngine, serves
from tools.models import flashrl

FIELDS: flashrl.Fields = {
    "q.weight": {
        "input_scale": torch.tensor([[0.5, 1.0, 2.0, 4.0]]),
        "output_scale": torch.tensor([[50.0], [60.0], [70.0], [80.0]]),
        "type": torch.int8,
    },
    "k.weight": {
        "input_scale": 1.0,
        "output_scale": torch.tensor([[30.0], [40.0]]),
        "type": torch.int8,
    },
    "norm.weight": {
        "input_scale": torch.tensor([2.0, 1.0, 0.5, 0.25]),
        "output_scale": 1.0,
        "type": torch.bfloat16,
    },
}


def checkpoint() -> dict[str, torch.Tensor]:
    """The W8A8 checkpoint that goes with FIELDS."""
    return {
        "q.weight": torch.ones(4, 4, dtype=torch.int8),
        "q.weight_scale": 1 / FIELDS["q.weight"]["output_scale"],
        "k.weight": torch.ones(2, 4, dtype=torch.int8),
        "k.weight_scale": 1 / FIELDS["k.weight"]["output_scale"],
        "norm.weight": torch.ones(4, dtype=torch.bfloat16),
        "lm_head.weight": torch.ones(8, 4, dtype=torch.bfloat16),
    }


def entries() -> dict[str, Entry]:
    flat = {
        name: [
            f.flatten() if isinstance(f := fields[side], torch.Tensor) else None
            for side in ("input_scale", "output_scale")
        ]
        for name, fields in FIELDS.items()
    }
    return {name: Entry(FIELDS[name]["type"], *flat[name]) for name in FIELDS}


def opened(
    profile: dict[str, Entry] | None = None,
    start: dict[str, torch.Tensor] | None = None,
    base: Base | None = None,
    **options,
) -> tuple[FakeEngine, Session]:
    """A session that has loaded the checkpoint through a profile."""
    made = Profile(entries() if profile is None else profile, "p.pt", base)
    engine = FakeEngine(torch.int8)
    calibration = Calibration(made, **{"scales": "frozen", "device": CPU, **options})
    session = Session(engine, calibration=calibration)
    with torch.no_grad():
        session.first_load(iter((start or checkpoint()).items()))
    session.open()
    return engine, session


def test_the_checkpoint_is_taken_as_it_is():
    engine, _ = opened()

    assert engine.live["qkv.weight"].eq(1).all()
    assert engine.live["norm.weight"].eq(1).all()


def test_a_push_is_stored_by_flashrls_arithmetic_under_the_checkpoints_scales():
    engine, session = opened()

    session.reload(NEW)

    stored = {name: flashrl.quantize(name, NEW[name], FIELDS) for name in FIELDS}
    wanted = {
        "qkv.weight": torch.cat([stored["q.weight"], stored["k.weight"]]),
        "qkv.weight_scale": torch.cat([checkpoint()[f"{n}.weight_scale"] for n in "qk"]),
        "norm.weight": stored["norm.weight"],
    }
    assert serves(engine, wanted)


def test_a_loader_may_use_the_memory_of_the_scales_again():
    start = checkpoint()
    engine, session = opened(start=start)

    for tensor in start.values():
        tensor.zero_()
    session.reload(NEW)

    assert engine.live["qkv.weight_scale"].gt(0).all()


def test_a_report_tells_what_has_outgrown_its_scale_and_by_how_much():
    _, session = opened()
    grown = NEW | {"k.weight": torch.tensor([[8.0, 1, 1, 1], [1, 1, 1, 1]]).bfloat16()}

    first, second = session.reload(grown), session.reload(NEW)

    # k is stored as 30 times itself: 240 where 127 fit, in one of eight.
    assert first.drift["k.weight"].clipped == 1 / 8
    assert first.peak >= 240 / 127
    assert " clipped (up to" in str(first)
    assert second.drift["k.weight"].clipped == 0


def test_refreshed_scales_clip_nothing():
    _, session = opened(scales="refreshed")

    report = session.reload({name: tensor * 100 for name, tensor in NEW.items()})

    assert (report.clipped, report.peak) == (None, None)


def test_clipping_beyond_the_threshold_is_warned_of_once(caplog):
    _, session = opened(warn_above=0.2)

    session.push([("k.weight", torch.tensor([[8.0, 1, 1, 1], [1, 1, 1, 1]]))])
    assert caplog.text == ""
    for _ in range(2):
        session.push([("k.weight", torch.full((2, 4), 8.0))])

    assert caplog.text.count("100.00 % of k.weight has outgrown the frozen scales") == 1
    assert "Write `scales: refreshed`" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_before_it_becomes_a_code(value):
    _, session = opened()
    bad = NEW["q.weight"].clone()
    bad[1, 2] = value

    with pytest.raises(MisfitTensor, match=r"q\.weight holds NaN or infinite values"):
        session.push([("q.weight", bad)])


def test_a_norm_that_overflows_is_refused():
    _, session = opened()
    huge = torch.full((4,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)

    with pytest.raises(MisfitTensor, match=r"norm\.weight holds NaN or infinite"):
        session.push([("norm.weight", huge)])


@pytest.mark.parametrize("name", ["q.weight", "k.weight_scale"])
def test_codes_and_scales_of_somebody_else_are_refused(name):
    _, session = opened()

    with pytest.raises(MisfitTensor, match=r"quantized already .* by the profile p\.pt"):
        session.push([(name, checkpoint()[name])])


def changed(name: str, **fields: object) -> dict[str, Entry]:
    entry = entries()[name]
    whole = {
        "kind": entry.kind,
        "input_scale": entry.input_scale,
        "output_scale": entry.output_scale,
    }
    return entries() | {name: Entry(**{**whole, **fields})}


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({n: e for n, e in entries().items() if n != "k.weight"}, r"k\.weight has no entry"),
        (entries() | {"o.weight": entries()["k.weight"]}, r"o\.weight is in no layer"),
        (
            changed("q.weight", output_scale=torch.ones(3)),
            r"q\.weight has shape \(4, 4\), and \(3, 4\) by",
        ),
        (changed("norm.weight", input_scale=torch.ones(5)), r"has shape \(4,\), and \(5,\) by"),
        (
            changed("k.weight", kind=torch.bfloat16, output_scale=None, input_scale=torch.ones(4)),
            r"k\.weight is torch\.int8 in the checkpoint, and torch\.bfloat16 by",
        ),
        (changed("norm.weight", kind=torch.int8), r"norm\.weight is torch\.bfloat16 in the check"),
        (
            changed("q.weight", output_scale=torch.ones(4))
            | {"k.weight": Entry(torch.int8, None, torch.ones(2))},
            r"2 of 2 layers have other weight scales than it was made with, first q\.weight",
        ),
    ],
)
def test_a_profile_that_does_not_fit_is_told_where(profile, says):
    with pytest.raises(ProfileError, match=rf"^p\.pt does not fit .*{says}.*Start the engine on"):
        opened(profile)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_checkpoint_with_impossible_scales_is_refused(scale):
    start = checkpoint()
    start["k.weight_scale"][1] = scale

    with pytest.raises(ProfileError, match=r"k\.weight has weight scales that are not finite"):
        opened(start=start)


def test_a_checkpoint_that_is_not_quantized_is_refused():
    with pytest.raises(ProfileError, match=r"q\.weight is torch\.bfloat16 in the checkpoint"):
        opened(start=NEW)


def test_only_the_first_few_misfits_are_listed():
    strangers = {f"{i}.weight": entries()["k.weight"] for i in range(9)}

    with pytest.raises(ProfileError, match=r"3\.weight is in no layer.*; and 5 more\. Start"):
        opened(entries() | strangers)


def test_a_fingerprint_tells_checkpoints_apart_that_look_alike():
    base = Base(model="m", fingerprint={"norm.weight": fingerprint(checkpoint()["norm.weight"])})
    other = checkpoint() | {"norm.weight": checkpoint()["norm.weight"] * 2}

    opened(base=base)
    with pytest.raises(ProfileError, match=r"norm\.weight should be .{12} \(sha256\), but the che"):
        opened(base=base, start=other)


def test_an_engine_without_a_checkpoint_fits_no_profile():
    calibration = Calibration(Profile(entries(), "p.pt"), scales="frozen", device=CPU)

    with pytest.raises(ProfileError, match="no weight of a checkpoint was loaded"):
        Session(FakeEngine(torch.int8), calibration=calibration).open()


@pytest.mark.parametrize("scales", ["frozen", "refreshed"])
def test_quantizers_go_every_way_that_a_push_goes(scales, monkeypatch):
    """With the factors that its entries have: one layer has both, another none for columns."""
    gone: set[tuple[str, bool, bool]] = set()
    for name in ("int8_frozen", "int8_refreshed"):

        def noted(weight, columns, rows, *rest, name=name):
            gone.add((name, columns is not None, rows is not None))
            return getattr(smoothed, name)(weight, columns, rows, *rest)

        monkeypatch.setattr(calibration, name, noted)
    _, session = opened(scales=scales)
    session.reload(NEW)
    pushed = set(gone)
    gone.clear()

    for run in session._calibration.quantizers():
        run(torch.zeros(2, 8, dtype=torch.bfloat16))

    assert gone == pushed
    assert len(pushed) == 2
