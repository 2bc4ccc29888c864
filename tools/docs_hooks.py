"""A hook of mkdocs: files outside docs/ that a page links to are put into the site.

A page links to `../examples/trl_grpo.py`, which works where the repository is read. In the site
that file would be missing, so it is copied to `files/examples/trl_grpo.py`, and the link with it.
A link to a file that does not exist is left alone: mkdocs then says that it is broken.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_LINK = re.compile(r"\]\(([^)\s#]+)((?:#[^)\s]*)?)\)")
_FOLDER = "files"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave docs/ to the copies."""
    root = Path(config["docs_dir"]).parent
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        target, anchor = match.groups()
        outside = posixpath.normpath(posixpath.join("docs", here, target))
        if "://" in target or outside.startswith(("docs/", "..")) or not (root / outside).is_file():
            return match[0]
        copy = f"{_FOLDER}/{outside}"
        if copy.endswith(".md"):
            copy, anchor = f"{copy}.txt", ""  # as it is: its own links lead elsewhere
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, content=(root / outside).read_bytes()))
        return f"]({posixpath.relpath(copy, here or '.')}{anchor})"

    return _LINK.sub(link, markdown)
