"""What one engine wants to be sent: names, shapes and dtypes, as plain data.

The engine tells (`flashquant.manifest`); a sender guesses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from flashquant.schemes import digest

Size = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Dtype = Literal["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"]

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class TensorSpec(BaseModel):
    """One tensor that an engine wants to be sent.

    Attributes:
        shape: of the whole, unsharded tensor.
        dtype: as it is to be sent, as torch names it.
        scales: the name of its scales, where it is to be sent as codes; they are a tensor of the
            manifest, too. None where it is sent as it is.
        rounds_to: the dtype in which the engine would hold floats before it makes codes of them;
            None where codes are made of what the trainer has.
        scheme: the canonical name of the scheme of its codes, where that is not the engine's.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Size, ...]
    dtype: Dtype
    scales: str | None = None
    rounds_to: Dtype | None = None
    scheme: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """How it is sent."""
        return _DTYPES[self.dtype]

    @property
    def rounds_to_torch(self) -> torch.dtype | None:
        """`rounds_to`, for torch."""
        return None if self.rounds_to is None else _DTYPES[self.rounds_to]


class Manifest(BaseModel):
    """Everything that one engine wants to be sent, and where it stands.

    Plain data: `model_dump_json()` travels over anything, and `Manifest.model_validate_json`
    reads it.

    Attributes:
        format: of this description.
        scheme: the canonical name of the engine's scheme, that of most layers.
        version: how many updates the engine has committed.
        digest: of the policy that is live, over the tensors as they would be sent; equal for
            every engine that serves the same policy in the same scheme, whatever its kernels
            make of it. None where live memory does not show all of them (packed for a kernel, or
            a shard of them only), and while an update is under way.
        tensors: by name of the checkpoint.
        tied: names that the engine stores nothing of -> the tensor that they have to equal.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    scheme: str
    version: Size
    digest: Digest | None
    tensors: dict[str, TensorSpec]
    tied: dict[str, str] = Field(default_factory=dict)


def dtype_name(dtype: torch.dtype) -> Dtype:
    """What a manifest calls a dtype.

    Raises:
        ValueError: it has no word for it.

    """
    for name, known in _DTYPES.items():
        if known == dtype:
            return name  # type: ignore[return-value]  # the keys are these words
    raise ValueError(f"a manifest has no word for {dtype}")


def policy_digest(fingerprints: Mapping[str, str]) -> str:
    """The digest of a policy, in whatever order its tensors come.

    Args:
        fingerprints: of every tensor as it is sent, by name.

    """
    return digest(dict(sorted(fingerprints.items())))
