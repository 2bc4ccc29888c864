"""One session, one fake engine: what goes live when, and what a failure leaves."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from flashquant.config.checks import Checks
from flashquant.errors import (
    IncompleteUpdate,
    MisfitTensor,
    MovedTensor,
    PeerFailed,
    ReloadError,
    SleepingWeights,
    TornWeights,
    UnknownWeight,
)
from flashquant.schemes import int8_channel
from flashquant.update import Ballot, Session, UndoLog
from tests.support.fake_engine import (
    CPU,
    NEW,
    OLD,
    FakeEngine,
    breaking,
    fresh,
    only,
    serves,
    serving,
    weights,
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def session(engine) -> Session:
    return serving(engine)


# What goes live, and when.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("start", [OLD, weights(3)], ids=["old", "other"])
def test_reload_equals_restart(dtype, start):
    engine = FakeEngine(dtype)
    session = serving(engine, start)

    session.reload(NEW)

    assert serves(engine, fresh(NEW, dtype=dtype))
    assert not serves(engine, fresh(start, dtype=dtype))


def test_a_quantized_layer_holds_codes_and_scales_of_each_shard():
    engine = FakeEngine(torch.int8)

    serving(engine).reload(NEW)

    (q, q_scale), (k, k_scale) = int8_channel(NEW["q.weight"]), int8_channel(NEW["k.weight"])
    assert torch.equal(engine.live["qkv.weight"], torch.cat([q, k]))
    assert torch.equal(engine.live["qkv.weight_scale"], torch.cat([q_scale, k_scale]))


@pytest.mark.parametrize("order", [("q.weight", "k.weight"), ("k.weight", "q.weight")])
def test_a_fused_layer_goes_live_with_its_last_shard_whichever_it_is(session, engine, order):
    first, last = order

    session.push(only(first))
    assert serves(engine, fresh(OLD))
    session.push(only(last))

    assert serves(engine, fresh(OLD | dict(only(*order))))


def test_a_half_arrived_layer_is_pending(session):
    session.push(only("q.weight"))

    assert session.status().pending == {"qkv": ("qkv.weight",)}


def test_nothing_is_pending_when_all_have_arrived(session):
    session.push(NEW.items())

    assert session.status().pending == {}


def test_a_layer_that_is_whole_does_not_wait_for_the_others(session, engine):
    session.push(only("norm.weight", "q.weight"))

    assert serves(engine, fresh(OLD | dict(only("norm.weight"))))


def test_a_shard_sent_again_in_a_later_push_replaces_the_first(session, engine):
    session.push(only("q.weight", of=weights(5)))
    session.push(only("q.weight"))
    session.push(only("k.weight"))

    assert serves(engine, fresh(OLD | dict(only("q.weight", "k.weight"))))


# One sync after the other, without brackets.


def sync(session, policy, order=("k.weight", "q.weight", "norm.weight")):
    """One tensor a push; a trainer that logs a refusal and goes on."""
    for name in order:
        with suppress(ReloadError):
            session.push(only(name, of=policy))


def test_half_a_layer_that_a_refused_tensor_left_does_not_mix_into_the_next_sync(session, engine):
    bad = {**weights(5), "k.weight": torch.full((2, 4), torch.nan).bfloat16()}
    sync(session, bad)
    assert session.status().refused == ("k.weight",)

    sync(session, NEW)

    assert serves(engine, fresh(NEW))
    assert session.status().pending == session.status().dropped == {}
    assert session.status().refused == ()


@pytest.mark.parametrize("left", [["q.weight"], ["norm.weight", "k.weight"]], ids=str)
def test_half_a_layer_that_a_dead_trainer_left_does_not_mix_into_the_next_sync(
    session, engine, left
):
    for _ in range(2):
        sync(session, weights(7), ("norm.weight", "k.weight", "q.weight"))
    session.reload(OLD)
    sync(session, weights(5), left)

    sync(session, NEW, ("norm.weight", "k.weight", "q.weight"))

    assert serves(engine, fresh(NEW))


def test_a_bucket_takes_nothing_of_an_earlier_sync_with_it(session, engine):
    """Its first tensor completes the layer, its second shows that another sync has begun."""
    session.push(only("norm.weight", "q.weight", of=weights(5)))

    session.push(iter(only("k.weight", "norm.weight")))

    assert session.status().pending == {"qkv": ("qkv.weight",)}
    assert torch.equal(engine.live["qkv.weight"], fresh(OLD)["qkv.weight"])
    session.push(only("q.weight"))
    assert serves(engine, fresh(NEW))


def test_what_an_earlier_sync_left_is_dropped_and_said(session, caplog):
    session.push(only("norm.weight", "q.weight"))
    session.push(only("norm.weight"))

    status = session.status()

    assert status.pending == {}
    assert status.dropped == {"qkv": ("qkv.weight",)}
    assert "had arrived in part and was dropped: qkv" in str(status)
    assert "qkv: qkv.weight is not complete" in caplog.text


def test_what_a_layer_lacks_has_the_names_of_the_checkpoint(session):
    """Not those of the engine's parameters, which no trainer knows."""
    session.begin()
    session.push(only("q.weight", "norm.weight"))
    with pytest.raises(IncompleteUpdate, match=r"qkv lacks k\.weight\. Send every shard"):
        session.finish()

    session.push(only("k.weight"))
    with pytest.raises(IncompleteUpdate, match=r"qkv lacks q\.weight\. Send what is missing"):
        session.check_nothing_waits()


def test_the_end_of_a_sync_says_what_was_dropped_in_it(session, engine):
    """An attempt that was refused and given up; in the next one, the name that was refused looks
    like the beginning of yet another, which would hide what it lacks."""
    with pytest.raises(ReloadError):
        session.push(only("norm.weight", of={"norm.weight": torch.full((4,), torch.nan)}))
    sync(session, NEW, ("q.weight", "norm.weight"))

    with pytest.raises(IncompleteUpdate, match=r"arrived of 1 layer was dropped.*first qkv: qkv"):
        session.check_nothing_waits()

    session.check_nothing_waits()  # said once: it may be that nobody wants to send it
    sync(session, NEW)
    session.check_nothing_waits()
    assert serves(engine, fresh(NEW))


def test_after_a_refused_end_a_whole_sync_is_right_whatever_its_buckets(session, engine):
    with pytest.raises(ReloadError):
        session.push(only("norm.weight", of={"norm.weight": torch.full((4,), torch.nan)}))
    sync(session, weights(5), ("q.weight", "norm.weight"))
    with pytest.raises(IncompleteUpdate):
        session.check_nothing_waits()

    session.push(only("k.weight"))
    session.push(only("q.weight", "norm.weight"))  # the name that came last before the end

    session.check_nothing_waits()
    assert serves(engine, fresh(NEW))


def test_what_was_half_there_at_an_end_does_not_mix_into_a_sync_of_everything(session, engine):
    session.push(only("q.weight", of=weights(5)))
    with pytest.raises(IncompleteUpdate, match="Send what is missing, or everything anew"):
        session.check_nothing_waits()

    session.push(only("norm.weight"))
    session.push(only("k.weight"))

    assert torch.equal(engine.live["qkv.weight"], fresh(OLD)["qkv.weight"])
    session.push(only("q.weight"))
    session.check_nothing_waits()
    assert serves(engine, fresh(NEW))


@pytest.mark.parametrize("refused_first", [False, True])
def test_what_was_missing_at_an_end_completes_it(session, engine, caplog, refused_first):
    sync(session, NEW, ("q.weight", "norm.weight"))
    with pytest.raises(IncompleteUpdate):
        session.check_nothing_waits()
    if refused_first:
        with pytest.raises(ReloadError):
            session.push(only("norm.weight", of={"norm.weight": torch.full((4,), torch.nan)}))

    session.push(only("k.weight"))

    assert serves(engine, fresh(NEW))
    if not refused_first:
        session.check_nothing_waits()
        assert "the update brought" not in caplog.text


def test_what_was_dropped_and_came_whole_afterwards_is_no_matter(session):
    sync(session, weights(5), ("norm.weight", "q.weight"))
    sync(session, NEW, ("norm.weight", "q.weight", "k.weight"))

    session.check_nothing_waits()


def test_a_bracket_says_what_it_drops(session, caplog):
    session.push(only("q.weight"))

    session.reload(dict(only("norm.weight")), strict=False)

    assert session.status().dropped == {"qkv": ("qkv.weight",)}
    assert "what waited is dropped" in caplog.text
    session.reload(NEW)
    assert session.status().dropped == {}


def test_a_refused_push_that_began_a_new_sync_drops_nothing(session, engine):
    session.push(only("norm.weight", "q.weight"))

    with pytest.raises(RuntimeError):
        session.push(breaking("norm.weight", of=weights(5), error=RuntimeError("nccl")))
    with pytest.raises(RuntimeError):
        session.push(breaking("norm.weight", "q.weight", of=weights(5), error=RuntimeError("nccl")))
    session.push(only("k.weight"))

    assert serves(engine, fresh(NEW))


def test_a_layer_that_waits_in_two_syncs_is_warned_of_with_a_way_out(session, caplog):
    for _ in range(5):
        sync(session, NEW, ("norm.weight", "q.weight"))

    assert caplog.text.count("strict=False") == 1
    assert session.status().pending == {"qkv": ("qkv.weight",)}


def test_the_last_refusal_is_kept_and_said_once(session, caplog):
    assert session.status().refusal is None

    with pytest.raises(UnknownWeight):
        session.push([("qq.weight", NEW["q.weight"])])

    refusal = session.status().refusal
    assert "UnknownWeight" in refusal.what
    assert refusal.names == ("qq.weight",)
    assert f"{refusal.what.rstrip('.')}, digest" in str(session.status())
    (said,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "qq.weight" in said.getMessage()


def test_chunks_after_a_refused_one_do_not_hide_why_it_was_refused(session):
    session.begin()
    for name in ("norms.weight", "q.weight", "k.weight"):
        with suppress(ReloadError):
            session.push([(name, NEW.get(name, NEW["norm.weight"]))])
    with pytest.raises(ReloadError):
        session.finish()

    assert "norms.weight" in session.status().refusal.what


def test_a_refusal_that_was_made_good_is_no_part_of_how_a_model_stands(session):
    sync(session, {**NEW, "norm.weight": torch.full((4,), torch.nan).bfloat16()})
    assert "refused and not sent again: norm.weight" in str(session.status())

    session.reload(NEW)

    assert "refus" not in str(session.status())
    assert session.status().refusal is not None


def test_a_bracket_that_fails_makes_no_refusal_good(session):
    with pytest.raises(MisfitTensor):
        session.push([("norm.weight", NEW["q.weight"])])

    with pytest.raises(RuntimeError):
        session.reload(breaking("norm.weight", error=RuntimeError("nccl")))

    assert session.status().refused == ("norm.weight",)


def test_a_name_that_the_loader_drops_is_said_once(session, engine, monkeypatch, caplog):
    for _ in range(2):
        session.push(only("lm_head.weight"))
    assert "lm_head.weight" not in caplog.text  # the checkpoint had it: dropped by design

    monkeypatch.setattr(engine, "load", lambda weights: list(weights))
    for _ in range(2):
        session.push([("rotary.inv_freq", torch.ones(2))])
    assert caplog.text.count("rotary.inv_freq") == 1


def test_a_push_returns_the_engines_own_names(session):
    assert session.push(only("k.weight", "norm.weight", "lm_head.weight")) == {
        "qkv.weight",
        "norm.weight",
    }


def test_a_buffer_may_be_reused_as_soon_as_the_push_returns(session, engine):
    bucket = torch.empty(16, dtype=torch.bfloat16)

    for name in ("q.weight", "k.weight"):
        view = bucket[: NEW[name].numel()].view(NEW[name].shape)
        view.copy_(NEW[name])
        session.push([(name, view)])
    bucket.fill_(-1)

    assert serves(engine, fresh(OLD | dict(only("q.weight", "k.weight"))))


def test_a_slice_in_the_middle_of_a_bucket_is_read_from_where_it_starts(session, engine):
    bucket = torch.cat([torch.full((7,), -1.0).bfloat16(), NEW["norm.weight"]])

    session.push([("norm.weight", bucket[7:])])

    assert torch.equal(engine.live["norm.weight"], NEW["norm.weight"])


def test_a_transposed_tensor_is_read_by_its_values(session, engine):
    transposed = NEW["q.weight"].t().contiguous().t()

    session.push([("q.weight", transposed), *only("k.weight")])

    assert torch.equal(engine.live["qkv.weight"][:4], NEW["q.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_floats_are_taken_too(session, engine, dtype):
    session.push([("norm.weight", NEW["norm.weight"].to(dtype))])

    assert torch.equal(engine.live["norm.weight"], NEW["norm.weight"].to(dtype).bfloat16())


def test_weights_that_want_gradients_are_taken(session, engine):
    session.reload({name: torch.nn.Parameter(tensor) for name, tensor in NEW.items()})

    assert serves(engine, fresh(NEW))


def test_weights_that_want_gradients_leave_no_graph(session, engine):
    session.push([("q.weight", torch.nn.Parameter(NEW["q.weight"]))])

    assert not engine.qkv.stage("qkv.weight").memory(CPU).requires_grad


def test_live_tensors_stay_where_they_are(session, engine):
    before = {name: live.data_ptr() for name, live in engine.live.items()}

    session.reload(NEW)

    assert {name: live.data_ptr() for name, live in engine.live.items()} == before


def test_the_loader_is_watched_once_a_name(session, engine):
    session.reload(NEW)
    engine.loads.clear()

    session.reload(weights(3))

    assert engine.loads == []


def test_the_loader_is_watched_on_meta_tensors_only(session, engine):
    session.reload(NEW)

    assert engine.loads
    assert not any(real for _, real in engine.loads)


# The fallback.


def test_a_loader_that_composes_runs_for_real():
    engine = FakeEngine(norm=torch.exp)
    session = serving(engine)

    session.reload(NEW)

    assert torch.equal(engine.live["norm.weight"], NEW["norm.weight"].exp())
    assert ("norm.weight", True) in engine.loads


def test_a_loader_that_composes_makes_its_layer_a_fallback():
    session = serving(FakeEngine(norm=torch.exp))

    session.reload(NEW)

    assert session.status().fallback == ("norm",)
    assert session.status().staged == ("qkv",)


def test_a_loader_that_breaks_while_it_runs_for_real_changes_nothing():
    def compose(loaded: Tensor) -> Tensor:
        if not loaded.is_meta and torch.equal(loaded, NEW["norm.weight"]):
            raise OSError("disk")
        return loaded.exp()

    engine = FakeEngine(norm=compose)
    session = serving(engine)
    before = session.proofs.digest()

    with pytest.raises(OSError, match="disk"):
        session.reload(NEW)

    assert session.proofs.digest() == before
    assert session.status().pending == {}


# All or nothing.


@pytest.mark.parametrize(
    "error", [RuntimeError("nccl"), KeyboardInterrupt(), SystemExit(), ValueError("gather")]
)
def test_an_iterator_that_fails_takes_the_whole_push_back(session, engine, error):
    with pytest.raises(type(error)):
        session.push(breaking("norm.weight", "q.weight", error=error))

    assert serves(engine, fresh(OLD))
    assert session.status().pending == {}


@pytest.mark.parametrize("error", [RuntimeError("nccl"), KeyboardInterrupt()])
def test_an_iterator_that_fails_takes_the_whole_reload_back(session, engine, error):
    with pytest.raises(type(error)):
        session.reload(breaking("norm.weight", "q.weight", "k.weight", error=error))

    assert serves(engine, fresh(OLD))
    assert not session.transactions.serving.torn


@pytest.mark.parametrize("push", [Session.push, Session.reload])
def test_ctrl_c_while_an_update_comes_to_stand_leaves_the_new_weights(
    session, engine, monkeypatch, push
):
    forget = UndoLog.forget

    def interrupted(undo):
        forget(undo)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(UndoLog, "forget", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push(session, NEW.items())

    assert serves(engine, fresh(NEW))
    status = session.status()
    assert (status.version, status.torn, status.pending, status.foreign) == (1, False, {}, ())


def test_after_a_failure_the_next_reload_goes_through(session, engine):
    with pytest.raises(RuntimeError):
        session.reload(breaking("norm.weight", "q.weight", error=RuntimeError("nccl")))

    session.reload(NEW)

    assert serves(engine, fresh(NEW))


def test_a_failed_push_leaves_what_an_earlier_one_made_live(session, engine):
    session.push(only("norm.weight"))

    with pytest.raises(RuntimeError):
        session.push(breaking("q.weight", "k.weight", error=RuntimeError("nccl")))

    assert serves(engine, fresh(OLD | dict(only("norm.weight"))))


def test_a_shard_of_an_earlier_push_survives_a_failed_one(session, engine):
    session.push(only("q.weight"))

    with pytest.raises(RuntimeError):
        session.push(breaking("norm.weight", error=RuntimeError("nccl")))
    session.push(only("k.weight"))

    assert serves(engine, fresh(OLD | dict(only("q.weight", "k.weight"))))


def test_a_shard_of_an_earlier_push_survives_a_failed_one_that_sent_it_again(session, engine):
    session.push(only("q.weight"))

    with pytest.raises(RuntimeError):
        session.push(breaking("q.weight", of=weights(5), error=RuntimeError("nccl")))
    session.push(only("k.weight"))

    assert serves(engine, fresh(OLD | dict(only("q.weight", "k.weight"))))


def test_a_shard_of_an_earlier_push_survives_a_failed_one_that_completed_its_layer(session, engine):
    session.push(only("q.weight"))

    with pytest.raises(RuntimeError):
        session.push(breaking("k.weight", error=RuntimeError("nccl")))
    session.push(only("k.weight", "norm.weight"))

    assert serves(engine, fresh(NEW))


def test_a_roll_back_that_fails_leaves_the_model_torn(session, engine, monkeypatch):
    commit = engine.norm.commit

    def fail():
        raise OSError("driver")

    def commit_for_good(undo):
        undo.remember_how(fail)
        return commit(undo)

    monkeypatch.setattr(engine.norm, "commit", commit_for_good)

    with pytest.raises(OSError, match="driver"):
        session.push(breaking("norm.weight", error=RuntimeError("nccl")))

    assert session.transactions.serving.torn


def test_a_layer_that_fails_to_commit_takes_back_the_layers_before_it(session, engine):
    def fail():
        raise RuntimeError("out of memory")

    engine.norm.on_commit = fail

    with pytest.raises(RuntimeError, match="out of memory"):
        session.push(only("q.weight", "k.weight", "norm.weight"))

    assert serves(engine, fresh(OLD))


def test_a_failure_inside_a_bracket_goes_back_to_before_it_began(session, engine):
    session.begin()
    session.push(only("norm.weight"))
    session.push(only("q.weight"))

    with pytest.raises(RuntimeError):
        session.push(breaking("k.weight", error=RuntimeError("nccl")))

    assert serves(engine, fresh(OLD))
    assert session.status().pending == {}


def failed(session: Session) -> Session:
    """A session whose bracket failed and has not been closed."""
    session.begin()
    with pytest.raises(RuntimeError):
        session.push(breaking("norm.weight", error=RuntimeError("nccl")))
    return session


def finish_in_vain(session: Session) -> None:
    with pytest.raises(ReloadError, match="it failed and was rolled back, or it never began"):
        session.finish()


def test_a_failed_bracket_cannot_be_finished(session):
    finish_in_vain(failed(session))


def test_a_failed_bracket_takes_no_further_push(session, engine):
    with pytest.raises(ReloadError, match=r"was rolled back; the old weights are served.*begin"):
        failed(session).push(only("norm.weight"))

    assert serves(engine, fresh(OLD))


@pytest.mark.parametrize("close", [finish_in_vain, Session.begin, Session.abandon])
def test_a_failed_bracket_that_was_closed_does_not_stand_in_the_way(session, engine, close):
    close(failed(session))

    session.push(only("norm.weight"))

    assert serves(engine, fresh(OLD | dict(only("norm.weight"))))


def test_a_bracket_that_ends_with_half_a_layer_goes_back(session, engine):
    session.begin()
    session.push(only("norm.weight", "k.weight"))

    with pytest.raises(IncompleteUpdate, match=r"qkv lacks q\.weight. Send every shard"):
        session.finish()

    assert serves(engine, fresh(OLD))
    assert session.status().pending == {}


def test_a_bracket_keeps_what_it_was_given(session, engine):
    session.begin()
    for name in ("k.weight", "norm.weight", "q.weight"):
        session.push(only(name))
    session.finish(strict=True)

    assert serves(engine, fresh(NEW))


def test_a_bracket_drops_what_half_arrived_before_it(session, engine):
    session.push(only("q.weight"))

    session.begin()
    session.push(only("norm.weight"))
    session.finish()

    assert session.status().pending == {}
    assert serves(engine, fresh(OLD | dict(only("norm.weight"))))


@pytest.mark.parametrize("again", [Session.begin, lambda session: session.reload(NEW)])
def test_a_bracket_that_was_left_open_is_rolled_back_by_the_next_one(
    session, engine, again, caplog
):
    session.begin()
    session.push(only("norm.weight", of=weights(5)))

    again(session)

    assert "never finished; it is rolled back" in caplog.text
    assert serves(engine, fresh(OLD)) or serves(engine, fresh(NEW))


def test_a_bracket_that_cannot_begin_is_not_open(session, engine, monkeypatch):
    def fail():
        raise RuntimeError("driver")

    monkeypatch.setattr(engine.norm, "drop", fail)
    with pytest.raises(RuntimeError, match="driver"):
        session.begin()

    with pytest.raises(ReloadError, match="or it never began"):
        session.finish()
    assert serves(engine, fresh(OLD))


def test_a_reload_by_an_impossible_path_changes_nothing(session, engine, tmp_path):
    with pytest.raises(ReloadError, match="Save the weights with safetensors"):
        session.reload(tmp_path / "nothing")

    assert serves(engine, fresh(OLD))
    session.begin()  # and no bracket was left open


def test_a_live_tensor_that_moves_is_reported(session, engine):
    def move():
        engine.norm.live["norm.weight"] = engine.norm.live["norm.weight"].clone()

    engine.norm.on_commit = move

    with pytest.raises(MovedTensor, match=r"norm\.weight"):
        session.reload(NEW)

    assert session.version == 0
    assert session.transactions.serving.torn


@pytest.mark.parametrize("name", ["norm.weight", "q.weight"])
def test_a_moved_tensor_is_not_healed_by_the_next_reload(session, engine, name):
    def move():
        engine.norm.live["norm.weight"] = engine.norm.live["norm.weight"].clone()
        engine.norm.on_commit = lambda: None

    engine.norm.on_commit = move
    with pytest.raises(MovedTensor):
        session.push(only("norm.weight"))

    session.reload(NEW)

    with pytest.raises(TornWeights, match="Restart the engine"):
        session.check_servable()


def test_without_the_ledger_nobody_looks_where_tensors_are(engine):
    session = Session(engine, checks=Checks(ledger=False))
    session.open()
    engine.norm.on_commit = lambda: engine.norm.live.update(
        {"norm.weight": engine.norm.live["norm.weight"].clone()}
    )

    session.reload(NEW, strict=False)

    assert not session.transactions.serving.torn


def test_without_the_digest_a_report_has_none_and_a_status_has_one(engine):
    session = Session(engine, checks=Checks(digest=False))
    session.open()

    assert session.reload(NEW).digest is None
    assert session.status().digest == session.proofs.digest()


# Cut off: whatever a call could not take back itself, the next one does.


def cut_off(session: Session, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A push whose own roll-back never ran, as when a second Ctrl-C comes at once."""
    with monkeypatch.context() as patch:
        patch.setattr(session.transactions, "_roll_back", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            session.push(breaking(*names, error=KeyboardInterrupt()))


@pytest.mark.parametrize(
    "next_call",
    [
        lambda session: session.push([]),
        Session.begin,
        Session.check_servable,
        finish_in_vain,
    ],
    ids=["push", "begin", "generate", "finish"],
)
def test_a_push_that_was_cut_off_is_taken_back_by_whoever_comes_next(
    session, engine, monkeypatch, next_call
):
    cut_off(session, monkeypatch, "norm.weight", "q.weight")
    assert not serves(engine, fresh(OLD))

    next_call(session)

    assert serves(engine, fresh(OLD))
    assert session.status().pending == {}


def test_a_bracket_that_was_cut_off_cannot_be_finished(session, engine, monkeypatch):
    session.begin()
    cut_off(session, monkeypatch, *NEW)

    finish_in_vain(session)

    assert serves(engine, fresh(OLD))


def test_an_update_that_another_one_rolled_back_goes_no_further(session, engine):
    def weights_that_begin_anew():
        yield from only("norm.weight")
        session.begin()
        session.abandon()
        yield from only("q.weight", "k.weight")

    with pytest.raises(ReloadError, match="rolled back before"):
        session.push(weights_that_begin_anew())

    assert serves(engine, fresh(OLD))


# Asleep.


@pytest.mark.parametrize("call", [lambda s: s.push(only("norm.weight")), Session.begin])
def test_sleeping_weights_refuse_updates_until_they_wake_up(session, engine, call):
    session.sleep(keeps_weights=True)

    with pytest.raises(SleepingWeights, match=r"Call wake_up\(\)"):
        call(session)
    session.wake_up()
    session.reload(NEW)

    assert serves(engine, fresh(NEW))


def test_sleeping_weights_are_not_read(session):
    session.sleep(keeps_weights=True)

    status = session.status()

    assert status.asleep
    assert status.digest is None
    assert not status.parameters


def test_weights_that_were_discarded_must_all_arrive_again(session):
    session.sleep(keeps_weights=False)
    session.wake_up()

    with pytest.raises(TornWeights, match="slept at level 2"):
        session.check_servable()
    session.push(only("norm.weight", "q.weight"))
    with pytest.raises(TornWeights, match=r"qkv\.weight"):
        session.check_servable()
    session.push(only("k.weight"))

    session.check_servable()


def test_an_update_of_a_part_of_the_model_says_so(session, caplog):
    """It may be meant; a bucket of whole layers that was lost looks just the same."""
    session.begin()
    session.push(only("norm.weight"))
    session.finish()
    assert "the update brought 1 of 2 parameters" in caplog.text
    assert "keep what they had: qkv.weight" in caplog.text

    caplog.clear()
    session.push(only("norm.weight"))
    session.check_nothing_waits()
    session.check_nothing_waits()
    assert caplog.text.count("the update brought 1 of 2 parameters") == 1


def test_a_whole_update_in_pushes_says_nothing(session, caplog):
    for name in ("norm.weight", "q.weight", "k.weight"):
        session.push(only(name))
    session.check_nothing_waits()

    assert "the update brought" not in caplog.text


# Several workers.


def workers(count: int = 2, **kwargs) -> list[tuple[FakeEngine, Session]]:
    """As many sessions as workers, which share a store."""
    store, found = HashStore(), []
    for rank in range(count):
        engine = FakeEngine()
        found.append(
            (
                engine,
                serving(engine, ballot=Ballot(store, rank, count, **{"lockstep": True, **kwargs})),
            )
        )
    return found


def at_once(calls: Sequence[Callable[[], object]]) -> list[object]:
    """What each call returned or raised; each in a thread of its own."""

    def outcome(call):
        try:
            return call()
        except BaseException as failure:
            return failure

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def test_all_workers_commit(engine):
    ranks = workers(3)

    reports = at_once([lambda s=session: s.reload(NEW) for _, session in ranks])

    assert all(serves(engine, fresh(NEW)) for engine, _ in ranks)
    assert len({report.digest for report in reports}) == 1
    assert [session.version for _, session in ranks] == [1, 1, 1]


@pytest.mark.parametrize(
    "bad_weights",
    [
        {**NEW, "norm.weight": torch.full((4,), torch.nan).bfloat16()},
        dict(only("norm.weight")),
        breaking("norm.weight", "q.weight", error=KeyboardInterrupt()),
    ],
    ids=["NaN", "incomplete", "interrupted"],
)
def test_one_worker_that_fails_takes_all_of_them_back(bad_weights):
    ranks = workers()
    calls = [lambda: ranks[0][1].reload(NEW), lambda: ranks[1][1].reload(bad_weights)]

    followed, failed = at_once(calls)

    assert isinstance(followed, PeerFailed)
    assert f"rank 1 did not commit this update ({type(failed).__name__}" in str(followed)
    assert not isinstance(failed, PeerFailed)
    assert all(serves(engine, fresh(OLD)) for engine, _ in ranks)

    at_once([lambda s=session: s.reload(NEW) for _, session in ranks])

    assert all(serves(engine, fresh(NEW)) for engine, _ in ranks)


def cannot_enter(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.transactions._ballot, "open", raising(MemoryError()))


def fails_having_entered(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ballot = session.transactions._ballot
    enter, fail = ballot.open, raising(MemoryError())
    monkeypatch.setattr(ballot, "open", lambda: (enter(), fail()))


def finds_that_something_moved(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.proofs, "audit", raising(MemoryError()))


def raising(failure: Exception) -> Callable[[], None]:
    def call() -> None:
        raise failure

    return call


@pytest.mark.parametrize("way", [cannot_enter, fails_having_entered, finds_that_something_moved])
@pytest.mark.parametrize("lockstep", [True, False])
def test_one_worker_that_cannot_begin_is_not_waited_for(way, lockstep, monkeypatch):
    """And they meet again in the next update, whoever comes first."""
    ranks = workers(lockstep=lockstep)
    calls = [lambda s=session: s.reload(NEW) for _, session in ranks]
    began = time.monotonic()

    with monkeypatch.context() as patch:
        way(ranks[1][1], patch)
        followed, failed = at_once(calls)

    assert time.monotonic() - began < 5
    assert isinstance(failed, MemoryError)
    assert isinstance(followed, PeerFailed)
    assert all(serves(engine, fresh(OLD)) for engine, _ in ranks)
    ranks[1][1].begin()
    ranks[0][1].begin()
    at_once([lambda s=session: (s.push(NEW.items()), s.finish()) for _, session in ranks])
    assert all(serves(engine, fresh(NEW)) for engine, _ in ranks)


def test_a_worker_that_is_interrupted_after_all_agreed_commits_all_the_same(monkeypatch):
    """It is too late to go back: the others stand already."""
    ranks = workers()
    ballot = ranks[1][1].transactions._ballot
    agree = ballot.agree

    def interrupted(round):
        agree(round)
        raise KeyboardInterrupt

    monkeypatch.setattr(ballot, "agree", interrupted)

    outcomes = at_once([lambda s=session: s.reload(NEW) for _, session in ranks])

    assert isinstance(outcomes[1], KeyboardInterrupt)
    assert all(serves(engine, fresh(NEW)) for engine, _ in ranks)
    assert [session.version for _, session in ranks] == [1, 1]


# Without an undo log.


def torn(session: Session) -> Session:
    with pytest.raises(RuntimeError):
        session.reload(breaking("norm.weight", error=RuntimeError("nccl")), atomic=False)
    return session


def test_a_failure_without_undo_leaves_the_model_torn(session, engine):
    torn(session)

    assert session.status().torn
    assert serves(engine, fresh(OLD | dict(only("norm.weight"))))


def test_a_torn_model_refuses_to_serve_and_says_what_heals_it(session):
    torn(session)

    with pytest.raises(TornWeights, match="Push one complete update"):
        session.check_servable()


def test_a_bracket_with_new_layers_does_not_serve_until_it_is_finished(session):
    session.begin()
    session.push(only("norm.weight"))

    with pytest.raises(TornWeights, match=r"update is under way.*Finish it"):
        session.check_servable()
    session.finish()

    session.check_servable()


def test_a_whole_model_does_not_refuse(session):
    session.reload(NEW, atomic=False)

    session.check_servable()


def test_a_failure_before_anything_went_live_tears_nothing(session, engine):
    with pytest.raises(RuntimeError):
        session.reload(breaking("q.weight", error=RuntimeError("nccl")), atomic=False)

    assert not session.transactions.serving.torn
    assert serves(engine, fresh(OLD))


@pytest.mark.parametrize("atomic", [True, False])
def test_a_complete_reload_heals_a_torn_model(session, engine, atomic):
    torn(session).reload(NEW, atomic=atomic)

    assert not session.status().torn
    assert serves(engine, fresh(NEW))


def test_a_part_of_the_weights_does_not_heal(session):
    torn(session).reload(dict(only("norm.weight")), strict=False)

    assert session.transactions.serving.torn


def test_nothing_does_not_heal_a_model_that_started_without_a_checkpoint():
    session = Session(FakeEngine())
    session.open()

    torn(session).reload({}, strict=False)

    assert session.transactions.serving.torn


def test_a_failed_atomic_reload_of_a_torn_model_leaves_it_torn(session):
    torn(session)

    with pytest.raises(RuntimeError):
        session.reload(breaking("norm.weight", error=RuntimeError("nccl")))

    assert session.transactions.serving.torn


# What is refused.


def test_a_strict_reload_names_what_is_missing(session, engine):
    with pytest.raises(IncompleteUpdate, match=r"norm\.weight\. .*strict=False"):
        session.reload(dict(only("q.weight", "k.weight")))

    assert serves(engine, fresh(OLD))


def test_a_model_that_started_without_a_checkpoint_needs_every_parameter():
    session = Session(FakeEngine())
    session.open()

    with pytest.raises(IncompleteUpdate, match=r"without 1 of .*qkv\.weight"):
        session.reload(dict(only("norm.weight")))


def test_a_lenient_reload_keeps_whole_old_layers(session, engine):
    session.reload(dict(only("q.weight", "k.weight")), strict=False)

    assert serves(engine, fresh(OLD | dict(only("q.weight", "k.weight"))))


def test_a_lenient_reload_keeps_no_half_of_a_layer(session, engine):
    with pytest.raises(IncompleteUpdate, match="half arrived"):
        session.reload(dict(only("norm.weight", "k.weight")), strict=False)

    assert serves(engine, fresh(OLD))


def test_a_name_the_loader_drops_may_be_left_out(session, engine):
    session.reload(dict(only("q.weight", "k.weight", "norm.weight")), strict=True)

    assert serves(engine, fresh(NEW))


def test_a_tensor_sent_twice_in_one_update_is_refused(session, engine):
    with pytest.raises(MisfitTensor, match=r"norm\.weight arrived twice.*send each tensor once"):
        session.reload([*NEW.items(), *only("norm.weight", of=weights(3))])

    assert serves(engine, fresh(OLD))


def test_a_tensor_sent_twice_in_one_bracket_is_refused(session):
    session.begin()
    session.push(only("norm.weight"))

    with pytest.raises(MisfitTensor, match="send each tensor once"):
        session.push(only("norm.weight"))


def test_scales_sent_beside_a_float_weight_are_refused():
    engine = FakeEngine(torch.int8)
    session = serving(engine)
    scales = [("q.weight_scale", torch.full((4, 1), 9.0))]

    with pytest.raises(MisfitTensor, match=r"q\.weight_scale arrived twice"):
        session.reload([*only("q.weight"), *scales, *only("k.weight", "norm.weight")])

    assert serves(engine, fresh(OLD, dtype=torch.int8))


def bad(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The new weights with one of them replaced, sent last."""
    return {key: value for key, value in NEW.items() if key != name} | {name: tensor}


def freed(tensor: Tensor) -> Tensor:
    """As FSDP leaves one: of the same shape, and without memory. To read it ends the process."""
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "remedy"),
    [
        (torch.zeros(3, 4).bfloat16(), r"shape \(3, 4\), but should have \(4, 4\).*unsharded"),
        (torch.zeros(4, 4, 1).bfloat16(), "unsharded"),
        (torch.zeros(16).bfloat16(), "unsharded"),
        (torch.zeros(4, 4, dtype=torch.float64), r"q\.weight is torch\.float64.*Send bfloat16"),
        (torch.zeros(4, 4).bfloat16().to_sparse(), "send a dense tensor"),
        (torch.zeros(4, 4).numpy(), "is a ndarray; send a torch"),
        (torch.zeros(4, 4, dtype=torch.int64), r"q\.weight is torch\.int64.*Send bfloat16"),
        (torch.zeros(4, 4, dtype=torch.int8), "Send bfloat16"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), "Send bfloat16"),
        (torch.zeros(4, 4, device="meta").bfloat16(), "send a tensor that holds values"),
        (freed(torch.zeros(4, 4).bfloat16()), r"q\.weight holds no values: its memory"),
        (torch.full((4, 4), float("nan")).bfloat16(), "NaN or infinite.*trainer's last step"),
        (torch.tensor([[float("inf"), -float("inf")] * 2] * 4).bfloat16(), "NaN or infinite"),
    ],
    ids=[
        "rows",
        "rank",
        "flat",
        "float64",
        "sparse",
        "numpy",
        "int64",
        "int8",
        "fp8",
        "meta",
        "freed",
        "nan",
        "inf",
    ],
)
@pytest.mark.parametrize("atomic", [True, False])
def test_a_tensor_that_does_not_fit_is_refused(session, engine, tensor, remedy, atomic):
    with pytest.raises(MisfitTensor, match=remedy):
        session.reload({"q.weight": tensor}, atomic=atomic)

    assert serves(engine, fresh(OLD))
    assert not session.transactions.serving.torn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_takes_everything_back(dtype, value):
    engine = FakeEngine(dtype)
    session = serving(engine)
    tensor = NEW["k.weight"].clone()
    tensor[1, 2] = value

    with pytest.raises(MisfitTensor, match=r"k\.weight holds NaN or infinite"):
        session.reload(bad("k.weight", tensor))

    assert serves(engine, fresh(OLD, dtype=dtype))


@pytest.mark.parametrize(
    ("stored", "sent", "value"),
    [(torch.float16, torch.bfloat16, 1e5), (torch.bfloat16, torch.float32, -3.4e38)],
    ids=["fp16 engine", "bf16 engine"],
)
def test_a_value_that_would_be_infinite_once_stored_is_refused(stored, sent, value):
    engine = FakeEngine(stored)
    session = serving(engine)

    with pytest.raises(MisfitTensor, match=r"q\.weight holds values up to .*Serve the engine"):
        session.reload(bad("q.weight", torch.full((4, 4), value, dtype=sent)))

    assert serves(engine, fresh(OLD, dtype=stored))


def test_large_but_finite_values_are_taken(session, engine):
    largest = torch.full((4,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)

    session.push([("norm.weight", largest)])

    assert torch.equal(engine.live["norm.weight"], largest)


def test_an_unknown_name_is_refused_with_the_nearest_one(session, engine):
    with pytest.raises(UnknownWeight, match=r"'q\.weigth'.* Did you mean 'q\.weight'\?"):
        session.reload({"norm.weight": NEW["norm.weight"], "q.weigth": NEW["q.weight"]})

    assert serves(engine, fresh(OLD))


def test_a_name_like_no_other_gets_no_hint(session):
    with pytest.raises(UnknownWeight, match="knows no weight 'z'") as refusal:
        session.push([("z", torch.zeros(1))])

    assert "Did you mean" not in str(refusal.value)


# What is told.


def test_versions_count_what_went_live(session):
    assert session.version == 0

    session.push(only("q.weight"))  # half a layer
    assert session.version == 0
    session.push(only("k.weight"))
    assert session.version == 1
    session.reload(NEW)
    assert session.version == 2


def test_a_bracket_is_one_version(session):
    session.begin()
    for name in NEW:
        session.push(only(name))
    session.finish()

    assert session.version == 1


def test_a_failed_update_is_no_version(session):
    with pytest.raises(RuntimeError):
        session.reload(breaking("norm.weight", error=RuntimeError("nccl")))

    assert session.version == 0


def test_a_report_counts_tensors_bytes_and_layers(session, engine):
    report = session.reload(NEW)

    assert report.tensors == 4
    assert report.bytes_in == sum(tensor.nbytes for tensor in NEW.values())
    assert report.bytes_out == sum(live.nbytes for live in engine.live.values())
    assert len(report.layers) == 2
    assert report.version == 1
    assert report.seconds >= sum(report.phases.values()) > 0


def test_a_report_tells_what_was_dropped_and_what_is_served(session):
    report = session.reload(NEW)

    assert report.ignored == ("lm_head.weight",)
    assert report.pending == ()
    assert report.digest == session.proofs.digest() == serving(FakeEngine(), NEW).proofs.digest()


def test_a_status_tells_scheme_version_and_roads(session):
    session.reload(NEW)

    status = session.status()

    assert (status.scheme, status.version, status.torn) == ("int8", 1, False)
    assert status.staged == ("qkv", "norm")
    assert status.direct == status.fallback == ()
    assert status.digest == session.proofs.digest()


def test_the_plan_shows_where_a_name_landed(session):
    session.push(only("k.weight"))

    assert "k.weight (2, 4)  ->  qkv.weight @ 16" in str(session.plan)


def test_a_session_is_live_once_it_is_open():
    session = Session(FakeEngine())

    assert not session.live
    session.first_load(iter(OLD.items()))
    assert not session.live
    session.open()
    assert session.live
