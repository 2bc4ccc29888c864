"""`flashquant profile sensitivity`: what each layer costs in 8 bits, and which to keep in bf16.

flashquant profile sensitivity --model BF16 --text FILE... [--scheme int8] [--budget KL]
    [--profile FILE] [--write YAML] [--png FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table

from flashquant.cli.output import bars
from flashquant.cli.texts import texts_of
from flashquant.errors import ProfileError

if TYPE_CHECKING:
    from flashquant.profiles.making.sensitivity import Sensitivity

_WORST = 10


def add_to(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "sensitivity", help="measure what each layer costs, and choose which to keep in bf16"
    )
    verb.add_argument("--model", required=True, help="folder of the bf16 checkpoint, tokenizer too")
    verb.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help=".txt, or .jsonl with 'text'"
    )
    verb.add_argument("--scheme", default="int8", help="default: %(default)s")
    verb.add_argument("--profile", help="of int8: a path, or owner/repo/file@revision")
    verb.add_argument(
        "--budget", type=float, default=0.01, help="KL that may be left, nats a token (%(default)s)"
    )
    verb.add_argument("--tokens", type=int, default=1024, help="of text (default: %(default)s)")
    verb.add_argument("--device", default="cpu", help="to run the model on (default: cpu)")
    verb.add_argument(
        "--write", metavar="YAML", help="write the entry, for FLASHRL_CONFIG, into a new file"
    )
    verb.add_argument("--png", metavar="FILE", help="draw what each layer costs")
    verb.set_defaults(run=_sensitivity)


def _sensitivity(chosen: argparse.Namespace) -> int:
    from flashquant.profiles import load_profile

    if chosen.write is not None and Path(chosen.write).exists():
        raise ProfileError(f"{chosen.write} is there already; name a new file for the entry")
    profile = None if chosen.profile is None else load_profile(chosen.profile)
    found = _measured(chosen, profile)
    console = Console()
    console.print(_table_of(found))
    every = f"every layer in {found.scheme}: {found.whole:.4f} nats a token"
    count = sum(len(cost.layers) for cost in found.costs)
    console.print(
        f"{every}; {len(found.keep)} of {count} layers kept ({found.kept_part:.1%} of their "
        f"weights): {found.left:.4f}",
        soft_wrap=True,
    )
    if chosen.write is not None:
        entry: dict[str, Any] = {"fn": found.scheme, "model": _from_anywhere(chosen.model)}
        entry["keep"] = found.keep
        if chosen.profile is not None:
            entry["profile"] = _from_anywhere(chosen.profile)
        with Path(chosen.write).open("x", encoding="utf-8") as file:
            yaml.safe_dump({"configs": [entry]}, file, sort_keys=False)
        console.print(f"{chosen.write}: the entry, with what is kept", soft_wrap=True)
    if chosen.png is not None:
        from flashquant.profiles.plot import draw_costs

        title = f"{Path(chosen.model).name} in {found.scheme}"
        draw_costs(found.costs, found.keep, title, chosen.png)
        console.print(f"{chosen.png}: what each layer costs", soft_wrap=True)
    return 0


def _from_anywhere(name: str) -> str:
    """A path holds where it was typed, and the entry's own are from its folder on."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _measured(chosen: argparse.Namespace, profile: Any) -> Sensitivity:
    from flashquant.profiles.making import Checkpoint
    from flashquant.profiles.making.calibrate import load, windows_of
    from flashquant.profiles.making.sensitivity import sensitivity

    model, tokenizer = load(Checkpoint(chosen.model).folder, chosen.device)
    windows = windows_of(tokenizer, texts_of(chosen.text), chosen.tokens, device=chosen.device)
    with bars() as note:
        return sensitivity(
            model, windows, chosen.scheme, chosen.budget, profile=profile, note_progress=note
        )


def _table_of(found: Sensitivity) -> Table:
    """The layers that cost most, by themselves."""
    table = Table("layers", "weights", "nats a token, alone", "", box=None)
    keep = set(found.keep)
    for cost in sorted(found.costs, key=lambda cost: cost.kl, reverse=True)[:_WORST]:
        first, *others = cost.layers
        names = ", ".join([first, *(name.rpartition(".")[2] for name in others)])
        kept = "kept" if first in keep else ""
        table.add_row(names, f"{cost.weights:,}", f"{cost.kl:.5f}", kept)
    return table
