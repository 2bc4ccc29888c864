"""`flashquant profile`: make profiles, look at them, compare and convert them.

sensitivity --model BF16 --text FILE...  what each layer costs, and which to keep (sensitivity.py)
make NEW --model BF16 --text FILE...     calibrate int8 or int4: run text through the model
make NEW --model BF16 --text FILE... --kv    scales of an fp8 KV cache
make NEW --model BF16 --twin W8A8        from a W8A8 checkpoint of the same model
inspect PROFILE [--plot PNG]             what a profile holds
compare ONE OTHER                        where two profiles differ
convert OLD NEW [--model W8A8]           FlashRL's profile.pt becomes ours
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from flashquant.cli import sensitivity
from flashquant.cli.output import bars
from flashquant.cli.texts import texts_of
from flashquant.config.schemes import SCHEMES
from flashquant.errors import ProfileError

if TYPE_CHECKING:
    from torch import Tensor

    from flashquant.profiles import Profile
    from flashquant.profiles.making import Checkpoint
    from flashquant.profiles.making.calibrate import Calibrated
    from flashquant.profiles.making.search import Chosen

_BASE_FILES = "folder of the bf16 checkpoint: config.json, safetensors, tokenizer"


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `profile` and its verbs."""
    profile = commands.add_parser(
        "profile",
        help="make int8 profiles, look at them, convert them",
        description="Makes calibration profiles, which bring int8 and int4 nearer to bf16, looks "
        "at them and converts FlashRL's: docs/calibration.md.",
    )
    verbs = profile.add_subparsers(dest="verb", required=True)
    _add_make(verbs)
    sensitivity.add_to(verbs)
    inspect = verbs.add_parser("inspect", help="what a profile holds")
    inspect.add_argument("profile", help="a path, or owner/repo/file@revision")
    inspect.add_argument("--plot", metavar="PNG", help="also draw its factors and outliers")
    inspect.set_defaults(run=lambda chosen: _inspect(chosen.profile, chosen.plot))
    compare = verbs.add_parser("compare", help="where two profiles differ")
    compare.add_argument("one", help="a path, or owner/repo/file@revision")
    compare.add_argument("other", help="likewise")
    compare.set_defaults(run=lambda chosen: _compare(chosen.one, chosen.other))
    convert = verbs.add_parser("convert", help="FlashRL's profile.pt becomes ours")
    convert.add_argument("old", help="a path, or owner/repo/file@revision")
    convert.add_argument("new", help="a path that ends in .safetensors")
    convert.add_argument(
        "--model", help="folder of the W8A8 checkpoint: check that they fit, and note which it is"
    )
    convert.add_argument("--revision", help="of the model's repository, to be noted")
    convert.set_defaults(
        run=lambda chosen: _convert(chosen.old, chosen.new, chosen.model, chosen.revision)
    )


def _add_make(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    make = verbs.add_parser("make", help="calibrate a profile, or read one off a W8A8 twin")
    make.add_argument("new", help="a path that ends in .safetensors, or with --kv in .json")
    make.add_argument("--model", required=True, help=_BASE_FILES)
    how = make.add_mutually_exclusive_group(required=True)
    how.add_argument("--twin", help="folder of the W8A8 checkpoint of the same model")
    how.add_argument(
        "--text", nargs="+", metavar="FILE", help="to run through it: .txt, or .jsonl with 'text'"
    )
    make.add_argument(
        "--scheme",
        choices=[s.name for s in SCHEMES.values() if s.takes_profile and not s.held_as],
        default="int8",
        help="that it is for (default: %(default)s)",
    )
    make.add_argument(
        "--kv", action="store_true", help="make the scales of an fp8 KV cache, into a .json file"
    )
    make.add_argument("--checkpoint", metavar="FOLDER", help="also write the W8A8 checkpoint there")
    make.add_argument("--tokens", type=int, default=16384, help="of text (default: %(default)s)")
    make.add_argument("--device", default="cpu", help="to run the model on (default: cpu)")
    make.add_argument("--revision", help="of the model's repository, to be noted")
    make.set_defaults(run=lambda chosen: _make_kv(chosen) if chosen.kv else _make(chosen))


def _make(chosen: argparse.Namespace) -> int:
    from flashquant.profiles import Base, save_profile, with_base
    from flashquant.profiles.making import Checkpoint, factors_of_twins, profile_of, write_w8a8

    if chosen.scheme != "int8" and (chosen.twin or chosen.checkpoint):
        raise ProfileError(
            f"--twin and --checkpoint are of W8A8 checkpoints, which {chosen.scheme} has none of. "
            "Give --text, and start the engine on the bf16 checkpoint."
        )
    source = Checkpoint(chosen.model)
    base = Base(model=chosen.model, revision=chosen.revision)
    console = Console()
    twin: Checkpoint | None = None
    if chosen.twin is not None:
        twin = Checkpoint(chosen.twin)
        factors, scales = factors_of_twins(source, twin)
        profile = profile_of(factors, source.items(), scales, chosen.new, base)
    else:
        found = _calibrate(source, chosen)
        profile = profile_of(
            found.factors,
            source.items(),
            dict.fromkeys(found.layers),
            chosen.new,
            base,
            scheme=chosen.scheme,
            held=found.held,
        )
        console.print(_table_of(found.chosen))
    if chosen.checkpoint is not None:
        twin = Checkpoint(write_w8a8(source, profile, chosen.checkpoint))
        console.print(f"{chosen.checkpoint}: its W8A8 checkpoint")
    if twin is not None:
        profile = with_base(profile, str(twin.folder), chosen.revision, twin.items())
    save_profile(profile, chosen.new)
    if chosen.checkpoint is not None:
        save_profile(profile, Path(chosen.checkpoint) / "profile.safetensors")
    console.print(f"{chosen.new}: {len(profile.entries)} weights, of {_base_of(profile)}")
    return 0


def _make_kv(chosen: argparse.Namespace) -> int:
    from flashquant.profiles import save_kv_scales
    from flashquant.profiles.making import Checkpoint, kv_scales
    from flashquant.profiles.making.calibrate import load, windows_of

    if chosen.text is None or chosen.checkpoint is not None:
        raise ProfileError("--kv runs text through the model: give --text, and no --checkpoint")
    model, tokenizer = load(Checkpoint(chosen.model).folder, chosen.device)
    windows = windows_of(tokenizer, texts_of(chosen.text), chosen.tokens, device=chosen.device)
    console = Console(stderr=True)
    scales = kv_scales(model, track(windows, "running the text", console=console, transient=True))
    save_kv_scales(scales, chosen.new, chosen.model)
    table = Table("layer", "keys", "values", box=None)
    for name, (keys, values) in scales.items():
        table.add_row(name, f"{keys:g}", f"{values:g}")
    console = Console()
    console.print(table)
    console.print(f"{chosen.new}: scales of {len(scales)} layers, of {chosen.model}")
    return 0


def _calibrate(source: Checkpoint, chosen: argparse.Namespace) -> Calibrated:
    from flashquant.profiles.making.calibrate import calibrate

    with bars() as note:
        return calibrate(
            source,
            texts_of(chosen.text),
            tokens=chosen.tokens,
            device=chosen.device,
            group=SCHEMES[chosen.scheme].group,
            note_progress=note,
        )


def _table_of(choices: Iterable[Chosen]) -> Table:
    """What was chosen for each kind of site; strengths and errors over all blocks."""
    from flashquant.profiles.making.discovery import kind_of

    kinds: dict[tuple[str, ...], list[Chosen]] = {}
    for choice in choices:
        site = choice.site
        makers = [producer.name for producer in site.producers]
        kinds.setdefault((*map(kind_of, makers[:1]), kind_of(site.consumers[0])), []).append(choice)
    table = Table("divided", "read by", "strength", "error", "without", box=None)
    for kind, found in kinds.items():
        readers = ", ".join(map(_short, found[0].site.consumers))
        strengths = [choice.strength for choice in found if choice.strength is not None]
        span = f"{min(strengths)} to {max(strengths)}" if strengths else ""
        none = len(found) - len(strengths)
        table.add_row(
            _short(kind[0]) if found[0].site.producers else "",
            readers,
            ", ".join(filter(None, [span, f"none in {none}" if none and span else ""])),
            f"{sum(c.error for c in found) / len(found):.2%}",
            f"{sum(c.error_without for c in found) / len(found):.2%}",
        )
    return table


def _short(name: str) -> str:
    """`up_proj` of `model.layers.3.mlp.up_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _convert(old: str, new: str, model: str | None, revision: str | None) -> int:
    from flashquant.plan import named_tensors
    from flashquant.profiles import check_profile_fits, load_profile, save_profile, with_base

    profile = load_profile(old)
    if model is not None:
        check_profile_fits(profile, named_tensors(model, reuses=True))
        profile = with_base(profile, model, revision, named_tensors(model, reuses=True))
    save_profile(profile, new)
    Console().print(f"{new}: {len(profile.entries)} weights, of {_base_of(profile)}")
    return 0


def _inspect(reference: str, plot: str | None) -> int:
    from flashquant.profiles import load_profile

    profile = load_profile(reference)
    weight = Column("weight", overflow="fold")
    table = Table(weight, "stored as", "shape", "columns", "rows", box=None)
    for name, entry in profile.entries.items():
        shape = " x ".join("?" if size is None else str(size) for size in entry.shape)
        kind = str(entry.kind).removeprefix("torch.")
        table.add_row(name, kind, shape, _span(entry.input_scale), _span(entry.output_scale))
    console = Console()
    console.print(table)
    console.print(f"\n{profile.source}: {len(profile.entries)} weights, of {_base_of(profile)}")
    if plot is not None:
        from flashquant.profiles.plot import draw

        draw(profile, plot)
        console.print(f"{plot}: its factors, and how far the largest are from the middle")
    return 0


def _compare(one: str, other: str) -> int:
    from flashquant.profiles import load_profile

    first, second = load_profile(one), load_profile(other)
    table = Table("weight", "columns", "rows", box=None)
    alike = 0
    for name in sorted(first.entries.keys() | second.entries.keys()):
        if name not in first.entries or name not in second.entries:
            table.add_row(name, f"only in {one if name in first.entries else other}", "")
            continue
        a, b = first.entries[name], second.entries[name]
        columns = _apart(a.input_scale, b.input_scale)
        rows = _apart(a.output_scale, b.output_scale)
        if (a.kind, columns, rows) == (b.kind, "", ""):
            alike += 1
        else:
            table.add_row(name, columns, rows if a.kind == b.kind else f"{a.kind} | {b.kind}")
    console = Console()
    if table.row_count:
        console.print(table)
        console.print("\nhow many times one is the other, in the middle channel and at most")
    console.print(f"{alike} of {alike + table.row_count} weights are scaled alike (to 1 in 10,000)")
    return 0


def _apart(one: Tensor | None, other: Tensor | None) -> str:
    """How many times the larger is the smaller; nothing where they are the same."""
    import torch

    if one is None and other is None:
        return ""
    filled = [v if v is not None else torch.ones((), device="cpu") for v in (one, other)]
    if one is not None and other is not None and len(one) != len(other):
        return f"{len(one)} | {len(other)} channels"
    times = (filled[0] / filled[1]).log().abs().exp()
    if times.max() < 1.0001:
        return ""
    return f"{times.median().item():.3g}, {times.max().item():.3g}"


def _base_of(profile: Profile) -> str:
    if profile.base is None:
        return "a checkpoint that nobody noted (convert it with --model)"
    revision = f"@{profile.base.revision}" if profile.base.revision else ""
    return f"{profile.base.model}{revision}, {len(profile.base.fingerprint)} fingerprints"


def _span(factors: Tensor | None) -> str:
    """The smallest, the middle and the largest of them."""
    if factors is None:
        return "1"
    return " … ".join(f"{f.item():.3g}" for f in (factors.min(), factors.median(), factors.max()))
