"""A reference becomes a file on this machine: a path, or a file on the Hugging Face Hub.

    runs/profile.pt, ~/profile.pt, /data/profile.pt     a file of this machine
    owner/repo/int8/profile.pt@v2                       one of the Hub, at a revision

What exists on this machine is never looked for elsewhere. The Hub is asked by its
own client, so its cache, its offline mode (HF_HUB_OFFLINE), its endpoint and its
tokens are what the rest of the machine uses; it is imported only when it is asked.

Limits
    1. A file that is downloaded is checked for its length, not for its content; pin a
       commit where that matters.
    2. `owner/repo/file` without an extension is never taken for a file on the Hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from flashquant.errors import LocateError

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_NAME: Final = re.compile(r"\w[\w.-]*")


class Located(NamedTuple):
    """A file that is here, and what any other process may find the same one by."""

    path: Path
    reference: str  # an absolute path, or a file on the Hub at a commit


class HubFile(NamedTuple):
    """One file of a model repository on the Hugging Face Hub."""

    repo: str
    file: str
    revision: str | None = None

    @classmethod
    def parse(cls, reference: str) -> HubFile | None:
        """`owner/repo/path/file.ext[@revision]`, or None where it is not of that form."""
        place, _, revision = reference.partition("@")
        owner, *rest = place.split("/")
        if len(rest) < 2 or not PurePosixPath(rest[-1]).suffix:
            return None
        repo, *parts = rest
        if not (_NAME.fullmatch(owner) and _NAME.fullmatch(repo)) or _odd_part(parts) is not None:
            return None
        return cls(f"{owner}/{repo}", "/".join(parts), revision or None)

    def beside(self, name: str) -> HubFile:
        """Another file in the same folder, at the same revision."""
        return self._replace(file=str(PurePosixPath(self.file).parent / name))

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")


def locate(reference: str) -> Located:
    """Find the file that a reference names; one on the Hub is downloaded, or is in the cache.

    Raises:
        LocateError: there is no such file, here or there, or it cannot be had; says which.

    """
    wanted = reference.strip()
    if not wanted:
        raise LocateError("the reference is blank. Write the path of a file.")
    path = os.path.abspath(os.path.expanduser(wanted))
    if os.path.isfile(path):  # not Path.is_file: that one raises on a name too long
        return Located(Path(path), path)
    if os.path.isdir(path):
        raise LocateError(f"{path} is a folder. Write the path of the file in it.")
    if os.path.exists(path):
        raise LocateError(f"{path} is not a regular file. Copy what it holds to one and name that.")
    hub = HubFile.parse(wanted)
    if hub is None:
        raise LocateError(_nothing_here(wanted, path))
    here = f"there is no file {path}, and "
    if (found := _from_hub(hub, here)) is None:
        raise LocateError(f"{here}{hub.repo} on the Hub has no file {_at(hub)}.")
    return found


def locate_in_model(model: str, name: str) -> Located | None:
    """The file of that name that comes with a model, a folder or a repository; None if none does.

    Raises:
        LocateError: whether there is one cannot be known.

    """
    if os.path.isdir(model):
        path = os.path.abspath(os.path.join(model, name))
        return Located(Path(path), path) if os.path.isfile(path) else None
    repo, revision = split_revision(model)
    hub = HubFile.parse(f"{repo}/{name}" + (f"@{revision}" if revision else ""))
    return None if hub is None else _from_hub(hub, "")


def named_in(source: str, reference: str, *, folder: bool = False) -> str:
    """What a reference written in a file means, said so that it holds from anywhere.

    A relative path is looked for beside the file, then (as FlashRL does) where the
    process was started; it may not lead out of there. In a file from the Hub, a bare
    name is a file beside it, at the same commit.

    Args:
        source: the file it is written in: an absolute path, or a file on the Hub.
        reference: as it is written there.
        folder: it names a model: a folder, or a repository on the Hub.

    Raises:
        LocateError: it leads out of where it may lead.

    """
    wanted = reference.strip()
    hub = None if os.path.isabs(source) else HubFile.parse(source)
    if os.path.isabs(wanted) or wanted.startswith("~"):
        if hub is not None:
            raise LocateError(
                f"{wanted!r} is a path of this machine, and {source} comes from the Hugging Face "
                "Hub. Copy that file here, or name files on the Hub in it."
            )
        return os.path.expanduser(wanted)
    if (odd := _odd_part(wanted.partition("@")[0].removeprefix("./").split("/"))) is not None:
        raise LocateError(
            f"{wanted!r} has {odd!r} in it, and what a file names may not lead out of its folder. "
            "Write an absolute path."
        )
    if hub is not None:
        bare = not folder and HubFile.parse(wanted) is None
        return str(hub.beside(wanted)) if bare else wanted
    for base in (os.path.dirname(source), os.getcwd()):
        path = os.path.join(base, wanted)
        if os.path.lexists(path):
            if not folder:
                _check_inside(path, base)
            return os.path.abspath(path)
    return wanted


def split_revision(model: str) -> tuple[str, str | None]:
    """`owner/repo@revision` as the two it is made of; a folder has no revision."""
    if os.path.isdir(model):
        return model, None
    name, _, revision = model.partition("@")
    return name, revision or None


def _from_hub(hub: HubFile, here: str) -> Located | None:
    if (found := _download(hub, here)) is None:
        return None
    commit = found.parts[-len(PurePosixPath(hub.file).parts) - 1]
    pinned = hub._replace(revision=commit) if _COMMIT.fullmatch(commit) else hub
    return Located(found, str(pinned))


def _download(hub: HubFile, here: str) -> Path | None:
    """The file in the client's cache, brought there unless it is; None where there is none.

    Args:
        hub: the file.
        here: the beginning of a sentence: what was looked for on this machine, in vain.

    Raises:
        LocateError: each of the client's reasons, in a sentence of ours.

    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(hub.repo, hub.file, revision=hub.revision))
    except HFValidationError as wrong:
        raise LocateError(
            f"{here}{hub.repo!r} cannot be a repository on the Hub ({wrong})."
        ) from wrong
    except GatedRepoError as locked:
        raise LocateError(
            f"{here}{hub.repo} on {constants.ENDPOINT} is gated. Ask for access on its page, and "
            "log in with `hf auth login`."
        ) from locked
    except RepositoryNotFoundError as absent:
        raise LocateError(
            f"{here}{constants.ENDPOINT} has no model repository {hub.repo} (or not for you: log "
            "in with `hf auth login`). Write a path that exists, or owner/repo/file."
        ) from absent
    except RevisionNotFoundError as absent:
        raise LocateError(
            f"{here}{hub.repo} on {constants.ENDPOINT} has no revision {hub.revision!r}. Write a "
            "branch, a tag or a commit after the @."
        ) from absent
    except LocalEntryNotFoundError as unknown:
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set. Unset it"
        else:
            reason = f"{constants.ENDPOINT} does not answer. Look at the connection"
        raise LocateError(
            f"{here}{hub} is not in the cache, while {reason}, or fetch it beforehand with "
            f"`hf download {hub.repo} {hub.file}"
            + (f" --revision {hub.revision}`." if hub.revision else "`.")
        ) from unknown
    except EntryNotFoundError:
        return None
    except Exception as broken:  # what its transport raises has changed with its versions
        said = " ".join(str(broken).split()) or type(broken).__name__
        raise LocateError(
            f"{hub} could not be downloaded whole ({said[:300]}). Nothing of it was kept or read; "
            "try again."
        ) from broken


def _at(hub: HubFile) -> str:
    return repr(hub.file) + (f" at {hub.revision!r}" if hub.revision else "")


def _nothing_here(wanted: str, path: str) -> str:
    parts = wanted.partition("@")[0].split("/")
    odd = None if wanted.startswith(("/", "~", ".")) else _odd_part(parts)
    if odd is not None and len(parts) > 2:
        return f"there is no file {path}, and what is named on the Hub has no {odd!r} in it."
    return (
        f"there is no file {path}. Write a path that exists, or owner/repo/file.ext on the "
        "Hugging Face Hub."
    )


def _odd_part(parts: list[str]) -> str | None:
    """The first part of a path by which it would not lead down."""
    return next((part for part in parts if part in ("", ".", "..") or "\\" in part), None)


def _check_inside(path: str, base: str) -> None:
    real, home = os.path.realpath(path), os.path.realpath(base)
    if os.path.commonpath([real, home]) != home:
        raise LocateError(
            f"{path} is a link that leads out of {home}, to {real}. Write that path itself."
        )
