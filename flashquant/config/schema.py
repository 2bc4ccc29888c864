"""What FLASHRL_CONFIG may say, and what it then means.

It names a configuration or a YAML file, here or on the Hugging Face Hub; either becomes one
frozen value before any engine starts, and what the file names is named so that it holds from
anywhere. This room knows neither torch nor vLLM, and never repairs what
it reads: a key or a name it does not know is an error that offers the nearest one.

    FLASHRL_CONFIG=int8_fast          ->  FlashConfig of one entry, scheme "int8"
    FLASHRL_CONFIG=runs/mixed.yaml    ->  FlashConfig of two, used in turn by data-parallel rank
        configs:
          - {fn: int8, model: org/model-w8a8, profile: runs/profile.pt}
          - {fn: bf16}
    FLASHRL_CONFIG=org/runs/mixed.yaml@v2   ->  the same, from the Hub

Limits
    1. A file may say more than the engine can do yet; the patches refuse that, not this room.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flashquant.config import env
from flashquant.config.keep import Kept, read_kept
from flashquant.config.locate import locate, named_in
from flashquant.config.overrides import Override, check_mixable
from flashquant.config.schemes import NAMES
from flashquant.config.sentences import listed, nearest, place, sentences
from flashquant.errors import ConfigError, LocateError

_MAX_BYTES: Final = 1 << 20


class RolloutConfig(BaseModel):
    """How one data-parallel rank generates: one entry of a FlashRL file.

    Only `fn` decides the arithmetic. `load_format`, `quantization` and
    `distributed_executor_backend` are defaults that an explicit engine argument
    overrides. `module_attribute_to_preserve` and `params_to_ignore` are accepted
    so that FlashRL's files stay valid; the write plan makes the first unnecessary, and FlashRL
    itself never reads the second.

    `keep` lists the modules that stay in bf16, at the first load and at every push
    (`flashquant.config.keep`); `overrides`, those that are stored in another scheme
    (`flashquant.config.overrides`).

    `kv_cache` has keys and values cached in fp8 (e4m3), whatever the weights are in; `kv_scales`
    names the file of the scales that it starts with.

    `scales` says what a reload through a profile does with the weight scales of the
    checkpoint: `refreshed` makes each anew from its channel, and keeps only the smoothing
    of the profile; `frozen` keeps them, as FlashRL does. `clipped_warning` is the
    fraction of a weight that frozen scales may clip before the log warns.

    `quantize_towers` has the towers of a multimodal model (what makes embeddings of images, videos
    or sounds) quantized with its language model; they stay in bf16 otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fn: str = "int8"  # as FlashRL reads an entry that leaves it out
    model: str | None = None
    profile: str | None = None
    scales: Literal["frozen", "refreshed"] = "refreshed"
    clipped_warning: float = Field(default=0.001, ge=0, le=1)
    keep: tuple[Kept, ...] = ()
    overrides: tuple[Override, ...] = ()
    kv_cache: Literal["fp8"] | None = None
    kv_scales: str | None = None
    quantize_towers: bool = Field(default=False, strict=True)
    load_format: str | None = None
    quantization: str | None = None
    distributed_executor_backend: str | None = None
    module_attribute_to_preserve: tuple[str, ...] = ()
    params_to_ignore: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        """The canonical name of what a quantized layer stores."""
        return NAMES[self.fn].name

    @property
    def schemes(self) -> tuple[str, ...]:
        """The canonical names of all that it stores, that of most layers first."""
        return tuple(dict.fromkeys([self.scheme, *(one.scheme for one in self.overrides)]))

    @field_validator("fn")
    @classmethod
    def _fn_names_a_configuration(cls, fn: str) -> str:
        if fn not in NAMES:
            raise ValueError(f"{fn!r} names no configuration; {nearest(fn, NAMES)}")
        return fn

    @field_validator("keep", mode="before")
    @classmethod
    def _names_or_blocks_are_kept(cls, keep: object) -> object:
        return tuple(map(read_kept, keep)) if isinstance(keep, list | tuple) else keep

    @field_validator(
        "model",
        "profile",
        "kv_scales",
        "load_format",
        "quantization",
        "distributed_executor_backend",
    )
    @classmethod
    def _text_is_never_blank(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("is blank; write a value, or leave the key out")
        return text

    @model_validator(mode="after")
    def _quantization_agrees_with_fn(self) -> RolloutConfig:
        stored = self.scheme.split("_")[0]
        rival = {"int8": "fp8", "int4": "fp8", "fp8": "int"}.get(stored)
        if self.quantization and (rival is None or rival in self.quantization.lower()):
            raise ValueError(
                f"quantization is {self.quantization!r}, but fn {self.fn!r} stores {stored}; "
                "leave quantization out, or change fn"
            )
        return self

    @model_validator(mode="after")
    def _only_what_quantizes_keeps(self) -> RolloutConfig:
        if self.keep and NAMES[self.fn].codes is None:
            raise ValueError(
                f"keep names layers that stay in bf16, and with fn {self.fn!r} all of them do; "
                "leave keep out"
            )
        return self

    @model_validator(mode="after")
    def _schemes_can_stand_beside_each_other(self) -> RolloutConfig:
        if not self.overrides:
            return self
        check_mixable(self.fn)
        if same := next((one for one in self.overrides if one.scheme == self.scheme), None):
            raise ValueError(
                f"overrides has {str(same.match)!r} in {same.fn!r}, which is what fn says of all "
                "layers; leave it out"
            )
        if self.profile is not None and NAMES[self.fn].takes_profile:
            raise ValueError(
                "profile scales the layers of one scheme, and overrides asks for several; leave "
                "one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _only_a_cache_in_fp8_has_scales(self) -> RolloutConfig:
        if self.kv_scales is not None and self.kv_cache is None:
            raise ValueError(
                "kv_scales are for a KV cache in fp8, and this entry asks for none; write "
                "kv_cache: fp8, or leave kv_scales out"
            )
        return self

    @model_validator(mode="after")
    def _towers_are_quantized_with_the_rest(self) -> RolloutConfig:
        if self.quantize_towers and "vision" in self.keep:
            raise ValueError(
                "quantize_towers is true, and keep says that vision stays in bf16; leave one of "
                "them out"
            )
        if self.quantize_towers and NAMES[self.fn].codes is None:
            raise ValueError(
                f"quantize_towers is true, but with fn {self.fn!r} nothing is quantized; leave it "
                "out, or change fn"
            )
        return self

    @model_validator(mode="after")
    def _only_int8_has_scales_to_keep(self) -> RolloutConfig:
        scheme = NAMES[self.fn]
        if "scales" in self.model_fields_set and not (scheme.takes_profile and scheme.bits == 8):
            raise ValueError(
                f"scales is {self.scales!r}, but fn {self.fn!r} has none to keep; leave scales "
                "out, or write fn: int8"
            )
        return self

    @model_validator(mode="after")
    def _a_profile_needs_real_weights_to_start_from(self) -> RolloutConfig:
        if NAMES[self.fn].takes_profile and self.profile and self.load_format == "dummy":
            raise ValueError(
                "load_format is 'dummy', but a profile scales by what the checkpoint holds; write "
                "load_format: auto"
            )
        return self


class _ConfigFile(BaseModel):
    """A whole FlashRL file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    configs: tuple[RolloutConfig, ...]

    @field_validator("configs")
    @classmethod
    def _there_is_an_entry(cls, configs: tuple[RolloutConfig, ...]) -> tuple[RolloutConfig, ...]:
        if not configs:
            raise ValueError("is an empty list; write at least one entry, such as `- fn: fp8`")
        return configs


class FlashConfig(_ConfigFile):
    """Every entry of one configuration, and where it was read."""

    source: str

    def for_rank(self, dp_rank: int) -> RolloutConfig:
        """The entry of one data-parallel rank; ranks take the entries in turn."""
        if dp_rank < 0:
            raise ConfigError(f"data-parallel rank is {dp_rank}, but ranks count from 0")
        return self.configs[dp_rank % len(self.configs)]


def config_from_env(environ: Mapping[str, str]) -> FlashConfig | None:
    """The configuration FLASHRL_CONFIG asks for, or None where it is unset or empty.

    Raises:
        ConfigError: it is set, and says something impossible.

    """
    reference = env.CONFIG.read(environ)
    if not reference:
        return None
    try:
        return load_config(reference)
    except ConfigError as error:
        raise ConfigError(f"{env.CONFIG.name}: {error}") from None


def load_config(reference: str) -> FlashConfig:
    """Read a configuration: its name, or a YAML file by its path or its place on the Hub.

    Raises:
        ConfigError: no such name or file, or the file says something impossible.

    """
    wanted = reference.strip()
    if not wanted:
        raise ConfigError(
            f"the configuration is blank. Write a name ({listed(NAMES)}) "
            "or the path of a YAML file."
        )
    if wanted in NAMES:
        return FlashConfig(configs=(RolloutConfig(fn=wanted),), source=wanted)
    if not _is_path(wanted):
        raise ConfigError(
            f"{wanted!r} is neither the name of a scheme nor the path of a YAML file; "
            + (_OFF if env.means_no(wanted) else nearest(wanted, NAMES))
        )
    path, source = locate(wanted)
    try:
        entries = _parse(_read(path)).configs
    except ValidationError as error:
        raise ConfigError("\n".join(sentences(error, source, _HOLDERS))) from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return FlashConfig(
        configs=tuple(_named_from_anywhere(entry, source, i) for i, entry in enumerate(entries)),
        source=source,
    )


def _is_path(wanted: str) -> bool:
    """Whether this cannot be meant as a name."""
    is_one = "/" in wanted or wanted.startswith("~") or wanted.endswith((".yaml", ".yml"))
    return is_one or os.path.exists(os.path.expanduser(wanted))


def _named_from_anywhere(entry: RolloutConfig, source: str, index: int) -> RolloutConfig:
    """The entry with what it names named so that every process finds the same ones."""
    named: dict[str, str] = {}
    for key, folder in (("model", True), ("profile", False), ("kv_scales", False)):
        if (written := getattr(entry, key)) is not None:
            try:
                named[key] = named_in(source, written, folder=folder)
            except LocateError as error:
                where = place(source, ("configs", index, key))
                raise LocateError(f"{where}: {error}") from None
    return entry.model_copy(update=named)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror}). Check its permissions.") from None
    if len(text) > _MAX_BYTES:
        raise ConfigError(
            f"is larger than {_MAX_BYTES >> 20} MiB, and no configuration is. "
            "Is it a profile? Name that under the key 'profile'."
        )
    return text


def _parse(text: bytes) -> _ConfigFile:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: an impossible date or number. RecursionError: brackets without end.
        raise ConfigError(
            f"is not plain YAML ({' '.join(str(error).split())}). "
            "A configuration is made of text and lists only."
        ) from None
    return _ConfigFile.model_validate(data)


_OFF: Final = f"to switch flashquant off, unset {env.CONFIG.name}"
_HOLDERS: Final = (
    ("the file", _ConfigFile),
    ("an entry", RolloutConfig),
    ("an override", Override),
)
