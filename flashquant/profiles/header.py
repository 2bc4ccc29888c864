"""The typed header of our profiles: one JSON text in the metadata of a safetensors file.

    {"format": "flashquant-profile", "version": 1, "scheme": "int8_channel",
     "base": {"model": "org/model-w8a8", "revision": "9f1c...",
              "fingerprint": {"model.norm.weight": "sha256 ..."}},
     "entries": {"model.layers.0.mlp.up_proj.weight": {"kind": "int8", "shape": [4864, 896]}}}

The tensors beside it are `NAME.input_scale`, `NAME.output_scale` and `NAME.weight_scale`,
float32, one number a channel. One that is missing stands for ones; a weight scale, for that of the
checkpoint. A profile for int4 also has `NAME.held`, uint8, one number a group.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Base(_Strict):
    """The W8A8 checkpoint that a profile belongs to.

    Attributes:
        model: its name or path, for people.
        revision: of its repository, where it has one.
        fingerprint: sha256 of a few of its tensors, by name; compared when the engine loads it.

    """

    model: str
    revision: str | None = None
    fingerprint: dict[str, Sha256] = {}


class EntryHeader(_Strict):
    """What is stored of one weight; None where its length does not matter."""

    kind: Literal["int8", "bfloat16", "float16", "float32"]
    shape: list[PositiveInt | None] = Field(min_length=1, max_length=2)
    offset: Literal[0, 1] = 0


class Header(_Strict):
    """Everything about a profile but its numbers."""

    format: Literal["flashquant-profile"] = "flashquant-profile"
    version: Literal[1] = 1
    scheme: Literal["int8_channel", "int4", "int4_g32", "int4_channel"] = "int8_channel"
    base: Base | None = None
    entries: dict[str, EntryHeader] = Field(min_length=1)
