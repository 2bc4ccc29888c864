"""Every scheme as one record: what a quantized layer stores, and what others call it.

To add one is to add a record here and its definition in `flashquant.schemes`, under the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

Granularity = Literal["channel", "tensor", "block", "group"]


@dataclass(frozen=True)
class Scheme:
    """What a quantized layer stores.

    Attributes:
        name: its canonical name, one of those that FLASHRL_CONFIG takes.
        aliases: the others, most of them FlashRL's.
        codes: the dtype of its codes, as torch names it; None where nothing is quantized.
        scales: what shares one scale: an output channel, a tensor, a block of 128 x 128, or a
            group of neighbouring columns of a channel.
        bits: of a code, as the kernels read it.
        group: how many columns share a scale, where that is a group; -1 where it is a channel of
            a scheme that could have groups.
        online: what vLLM calls its own quantization to it while loading, if it has one.
        checkpoint: type, num_bits and strategy of its weights in a compressed-tensors checkpoint,
            if vLLM serves such a one.
        emulated: whether a CPU has no kernel of it, and vLLM's emulation computes it there.
        lists_layers: whether FlashRL's profile of it is a list of the weights that are quantized.
        takes_profile: whether a profile of calibration may scale it.
        held_as: the scheme that live layers hold, where it differs only in how it gets there.
        vllm: the versions that serve it, as PEP 440 writes them; None where none does yet.
        instead: what to do where it is not served.

    """

    name: str
    aliases: tuple[str, ...] = ()
    codes: str | None = None
    scales: Granularity | None = None
    bits: int = 8
    group: int | None = None
    online: str | None = None
    checkpoint: tuple[str, int, str] | None = None
    takes_profile: bool = False
    lists_layers: bool = False
    emulated: bool = False
    held_as: str = ""
    vllm: str | None = ""
    instead: str = ""

    @property
    def by_layer(self) -> bool:
        """Whether layers are loaded in floats, of which their processing makes the codes."""
        return self.online is not None or self.codes == "float4_e2m1fn"


_E4M3: Final = "float8_e4m3fn"

SCHEMES: Final[Mapping[str, Scheme]] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme("bf16"),
            Scheme(
                "fp8_vllm",
                ("fp8", "fp8_fast", "fp8_vllm_fast"),
                codes=_E4M3,
                scales="tensor",
                online="fp8_per_tensor",
            ),
            Scheme(
                "fp8_tensor",
                codes=_E4M3,
                scales="tensor",
                checkpoint=("float", 8, "channel"),
                lists_layers=True,
                vllm=">=0.24",
                instead="vLLM's kernels for channels of fp8 have been looked at since 0.24; "
                "fp8_vllm stores one scale a layer",
            ),
            Scheme(
                "fp8_channel",
                codes=_E4M3,
                scales="channel",
                online="fp8_per_channel",
                checkpoint=("float", 8, "channel"),
                lists_layers=True,
                vllm=">=0.24",
                instead="vLLM quantizes by channel while it loads since 0.24; fp8_vllm stores one "
                "scale a layer",
            ),
            Scheme("fp8_block", codes=_E4M3, scales="block", online="fp8_per_block"),
            Scheme("mxfp8", codes=_E4M3, scales="group", group=32, online="mxfp8", emulated=True),
            Scheme(
                "int8",
                ("int8_fast", "int8_wo_prune"),
                codes="int8",
                scales="channel",
                checkpoint=("int", 8, "channel"),
                takes_profile=True,
            ),
            Scheme(
                "int8_prune",
                codes="int8",
                scales="channel",
                checkpoint=("int", 8, "channel"),
                takes_profile=True,
                held_as="int8",
            ),
            Scheme(
                "mxfp4",
                codes="float4_e2m1fn",
                scales="group",
                bits=4,
                group=32,
                vllm=None,
                instead="no reload of it could be compared with a start (on a CPU, vLLM's "
                "emulation of it wants amd-quark and Triton); nvfp4 has codes of four bits, too, "
                "in smaller groups",
            ),
            Scheme("nvfp4", codes="float4_e2m1fn", scales="group", bits=4, group=16, emulated=True),
            Scheme("int4", codes="int4", scales="group", bits=4, group=128, takes_profile=True),
            Scheme("int4_g32", codes="int4", scales="group", bits=4, group=32, takes_profile=True),
            Scheme(
                "int4_channel", codes="int4", scales="channel", bits=4, group=-1, takes_profile=True
            ),
        )
    }
)
"""By canonical name."""

NAMES: Final[Mapping[str, Scheme]] = MappingProxyType(
    {name: scheme for scheme in SCHEMES.values() for name in (scheme.name, *scheme.aliases)}
)
"""By every name that FLASHRL_CONFIG takes."""

INT4: Final[Mapping[str, int]] = MappingProxyType(
    {
        name: scheme.group
        for name, scheme in SCHEMES.items()
        if scheme.codes == "int4" and scheme.group is not None
    }
)
"""How many columns share a scale in the schemes of int4, -1 for all of a row."""

ONLINE: Final[Mapping[str, str]] = MappingProxyType(
    {name: scheme.online for name, scheme in SCHEMES.items() if scheme.online is not None}
)
"""vLLM's names of its own online quantization, by scheme."""


def _by_channel(kind: Literal["int", "float"]) -> Mapping[str, Any]:
    """A quantization config of compressed-tensors: a scale a channel, and one a token."""
    numbers: dict[str, Any] = {"num_bits": 8, "type": kind, "symmetric": True}
    return _compressed(
        f"{kind}-quantized",
        weights={**numbers, "strategy": "channel", "dynamic": False},
        input_activations={**numbers, "strategy": "token", "dynamic": True},
    )


def _by_group(scheme: Scheme) -> Mapping[str, Any]:
    """The same of weights alone: int4, a scale a group of columns, or a channel."""
    of_group = {} if scheme.group == -1 else {"group_size": scheme.group}
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False}
    return _compressed("pack-quantized", weights={**weights, "strategy": scheme.scales, **of_group})


def _nvfp4(group: int | None) -> Mapping[str, Any]:
    """The same of NVFP4 without codes of activations: a scale a group, a divisor a layer."""
    numbers = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    weights = {**numbers, "strategy": "tensor_group", "group_size": group}
    return _compressed("nvfp4-pack-quantized", weights=weights)


def _compressed(form: str, **numbers: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], **numbers}},
    }


W8A8: Final[Mapping[str, Any]] = _by_channel("int")
"""The quantization config of a W8A8 checkpoint."""

COMPRESSED: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "int8": W8A8,
        "fp8_tensor": _by_channel("float"),
        "nvfp4": _nvfp4(SCHEMES["nvfp4"].group),
        **{name: _by_group(SCHEMES[name]) for name in INT4},
    }
)
"""What a bf16 checkpoint is served as in schemes of which vLLM has no online quantization."""

MIXABLE: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {**COMPRESSED, "fp8_channel": _by_channel("float")}
)
"""The schemes that vLLM serves beside one another in one engine, as what they are served then."""


def numbers_of(scheme: str) -> Mapping[str, Any]:
    """How compressed-tensors describes the layers of a scheme that is `MIXABLE`."""
    held = MIXABLE[scheme]
    return {**held["config_groups"]["group_0"], "format": held["format"]}


def has_numbers(group: Mapping[str, Any] | None, scheme: str) -> bool:
    """Whether a group of compressed-tensors, as vLLM has read it, is that of a scheme."""
    held, asked = (group or {}).get("weights"), numbers_of(scheme)["weights"]
    return all(getattr(held, key, None) == number for key, number in asked.items())


def mixed(scheme: str, layers: Mapping[str, Iterable[str]]) -> Mapping[str, Any]:
    """The quantization config of an engine of several schemes.

    Args:
        scheme: of all layers but those that are named.
        layers: by each other scheme, its layers as compressed-tensors names them.

    """
    others = ({**numbers_of(other), "targets": list(named)} for other, named in layers.items())
    groups = (numbers_of(scheme), *others)
    return {
        **MIXABLE[scheme],
        "format": "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
