"""The write plan of a checkpoint before there is an engine: where each tensor lands, and how.

The model is created by vLLM on the meta device, from the configuration that an engine would have,
so no weight is loaded or held. Its own loader is watched there, as in a serving engine. Whether a
layer is written in place or processed shows only when it has been processed: one layer of each
kind is given memory (random values) and processed by vLLM for that.

Limits
1. One worker: no tensor or expert parallelism.
2. A model that computes with values while it is created cannot be created on meta; that is said.
3. vLLM keeps parts of a model for the next one of the process (rotary embeddings): a process that
   has inspected serves no engine afterwards. `flashquant inspect` is one of its own.
4. Windows that a layer holds of another's parameter (Mamba's convolution) are not seen on meta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import base_loader
from vllm.utils.torch_utils import set_default_torch_dtype

from flashquant.errors import ConfigError, FlashquantError, ReloadError, UnsupportedEngine
from flashquant.patches import is_patched, patch, unpatch
from flashquant.patches.diagnostics.bench import flashrl_config, room_for_others
from flashquant.patches.diagnostics.inspected import (
    Destination,
    Form,
    How,
    InspectedLayer,
    InspectedTensor,
    Inspection,
    What,
)
from flashquant.patches.diagnostics.only_worker import only_worker
from flashquant.patches.engine import LiveEngine
from flashquant.patches.layers import (
    InPlaceLayer,
    LayerBlueprint,
    PerTensorLayer,
    is_handle,
    is_processor,
    leaves,
    packed_once,
)
from flashquant.patches.seams.blame import naming_the_layer
from flashquant.patches.seams.loading import engine_of, note_in_bf16
from flashquant.plan import Fill, Planner, Replay, Step, Write, named_forms
from flashquant.schemes import holds_codes
from flashquant.update import Layer, scheme_of

_SHOWN = 400  # characters of what vLLM says


def inspect_model(path: Path, scheme: str) -> Inspection:
    """Make the write plan of a checkpoint, without loading its weights.

    Args:
        path: a folder with config.json and safetensors, of which only headers are read.
        scheme: what FLASHRL_CONFIG would say: a scheme, or a file.

    Raises:
        ConfigError: what FLASHRL_CONFIG may not say, or keeps of the model; or the folder is no
            checkpoint.
        ReloadError: the folder holds no safetensors.
        UnsupportedEngine: the model cannot be served in this scheme on this machine, or cannot be
            created without its weights.

    """
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} is no folder of a checkpoint: it has no config.json")
    forms = dict(named_forms(path))
    with ExitStack() as stack:
        if not is_patched():
            stack.callback(unpatch)
            patch()
        config = _configured(path, scheme)
        stack.enter_context(only_worker(config))
        model = _created(config)
        engine = engine_of(model)
        planner, refused = _planned(engine, forms)
        note_in_bf16(model, {n: planner.plan[n].targets for n in forms if n not in refused})
        groups = engine.blueprint.groups()
        chosen = {_kind_of(group): group for group in reversed(groups)}  # the first of each kind
        with _as_while_loading(config):
            _give_memory(chosen.values(), engine.device)
            _process(engine, list(chosen.values()))
        live = {layer.name: layer for layer in engine.layers}
        schemes = {
            target: scheme_of(name, engine)
            for name in forms
            if name not in refused
            for target in planner.plan[name].targets
        }
        return Inspection(
            model=str(path),
            architecture=type(model).__name__,
            scheme=engine.scheme,
            device=str(engine.device),
            tensors=tuple(_tensor(name, forms[name], planner, refused) for name in forms),
            layers=tuple(
                _layer(group, chosen[_kind_of(group)], live, planner.replayed, schemes)
                for group in groups
            ),
            unfilled=_unfilled(planner, engine.targets, engine.optional),
            in_bf16=engine.in_bf16,
            looked_at=tuple(group[0].name for group in reversed(chosen.values())),
        )


def _configured(path: Path, scheme: str) -> VllmConfig:
    """What an engine on this checkpoint would be configured with."""
    with flashrl_config(scheme):
        arguments = EngineArgs(
            model=str(path),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=128,
            kv_cache_memory_bytes=16 << 20,
            **room_for_others(),
        )
        try:
            return arguments.create_engine_config()
        except FlashquantError:
            raise
        except (OSError, ValueError) as refusal:  # pydantic's is a ValueError
            said = " ".join(str(refusal).split())
            raise ConfigError(
                f"vLLM takes no engine on {path} ({said[:_SHOWN]}). Look at its config.json, and "
                "whether this vLLM knows the architecture."
            ) from refusal


def _created(config: VllmConfig) -> nn.Module:
    """The model as vLLM creates it, without memory; its session notes it on the way."""
    try:
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            model: nn.Module = base_loader.initialize_model(
                vllm_config=config, model_config=config.model_config
            )
            return model
    except FlashquantError:
        raise
    except Exception as failure:  # whatever a model's own class, or torch, says of values on meta
        (architecture, *_) = config.model_config.architectures
        raise UnsupportedEngine(
            f"{architecture} cannot be created without its weights ({type(failure).__name__}: "
            f"{failure}). Start an engine on it: flashquant.status(llm) says how each layer is "
            "written, if vLLM serves it at all."
        ) from failure


def _planned(engine: LiveEngine, forms: Mapping[str, Tensor]) -> tuple[Planner, dict[str, str]]:
    """The plan of every name that the loader takes, and what it says of the others."""
    planner, refused = Planner(engine), dict[str, str]()
    for name, form in forms.items():
        planner.note(name, form)
    planner.learn_together(forms.items())
    for name, form in forms.items():
        try:
            planner.of(name, form)
        except ReloadError as refusal:
            refused[name] = str(refusal)
    return planner, refused


@contextmanager
def _as_while_loading(config: VllmConfig) -> Iterator[None]:
    """What vLLM has set while it processes weights."""
    dtype: torch.dtype = config.model_config.dtype
    with set_current_vllm_config(config), set_default_torch_dtype(dtype), torch.no_grad():
        yield


def _kind_of(group: Sequence[LayerBlueprint]) -> tuple[object, ...]:
    """What layers have in common that vLLM processes alike."""
    return tuple(
        (type(one.module), *map(type, _processors(one.module)), *_forms(one).values())
        for one in group
    )


def _processors(module: nn.Module) -> Iterator[object]:
    """The method, the scheme and the kernel of a layer, outermost first."""
    waiting, seen = [module.__dict__], set[int]()
    while waiting:
        for value in list(waiting.pop().values()):
            if is_processor(value) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(vars(value))
                yield value


def _give_memory(groups: Iterable[Sequence[LayerBlueprint]], device: torch.device) -> None:
    """Random values for the parameters and buffers of some layers; what is shared, stays so."""
    made: dict[int, Any] = {}
    blueprints = [blueprint for group in groups for blueprint in group]
    for module in (blueprint.module for blueprint in blueprints):
        owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in owned:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = made.setdefault(id(tensor), _random_like(tensor, device))
    for blueprint in blueprints:
        if blueprint.sources:  # an attention was handed parameters of others when it was created
            vars(blueprint.module).update(vars(blueprint.build({}, made)))


def _random_like(meta: Tensor, device: torch.device) -> Any:
    """Values by which processing shows what it changes, in a tensor with the loader of `meta`."""
    made = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
    if meta.dtype.is_floating_point and meta.dtype.itemsize > 1:
        made.uniform_(0.5, 2.0)  # a scale is one of them
    elif meta.dtype.itemsize == 1 and meta.dtype != torch.bool:
        made.view(torch.uint8).random_(0, 120)  # of float8, none of which is NaN
    else:
        made.zero_()
    made.__class__, made.__dict__ = meta.__class__, dict(meta.__dict__)
    return made


def _process(engine: LiveEngine, groups: Sequence[Sequence[LayerBlueprint]]) -> None:
    """Process some layers as vLLM does, and let the engine see what became of them."""
    engine.blueprint.keep([blueprint for group in groups for blueprint in group])
    with naming_the_layer(engine.scheme, engine.model):
        engine.note_loaded()
        with packed_once(engine.shared):
            for group in groups:
                for one in sorted(group, key=lambda one: bool(one.sources)):  # attentions last
                    module: Any = one.module
                    if one.sources:
                        module.process_weights_after_loading(torch.get_default_dtype())
                    elif is_processor(getattr(module, "quant_method", None)):
                        module.quant_method.process_weights_after_loading(module)
        engine.note_processed()


def _tensor(
    name: str, form: Tensor, planner: Planner, refused: Mapping[str, str]
) -> InspectedTensor:
    entry = None if name in refused else planner.plan[name]
    steps = () if entry is None else tuple(map(_destination, entry.steps))
    return InspectedTensor(name, _form_of(form), steps, refused.get(name, ""))


def _destination(step: Step) -> Destination:
    view = step.target_view
    what, detail = _what(step)
    return Destination(step.target, view.shape, view.stride, view.offset, what, detail)


def _what(step: Step) -> tuple[What, str]:
    match step:
        case Write():
            return "copy", ""
        case Fill(value=value):
            return "fill", f"{value:g}"
        case Replay(reason=reason):
            return "loader", reason


def _layer(
    group: Sequence[LayerBlueprint],
    like: Sequence[LayerBlueprint],
    live: Mapping[str, Layer],
    replayed: AbstractSet[str],
    schemes: Mapping[str, str],
) -> InspectedLayer:
    """One layer, known by the one of its kind that was processed."""
    parameters = {
        target: form
        for blueprint in group
        for target, form in zip(blueprint.targets.values(), _forms(blueprint).values(), strict=True)
    }
    reads = {
        f"{one.name}.{path}".removeprefix(f"{like[0].name}."): leaf
        for one in like
        for path, leaf in leaves(one.module).items()
    }
    forms = [meta for one in like for meta in one.parameters.values() if meta is not None]
    held = [*forms, *(leaf for leaf in reads.values() if isinstance(leaf, Tensor))]
    quantized = any(holds_codes(tensor.dtype) for tensor in held)
    return InspectedLayer(
        name=group[0].name,
        module=type(group[0].module).__name__,
        processed_by=tuple(type(p).__name__ for p in _processors(group[0].module)),
        how="loader" if replayed & parameters.keys() else _how(live[like[0].name]),
        quantized=quantized,
        parameters=parameters,
        reads={path: _form_of(leaf) for path, leaf in reads.items()},
        scheme=next((schemes[t] for t in parameters if t in schemes), None) if quantized else None,
    )


def _how(layer: Layer) -> How:
    if isinstance(layer, PerTensorLayer):
        return "whole"
    if isinstance(layer, InPlaceLayer):
        return "in place"
    return "processed" if layer.placement == "staged" else "copied"


def _forms(blueprint: LayerBlueprint) -> dict[str, Form]:
    """Dtype and shape of each parameter in checkpoint format."""
    return {name: _form_of(meta) for name, meta in blueprint.parameters.items() if meta is not None}


def _form_of(leaf: Any) -> Form:
    if is_handle(leaf):
        return Form("oneDNN handler", (leaf.k, leaf.n))
    return Form(str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape))


def _unfilled(
    planner: Planner, targets: Mapping[str, Tensor], optional: AbstractSet[str]
) -> tuple[str, ...]:
    """Parameters that nothing fills; scales are made with their codes."""
    filled = {target for name in planner.plan.names for target in planner.plan[name].targets}
    made = {f"{target}_scale" for target in filled if holds_codes(targets[target].dtype)}
    return tuple(target for target in targets if target not in filled | made | optional)
