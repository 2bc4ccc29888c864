"""One serving model, as a session sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.torch_utils import set_default_torch_dtype

from flashquant.calibration import Calibration
from flashquant.checks import Checks
from flashquant.errors import UnsupportedEngine
from flashquant.patches.blueprint import LayerBlueprint, ModelBlueprint
from flashquant.patches.direct import Direct
from flashquant.patches.direct_layer import DirectLayer
from flashquant.patches.engine_args import ADDITIONAL_CONFIG_KEY, ONLINE, PROFILE_KEY
from flashquant.patches.late_layer import LateLayer
from flashquant.patches.layers import Learned, LiveLayer
from flashquant.profiles import load_profile
from flashquant.schemes import fp8_channel, fp8_tensor
from flashquant.weights import NamedTensors

# vLLM warns of a bf16 tensor on its way into an int8 parameter; while we watch
# its loader, on meta tensors, that is just what we want to see.
_LOADERS_LOG = logging.getLogger("vllm.model_executor")


class LiveEngine:
    """The blueprint of a model and, once it has been processed, its live layers."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, *, quantized: bool) -> None:
        """Args:
        model: as vLLM has just created it.
        vllm_config: as flashquant has configured it.
        quantized: whether vLLM quantizes this model; a speculative draft stays in bf16.

        """
        decided = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
        self.scheme = str(decided["scheme"]) if quantized else "bf16"
        self.checks = Checks(**decided["checks"])
        self.shares_scales = (
            self.scheme in ONLINE and vllm_config.parallel_config.tensor_parallel_size > 1
        )
        self.device = torch.device(vllm_config.device_config.device)
        profile = decided.get(PROFILE_KEY) if quantized else None
        self.calibration = (
            Calibration(
                load_profile(profile["reference"]),
                scales=profile["scales"],
                device=self.device,
                starts_on_floats=profile["starts_on_floats"],
                warn_above=profile["warn_above"],
                prunes=profile["prunes"],
            )
            if profile
            else None
        )
        self.layers: tuple[LiveLayer | DirectLayer | LateLayer, ...] = ()
        self.stored: dict[str, Tensor] = {}
        self.model = model
        self._vllm_config = vllm_config
        self._blueprint = ModelBlueprint(model)
        self.stored |= self._blueprint.targets
        self._load: Callable[[NamedTensors], object] = cast(Any, model).load_weights
        self._loaded: dict[str, str] = {}

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """Every checkpoint-format parameter, on meta."""
        return self._blueprint.targets

    @property
    def tied(self) -> Mapping[str, str]:
        """The other names of parameters that the model holds once, and under which it does."""
        return self._blueprint.tied

    @property
    def shared(self) -> Iterator[Tensor]:
        """The live parameters that several modules hold, as a tied head and the embeddings do."""
        return self._blueprint.shared()

    def load(self, weights: NamedTensors) -> object:
        """The model's own `load_weights`."""
        return self._load(weights)

    @contextmanager
    def laid_out(self, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Put checkpoint-format parameters under the model while its loader is watched."""
        with _loaders_are_quiet(), self._blueprint.laid_out(values), torch.no_grad():
            yield

    @contextmanager
    def apart(self) -> Iterator[Mapping[str, Tensor]]:
        """The same on meta, each name of a tied parameter with one of its own; all, by name."""
        with _loaders_are_quiet(), self._blueprint.apart() as targets, torch.no_grad():
            yield targets

    def note_loaded(self) -> None:
        """All weights are in, none is processed: take their digests."""
        for blueprint in self._blueprint.layers:
            _refuse_late_parameters(blueprint)
            self._loaded |= blueprint.digests()

    def note_processed(self) -> None:
        """The model serves: find out what processing made of each layer."""
        learned: Learned = {}
        self._blueprint.tie()
        self.stored = dict(self._blueprint.targets)
        # vLLM's online schemes are ours to the bit. By tensor, one has to see all of it; the
        # scale of a shard that another worker has the rest of, vLLM has to find.
        late = self.scheme == "fp8_vllm" and not self.shares_scales
        ours = fp8_tensor if late else fp8_channel if self.scheme == "fp8_channel" else None
        direct = Direct(ours, self._context, self.device, by_row=not late)
        stale = self._blueprint.stale()
        lent = {target for _, target, _ in stale}
        layers: list[LiveLayer | DirectLayer | LateLayer] = []
        for group in self._blueprint.groups():
            alone = len(group) == 1 and lent.isdisjoint(group[0].targets.values())
            homes = direct.homes(group[0]) if alone else None
            if homes is not None and late:
                layers.append(LateLayer(group[0], homes, fp8_tensor))
                continue
            if homes is not None:
                layers.append(DirectLayer(group[0], homes))
                self.stored |= {target: home.to("meta") for target, home in homes.items()}
                continue
            layer = LiveLayer(group, self._loaded, self._context, self.device, learned, stale)
            layer.rehearse()
            layers.append(layer)
        self.layers = tuple(layers)
        self._blueprint.release_originals()

    @contextmanager
    def _context(self) -> Iterator[None]:
        """What vLLM has set while it processes weights: config, default dtype and device."""
        dtype: torch.dtype = self._vllm_config.model_config.dtype
        with (
            set_current_vllm_config(self._vllm_config),
            set_default_torch_dtype(dtype),
            # A default device is asked at every call of torch; the host is one already.
            nullcontext() if self.device.type == "cpu" else self.device,
            torch.no_grad(),
        ):
            yield


@contextmanager
def _loaders_are_quiet() -> Iterator[None]:
    level = _LOADERS_LOG.level
    _LOADERS_LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOADERS_LOG.setLevel(level)


def _refuse_late_parameters(blueprint: LayerBlueprint) -> None:
    """A parameter that was not there when the model was created has no place in the plan."""
    for name, meta in blueprint.parameters.items():
        if meta is None and blueprint.module._parameters.get(name) is not None:
            raise UnsupportedEngine(
                f"{blueprint.name}.{name} ({type(blueprint.module).__name__}) was made while the "
                "checkpoint was loaded, so flashquant cannot tell where a push of it would land. "
                "Unset FLASHRL_CONFIG to serve this model unpatched."
            )


def asks_for_session(vllm_config: VllmConfig) -> bool:
    """Whether this engine was configured by flashquant."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and ADDITIONAL_CONFIG_KEY in additional


def scheme_of(vllm_config: VllmConfig) -> str:
    """What flashquant was asked to serve; bf16 where it was not asked."""
    if not asks_for_session(vllm_config):
        return "bf16"
    return str(vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]["scheme"])
