"""`flashquant sync`: servers are brought to the newest policy of a folder, or stay as they are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from flashquant.cli import sync
from flashquant.cli.main import main
from flashquant.errors import StaleBase
from flashquant.sender import BundleStore, Delta, Sender
from tests.sender.test_sender import applied, manifest, moved, policy, same


class Rollouts:
    """A server as far as this command can tell: vLLM's route, and one worker behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.code, self.workers = 200, 1
        self.start()

    def start(self) -> None:
        """Or start anew: from a checkpoint."""
        self.held: dict[str, Any] = {}
        self.digest: str | None = None
        self.version = 0

    def answer(self, method: str, args: list[str]) -> Any:
        self.asked.append(method)
        if method == sync.STANDING:
            return [self.version, 0, False, "", None, False]
        if method == sync.MANIFEST:
            return {"answer": {"digest": self.digest, "version": self.version}}
        try:
            return {"answer": self.apply(Path(args[0]))}
        except StaleBase as failure:
            return {"error": "StaleBase", "says": str(failure)}

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
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
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
    list(sync.catch_up(server, store.folder, store.folder))
    rollouts.asked.clear()

    assert list(sync.catch_up(server, store.folder, store.folder)) == []
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
    list(sync.catch_up(server, store.folder, store.folder))

    rollouts.start()
    applied_now = [name for name, _ in sync.catch_up(server, store.folder, store.folder)]

    assert ["whole" in name for name in applied_now] == [True, False, False]
    assert rollouts.digest == store.newest


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

    def sleep(_: float) -> None:
        code = next(rounds)
        if code is None:
            raise KeyboardInterrupt
        rollouts.code = code

    rollouts.code = 500
    monkeypatch.setattr(sync.time, "sleep", sleep)

    assert main(["sync", "--from", str(store.folder), "--to", url]) == 0

    assert rollouts.digest == store.newest
    assert capsys.readouterr().err.count("without FLASHRL_CONFIG") == 1


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
