"""Write the table in docs/layouts.md anew, from the cases that the tests check.

python -m tools.layouts [-k WORD]    with a word: only the cases whose id has it, printed
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

os.environ.pop("FLASHRL_CONFIG", None)
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TORCHDYNAMO_DISABLE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)

from tools.layouts.cases import CORNERS, EXPERTS, LINEAR, Case
from tools.layouts.layout import Layout, look

DOCUMENT = Path(__file__).parents[2] / "docs/layouts.md"
BEGIN, END = "<!-- python -m tools.layouts -->", "<!-- end -->"
_HEAD = "| kernel | chosen on | scheme | storage | bytes | test |\n|---|---|---|---|---:|---|"


def main() -> int:
    """Look at every case, and write what was seen."""
    parser = argparse.ArgumentParser(prog="python -m tools.layouts")
    parser.add_argument("-k", default="", help="only cases whose id has this in it, printed")
    word = parser.parse_args().k
    cases = [case for case in (*LINEAR, *EXPERTS, *CORNERS) if word in case.id]
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_rows(cases, Path(folder)))
    table = "\n".join([_HEAD, *rows])
    if word:
        print(table)
        return 0
    before, rest = DOCUMENT.read_text().split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    return 0


def _rows(cases: Iterable[Case], folder: Path) -> Iterable[str]:
    for case in sorted(cases, key=lambda case: case.kernel):
        layout = look(case, folder)
        cells = [
            f"`{case.kernel}`",
            _machine(case),
            case.scheme,
            _storage(layout),
            _bytes(case, layout),
            f"`[{case.id}]`",
        ]
        yield f"| {' | '.join(cells)} |"


def _machine(case: Case) -> str:
    machine = case.machine
    extra = [f"with {' and '.join(sorted(machine.has))}"] if machine.has else []
    extra += [f"without {', '.join(f'`{name}`' for name in machine.without)}"] * bool(
        machine.without
    )
    extra += [
        f"`{name}={value}`" for name, value in (*machine.settings.items(), *case.options.items())
    ]
    extra += [] if machine.cutlass_fp8 else ["CUDA before 12.4"]
    return ", ".join([f"{machine.name} ({machine.capability})", *extra])


def _storage(layout: Layout) -> str:
    """Each parameter's; where layers differ, the others by name."""
    return ", ".join(f"{name}: {stored.kind}" for name, stored in layout.stored.items())


def _bytes(case: Case, layout: Layout) -> str:
    wrong = [*layout.different, *layout.moved]
    if wrong:
        return f"**differs**: {', '.join(wrong)}"
    return f"{layout.compared:,}" + (f", of an opaque `{case.opaque}`" if case.opaque else "")


if __name__ == "__main__":
    raise SystemExit(main())
