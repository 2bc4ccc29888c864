"""The file of the scales of a KV cache: what each attention layer's keys and values are divided by.

    {"format": "flashquant-kv-scales", "version": 1, "model": "runs/policy",
     "scales": {"model.layers.0.self_attn": [0.125, 0.0625]}}

Keys first, then values; by the names of attention layers in the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashquant.errors import ProfileError

_LARGEST: Final = torch.finfo(torch.float32).max
_SMALLEST: Final = torch.finfo(torch.float32).tiny
_Scale = Annotated[float, Field(ge=_SMALLEST, le=_LARGEST, allow_inf_nan=False)]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["flashquant-kv-scales"] = "flashquant-kv-scales"
    version: Literal[1] = 1
    model: str
    scales: dict[str, tuple[_Scale, _Scale]] = Field(min_length=1)


def read_kv_scales(path: Path, source: str) -> dict[str, tuple[float, float]]:
    """Read the scales of keys and values, by attention layer.

    Args:
        path: of the file.
        source: what it is called in errors.

    Raises:
        ProfileError: it is no such file, or a scale is not finite and above 0.

    """
    try:
        return dict(_File.model_validate_json(path.read_bytes()).scales)
    except OSError as broken:
        raise ProfileError(f"{source} cannot be read ({broken}). Copy it anew.") from broken
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(map(str, problem["loc"])) or "the file"
        raise ProfileError(
            f"{source}: {place}: {problem['msg']}. It should hold two numbers a layer, of keys and "
            "of values, finite and above 0; make it with `flashquant profile make --kv`."
        ) from None


def save_kv_scales(
    scales: Mapping[str, tuple[float, float]], path: str | os.PathLike[str], model: str
) -> None:
    """Write scales; the file appears when it is whole.

    Raises:
        ProfileError: the path does not end in `.json`.

    """
    target = Path(path)
    if target.suffix != ".json":
        raise ProfileError(f"{target} is to be a JSON file; end its name in .json")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        text = _File(model=model, scales=dict(scales)).model_dump_json(indent=1)
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
