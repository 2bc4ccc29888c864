"""What a stack says to the settings of our example, by the stack's own configuration.

Usage: python -m tests.stacks.programs.settings STACK EXAMPLE
Prints one JSON object: the settings found in the example, and those that are refused.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.stacks.programs.rollouts import print_result

# In the shell scripts: `name=value`, or `--name value`, one a line.
_OVERRIDE = re.compile(r"^ +(\+?[\w.]+=\S+)", re.MULTILINE)
_FLAG = re.compile(r"^ +(--[\w.]+)", re.MULTILINE)

Answer = dict[str, list[str]]


def verl(example: str) -> Answer:
    """By the whole configuration, which is in the wheel. `+` may bring a name it does not have."""
    configuration = yaml.safe_load(_source("verl", "trainer/config/_generated_ppo_trainer.yaml"))
    found = [override.partition("=")[0] for override in _OVERRIDE.findall(example)]
    old = [name for name in found if not name.startswith("+")]
    return {"found": found, "refused": [n for n in old if not _has(configuration, n.split("."))]}


def openrlhf(example: str) -> Answer:
    """By its parser, which is read and not run: it is made under `if __name__ == "__main__"`."""
    known = set(re.findall(r'"(--[\w.]+)"', _source("openrlhf", "cli/train_ppo_ray.py")))
    found = _FLAG.findall(example)
    return {"found": found, "refused": [flag for flag in found if flag not in known]}


def skyrl(example: str) -> Answer:
    """By its own parser of overrides."""
    from tests.stacks.programs import skyrl as program

    program.enter_the_gym()
    from skyrl.train.config.config import SkyRLTrainConfig

    found = _OVERRIDE.findall(example)
    return {"found": found, "refused": _raised(SkyRLTrainConfig.from_cli_overrides, found)}


def areal(example: str) -> Answer:
    """By merging it into its dataclass, which takes no name that it does not have."""
    from areal.api.cli_args import GRPOConfig
    from omegaconf import OmegaConf

    def merge() -> None:
        merged = OmegaConf.merge(OmegaConf.structured(GRPOConfig), yaml.safe_load(example))
        OmegaConf.to_container(merged.actor)

    return {"found": list(yaml.safe_load(example)), "refused": _raised(merge)}


def ms_swift(example: str) -> Answer:
    """By the dataclasses of its two commands."""
    from dataclasses import fields

    from swift.arguments import RLHFArguments, RolloutArguments

    known = {f"--{one.name}" for kind in (RLHFArguments, RolloutArguments) for one in fields(kind)}
    found = _FLAG.findall(example)
    return {"found": found, "refused": [flag for flag in found if flag not in known]}


def _source(package: str, path: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / path).read_text()


def _has(configuration: Any, path: list[str]) -> bool:
    if not path:
        return True
    inside = isinstance(configuration, dict) and path[0] in configuration
    return inside and _has(configuration[path[0]], path[1:])


def _raised(call: Callable[..., object], *arguments: Any) -> list[str]:
    try:
        call(*arguments)
    except Exception as refused:  # each stack has exceptions of its own
        return [str(refused)]
    return []


if __name__ == "__main__":
    stack, path = sys.argv[1:]
    print_result(globals()[stack.replace("-", "_")](Path(path).read_text()))
