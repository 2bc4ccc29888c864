"""A folder of bundles: who missed some catches up, and nothing goes that somebody needs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from flashquant.errors import BrokenDelta, ReloadError, StaleBase
from flashquant.sender import BundleStore, Delta, Sender
from tests.sender.test_sender import applied, manifest, moved, policy, same


class Engine:
    """What an engine does with bundles, as far as a folder can tell."""

    def __init__(self):
        self.held, self.digest, self.read = {}, None, 0

    def apply(self, path):
        delta = Delta.load(path)
        if delta.header.base not in (None, self.digest):
            raise StaleBase(path.name)
        self.held, self.digest = applied(delta, self.held), delta.header.digest
        self.read += 1

    def catch_up(self, store):
        for path in store.path_from(self.digest):
            self.apply(path)


@pytest.fixture
def store(tmp_path):
    return BundleStore(tmp_path / "bundles")


@pytest.fixture
def sender():
    return Sender(manifest(), delta=True)


def steps(sender, store, count, start=0):
    """A trainer that writes a bundle a step; the last weights."""
    weights = moved(policy(), start)
    for seed in range(start, start + count):
        weights = moved(weights, seed)
        store.put(sender.bundle(weights))
    return weights


def test_an_engine_that_was_stopped_for_20_steps_catches_up_by_20_deltas(store, sender):
    engine = Engine()
    steps(sender, store, 2)
    engine.catch_up(store)
    read = engine.read

    weights = steps(sender, store, 20, start=2)
    engine.catch_up(store)

    assert engine.read == read + 20
    assert engine.digest == store.newest
    assert same(engine.held, dict(Sender(manifest()).stream(weights)))
    assert store.path_from(engine.digest) == []


def test_with_the_one_file_it_needs_removed_it_takes_the_whole_bundle_and_says_so(
    store, sender, caplog
):
    engine = Engine()
    steps(sender, store, 2)
    engine.catch_up(store)
    steps(sender, store, 3, start=2)
    weights = moved(policy(), 9)
    store.put(sender.bundle(weights))
    store.put(sender.snapshot())
    first, *_ = store.path_from(engine.digest)
    assert "whole" not in first.name
    first.unlink()

    with caplog.at_level(logging.WARNING):
        engine.catch_up(store)

    assert "by a whole bundle" in caplog.text
    assert same(engine.held, dict(Sender(manifest()).stream(weights)))


def test_a_new_engine_starts_with_the_last_whole_bundle(store, sender):
    steps(sender, store, 3)
    store.put(sender.snapshot())
    weights = steps(sender, store, 2, start=3)
    engine = Engine()

    engine.catch_up(store)

    assert engine.read == 3
    assert same(engine.held, dict(Sender(manifest()).stream(weights)))


def test_deltas_are_read_only_while_they_are_less_than_a_whole_bundle(store, sender):
    """One is less, forty are not: each step changes a part of every tensor."""
    engine = Engine()
    steps(sender, store, 1)
    engine.catch_up(store)
    steps(sender, store, 1, start=1)
    store.put(sender.snapshot())
    by_deltas = store.path_from(engine.digest)
    steps(sender, store, 40, start=2)
    store.put(sender.snapshot())

    assert [path.name[:8] for path in by_deltas] == ["00000002"]
    assert store.path_from(engine.digest) == store.path_from(None)


def test_without_a_way_it_says_what_to_put_there(store, sender):
    sender.bundle(policy())
    steps(sender, store, 2)

    with pytest.raises(StaleBase, match=r"no bundles in .* lead from policy None.*Sender\.snap"):
        store.path_from(None)
    with pytest.raises(StaleBase):
        store.prune([])
    assert len(list(store.folder.iterdir())) == 2


def test_an_empty_folder_leads_nowhere(store):
    assert store.path_from(None) == store.path_from("0" * 32) == store.prune([]) == []


def test_what_a_live_engine_needs_stays_and_the_rest_goes(store, sender):
    engine, behind = Engine(), Engine()
    steps(sender, store, 3)
    behind.catch_up(store)
    steps(sender, store, 3, start=3)
    store.put(sender.snapshot())
    weights = steps(sender, store, 2, start=6)
    engine.catch_up(store)

    removed = store.prune([engine.digest, behind.digest])

    assert removed
    for one in (engine, behind, Engine()):
        one.catch_up(store)
        assert same(one.held, dict(Sender(manifest()).stream(weights)))
    assert behind.read == 3 + 5  # by deltas: none of those it needed has gone
    assert store.prune([engine.digest])
    assert len(list(store.folder.iterdir())) == 3


def test_a_sender_that_starts_anew_goes_on_in_the_same_folder(store, sender):
    engine = Engine()
    steps(sender, store, 3)
    engine.catch_up(store)

    weights = steps(Sender(manifest(), delta=True), store, 2, start=20)
    engine.catch_up(store)

    assert same(engine.held, dict(Sender(manifest()).stream(weights)))


def test_what_is_no_bundle_is_let_alone(store, sender):
    steps(sender, store, 1)
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / ".00000002-whole-x.safetensors.tmp").write_bytes(b"half")

    assert len(store.path_from(None)) == 1
    store.prune([])
    assert (store.folder / "notes.txt").exists()
    assert (store.folder / ".00000002-whole-x.safetensors.tmp").exists()


def of_no_file(store, make):
    """A name that would lead on to another policy, of what is no ordinary file."""
    make(store.folder / f"00000009-{store.newest}-{'f' * 32}.safetensors")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_ordinary_files_are_bundles(store, sender, make):
    """A link leads out of the folder; a pipe would be read for ever."""
    steps(sender, store, 2)
    newest = store.newest

    of_no_file(store, make)

    assert store.newest == newest
    assert len(store.path_from(None)) == 2
    assert store.put(sender.bundle(moved(policy(), 7))).name.startswith("00000003")


def test_after_a_policy_came_back_the_newest_stays_the_newest(store, sender):
    """A step that was taken back, and one in which nothing changed."""
    one, other = moved(policy(), 1), moved(policy(), 2)
    for weights in (one, other, one, one, other, one):
        store.put(sender.bundle(weights))
        if len(list(store.folder.iterdir())) == 3:
            store.put(sender.snapshot())
    newest = store.newest

    for _ in range(3):
        store.prune([])
        assert store.newest == newest
    engine = Engine()
    engine.catch_up(store)
    assert same(engine.held, dict(Sender(manifest()).stream(one)))
    assert store.put(sender.bundle(other)).name.startswith("00000008")


def test_a_way_without_what_was_refused_is_another_or_none(store, sender):
    engine = Engine()
    steps(sender, store, 1)
    engine.catch_up(store)
    steps(sender, store, 1, start=1)
    (delta,) = store.path_from(engine.digest)
    with pytest.raises(StaleBase):
        store.path_from(engine.digest, without=[delta])
    store.put(sender.snapshot())

    (whole,) = store.path_from(engine.digest, without=[delta])

    assert "whole" in whole.name
    assert store.path_from(engine.digest) == [delta]


def test_two_writers_at_once_are_told(store, sender, monkeypatch):
    """Both took the same number: which policy is the newest, no reader could say."""
    steps(sender, store, 2)
    other = Sender(manifest(), delta=True).bundle(moved(policy(), 50))
    save = Delta.save

    def meanwhile(delta, path):
        monkeypatch.setattr(Delta, "save", save)
        store.put(other)
        save(delta, path)

    monkeypatch.setattr(Delta, "save", meanwhile)
    with pytest.raises(ReloadError, match="another writer has put 00000003-whole"):
        store.put(sender.bundle(moved(policy(), 9)))

    assert store.newest == other.header.digest
    assert len(list(store.folder.iterdir())) == 3


def test_a_bundle_that_does_not_start_from_the_newest_policy_is_warned_of(store, sender, caplog):
    steps(sender, store, 2)
    sender.bundle(moved(policy(), 8))
    assert not caplog.records

    store.put(sender.bundle(moved(policy(), 9)))

    assert "one was left out, or there is another writer" in caplog.text


def test_what_a_killed_writer_left_goes_with_the_next_prune(store, sender):
    """And what one is writing just now stays."""
    steps(sender, store, 2)
    newest = max(store.folder.iterdir())
    half, writing = (
        store.folder / f".{name}.x7" for name in (newest.name, newest.name.replace("2", "3", 1))
    )
    for folder in (half, writing):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")

    store.prune([])

    assert (half.exists(), writing.exists()) == (False, True)


def test_a_reader_looks_again_where_another_process_has_pruned_what_it_saw(store, sender):
    steps(sender, store, 2)
    looks = []

    class Beside(BundleStore):
        def _all(self):
            found = super()._all()
            if not looks:
                store.put(sender.bundle(moved(policy(), 7)))
                store.put(sender.snapshot())
                store.prune([])
            looks.append(found)
            return found

    way = Beside(store.folder).path_from(None)

    assert way == store.path_from(None)
    assert all(path.exists() for path in way)
    assert len(looks) == 2


def test_a_file_that_was_spoilt_is_refused_when_it_is_read(store, sender):
    steps(sender, store, 1)
    (path,) = store.path_from(None)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(BrokenDelta):
        Engine().catch_up(store)
