"""One serving model, as a session sees it."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.offloader import PrefetchOffloader, get_offloader
from vllm.utils.torch_utils import set_default_torch_dtype

from flashquant.config.checks import Checks
from flashquant.config.schemes import SCHEMES
from flashquant.errors import UnsupportedEngine
from flashquant.patches.cache_scales import CacheScales
from flashquant.patches.decided import (
    ADDITIONAL_CONFIG_KEY,
    PROFILE_KEY,
    kept_by,
    overrides_of,
)
from flashquant.patches.layers import (
    LayerBlueprint,
    LayerChoice,
    LiveLayer,
    MadeOnce,
    ModelBlueprint,
    Quantizer,
    all_made_once,
    attributes_kept,
    buffer_layers,
    is_deferred_attention_layer,
    is_processor,
    plain_tensors,
    while_loaded,
)
from flashquant.plan import NamedTensors, TensorPlan, Write
from flashquant.profiles import Calibration, load_profile
from flashquant.schemes import DEFINITIONS, WHOLE, resolved, warm
from flashquant.update import UndoLog, WhyInBf16, digests

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
        self.overrides: Mapping[str, str] = overrides_of(vllm_config) if quantized else {}
        self.checks = Checks(**decided["checks"])
        self.is_alone = vllm_config.parallel_config.world_size * sharing_replicas(vllm_config) == 1
        by_layer = any(SCHEMES[scheme].by_layer for scheme in self._schemes)
        self.shares_scales = by_layer and _cuts_weights(vllm_config)
        # vLLM says `cuda`, which is never equal to the device of a tensor.
        self.device = resolved(torch.device(vllm_config.device_config.device))
        profile = decided.get(PROFILE_KEY) if quantized else None
        self.calibration = (
            Calibration(
                load_profile(profile["reference"]),
                scales=profile["scales"],
                device=self.device,
                starts_on_floats=profile["starts_on_floats"],
                warn_above=profile["warn_above"],
                prunes=profile["prunes"],
                kept={f"{module}.weight" for module in kept_by(vllm_config)},
            )
            if profile
            else None
        )
        _refuse_own_processing(model)
        _refuse_weights_elsewhere()
        _refuse_made_score(vllm_config)
        self.layers: tuple[LiveLayer, ...] = ()
        self.stored: dict[str, Tensor] = {}
        self.in_bf16: Mapping[str, WhyInBf16] = {}
        eager = self.device.type == "cpu" or vllm_config.model_config.enforce_eager
        self.cache_scales = CacheScales(model, captured=not eager)
        self.model = model
        self._vllm_config = vllm_config
        self._blueprint = ModelBlueprint(model)
        self.stored |= self._blueprint.targets
        self._load: Callable[[NamedTensors], object] = cast(Any, model).load_weights
        self._loaded: dict[str, str] = {}
        self._plain = plain_tensors(model)
        self._made_once: tuple[MadeOnce, ...] = ()
        self.made_while_loaded: tuple[str, ...] = ()

    @property
    def blueprint(self) -> ModelBlueprint:
        """The layers as they were when the model was created."""
        return self._blueprint

    @property
    def targets(self) -> Mapping[str, Tensor]:
        """Every checkpoint-format parameter, and every buffer that a checkpoint may bring, on
        meta."""
        return self._blueprint.targets

    @property
    def optional(self) -> frozenset[str]:
        """The buffers among them: a checkpoint brings some, or none."""
        return frozenset(t for one in self._blueprint.buffers for t in one.targets.values())

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

    def place(self, plan: TensorPlan, values: Tensor) -> None:
        """Write a tensor into the parameters that are being loaded, where its plan says."""
        for step in plan.steps:
            if isinstance(step, Write):
                parameter = self.model.get_parameter(step.target)
                step.target_view.into(parameter.data).copy_(step.source_view.into(values))

    @contextmanager
    def laid_out(self, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Put checkpoint-format parameters under the model while its loader is watched."""
        with self._watched(), self._blueprint.laid_out(values), torch.no_grad():
            yield

    @contextmanager
    def apart(self) -> Iterator[Mapping[str, Tensor]]:
        """Like `laid_out`, on meta, with a parameter for each name of a tied one; all, by name."""
        with self._watched(), self._blueprint.apart() as targets, torch.no_grad():
            yield targets

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Run the loader, quietly, and on nothing that is live."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_loaders_are_quiet())
            if self.made_while_loaded:
                stack.enter_context(attributes_kept(self.model))
            yield

    def note_loaded(self) -> None:
        """All weights are in, none is processed: take their digests."""
        for blueprint in self._blueprint.layers:
            _refuse_late_parameters(blueprint)
        self.made_while_loaded = tuple(while_loaded(self.model, self._plain))
        self._plain.clear()
        loaded = (blueprint.loaded() for blueprint in self._blueprint.layers)
        self._loaded |= digests(itertools.chain.from_iterable(loaded))

    def note_processed(self) -> None:
        """The model serves: find out what processing made of each layer."""
        self._blueprint.tie()
        self.stored = dict(self._blueprint.targets)
        choice = LayerChoice(
            self._context,
            self.device,
            self._loaded,
            self._online_quantizer(),
            shares_scales=self.shares_scales,
            aliases=self._blueprint.stale_aliases(),
            compared=frozenset(self.tied.values()),
        )
        self.layers = (
            *(choice.layer(group) for group in self._blueprint.groups()),
            *buffer_layers(self._blueprint.buffers),
        )
        for layer in self.layers:
            self.stored |= {target: home.to("meta") for target, home in layer.homes.items()}
        self._blueprint.release_originals()
        self._made_once = tuple(all_made_once(self.model))
        warm(tuple(self._quantizers()), self._vllm_config.model_config.dtype, self.device)

    def make_anew(self, undo: UndoLog) -> None:
        """Bring up to date what modules have made of their weights by themselves."""
        for one in self._made_once:
            one.make_anew(undo)

    @property
    def _schemes(self) -> tuple[str, ...]:
        """All that its layers are stored in."""
        return tuple(dict.fromkeys([self.scheme, *self.overrides.values()]))

    def _online_quantizer(self) -> Quantizer | None:
        """What makes the same codes of a layer's floats as vLLM, where flashquant can."""
        # The scale of a tensor that other workers hold a shard of, vLLM has to find.
        per_tensor = self.scheme == "fp8_vllm" and not self.shares_scales
        if per_tensor or self.scheme == "fp8_channel":
            return Quantizer(WHOLE[self.scheme], per_tensor=per_tensor)
        return None

    def _quantizers(self) -> Iterator[Callable[[Tensor], object]]:
        """What pushes are quantized with, where it is not vLLM that does it."""
        if self.calibration is not None:
            yield from self.calibration.quantizers()
            return
        yield from (DEFINITIONS[scheme] for scheme in self._schemes if scheme in DEFINITIONS)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """What vLLM has set while it processes weights: config and default dtype.

        No default device: that is set only while the model is created. With one, a twin would hold
        on a GPU what the live layer has on the host.
        """
        dtype: torch.dtype = self._vllm_config.model_config.dtype
        with (
            set_current_vllm_config(self._vllm_config),
            set_default_torch_dtype(dtype),
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


def _cuts_weights(vllm_config: VllmConfig) -> bool:
    """Whether workers hold shards of a tensor; experts are cut up across replicas, too."""
    tensor_parallel: int = vllm_config.parallel_config.tensor_parallel_size
    return tensor_parallel * sharing_replicas(vllm_config) > 1


def sharing_replicas(vllm_config: VllmConfig) -> int:
    """How many data-parallel replicas compute each layer of experts together; 1 without experts."""
    if not vllm_config.model_config.get_num_experts():
        return 1
    return int(vllm_config.parallel_config.data_parallel_size)


def _refuse_weights_elsewhere() -> None:
    """Buffers that layers share, into which each step copies the weights from the host."""
    if isinstance(get_offloader(), PrefetchOffloader):
        raise UnsupportedEngine(
            "vLLM keeps weights on the host, where a push would not reach them, and copies those "
            "of each layer into a shared buffer as it is computed (offload_group_size). Serve the "
            "model without that, or unset FLASHRL_CONFIG to serve it unpatched."
        )


def _refuse_made_score(vllm_config: VllmConfig) -> None:
    """The rows of a head that vLLM makes a classifier's score of, once, while it loads them."""
    model_config = vllm_config.model_config
    own = model_config.hf_config
    configs = (own, own.get_text_config())
    if model_config.runner_type == "pooling" and any(
        getattr(config, key, None) is not None
        for config in configs
        for key in ("classifier_from_token", "method")
    ):
        raise UnsupportedEngine(
            "vLLM makes the score of this classifier of rows of lm_head while it loads "
            "(classifier_from_token), which would stay as it is when new weights are pushed. Serve "
            "a checkpoint that holds score.weight, or unset FLASHRL_CONFIG to serve it unpatched."
        )


def _refuse_own_processing(model: nn.Module) -> None:
    """What a module makes of its weights itself, after vLLM has loaded them, would go stale."""
    for name, module in model.named_modules():
        own = callable(getattr(module, "process_weights_after_loading", None))
        if own and not is_processor(module) and not is_deferred_attention_layer(module):
            raise UnsupportedEngine(
                f"{name or 'the model'} ({type(module).__name__}) makes something of its weights "
                "after they were loaded (process_weights_after_loading), which flashquant cannot "
                "make anew when new ones are pushed: it would go stale. Unset FLASHRL_CONFIG to "
                "serve this model unpatched."
            )
