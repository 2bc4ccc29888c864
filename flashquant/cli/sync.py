"""`flashquant sync`: bring the bundles of a folder into running vLLM servers, as they come.

flashquant sync --from FOLDER --to URL [URL ...] [--seen-as FOLDER] [--once] [--every SECONDS]

The trainer writes bundles (`flashquant.sender.BundleStore`); each server reads them itself, so it
has to see the folder, too. A server is asked over vLLM's route /collective_rpc, which it has with
VLLM_SERVER_DEV_MODE=1. Whatever is refused leaves it on the policy it served, and it goes by other
bundles if there are any. Each server has a thread: one that never answers holds up no other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import logging
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich.console import Console
from rich.markup import escape

from flashquant import errors
from flashquant.cli import output
from flashquant.errors import BrokenDelta, ReloadError, StaleBase

if TYPE_CHECKING:
    from flashquant.sender import BundleStore

logger = logging.getLogger(__name__)

# A worker's methods (flashquant.patches.seams.worker), by the names under which vLLM calls them.
MANIFEST: Final = "flashquant_manifest"
TRY_APPLY_DELTA: Final = "flashquant_try_apply_delta"
STANDING: Final = "flashquant_standing"
_ROUTE: Final = "collective_rpc"
_PATIENCE: Final = 600.0  # seconds for one answer: an update of a large model over a slow disk
_UNREADABLE: Final = (
    OSError,
    http.client.HTTPException,
    ValueError,
    KeyError,
    TypeError,
    RecursionError,
)


class NoAnswer(ReloadError):
    """A server could not be asked, or did not understand."""


class _Standing(NamedTuple):
    """What a worker says of its weights: while that stays, they are the same.

    A version alone may be that of another engine, started anew at this URL and brought on by
    somebody else.
    """

    version: int
    torn: str
    start: str
    foreign: int


_Weights = tuple[_Standing, ...]  # of every worker


@dataclass
class Server:
    """One running server.

    Attributes:
        url: of it, without a route.
        digest: of the policy that it serves, as far as is known.
        known: what its workers said of their weights when that was known, as `_weights_of` has it.
        trouble: what was said last of what is wrong with it; nothing, if it is well.
        told: whether it has been said that there is nothing to bring.
        refused: bundles of which was said that it refused them.

    """

    url: str
    digest: str | None = None
    known: _Weights = ()
    trouble: str = ""
    told: bool = False
    refused: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Ask which policy it serves, if that may be another than is known.

        Raises:
            NoAnswer: it does not say.

        """
        found = _weights_of(self._ask(STANDING))
        if not found or found != self.known:
            said = _answers(self._ask(MANIFEST))
            digests = {_field(one, "digest", str, NoneType) for one in said}
            # Replicas that serve different policies need a whole bundle, each of them.
            self.digest = digests.pop() if len(digests) == 1 else None
            self.known = found

    def apply(self, path: Path, digest: str) -> dict[str, Any]:
        """One update by a bundle.

        Args:
            path: where the server sees it.
            digest: of the policy that comes out.

        Returns:
            The `ReloadReport` of the first worker, as plain data.

        Raises:
            ReloadError: it was refused; the error is the one that the worker raised.

        """
        before, self.known = self.known, ()  # until it is known again
        reports = _answers(self._ask(TRY_APPLY_DELTA, str(path)))
        report: dict[str, Any] = reports[0]
        _field(report, "seconds", int, float)
        versions = [_field(one, "version", int) for one in reports]
        self.digest = digest
        if len(versions) == len(before):
            self.known = tuple(
                one._replace(version=version, torn="", foreign=0)
                for one, version in zip(before, versions, strict=True)
            )
        return report

    def _ask(self, method: str, *arguments: str) -> list[Any]:
        """What every worker answers: one at least."""
        body = json.dumps({"method": method, "args": arguments}).encode()
        headers = {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(f"{self.url}/{_ROUTE}", body, headers)
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                found: list[Any] = json.load(answer)["results"]
            if not (isinstance(found, list) and found):
                raise TypeError(f"no worker's results: {found!r:.200}")
        except urllib.error.HTTPError as refusal:
            raise NoAnswer(_explained(self.url, refusal)) from refusal
        except _UNREADABLE as failure:
            raise NoAnswer(
                f"{self.url} gives no answer that could be read ({failure}). Is it the URL of a "
                "vLLM server (http://host:port), and does it run?"
            ) from failure
        return found


def _explained(url: str, refusal: urllib.error.HTTPError) -> str:
    said = ""
    with contextlib.suppress(OSError, http.client.HTTPException):
        said = " ".join(refusal.read(500).decode(errors="replace").split())
    if refusal.code == 404:
        return (
            f"{url} has no route /{_ROUTE}. Start the server with VLLM_SERVER_DEV_MODE=1, where "
            "nobody but the trainer can reach it."
        )
    return (
        f"{url} answers {refusal.code} ({said}). If it does not know flashquant's methods, it was "
        "started without FLASHRL_CONFIG; its log says more."
    )


def _weights_of(found: Sequence[Any]) -> _Weights:
    """What the workers say of their weights; nothing, where one says what nobody understands."""
    try:
        every = [_Standing(one[0], one[3], one[6], one[7]) for one in found]
    except (IndexError, KeyError, TypeError):  # flashquant there is older, or it is something else
        return ()
    return tuple(every) if all(isinstance(one.version, int) and one.start for one in every) else ()


def _answers(found: Sequence[Any]) -> list[Any]:
    """The workers' answers, or the error of the first one that failed by itself."""
    failures = [one for one in found if isinstance(one, dict) and "error" in one]
    if failures:
        followed = errors.PeerFailed.__name__
        first = next((one for one in failures if one["error"] != followed), failures[0])
        kind, says = getattr(errors, str(first["error"]), None), str(first.get("says", ""))
        if isinstance(kind, type) and issubclass(kind, ReloadError):
            raise kind(says)
        raise ReloadError(f"{first['error']}: {says}")
    try:
        return [one["answer"] for one in found]
    except (KeyError, TypeError) as odd:
        raise NoAnswer(f"an answer that flashquant does not know: {found!r:.200}") from odd


def _field(said: Any, name: str, *kinds: type) -> Any:
    """One field of an answer."""
    value = said.get(name, said) if isinstance(said, dict) else said
    if not isinstance(value, kinds):
        raise NoAnswer(f"an answer that flashquant does not know: {said!r:.200}")
    return value


def catch_up(
    server: Server, store: BundleStore, seen_as: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Bring one server to the newest policy of a folder.

    Args:
        store: the bundles.
        seen_as: their folder, as the server sees it.

    Yields:
        The name of each bundle that was applied, and the report.

    Raises:
        ReloadError: a bundle was refused, and no others lead there.
        StaleBase: no bundles lead to the newest policy from where the server is.
        OSError: the folder cannot be read.

    """
    refused: dict[Path, ReloadError] = {}
    while True:
        server.look()
        try:
            way = store.path_from(server.digest, without=refused)
        except StaleBase:
            if refused:
                raise next(reversed(refused.values())) from None
            raise
        for path in way:
            try:
                report = server.apply(seen_as / path.name, path.stem.rsplit("-", 1)[-1])
            except (BrokenDelta, StaleBase) as refusal:  # or somebody else brought it on meanwhile
                if path.name not in server.refused:
                    logger.warning("%s refuses %s: %s", server.url, path.name, refusal)
                server.refused.add(path.name)
                refused[path] = refusal
                break
            yield path.name, report
        else:
            return


def add_to(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    sync = commands.add_parser(
        "sync",
        help="bring bundles of a folder into running servers",
        description="Watches a folder of weight updates (bundles, written by the trainer's "
        "flashquant.sender.BundleStore) and has each vLLM server read those that it lacks: "
        "docs/delta.md. Ends at Ctrl-C.",
    )
    sync.add_argument(
        "--from",
        dest="folder",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="that the trainer writes",
    )
    sync.add_argument(
        "--to", nargs="+", required=True, metavar="URL", help="servers, as http://10.0.0.2:8000"
    )
    sync.add_argument(
        "--seen-as", type=Path, metavar="FOLDER", help="where the servers see the folder"
    )
    sync.add_argument("--once", action="store_true", help="and do not wait for more")
    sync.add_argument(
        "--every", type=_seconds, default=1.0, metavar="SECONDS", help="look for more so often (1)"
    )
    sync.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Until it is interrupted, or once; 1 where a server could not be brought along then."""
    if not options.folder.is_dir():
        raise ReloadError(
            f"{options.folder} is no folder. Name the one that the trainer's BundleStore writes."
        )
    from flashquant.sender import BundleStore

    store = BundleStore(options.folder.resolve())
    servers = [Server(url) for url in dict.fromkeys(url.rstrip("/") for url in options.to)]
    follow = functools.partial(
        _follow,
        store=store,
        seen_as=options.seen_as or store.folder,
        console=output.console(),
        every=None if options.once else options.every,
    )
    try:
        with ThreadPool(len(servers)) as each:  # whose threads end with the command
            return 0 if all(list(each.imap_unordered(follow, servers))) else 1
    except KeyboardInterrupt:
        return 0


def _seconds(said: str) -> float:
    value = float(said)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(said)
    return value


def _follow(
    server: Server, store: BundleStore, seen_as: Path, console: Console, every: float | None
) -> bool:
    """Whether one server was brought along, once; or again and again."""
    while True:
        well = _bring(server, store, seen_as, console)
        if every is None:
            return well
        time.sleep(every)


def _bring(server: Server, store: BundleStore, seen_as: Path, console: Console) -> bool:
    """One server, with a line for each bundle; what fails is said once, and tried again later."""
    try:
        for name, report in catch_up(server, store, seen_as):
            console.print(
                f"{server.url}: {name} in {report['seconds']:.2f} s, version {report['version']}",
                highlight=False,
                markup=False,
            )
            server.told = True
        if not server.told:
            console.print(
                f"{server.url}: serves the newest policy already", highlight=False, markup=False
            )
            server.told = True
    except (ReloadError, OSError) as failure:
        server.known = ()  # it may have been started anew, or be where nobody expects it
        if (trouble := str(failure)) != server.trouble:
            server.trouble = trouble
            line = f"[red]{escape(server.url)}[/]: {escape(trouble)}"
            Console(stderr=True, soft_wrap=True).print(line)
        return False
    server.trouble = ""
    return True
