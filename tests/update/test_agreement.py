"""One ballot a bracket: everybody commits, or nobody does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from flashquant.errors import MisfitTensor, PeerFailed, WorkerLost
from flashquant.update import Ballot, Member
from flashquant.update import agreement as agree


@pytest.fixture
def store() -> HashStore:
    return HashStore()


def voice(store, rank, **options):
    return Ballot(store, rank, 2, **{"lockstep": True, **options})


def both(one, other):
    """Run two calls side by side; what each returned or raised."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(one), pool.submit(other)]
        return [future.exception() or future.result() for future in futures]


def commit(one, other):
    """One round in which both are ready."""
    rounds = one.open(), other.open()
    return both(lambda: one.agree(rounds[0]), lambda: other.agree(rounds[1]))


def test_two_that_are_ready_commit(store):
    one, other = voice(store, 0), voice(store, 1)

    for _ in range(5):  # round after round
        assert commit(one, other) == [None, None]


def test_one_that_is_ready_waits_for_the_other(store):
    one, other = voice(store, 0), voice(store, 1)
    round = one.open()
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (one.agree(round), done.set()))
    waiting.start()

    assert not done.wait(0.2)
    other.agree(other.open())

    assert done.wait(5)
    waiting.join()


def test_one_that_refuses_names_itself_and_waits_for_nobody(store):
    one, other = voice(store, 0), voice(store, 1)
    round = one.open()

    assert other.refuse(other.open(), MisfitTensor("q.weight holds NaN"))

    with pytest.raises(PeerFailed, match=r"rank 1 .*MisfitTensor: q\.weight holds NaN"):
        one.agree(round)


def test_the_first_refusal_is_the_one_that_is_told(store):
    one, other, third = (Ballot(store, rank, 3, lockstep=True) for rank in range(3))
    rounds = [ballot.open() for ballot in (one, other, third)]

    other.refuse(rounds[1], ValueError("first"))
    third.refuse(rounds[2], ValueError("second"))

    with pytest.raises(PeerFailed, match="first"):
        one.agree(rounds[0])


def test_after_all_have_agreed_it_is_too_late_to_refuse(store):
    one, other = voice(store, 0), voice(store, 1)
    rounds = one.open(), other.open()
    both(lambda: one.agree(rounds[0]), lambda: other.agree(rounds[1]))

    assert not one.refuse(rounds[0], KeyboardInterrupt())


def test_one_that_missed_a_round_joins_the_others(store):
    """A worker may fail before it could begin; the next update finds all of them together."""
    one, other = voice(store, 0), voice(store, 1)
    one.refuse(one.open(), ValueError())
    rounds = one.open(), other.open()

    assert rounds[0] == rounds[1]
    assert both(lambda: one.agree(rounds[0]), lambda: other.agree(rounds[1])) == [None, None]


def test_ranks_with_programs_of_their_own_follow_each_other_through_every_round(store):
    """One fails, and tries again before the other has come to what failed."""
    fast, slow = voice(store, 0, lockstep=False), voice(store, 1, lockstep=False)
    failed = fast.open()
    assert fast.refuse(failed, MemoryError("full"))
    again = fast.open()

    with pytest.raises(PeerFailed, match="full"):
        slow.agree(slow.open())
    late = slow.open()

    assert both(lambda: fast.agree(again), lambda: slow.agree(late)) == [None, None]


def test_a_dead_process_is_not_waited_for(store, monkeypatch):
    monkeypatch.setattr(agree, "_LOOK_EVERY", 0.05)
    one, _ = voice(store, 0), voice(store, 1)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    member = Member.here(1)._replace(pid=dead.pid)
    store.set("member/1", json.dumps(member))
    dead.wait()
    start = time.monotonic()

    with pytest.raises(WorkerLost, match=r"rank 1 was lost.*its process has ended"):
        one.agree(one.open())

    assert time.monotonic() - start < 10


def test_one_that_is_alive_is_waited_for_as_long_as_patience_lasts(store, monkeypatch):
    monkeypatch.setattr(agree, "_LOOK_EVERY", 0.05)
    one, _ = voice(store, 0, patience=0.2), voice(store, 1)

    with pytest.raises(PeerFailed, match=r"rank 1 .*not ready after"):
        one.agree(one.open())


def test_a_slow_worker_finds_the_decision_of_an_old_round(store):
    """The others may have failed, and begun anew, several times meanwhile."""
    one, slow = voice(store, 0), voice(store, 1)
    round = slow.open()
    for _ in range(3):
        one.refuse(one.open(), ValueError("at once"))

    with pytest.raises(PeerFailed, match="at once"):
        slow.agree(round)


def test_this_process_is_not_gone():
    assert not Member.here(0).gone


def test_a_process_on_another_host_counts_as_alive():
    assert not Member.here(0)._replace(host="elsewhere", pid=2**22 - 1).gone


def test_another_process_with_the_same_id_is_not_the_member():
    assert Member.here(0)._replace(started=1.0).gone


def test_a_member_that_nobody_has_waited_for_is_gone():
    child = os.fork()
    if child == 0:
        os._exit(0)
    zombie = Member.here(1)._replace(pid=child)
    while not zombie.gone:
        time.sleep(0.01)
    os.waitpid(child, 0)

    assert zombie.gone
