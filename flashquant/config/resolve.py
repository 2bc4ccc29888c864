"""What one entry of a configuration comes to: its checkpoint, at a revision, and its profile.

Reads config.json of the checkpoint and no weights; asks neither torch nor vLLM.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from flashquant.config.locate import Located, locate, locate_in_model, split_revision
from flashquant.config.schema import RolloutConfig
from flashquant.config.schemes import SCHEMES
from flashquant.errors import ConfigError, LocateError

# In a model that an entry names: the name that `profile make` gives, and FlashRL's.
_OWN_PROFILES: Final = ("profile.safetensors", "profile.pt")


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint an engine starts on, by its config.json.

    Attributes:
        model: a folder, or `owner/repo`.
        revision: the commit of the repository; None of a folder.
        pinned: whether the configuration itself names that commit, so that it cannot change.
        architectures: the classes of the model.
        dtype: of its weights, as it says itself.
        tied: whether its head is its embeddings.
        quantization: its own quantization config, if it holds codes already.

    """

    model: str
    revision: str | None
    pinned: bool
    architectures: tuple[str, ...]
    dtype: str | None
    tied: bool
    quantization: Mapping[str, Any] | None


def checkpoint_of(reference: str) -> Checkpoint:
    """Look at the checkpoint that a folder, `owner/repo` or `owner/repo@revision` names.

    Raises:
        LocateError: whether there is one cannot be known.
        ConfigError: there is none, or its config.json cannot be read.

    """
    model, revision = split_revision(reference)
    found = locate_in_model(reference, "config.json")
    if found is None:
        raise ConfigError(
            f"{reference} is no checkpoint: it has no config.json. Write the folder of one, or "
            "owner/repo on the Hugging Face Hub."
        )
    said = _read(found)
    _, at, commit = found.reference.rpartition("@")
    is_folder = os.path.isdir(model)
    return Checkpoint(
        model=os.path.abspath(model) if is_folder else model,
        revision=None if is_folder or not at else commit,
        pinned=is_folder or revision == commit,
        architectures=tuple(said.get("architectures") or ()),
        dtype=said.get("dtype") or said.get("torch_dtype"),
        tied=bool(said.get("tie_word_embeddings")),
        quantization=said.get("quantization_config"),
    )


def _read(found: Located) -> dict[str, Any]:
    try:
        said = json.loads(found.path.read_bytes())
    except (OSError, ValueError) as broken:
        raise ConfigError(
            f"{found.reference} cannot be read ({broken}). Copy the checkpoint anew."
        ) from broken
    if not isinstance(said, dict):
        raise ConfigError(f"{found.reference} is no JSON object. Copy the checkpoint anew.")
    return said


def profile_of(config: RolloutConfig) -> Located | None:
    """The profile that an entry names, or that lies in the model it names; None without one.

    Raises:
        LocateError: it names one that cannot be had.

    """
    if not SCHEMES[config.scheme].takes_profile:
        return None
    if config.profile is not None:
        return _named_profile(config.profile)
    if config.model is None:
        return None
    found = (locate_in_model(config.model, name) for name in _OWN_PROFILES)
    return next((profile for profile in found if profile is not None), None)


def _named_profile(reference: str) -> Located:
    try:
        return locate(reference)
    except LocateError as error:
        beside = (
            ""
            if os.path.isabs(reference)
            else (
                " A relative path is looked for beside the file that names it, then where the "
                "process was started."
            )
        )
        raise LocateError(f"profile: {error}{beside}") from error.__cause__


def check_profile_is_for(scheme: str, config: RolloutConfig, profile: Located) -> None:
    """A profile scales by the codes and groups of the scheme that it was made for.

    Args:
        scheme: the one that the profile is for.
        config: the entry that asks for it.
        profile: where it was found.

    Raises:
        ConfigError: the entry asks for another one.

    """
    if scheme not in (config.scheme, SCHEMES[config.scheme].held_as):
        raise ConfigError(
            f"the profile {profile.reference} is for {scheme}, and fn {config.fn!r} asks for "
            f"{config.scheme}. Make one with `flashquant profile make --scheme {config.scheme}`, "
            "or name another under `profile`."
        )


def check_same_scheme(own: Mapping[str, Any], scheme: str, model: str) -> None:
    """A checkpoint that is quantized already is served as it is, if that is what was asked for.

    Args:
        own: its quantization config.
        scheme: the one that live layers are to hold.
        model: its name, for the error.

    Raises:
        ConfigError: it holds something else.

    """
    groups = own.get("config_groups") or {}
    weights = [group.get("weights") or {} for group in groups.values()]
    stored = {(w.get("type"), w.get("num_bits"), w.get("strategy")) for w in weights}
    if own.get("quant_method") == "compressed-tensors" and stored == {SCHEMES[scheme].checkpoint}:
        return
    raise ConfigError(
        f"{model} is quantized already ({own.get('quant_method')}, {sorted(map(str, stored))}), "
        f"and FLASHRL_CONFIG asks for {scheme}. Serve the bf16 checkpoint in {scheme}, or ask for "
        "what this one holds: int8 for W8A8, fp8_channel or fp8_tensor for fp8 with channel scales."
    )
