"""A Hugging Face Hub of one machine: the endpoints its client asks for a file, and no more.

    with hub({"owner/repo": {"main": {"profile.pt": b"..."}}}) as at:
        subprocess.run(..., env={"HF_ENDPOINT": at.url, "HF_HOME": str(tmp_path)})

Files that end in `.pt` lie, as large ones do, on another host, to which it redirects.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Repos = Mapping[str, Mapping[str, Mapping[str, bytes]]]  # repo -> revision -> file -> content


@dataclass
class Hub:
    """What is served, and what has been asked for."""

    repos: Repos
    url: str = ""
    other_host: str = ""
    moved: Mapping[str, str] = field(default_factory=dict)  # a repository's old name -> its new one
    cut: frozenset[str] = frozenset()  # files of which only half is sent
    asked: list[str] = field(default_factory=list)

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(
            f"{repo}{sorted(self.repos[repo][revision].items())}".encode()
        ).hexdigest()

    def find(self, repo: str, revision: str, file: str) -> tuple[str, bytes] | str:
        """The commit and the content, or the Hub's word for what is missing."""
        if repo not in self.repos:
            return "RepoNotFound"
        named = {name: name for name in self.repos[repo]}
        named |= {self.commit(repo, name): name for name in named}
        if revision not in named:
            return "RevisionNotFound"
        content = self.repos[repo][named[revision]].get(file)
        return "EntryNotFound" if content is None else (self.commit(repo, named[revision]), content)


@contextmanager
def hub(repos: Repos, **options: object) -> Iterator[Hub]:
    """Serve these files until the block is left."""
    state = Hub(repos, **options)  # type: ignore[arg-type]
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    state.other_host = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            state.asked.append(f"{self.command} {self.path}")
            owner, name, *rest = self.path.strip("/").split("/")
            if rest[:1] != ["resolve"]:  # the client also asks for news of its own
                self._say(404, {})
                return
            _, revision, *parts = rest
            repo, file = f"{owner}/{name}", "/".join(parts)
            if repo in state.moved:
                self._say(307, {"Location": self.path.replace(repo, state.moved[repo])})
                return
            found = state.find(repo, revision, file)
            if isinstance(found, str):
                self._say(404, {"X-Error-Code": found, "X-Error-Message": found})
                return
            commit, content = found
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": commit}
            if file.endswith(".pt") and not self.headers["Host"].startswith("localhost"):
                headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
                self._say(302, headers | {"Location": f"{state.other_host}{self.path}"})
                return
            if body and file in state.cut:
                content = content[: len(content) // 2]
            self._say(200, headers, content, body=body)

        def _say(
            self,
            status: int,
            headers: Mapping[str, str],
            content: bytes = b"",
            *,
            body: bool = True,
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
