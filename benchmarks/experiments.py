"""Fourteen things that go wrong in a weight push: vLLM's own reload beside flashquant.

    python -m benchmarks.experiments [--only T1 T5] [--engines int8] [--json FILE]

T1 to T14 were first run on vLLM's own reload alone. Here both arms live through them: the same
calls with the same tensors, in the order in which the model lists them, on engines started from
the same checkpoints. Each experiment has an engine of its own, in a process of its own with a time
limit, because vLLM may be left dead, hang or crash: that is a result. Before them comes T0, an
update without a fault: an engine that it ruins proves little by what becomes of it in the others.

Judged exactly, by prompt log-probs and greedy tokens, against the engine before the push and
against a fresh engine of the same arm on what was pushed. Where it is half a model, that is the
old one with this half; where it is no model at all (T2, T4), it is the new one unharmed.

An int8 engine of vLLM alone is wrong whenever it is fed bf16 (`benchmarks.beside_vllm`), and no
experiment would add to that. So int8 engines are fed codes and scales, in both arms, which vLLM
can do; flashquant's is fed bf16 as well, which is what a trainer has.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import arms
from benchmarks.arms import ARMS, FLASHQUANT, NATIVE
from benchmarks.pushes import EXPERIMENTS, Experiment, Weights
from tools.models import tiny_models
from tools.models.policies import W8A8, Policies

# Processes that begin with vLLM imported, which takes longer than all the rest, and with nothing
# else: flashquant comes with the first engine, or does not.
_FORKS = multiprocessing.get_context("forkserver")
_PRELOAD = [
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
]
_LEFT_BEHIND = "ignore:resource_tracker"  # a process that ends at once leaves semaphores behind
_PATIENCE = 120  # seconds for a push and the look at what is served then; it takes about two
_STARTING = 600  # seconds for the two engines before it; on an idle machine about five


@dataclass(frozen=True)
class Engine:
    """One kind of engine that a trainer feeds.

    Attributes:
        stored: what its checkpoint holds, in the words of `tools.models.policies`.
        fed: what the trainer sends, in the same words.
        config: what FLASHRL_CONFIG says in flashquant's arm.
        options: what vLLM is told in its own arm.
        arms: those that have it.

    """

    name: str
    stored: str
    fed: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ARMS

    def start(self, checkpoint: Path, arm: str) -> Any:
        """One of this kind, with flashquant or without."""
        if arm == FLASHQUANT:
            return arms.start(checkpoint, self.config)
        return arms.start(checkpoint, None, **self.options)


@dataclass(frozen=True)
class Row:
    """What one engine did in one experiment.

    Attributes:
        raised: names of the exceptions that the calls raised; None if they never came back.
        generating: name of the exception that generating raised after them.
        end: how the process ended, if not as it should.
        gap: largest difference from the fresh engine's prompt log-probs; NaN is served as NaN.

    """

    experiment: str
    engine: str
    arm: str
    raised: list[str] | None = None
    generating: str | None = None
    end: str | None = None
    equals_fresh: bool = False
    equals_old: bool = False
    gap: float | None = None

    @property
    def right(self) -> bool:
        """What was pushed is served, without an error."""
        return not self.raised and self.equals_fresh

    @property
    def refused(self) -> bool:
        """An error, and the old weights are still served."""
        return bool(self.raised) and self.equals_old

    @property
    def verdict(self) -> str:
        """The row's cell in the table."""
        if self.raised is None:
            return f"the push {self.end}"
        if self.right:
            return "equals a fresh start"
        raised = f"raised {', '.join(self.raised)}" if self.raised else "returned"
        if self.gap is None:
            return f"{raised}; generating {self.end or f'raises {self.generating}'}"
        if self.refused:
            return f"refused: {', '.join(self.raised)}, old weights still served"
        if self.raised:
            return f"{raised}; {'the new weights' if self.equals_fresh else 'a mixture'} served"
        return "silently kept the old weights" if self.equals_old else arms.silently_wrong(self.gap)


ENGINES = (
    Engine("int8", stored=W8A8, fed=W8A8, config="int8"),
    Engine("fp8", "bf16", "bf16", "fp8_channel", options={"quantization": "fp8_per_channel"}),
    Engine("bf16", "bf16", "bf16", "bf16"),
    Engine("int8 fed bf16", stored=W8A8, fed="bf16", config="int8", arms=(FLASHQUANT,)),
)


def rows(experiments: Sequence[Experiment], engines: Sequence[Engine]) -> Iterator[Row]:
    """Every experiment on every engine of both arms, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        for experiment in experiments:
            for engine in engines:
                for arm in engine.arms:
                    yield run(experiment, engine, arm, Path(folder))


def run(experiment: Experiment, engine: Engine, arm: str, folder: Path) -> Row:
    """Live through one experiment in a process of its own, and say how that ended.

    Raises:
        RuntimeError: it ended before the push; with the end of what it said.

    """
    names = (experiment.name, engine.name, arm)
    notes = folder / f"{'-'.join(names)}.jsonl"
    child = _FORKS.Process(target=_live_apart, args=(*names, notes))
    child.start()
    end = ended(child)
    if not notes.exists():
        said = notes.with_suffix(".log").read_text()[-4000:]
        raise RuntimeError(f"{names} {end} before the push:\n{said}")
    return row(*names, notes.read_text(), end)


def row(experiment: str, engine: str, arm: str, notes: str, end: str | None) -> Row:
    """Put together what a process noted as it went, one JSON object a line, and its end."""
    facts: dict[str, Any] = {}
    for line in notes.splitlines():
        facts |= json.loads(line)
    return Row(experiment, engine, arm, end=end, **facts)


def ended(child: ForkServerProcess) -> str | None:
    """Wait for a process: None if it came to its end."""
    child.join(_STARTING + _PATIENCE)
    if child.exitcode is None:
        child.kill()
        child.join()
        return "hangs"
    if child.exitcode < 0:
        name = signal.Signals(-child.exitcode).name
        return "hangs" if name == "SIGALRM" else f"dies of {name}"
    return f"ends the process with {child.exitcode}" if child.exitcode else None


def _live_apart(experiment: str, engine: str, arm: str, notes: Path) -> None:
    log = notes.with_suffix(".log").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    live_through(_named(experiment, EXPERIMENTS), _named(engine, ENGINES), arm, notes)
    # At once: all is noted, and what a dead engine does when it is collected is not the question.
    os._exit(0)


def in_order(checkpoint: Path, weights: Weights) -> dict[str, Tensor]:
    """As the model lists them, which is how a trainer sends them; a scale after its codes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    place = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    names = sorted(weights, key=lambda name: (place[name.removesuffix("_scale")], name))
    return {name: weights[name] for name in names}


def live_through(experiment: Experiment, engine: Engine, arm: str, notes: Path) -> None:
    """The whole experiment in this process, each fact noted before the next thing can go wrong."""
    arms.enable_amx()
    policies, target = Policies(notes.parent, "qwen2"), "b"
    if experiment.pushed is not None:
        target = experiment.name
        half = experiment.pushed(policies.tensors("a"), policies.tensors("b"))
        if not (path := notes.parent / f"qwen2-{target}").exists():
            arms.write_like(policies.bf16("b"), path, half)
    fresh, live = (
        engine.start(policies.served(policy, engine.stored), arm) for policy in (target, "a")
    )
    expected, old = arms.outputs(fresh), arms.outputs(live)
    arms.check_distinct(experiment.name, expected, old)
    b = in_order(policies.bf16("b"), tiny_models.tensors(policies.served("b", engine.fed)))

    with notes.open("w", buffering=1) as lines:
        signal.alarm(_PATIENCE)  # counted from here: how long engines take to start is no result
        errors = experiment.live(live, b)
        _note(lines, raised=list(dict.fromkeys(filter(None, errors))))
        try:
            served = arms.outputs(live)
        except Exception as error:
            _note(lines, generating=type(error).__name__)
            return
        _note(
            lines,
            equals_fresh=served == expected,
            equals_old=served == old,
            gap=served.gap(expected),
        )


def _note(lines: TextIO, **facts: object) -> None:
    lines.write(json.dumps(facts) + "\n")


def table(found: list[Row]) -> str:
    """One row an experiment; flashquant's engines share a cell for as long as they agree."""
    verdicts: dict[str, dict[str, dict[str, str]]] = {}
    for row in found:
        arm = verdicts.setdefault(row.experiment, {NATIVE: {}, FLASHQUANT: {}})[row.arm]
        arm[row.engine] = row.verdict
    native = dict.fromkeys(row.engine for row in found if row.arm == NATIVE)
    return arms.table(
        ["experiment", *(f"vLLM, {engine}" for engine in native), "flashquant, every engine"],
        [
            [
                f"{name} {_named(name, EXPERIMENTS).what}",
                *(cells[NATIVE][engine] for engine in native),
                agreed(cells[FLASHQUANT]),
            ]
            for name, cells in verdicts.items()
        ],
    )


def agreed(verdicts: Mapping[str, str]) -> str:
    """What all engines say, or what each of them says."""
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    return "; ".join(f"{engine}: {verdict}" for engine, verdict in verdicts.items())


def holds(row: Row) -> bool:
    """Right, or refused where there was something to refuse."""
    return row.right or (row.refused and not _named(row.experiment, EXPERIMENTS).whole)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if flashquant is neither right nor refuses what is not."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments",
        description="vLLM's own reload beside flashquant, in everything that goes wrong in a push",
    )
    for option, things in (("--only", EXPERIMENTS), ("--engines", ENGINES)):
        names = [thing.name for thing in things]
        parser.add_argument(option, nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to it as well")
    arguments = parser.parse_args(argv)
    os.environ.clear()
    os.environ.update(arms.environment(), PYTHONWARNINGS=_LEFT_BEHIND)
    _FORKS.set_forkserver_preload(_PRELOAD)
    found = []
    experiments = [experiment for experiment in EXPERIMENTS if experiment.name in arguments.only]
    engines = [engine for engine in ENGINES if engine.name in arguments.engines]
    for row in rows(experiments, engines):
        print(f"{row.experiment} {row.engine} {row.arm}: {row.verdict}", file=sys.stderr)
        found.append(row)
    if arguments.json is not None:
        facts = [asdict(row) | {"verdict": row.verdict} for row in found]
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")
    print(table(found))
    return 0 if all(holds(row) for row in found if row.arm == FLASHQUANT) else 1


def _named(name: str, things: Iterable[Any]) -> Any:
    return next(thing for thing in things if thing.name == name)


if __name__ == "__main__":
    raise SystemExit(main())
