"""The page that is pasted into an issue: what it was run on, failures first, then the facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "fails", "late", "skipped"]
_DETAIL = 400  # characters of one
_HEADINGS: dict[Verdict, str] = {
    "fails": "Fails",
    "late": "Ended before its time",
    "skipped": "Not looked at",
}


@dataclass(frozen=True)
class Fact:
    """One thing that a step found, or the step itself.

    Attributes:
        step: its name.
        name: of what was looked at; the program as a whole is `program`.
        verdict: late is a program that was ended.
        detail: in words.
        seconds: of the whole run, when it was known.

    """

    step: str
    name: str
    verdict: Verdict
    detail: str
    seconds: float


def verdict(facts: Sequence[Fact]) -> str:
    """All of them in a line."""
    count = {kind: sum(fact.verdict == kind for fact in facts) for kind in (*_HEADINGS, "ok")}
    said = [f"{count['ok']} well", f"{count['fails']} fail"]
    said += [f"{count['late']} ended before their time"] if count["late"] else []
    said += [f"{count['skipped']} not looked at"] if count["skipped"] else []
    return ", ".join(said)


def page(facts: Sequence[Fact], *, command: str, date: str, seconds: float, tables: str) -> str:
    """Markdown.

    Args:
        facts: in the order in which they were found.
        command: what was run.
        date: when.
        seconds: how long.
        tables: of the benchmarks, in markdown; may be empty.

    """
    lines = [f"# flashquant on a GPU: {verdict(facts)}", ""]
    machine = [f"- {fact.name}: {fact.detail}" for fact in facts if fact.step == "machine"]
    lines += [f"- run: `{command}`, {date}, {seconds:.0f} s", *machine]
    for kind, heading in _HEADINGS.items():
        found = [fact for fact in facts if fact.verdict == kind]
        lines += ["", f"## {heading}", "", *_listed(found)] if found else []
    lines += ["", "## Well", "", *_well(facts)]
    lines += ["", "## Tables", "", tables] if tables else []
    return "\n".join(lines) + "\n"


def _listed(facts: Sequence[Fact]) -> Iterator[str]:
    for fact in facts:
        yield f"- **{fact.step}**, {fact.name}: {_short(fact.detail)}"


def _well(facts: Sequence[Fact]) -> Iterator[str]:
    """A line a step that has nothing else: a doctor's verdict, or what it says last."""
    for step in dict.fromkeys(fact.step for fact in facts if fact.step != "machine"):
        found = [fact for fact in facts if fact.step == step]
        if any(fact.verdict in ("fails", "late") for fact in found):
            continue
        well = [fact for fact in found if fact.verdict == "ok"]
        if not well:
            continue
        told = [fact for fact in well if fact.name in ("runner", "engines")] or well[-1:]
        yield f"- **{step}** ({len(well)}): {_short(' | '.join(fact.detail for fact in told))}"


def _short(detail: str) -> str:
    return detail if len(detail) <= _DETAIL else f"{detail[:_DETAIL]} ..."
