"""A bf16 model and some text become factors: load, find the sites, watch, choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashquant.errors import ProfileError
from flashquant.profiles.making.checkpoint import Checkpoint
from flashquant.profiles.making.discovery import find_sites, linear_layers
from flashquant.profiles.making.factors import Factors, Site
from flashquant.profiles.making.groups import alone, choose_for_groups
from flashquant.profiles.making.search import Chosen, Seen, choose, factors_of, watch

_TOKENS_OF_A_PROOF = 48


@dataclass(frozen=True)
class Calibrated:
    """How a model is to be scaled.

    Attributes:
        factors: by name.
        layers: the weights that are to be stored as codes.
        chosen: what was decided where.
        held: of int4, `[N, groups]` uint8 by layer: hundredths of each group that codes reach.

    """

    factors: Factors
    layers: list[str]
    chosen: list[Chosen]
    held: dict[str, Tensor]


def calibrate(
    source: Checkpoint,
    texts: Iterable[str],
    *,
    tokens: int = 16384,
    length: int = 512,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    group: int | None = None,
    note_progress: Callable[[str, float], None] = lambda phase, done: None,
) -> Calibrated:
    """Choose how a bf16 model is smoothed, from the model alone.

    Args:
        source: the model, with its tokenizer; transformers runs it.
        texts: like those it will write; read until there are enough tokens.
        tokens: to calibrate on.
        length: of the windows that they are cut into.
        device: where the model runs.
        dtype: it runs in.
        group: how many columns share a scale in int4, -1 for a whole row; None for int8.
        note_progress: called with the phase, and which part of it is done.

    Raises:
        ProfileError: transformers is missing, or does not know the model or its tensors by the
            names in the checkpoint; there is no text; or a layer is no whole groups.

    """
    model, tokenizer = load(source.folder, device, dtype)
    layers = [f"{name}.weight" for name in linear_layers(model)]
    if strange := [name for name in layers if name not in source]:
        raise ProfileError(
            f"transformers calls a weight {strange[0]}, which the checkpoint does not hold: it "
            "stores this architecture in another form (stacked experts?). Make the profile from a "
            "W8A8 twin (--twin)."
        )
    windows = windows_of(tokenizer, texts, tokens, length, device)
    note_progress("finding what can be smoothed", 0)
    sites = find_sites(model, windows[0][:, :_TOKENS_OF_A_PROOF])
    parameters = dict(model.named_parameters())
    if group is not None:
        _check_groups({name: parameters[name] for name in layers}, group)
        sites += alone(sites, layers)
    seen = 0

    def note_tokens(count: int) -> None:
        nonlocal seen
        seen += count
        note_progress("running the text", seen / (len(windows) * length))

    watched = watch(model, sites, windows, note_tokens)
    chosen, held = _chosen(
        sites, watched, parameters, group, lambda done: note_progress("choosing strengths", done)
    )
    return Calibrated(factors_of(chosen, parameters), layers, chosen, held)


@torch.no_grad()
def _chosen(
    sites: list[Site],
    watched: dict[Site, Seen],
    parameters: Mapping[str, Tensor],
    group: int | None,
    note_progress: Callable[[float], None],
) -> tuple[list[Chosen], dict[str, Tensor]]:
    """Of each site how it is scaled; of int4 what each group holds, by layer."""
    chosen: list[Chosen] = []
    held: dict[str, Tensor] = {}
    for done, site in enumerate(sites):
        note_progress(done / len(sites))
        if group is None:
            chosen.append(choose(site, watched.pop(site), parameters))
            continue
        found, of_site = choose_for_groups(site, watched.pop(site), parameters, group)
        chosen.append(found)
        held |= of_site
    note_progress(1)
    return chosen, held


def _check_groups(weights: Mapping[str, Tensor], group: int) -> None:
    for name, weight in weights.items():
        if group != -1 and weight.shape[1] % group:
            raise ProfileError(
                f"{name} has {weight.shape[1]} columns, no multiple of groups of {group}; make "
                "the profile for int4_g32 or int4_channel"
            )


def load(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A model of transformers, in evaluation mode, and its tokenizer.

    Raises:
        ProfileError: transformers is missing, or does not know the model.

    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as missing:
        raise ProfileError(f"transformers is needed to run the model: {missing}") from missing
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        model: Any = load(folder, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as refusal:
        said = " ".join(str(refusal).split())[:300]
        raise ProfileError(f"transformers does not load {folder}: {said}") from refusal
    found: nn.Module = model.to(device).eval()
    return found, tokenizer


def windows_of(
    tokenizer: Any, texts: Iterable[str], tokens: int, length: int = 512, device: str = "cpu"
) -> list[Tensor]:
    """Windows of tokens, `[1, length]` each, until there are enough tokens.

    Raises:
        ProfileError: there is not enough text for one.

    """
    windows = list(_windows(tokenizer, texts, tokens, length, device))
    if not windows:
        raise ProfileError(f"the text is shorter than one window of {length} tokens; give it more")
    return windows


def _windows(
    tokenizer: Any, texts: Iterable[str], tokens: int, length: int, device: str
) -> Iterator[Tensor]:
    """`[1, length]` each; texts follow each other, and what is left over is dropped."""
    held: list[int] = []
    given = 0
    for text in texts:
        held += tokenizer(text, verbose=False)["input_ids"]
        while len(held) >= length and given < tokens:
            yield torch.tensor([held[:length]], device=device)
            held = held[length:]
            given += length
        if given >= tokens:
            return
