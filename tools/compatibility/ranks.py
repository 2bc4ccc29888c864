"""Cells over two ranks: one pair of processes looks at them one after another.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tools.compatibility.ranks \
    judge FOLDER ANSWERS ARCHITECTURE COLUMN [ARCHITECTURE COLUMN ...]

Each rank starts the same engines (vLLM's external_launcher), pushes to its own worker, and compares
what it holds; rank 0 writes what came out of a cell as a line of ANSWERS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import tests.conftest  # noqa: F401  (the environment in which engines share a process)
from tools.compatibility.cell import DIED, ENGINE, EXACT, WRONG, Cell

_PAIR = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
_SECONDS_TO_START, _SECONDS_A_CELL = 200, 60

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
            yield Cell(*left.pop(0), lost, said)


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
    with (folder / "ranks.txt").open("w+") as log:
        try:
            code = subprocess.run(
                program, env=environ, stdout=log, stderr=log, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds} seconds"
        log.seek(0)
        words = [line.strip() for line in log if "Segfault" in line or "CHECK" in line]
    return words[-1] if words else f"two ranks ended with exit code {code}"


def main(arguments: Sequence[str]) -> None:
    """Be one rank of a pair."""
    from unittest import mock

    import torch.distributed
    from vllm.distributed.device_communicators import cpu_communicator
    from vllm.model_executor.models import registry

    from tests.engine.kernels import mind_the_map_of_experts
    from tools.compatibility.control import blame
    from tools.compatibility.trial import judge

    verb, folder, answers, *flat = arguments
    if verb == "judge":
        mind_the_map_of_experts()
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
                torch.distributed.all_gather_object(ranks, cell)
            if os.environ["RANK"] == "0":
                with Path(answers).open("a") as file:
                    file.write(json.dumps(asdict(_worst(ranks))) + "\n")


def _worst(ranks: Sequence[Cell]) -> Cell:
    """A cell is what it is on the rank where least is right."""
    return min(ranks, key=lambda cell: (cell.verdict != WRONG, cell.verdict == EXACT))


if __name__ == "__main__":
    main(sys.argv[1:])
