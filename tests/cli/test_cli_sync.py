"""`flashquant sync`: servers are brought to the newest policy of a folder, or stay as they are."""

from __future__ import annotations

import json
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flashquant.cli import sync
from flashquant.cli.main import main
from flashquant.errors import BrokenDelta, StaleBase
from flashquant.sender import BundleStore, Delta, Sender
from tests.sender.test_sender import applied, manifest, moved, policy, same


class Rollouts:
    """A server as far as this command can tell: vLLM's route, and one worker behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.code, self.workers = 200, 1
        self.said: bytes | None = None  # whatever it is asked
        self.start()

    def start(self) -> None:
        """Or start anew: from a checkpoint."""
        self.held: dict[str, Any] = {}
        self.digest: str | None = None
        self.version, self.foreign = 0, 0
        self.torn, self.word = "", uuid.uuid4().hex

    def answer(self, method: str, args: list[str]) -> Any:
        self.asked.append(method)
        if method == sync.STANDING:
            return [self.version, 0, False, self.torn, None, False, self.word, self.foreign]
        if method == sync.MANIFEST:
            return {"answer": {"digest": self.digest, "version": self.version}}
        try:
            return {"answer": self.apply(Path(args[0]))}
        except (StaleBase, BrokenDelta) as failure:
            return {"error": type(failure).__name__, "says": str(failure)}

    def apply(self, path: Path) -> dict[str, Any]:
        delta = Delta.load(self.folder / path.name)
        if delta.header.base not in (None, self.digest):
            raise StaleBase(f"{path.name} is for another policy")
        self.held, self.digest = applied(delta, self.held), delta.header.digest
        self.version += 1
        return {"seconds": 0.1, "version": self.version}


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "bundles")


@pytest.fixture
def rollouts(store: BundleStore) -> Rollouts:
    return Rollouts(store.folder)


@pytest.fixture
def url(rollouts: Rollouts) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers = [rollouts.answer(body["method"], body["args"])] * rollouts.workers
            said = {"results": answers} if self.path == "/collective_rpc" else {}
            self.send_response(rollouts.code)
            self.end_headers()
            self.wfile.write(rollouts.said or json.dumps(said).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def once(store: BundleStore, *urls: str, more: tuple[str, ...] = ()) -> int:
    return main(["sync", "--from", str(store.folder), "--to", *urls, "--once", *more])


def steps(sender: Sender, store: BundleStore, weights: Any, seeds: range) -> Any:
    for seed in seeds:
        weights = moved(weights, seed)
        store.put(sender.bundle(weights))
    return weights


def test_a_server_catches_up_by_what_it_missed(
    store: BundleStore, rollouts: Rollouts, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sender = Sender(manifest(), delta=True)
    weights = steps(sender, store, policy(), range(2))

    assert once(store, url) == 0
    weights = steps(sender, store, weights, range(2, 5))
    rollouts.asked.clear()
    assert once(store, f"{url}/") == 0

    assert rollouts.digest == store.newest
    assert same(rollouts.held, dict(sender.stream(weights)))
    assert rollouts.asked == [sync.STANDING, sync.MANIFEST, *[sync.TRY_APPLY_DELTA] * 3]
    assert "version 5" in capsys.readouterr().out


def test_one_that_is_there_already_is_left_alone(
    store: BundleStore, rollouts: Rollouts, url: str
) -> None:
    steps(Sender(manifest(), delta=True), store, policy(), range(2))
    server = sync.Server(url)
    list(sync.catch_up(server, store, store.folder))
    rollouts.asked.clear()

    assert list(sync.catch_up(server, store, store.folder)) == []
    assert rollouts.asked == [sync.STANDING]  # no pass over its weights


def test_where_there_is_nothing_to_bring_it_says_so(
    store: BundleStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(Sender(manifest(), delta=True), store, policy(), range(2))
    once(store, url)
    capsys.readouterr()

    assert once(store, url) == 0
    assert capsys.readouterr().out == f"{url}: serves the newest policy already\n"


def test_a_server_that_was_started_anew_begins_with_a_whole_bundle(
    store: BundleStore, rollouts: Rollouts, url: str
) -> None:
    steps(Sender(manifest(), delta=True), store, policy(), range(3))
    server = sync.Server(url)
    list(sync.catch_up(server, store, store.folder))

    rollouts.start()
    applied_now = [name for name, _ in sync.catch_up(server, store, store.folder)]

    assert ["whole" in name for name in applied_now] == [True, False, False]
    assert rollouts.digest == store.newest


def test_one_that_somebody_else_brought_to_the_same_version_after_a_new_start_is_not_up_to_date(
    store: BundleStore, rollouts: Rollouts, url: str
) -> None:
    sender = Sender(manifest(), delta=True)
    weights = steps(sender, store, policy(), range(3))
    server = sync.Server(url)
    list(sync.catch_up(server, store, store.folder))
    version = rollouts.version

    rollouts.start()
    rollouts.version = version

    assert list(sync.catch_up(server, store, store.folder))
    assert same(rollouts.held, dict(sender.stream(weights)))


@pytest.mark.parametrize("since", [{"torn": "it slept"}, {"foreign": 1}], ids=str)
def test_one_that_has_lost_its_weights_since_is_not_up_to_date(
    since: dict[str, Any], store: BundleStore, rollouts: Rollouts, url: str
) -> None:
    """By a sleep, or another writer: its version stays."""
    steps(Sender(manifest(), delta=True), store, policy(), range(2))
    server = sync.Server(url)
    list(sync.catch_up(server, store, store.folder))

    vars(rollouts).update(since, digest=None)
    applied_now = [name for name, _ in sync.catch_up(server, store, store.folder)]

    assert ["whole" in name for name in applied_now] == [True, False]


def test_replicas_that_serve_different_policies_both_begin_anew(
    store: BundleStore, rollouts: Rollouts, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one alone has refused a bundle, or was started anew."""
    steps(Sender(manifest(), delta=True), store, policy(), range(2))
    server = sync.Server(url)
    list(sync.catch_up(server, store, store.folder))
    second = Rollouts(store.folder)
    answers = lambda *asked: [rollouts.answer(*asked), second.answer(*asked)]  # noqa: E731
    monkeypatch.setattr(server, "_ask", lambda method, *args: answers(method, list(args)))

    assert list(sync.catch_up(server, store, store.folder))

    assert rollouts.digest == second.digest == store.newest
    assert list(sync.catch_up(server, store, store.folder)) == []


def test_what_a_worker_refuses_is_raised_as_what_it_is(
    store: BundleStore, rollouts: Rollouts, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else has pushed since it was asked."""
    steps(Sender(manifest(), delta=True), store, policy(), range(2))
    server = sync.Server(url)
    path = store.path_from(None)[-1]

    with pytest.raises(StaleBase, match="for another policy"):
        server.apply(path, "0" * 32)
    assert server.digest is None


def test_of_several_servers_one_that_fails_does_not_hold_up_the_others(
    store: BundleStore, rollouts: Rollouts, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(Sender(manifest(), delta=True), store, policy(), range(2))

    assert once(store, "http://127.0.0.1:1", url) == 1

    assert rollouts.digest == store.newest
    said = capsys.readouterr().err
    assert "http://127.0.0.1:1: http://127.0.0.1:1 gives no answer that could be read" in said


@pytest.mark.parametrize(
    ("code", "says"), [(404, "VLLM_SERVER_DEV_MODE=1"), (500, "without FLASHRL_CONFIG")]
)
def test_what_is_wrong_with_a_server_is_said_with_what_to_do(
    code: int,
    says: str,
    store: BundleStore,
    rollouts: Rollouts,
    url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rollouts.code = code

    assert once(store, url) == 1

    assert says in capsys.readouterr().err


def test_trouble_is_said_once_and_tried_again(
    store: BundleStore,
    rollouts: Rollouts,
    url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps(Sender(manifest(), delta=True), store, policy(), range(1))
    rounds = iter([500, 500, 200, None])

    over = threading.Event()

    def sleep(_: float) -> None:
        code = next(rounds)
        if code is None:
            interrupt()
            over.wait(60)
            raise RuntimeError("the command is over")
        else:
            rollouts.code = code

    rollouts.code = 500
    monkeypatch.setattr(sync.time, "sleep", sleep)

    assert main(["sync", "--from", str(store.folder), "--to", url]) == 0
    over.set()

    assert rollouts.digest == store.newest
    assert capsys.readouterr().err.count("without FLASHRL_CONFIG") == 1


def interrupt() -> None:
    """Ctrl-C, wherever the command waits."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_a_server_that_never_answers_holds_up_no_other(
    store: BundleStore, rollouts: Rollouts, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps(Sender(manifest(), delta=True), store, policy(), range(2))

    over = threading.Event()

    def sleep(_: float) -> None:
        if not over.is_set():
            interrupt()
        over.wait(60)
        raise RuntimeError("the command is over")

    monkeypatch.setattr(sync.time, "sleep", sleep)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        never = f"http://127.0.0.1:{mute.getsockname()[1]}"
        assert main(["sync", "--from", str(store.folder), "--to", never, url]) == 0
        over.set()

    assert rollouts.digest == store.newest


@pytest.mark.parametrize(
    "said",
    [
        b"<html>It works!</html>",
        b"[" * 100_000,
        b"[1]",
        b'{"results": null}',
        b'{"results": []}',
        b'{"results": {"0": 1}}',
        b'{"results": [null]}',
        b'{"results": [[]]}',
        b'{"results": [["x"]]}',
        b'{"results": [{"error": "Odd"}]}',
        b'{"results": [{"answer": {}}]}',
        b'{"results": [{"answer": {"digest": 3, "version": 1}}]}',
        b'{"results": [{"answer": {"digest": null, "version": "1"}}]}',
        b'{"results": [{"answer": {"digest": null, "version": 1}}]}',
    ],
    ids=lambda said: said[:60].decode(),
)
def test_an_answer_of_whatever_kind_is_trouble_and_no_end(
    said: bytes,
    store: BundleStore,
    rollouts: Rollouts,
    url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps(Sender(manifest(), delta=True), store, policy(), range(2))
    rollouts.said = said
    server = sync.Server(url)
    assert not sync._bring(server, store, store.folder, Console())
    assert capsys.readouterr().err.startswith(f"{url}: ")

    rollouts.said = None

    assert sync._bring(server, store, store.folder, Console())
    assert rollouts.digest == store.newest


@pytest.mark.parametrize(
    "odd", ["myhost", "localhost:1", "http://[::1", "http://[fe80::1]:1", "file:///dev", "http://"]
)
def test_what_is_no_url_of_a_server_is_trouble_with_its_name(
    odd: str, store: BundleStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert once(store, odd) == 1

    assert capsys.readouterr().err.startswith(
        f"{odd.rstrip('/')}: {odd.rstrip('/')} gives no answer"
    )


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b""])
def test_where_a_bundle_is_spoilt_a_server_goes_by_a_whole_one(
    spoil: Any, store: BundleStore, rollouts: Rollouts, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    sender = Sender(manifest(), delta=True)
    weights = steps(sender, store, policy(), range(2))
    assert once(store, url) == 0
    weights = steps(sender, store, weights, range(2, 3))
    (delta,) = store.path_from(rollouts.digest)
    delta.write_bytes(spoil(delta.read_bytes()))
    server = sync.Server(url)
    for _ in range(2):  # there is no other way yet
        assert not sync._bring(server, store, store.folder, Console())
    assert caplog.text.count(f"refuses {delta.name}") == 1

    store.put(sender.snapshot())
    weights = steps(sender, store, weights, range(3, 4))

    assert sync._bring(server, store, store.folder, Console())
    assert same(rollouts.held, dict(sender.stream(weights)))


def test_a_server_that_another_one_brings_on_meanwhile_goes_on_from_there(
    store: BundleStore, rollouts: Rollouts, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands follow one folder for the same server."""
    sender = Sender(manifest(), delta=True)
    weights = steps(sender, store, policy(), range(1))
    assert once(store, url) == 0
    weights = steps(sender, store, weights, range(1, 4))
    store.put(sender.snapshot())
    apply, names = rollouts.apply, list[str]()

    def twice(path: Path) -> Any:
        names.append(path.name)
        if len(names) == 1:
            apply(path)
        return apply(path)

    monkeypatch.setattr(rollouts, "apply", twice)

    assert once(store, url) == 0

    assert same(rollouts.held, dict(sender.stream(weights)))
    assert [name[:8] for name in names] == ["00000002", "00000003", "00000004"]


def test_a_folder_that_goes_away_is_trouble_until_it_is_back(
    store: BundleStore, rollouts: Rollouts, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a share does that is unmounted; and nobody makes another one in its place."""
    steps(Sender(manifest(), delta=True), store, policy(), range(2))
    server, away = sync.Server(url), store.folder.with_name("away")
    store.folder.rename(away)

    assert not sync._bring(server, store, store.folder, Console())
    assert "No such file or directory" in capsys.readouterr().err
    assert not store.folder.exists()

    away.rename(store.folder)
    assert sync._bring(server, store, store.folder, Console())
    assert rollouts.digest == store.newest


@pytest.mark.parametrize("every", ["-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(every: str, store: BundleStore) -> None:
    with pytest.raises(SystemExit):
        main(["sync", "--from", str(store.folder), "--to", "http://h", "--every", every])


def test_servers_may_see_the_folder_elsewhere(
    store: BundleStore, rollouts: Rollouts, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps(Sender(manifest(), delta=True), store, policy(), range(1))
    paths = []
    apply = rollouts.apply
    monkeypatch.setattr(rollouts, "apply", lambda path: paths.append(path) or apply(path))

    once(store, url, more=("--seen-as", "/mnt/run-7"))

    assert [path.parent for path in paths] == [Path("/mnt/run-7")]


def test_a_folder_that_is_not_there_is_no_empty_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync", "--from", str(tmp_path / "no"), "--to", "http://h", "--once"]) == 1
    assert "is no folder" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_methods_are_called_by_the_names_that_workers_have() -> None:
    worker = pytest.importorskip("flashquant.patches.seams.worker")

    assert (sync.MANIFEST, sync.STANDING) == (worker.MANIFEST, worker.STANDING)
    assert sync.TRY_APPLY_DELTA == worker.TRY_APPLY_DELTA


def test_what_a_worker_says_of_its_weights_is_read_as_it_is_said() -> None:
    loading = pytest.importorskip("flashquant.patches.seams.loading")
    said = loading.Standing(version=3, torn="why", start="word", foreign=2)

    assert sync._weights_of([list(said)]) == (sync._Standing(3, "why", "word", 2),)
    assert sync._weights_of([list(loading.Standing())]) == ()  # no model yet
