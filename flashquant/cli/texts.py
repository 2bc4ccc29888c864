"""Text that a user gives to be run through a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from flashquant.errors import ProfileError


def texts_of(paths: Iterable[str]) -> Iterator[str]:
    """The texts of .txt files, and of the lines of .jsonl files.

    Raises:
        ProfileError: a file cannot be read, or a line has no text.

    """
    for path in map(Path, paths):
        try:
            read = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path} is no text that can be read ({error})") from error
        if path.suffix != ".jsonl":
            yield read
            continue
        for number, line in enumerate(filter(str.strip, read.splitlines()), 1):
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, LookupError, TypeError):
                raise ProfileError(
                    f"{path}, line {number}: should be a JSON object with a 'text'"
                ) from None
