"""How vLLM is asked to quantize as a scheme says; what else is asked of it is honoured or refused.

a quantized checkpoint       is served as it is: it says itself which layers it leaves in bf16
int8, fp8_tensor             a bf16 checkpoint gets the quantization config of its twin of codes
the other 8-bit schemes      are vLLM's own, made while a bf16 checkpoint loads
several (`overrides`)        a group of that config for each; fp8_channel is no online scheme there
bf16                         quantizes nothing
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vllm.config.quantization import resolve_quantization_config

from flashquant.config.resolve import check_same_scheme
from flashquant.config.schema import RolloutConfig
from flashquant.config.schemes import COMPRESSED, SCHEMES, Scheme, mixed
from flashquant.errors import ConfigError
from flashquant.update import some_of

logger = logging.getLogger(__name__)


def choose_quantization(
    args: Any,
    config: RolloutConfig,
    own: Mapping[str, Any] | None,
    others: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> None:
    """Let vLLM quantize as the scheme asks, or check that the checkpoint is quantized so already.

    Args:
        args: vLLM's `EngineArgs`, changed in place.
        config: which scheme is asked for.
        own: the `quantization_config` of the checkpoint, if it has one.
        others: by each other scheme, the layers that are stored in it.

    Raises:
        ConfigError: an argument asks for what the scheme is not.

    """
    asked = SCHEMES[config.scheme]
    scheme = held_as(asked)
    if own is not None:
        check_same_scheme(own, scheme, args.model)
        if config.quantize_towers:
            raise ConfigError(
                f"quantize_towers is for bf16 checkpoints, and {args.model} is quantized already: "
                "it says itself which layers are. Leave quantize_towers out."
            )
        if others:
            raise ConfigError(
                f"overrides are for bf16 checkpoints, and {args.model} is quantized already: it "
                "says itself what its layers are. Leave overrides out."
            )
        _refuse_another_ignore(args, own)
    elif scheme in COMPRESSED or others:
        _serve_as_compressed(args, scheme, mixed(scheme, others) if others else COMPRESSED[scheme])
    elif asked.online is not None:
        _refuse_overrides(args, config.scheme)
        _set_quantization(args, asked.online, asked.name)
        _refuse_other_codes(args, asked.online, config.scheme)
        # vLLM makes settings of the name when the arguments are created, which is over; where
        # they are missing, only 0.30 and later would make them once more. Without any, it leaves
        # a name that is one of checkpoints, too (mxfp8), for later.
        args.quantization_config = resolve_quantization_config(
            args.quantization, args.quantization_config or {}
        )
    else:
        _refuse_overrides(args, config.scheme)
        _set_quantization(args, None, asked.name)


def held_as(scheme: Scheme) -> str:
    """The scheme as which the engine's memory is written."""
    return scheme.held_as or scheme.name


def _set_quantization(args: Any, quantization: str | None, scheme: str) -> None:
    same = {quantization, "fp8"} if scheme == "fp8_vllm" else {quantization}
    if args.quantization is not None and args.quantization not in same:
        raise ConfigError(
            f"FLASHRL_CONFIG asks for {scheme} (quantization={quantization!r}), but the engine was "
            f"given quantization={args.quantization!r}. Drop one of the two."
        )
    args.quantization = quantization


def _refuse_overrides(args: Any, scheme: str) -> None:
    """A quantization config in hf_overrides would make vLLM take the checkpoint for quantized."""
    if _overriding(args):
        raise ConfigError(
            f"FLASHRL_CONFIG asks for {scheme} of a bf16 checkpoint, and hf_overrides says that it "
            "is quantized already. Leave its quantization_config out; to keep layers in bf16, give "
            "the engine quantization_config={'ignore': [...]}."
        )


def _refuse_other_codes(args: Any, online: str, scheme: str) -> None:
    """vLLM can quantize layer by layer as it is told; these are other codes than a push becomes."""
    asked = resolve_quantization_config(online, args.quantization_config or {})
    own = resolve_quantization_config(online, {})
    odd = [kind for kind in ("linear", "moe") if _weight(asked, kind) != _weight(own, kind)]
    odd += ["targets"] if getattr(asked, "targets", None) else []
    if odd:
        raise ConfigError(
            f"FLASHRL_CONFIG asks for {scheme}, and the engine was given a quantization_config "
            f"whose {some_of(odd)} ask for something else. Leave them out; `ignore` names layers "
            "that stay in bf16."
        )


def _weight(settings: Any, kind: str) -> Any:
    return getattr(getattr(settings, kind, None), "weight", None)


def _refuse_another_ignore(args: Any, own: Mapping[str, Any]) -> None:
    """What a checkpoint holds as codes has no bf16 to stay in, and the rest is in bf16 anyway."""
    before: Iterable[str] = own.get("ignore") or ()
    over = _overriding(args).get("ignore", before) or ()
    asked = "a quantization_config" if _settings(args) else ""
    if not asked and set(over) == set(before):
        return
    raise ConfigError(
        f"the engine was given {asked or 'a quantization_config in hf_overrides'}, but "
        f"{args.model} is quantized already, and says itself which of its layers are not "
        f"({some_of(before) or 'none'}). Leave it out; or serve the bf16 checkpoint, of which "
        "`ignore` keeps any layer in bf16."
    )


def _overriding(args: Any) -> Mapping[str, Any]:
    """The quantization config that hf_overrides holds, if it can be seen."""
    overrides = args.hf_overrides if isinstance(args.hf_overrides, Mapping) else {}
    return overrides.get("quantization_config") or {}


def _settings(args: Any) -> dict[str, Any]:
    """What vLLM's own argument says of a quantization, by setting."""
    theirs = vars(args).get("quantization_config") or {}
    said = theirs if isinstance(theirs, Mapping) else vars(theirs)
    return {name: value for name, value in said.items() if value}


def _serve_as_compressed(args: Any, scheme: str, twin: Mapping[str, Any]) -> None:
    """Give a bf16 checkpoint the quantization config of its compressed-tensors twin.

    vLLM has no online int8 for dense layers, and none by tensor with scales of channels. A bf16
    checkpoint is therefore served as if it were one that holds codes, and quantized on its way in.
    """
    if callable(args.hf_overrides):
        raise ConfigError(
            f"{scheme} on a bf16 checkpoint adds a quantization_config to hf_overrides, which was "
            "given as a function. Pass hf_overrides as a dict, or serve a checkpoint that is "
            "quantized already."
        )
    overrides = dict(args.hf_overrides or {})
    theirs = overrides.get("quantization_config") or {}
    if theirs.keys() - {"ignore"}:
        check_same_scheme({**twin, **theirs}, scheme, "the model of hf_overrides")
    asked = [*(theirs.get("ignore") or ()), *_ignored_by_arguments(args, scheme)]
    if ignored := [pattern for pattern in asked if pattern not in twin["ignore"]]:
        logger.info("layers that match %s are not quantized", some_of(ignored))
    ours = {**twin, **theirs, "ignore": [*twin["ignore"], *ignored]}
    args.hf_overrides = {**overrides, "quantization_config": ours}
    _set_quantization(args, "compressed-tensors", scheme)


def _ignored_by_arguments(args: Any, scheme: str) -> list[str]:
    """What vLLM's own argument leaves in bf16; it is taken over from there.

    Raises:
        ConfigError: it asks for something else, of which the scheme knows nothing.

    """
    settings = _settings(args)
    if odd := sorted(settings.keys() - {"ignore"}):
        raise ConfigError(
            f"FLASHRL_CONFIG asks for {scheme}, and the engine was given a quantization_config "
            f"with {', '.join(odd)}, which vLLM has for its online schemes only. Leave it out; "
            "`ignore` names layers that stay in bf16."
        )
    args.quantization_config = None
    return [_as_regex(pattern) for pattern in settings.get("ignore", ())]


def _as_regex(pattern: str) -> str:
    """vLLM's online schemes know wildcards, compressed-tensors does not."""
    wild = not pattern.startswith("re:") and any(sign in pattern for sign in "*?[")
    return f"re:{fnmatch.translate(pattern)}" if wild else pattern
