"""What the pages show as code: blocks, what stands in a sentence, and commands in either."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
# Not the change log: what it says was so.
PAGES = [
    page
    for page in [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
    if page.name != "CHANGELOG.md"
]

_SEPARATORS = ("&&", "||", "|", ";", "&")
_ASSIGNED = re.compile(r"[A-Z_]+=.*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Some lines of code, and where they stand: a block, or a span of one line."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One simple command of a shell."""

    where: Block
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


@cache
def blocks() -> tuple[Block, ...]:
    """Every fenced block, in the order of pages and lines; its language as it is written."""
    return tuple(
        Block(_name(page), token.map[0] + 1, token.info.strip(), token.content)
        for page in PAGES
        for token in _parsed(page)
        if token.type == "fence" and token.map
    )


@cache
def spans() -> tuple[Block, ...]:
    """Everything that a sentence, a table or a heading writes as code, on one line each."""
    return tuple(
        Block(_name(page), (token.map or [0])[0] + 1, "span", child.content)
        for page in PAGES
        for token in _parsed(page)
        for child in token.children or ()
        if child.type == "code_inline"
    )


def of(*languages: str) -> list[Block]:
    return [block for block in blocks() if block.language in languages]


def commands(block: Block) -> Iterator[Command]:
    """The simple commands of a block; of a `console` block, what follows its prompts."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        yield from _of_line(block, line)


def _of_line(block: Block, line: str) -> Iterator[Command]:
    for inner in re.findall(r"\$\(([^)]*)\)", line):
        yield from _of_line(block, inner)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in _SEPARATORS:
            words.append(word)
        elif words:
            yield _command(block, words)
            words = []


def _command(block: Block, words: list[str]) -> Command:
    """The words without the variables in front of them (all of them, of an `export`)."""
    if words[0] == "export":
        words = words[1:]
    count = next((i for i, w in enumerate(words) if not _ASSIGNED.fullmatch(w)), len(words))
    variables = tuple((name, value) for name, _, value in (w.partition("=") for w in words[:count]))
    return Command(block, tuple(words[count:]), variables)


def _parsed(page: Path):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))
