"""Cells over two ranks: one pair of processes looks at them one after another.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tools.compatibility.ranks \
    judge FOLDER ANSWERS ARCHITECTURE COLUMN [ARCHITECTURE COLUMN ...]

Each rank starts the same engines (vLLM's external_launcher), pushes to its own worker, and compares
what it holds; rank 0 writes what came out of a cell as a line of ANSWERS. A stage of a pipeline may
fail while the other waits for it: it writes down what it found by itself, and ends the pair.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import tests.conftest  # noqa: F401  (the environment in which engines share a process)
from tools.compatibility.cell import DIED, ENGINE, EXACT, WRONG, Cell

_PAIR = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
_SECONDS_TO_START, _SECONDS_A_CELL, _SECONDS_ALONE = 200, 60, 20
_LATE = 124  # what `timeout` says

Asked = tuple[str, str]  # architecture, column


def run(verb: str, asked: Sequence[Asked], folder: Path) -> Iterator[Cell]:
    """Let a pair look at cells, and another one at the rest where it ended or was late."""
    left = list(asked)
    while left:
        answers = folder / "answers.jsonl"
        answers.write_text("")
        said = _run_pair(verb, left, folder, answers)
        cells = [Cell(**json.loads(line)) for line in answers.read_text().splitlines()]
        yield from cells
        left = left[len(cells) :]
        if left:
            lost = ENGINE if verb == "blame" else DIED
            asked_last = left.pop(0)
            alone = _alone(verb, folder, asked_last)
            told = alone.exists()
            yield Cell(**json.loads(alone.read_text())) if told else Cell(*asked_last, lost, said)


def _run_pair(verb: str, asked: Sequence[Asked], folder: Path, answers: Path) -> str:
    """How it ended."""
    from tools.compatibility.trial import policy

    for architecture, _ in asked:  # not by both ranks at once
        for which in "ab":
            policy(folder, architecture, which)
    flat = [part for cell in asked for part in cell]
    program = [sys.executable, *_PAIR, __spec__.name, verb, str(folder), str(answers), *flat]
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    seconds = _SECONDS_TO_START + _SECONDS_A_CELL * len(asked)
    limited = ["timeout", "-k", "20", str(seconds), *program]  # asks first: the ranks end, too
    with (folder / "ranks.txt").open("w+") as log:
        code = subprocess.run(limited, env=environ, stdout=log, stderr=log, check=False).returncode
        if code == _LATE:
            return f"no answer in {seconds} seconds"
        log.seek(0)
        words = [line.strip() for line in log if "Segfault" in line or "CHECK" in line]
    return words[-1] if words else f"two ranks ended with exit code {code}"


def _alone(verb: str, folder: Path, asked: Asked) -> Path:
    """Where the rank that fails first writes what it found of a cell."""
    return folder / f"{verb} {' '.join(asked)}.json"


def main(arguments: Sequence[str]) -> None:
    """Be one rank of a pair."""
    from unittest import mock

    import torch.distributed
    from vllm.distributed.device_communicators import cpu_communicator
    from vllm.model_executor.models import registry

    from tests.engine.kernels import make_room_between_stages, mind_the_map_of_experts
    from tools.compatibility.control import blame
    from tools.compatibility.trial import judge

    verb, folder, answers, *flat = arguments
    if verb == "judge":
        mind_the_map_of_experts()
    make_room_between_stages()  # without it no model is served: what else vLLM lacks would not show
    named = staticmethod(lambda group: f"{os.environ['MASTER_PORT']}-{group.unique_name}")
    with (
        mock.patch.object(registry, "_run_in_subprocess", lambda ask: ask()),
        # vLLM names the memory that ranks share alike in all pairs of a machine.
        mock.patch.object(cpu_communicator._CPUSHMDistributed, "make_group_name", named),
    ):
        for asked in zip(flat[::2], flat[1::2], strict=True):
            cell = {"judge": judge, "blame": blame}[verb](*asked, Path(folder))
            ranks: list[Cell] = [cell, cell]
            if torch.distributed.is_initialized():
                alone = _alone(verb, Path(folder), asked)
                if cell.verdict != EXACT:
                    if not alone.exists():  # the other may fail of this one's end
                        alone.write_text(json.dumps(asdict(cell)))
                    signal.alarm(_SECONDS_ALONE)  # ends this process, and torchrun the other
                torch.distributed.all_gather_object(ranks, cell)
                signal.alarm(0)
            if os.environ["RANK"] == "0":
                with Path(answers).open("a") as file:
                    file.write(json.dumps(asdict(_worst(ranks))) + "\n")


def _worst(ranks: Sequence[Cell]) -> Cell:
    """A cell is what it is on the rank where least is right."""
    return min(ranks, key=lambda cell: (cell.verdict != WRONG, cell.verdict == EXACT))


if __name__ == "__main__":
    main(sys.argv[1:])
