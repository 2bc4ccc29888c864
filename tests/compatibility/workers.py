"""The processes that cells run in: several cells each, and one that dies costs its cell.

python -m tests.compatibility.workers judge FOLDER llama:bf16 llama:int8 ...
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from tests.compatibility.trial import DIED, ENGINE, Cell

Asked = tuple[str, str]  # architecture, scheme

# Engines stay in memory until their process ends.
_CELLS_A_PROCESS = 40
_SECONDS_A_PROCESS = 900


def run(verb: str, cells: Sequence[Asked], folder: Path) -> Iterator[Cell]:
    """Let `judge` or `blame` look at cells, in as few processes as possible."""
    left = list(cells)
    while left:
        batch = left[:_CELLS_A_PROCESS]
        done = list(_one_process(verb, batch, folder))
        yield from done
        left = left[len(done) :]


def _one_process(verb: str, batch: Sequence[Asked], folder: Path) -> Iterator[Cell]:
    """The cells that one process came to; the last one may have ended it."""
    results, log = folder / "results.jsonl", folder / "log.txt"
    results.unlink(missing_ok=True)
    names = [f"{architecture}:{scheme}" for architecture, scheme in batch]
    with log.open("w") as said:
        ended = subprocess.run(
            [sys.executable, "-m", __spec__.name, verb, str(folder), *names],
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS_A_PROCESS,
            check=False,
        )
    lines = results.read_text().splitlines() if results.exists() else []
    yield from (Cell(**json.loads(line)) for line in lines)
    if len(lines) < len(batch):
        if ended.returncode >= 0:
            raise RuntimeError(f"a worker failed at {names[len(lines)]}: {log.read_text()[-2000:]}")
        verdict = ENGINE if verb == "blame" else DIED
        yield Cell(*batch[len(lines)], verdict, _last_words(ended.returncode, log.read_text()))


def _last_words(code: int, log: str) -> str:
    """The signal, and the failed check that the kernel named, if it did."""
    said = [line.strip() for line in log.splitlines() if "CHECK" in line or "Error:" in line]
    return f"{signal.Signals(-code).name}: {said[-1] if said else 'nothing was said'}"


def _main(arguments: Sequence[str]) -> None:
    from vllm.model_executor.models import registry

    from tests.compatibility.control import blame
    from tests.compatibility.trial import judge  # before vLLM: it sets the environment

    verb, folder, *names = arguments
    look = {"judge": judge, "blame": blame}[verb]
    # vLLM asks each class of models what it can in a process of its own, for CUDA's sake: ten
    # seconds each. Here is none.
    with mock.patch.object(registry, "_run_in_subprocess", lambda ask: ask()):
        for name in names:
            architecture, _, scheme = name.partition(":")
            cell = look(architecture, scheme, Path(folder))
            with (Path(folder) / "results.jsonl").open("a") as results:
                results.write(json.dumps(asdict(cell)) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
