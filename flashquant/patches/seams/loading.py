"""A session opens: from the moment a model is created to the moment it serves.

initialize_model               -> note the pristine layers, take over load_weights
load_weights (the checkpoint)  -> the first load, by the same stream as every push
process_weights_after_loading  -> look at what it made of each layer; pushes are reloads now
the same, on a live model      -> the trainer says that it has sent everything
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from flashquant.errors import ReloadError, UnsupportedEngine
from flashquant.patches.channels import FORGOT
from flashquant.patches.decided import (
    asks_for_session,
    kept_by,
    overrides_of,
    scheme_of,
)
from flashquant.patches.engine import LiveEngine
from flashquant.patches.layers import packed_once
from flashquant.patches.point import PatchPoint
from flashquant.patches.seams.attached import Attached
from flashquant.patches.seams.blame import naming_the_layer
from flashquant.patches.seams.kept import name_as_vllm
from flashquant.patches.seams.overrides import check_created
from flashquant.patches.seams.towers import in_bf16
from flashquant.update import Deltas, Session

logger = logging.getLogger(__name__)


def find_session(model: nn.Module) -> Session | None:
    """The session of a serving model, if it has one."""
    attached = _attached(model)
    return attached.session if attached is not None and attached.session.live else None


def note_in_bf16(model: nn.Module, landed: Mapping[str, tuple[str, ...]]) -> None:
    """Find out what stays in bf16 of a model that has been planned for, and does not serve.

    Args:
        model: vLLM's.
        landed: the parameters in which each tensor of the checkpoint lands, by its name.

    Raises:
        ConfigError: what was to be kept is quantized all the same.

    """
    if (attached := _attached(model)) is not None:
        attached.note_in_bf16(lambda: landed)


def engine_of(model: nn.Module) -> LiveEngine:
    """What is known of a model that vLLM has created for flashquant, whether it serves yet or not.

    Raises:
        ReloadError: flashquant was not there when it was created.

    """
    attached = _attached(model)
    if attached is None:
        raise ReloadError(f"{type(model).__name__} was not created under FLASHRL_CONFIG")
    return attached.engine


def session_of(model: nn.Module) -> Session:
    """The session of a serving model.

    Raises:
        ReloadError: flashquant was not there when the model was created.

    """
    session = find_session(model)
    if session is None:
        raise ReloadError(
            f"{type(model).__name__} is not looked after by flashquant. Set FLASHRL_CONFIG before "
            "the engine is created (in every process), and do not call unpatch() in between."
        )
    return session


def deltas_of(model: nn.Module) -> Deltas:
    """What applies bundles to a serving model.

    Raises:
        ReloadError: as `session_of`.

    """
    session_of(model)
    attached = _attached(model)
    if attached is None:
        raise ReloadError(f"{type(model).__name__} is not looked after by flashquant")
    return attached.deltas


class Standing(NamedTuple):
    """What the engine core wants to know of one worker's weights after every call.

    `flashquant sync` reads it by the order of its fields: new ones come last.
    """

    version: int = 0
    drafts: int = 0  # the versions of its speculative drafts, together
    holds_steps: bool = False  # an update is under way that no step may run beside
    torn: str = ""  # why nothing may be generated, or nothing
    quiet: float | None = None  # seconds since anything came of an update under way
    forgot: bool = False  # the worker has dropped its half of the encoder cache
    start: str = ""  # a word that no other start of an engine has
    foreign: int = 0  # how many live parameters another writer has modified


def models_of(worker: Any) -> tuple[nn.Module, ...]:
    """The model that a worker serves, and its speculative draft where there is one."""
    draft = worker.get_draft_model() if hasattr(worker, "get_draft_model") else None
    return tuple(model for model in (worker.get_model(), draft) if model is not None)


def standing_of(worker: Any) -> Standing:
    """How a worker's weights stand; the engine core will act on it."""
    model, *drafts = models_of(worker)
    attached = _attached(model)
    if attached is None:
        return Standing()
    sessions = [attached.session, *(s for d in drafts if (s := find_session(d)) is not None)]
    for session in sessions:
        session.transactions.take_back_what_was_left()
        session.proofs.look()
    transactions = [session.transactions for session in sessions]
    return Standing(
        version=attached.note_version(),
        drafts=sum(session.version for session in sessions[1:]),
        holds_steps=attached.session.transactions.holds_steps,
        torn=attached.session.transactions.serving.complaint,
        quiet=next((t.quiet for t in transactions if t.quiet is not None), None),
        forgot=take_forgotten(worker),
        start=attached.start,
        foreign=len(attached.session.proofs.foreign),
    )


def note_forgotten(runner: Any) -> None:
    """A worker's half of the encoder cache is empty; the scheduler's has to be emptied, too."""
    FORGOT.put(runner, True)


def take_forgotten(worker: Any) -> bool:
    """Whether it was emptied since this was last asked."""
    return FORGOT.take(worker.model_runner) is not None


def check_servable(model: nn.Module) -> None:
    """Raise TornWeights where a forward pass would meet a mixture of two policies."""
    if (attached := _attached(model)) is not None and attached.session.live:
        attached.check_servable()


def _initialize_model(original: Any, vllm_config: Any, **kwargs: Any) -> nn.Module:
    if not asks_for_session(vllm_config):
        return original(vllm_config, **kwargs)  # type: ignore[no-any-return]
    kept = kept_by(vllm_config)
    name_as_vllm(vllm_config, kept)
    with naming_the_layer(scheme_of(vllm_config), keeps=bool(kept)), in_bf16(vllm_config) as towers:
        model: nn.Module = original(vllm_config, **kwargs)
    towers.tell(model)
    check_created(model, overrides_of(vllm_config))
    own = kwargs.get("model_config") or vllm_config.model_config  # a draft has its own
    vars(model)["load_weights"] = Attached(model, vllm_config, own, towers.names)
    return model


def _refuse_to_initialize(original: Any, vllm_config: Any, **kwargs: Any) -> nn.Module:
    """For a loader that creates the model itself, and brings weights that are processed already.

    Such an engine would have no session, and what is pushed would be cast, not quantized.
    """
    if asks_for_session(vllm_config):
        name = getattr(vllm_config.load_config, "load_format", None)
        raise UnsupportedEngine(
            f"load_format={name!r} brings weights in a way that flashquant cannot follow, so that "
            "what is pushed later would not be quantized. Leave it out, or unset FLASHRL_CONFIG."
        )
    return original(vllm_config, **kwargs)  # type: ignore[no-any-return]


def _load_model(original: Any, worker: Any, **kwargs: Any) -> None:
    """A loader of somebody else's, or of a package, may create the model by itself.

    Layers of which not all was in the checkpoint are processed when it has been loaded.
    """
    with naming_the_layer(scheme_of(worker.vllm_config)):
        original(worker, **kwargs)
    if asks_for_session(worker.vllm_config) and find_session(worker.get_model()) is None:
        name = getattr(worker.vllm_config.load_config, "load_format", None)
        raise UnsupportedEngine(
            f"load_format={name!r} created the model past flashquant, so that what is pushed later "
            "would not be quantized. Leave it out, or unset FLASHRL_CONFIG."
        )


def _process_weights_after_loading(
    original: Any, model: nn.Module, model_config: Any, target_device: Any
) -> None:
    attached = _attached(model)
    if attached is None:
        original(model, model_config, target_device)
        return
    if attached.session.live:
        # verl, NeMo-RL and checkpoint-engine call it after their last bucket. Every layer
        # was processed as it went live, and a second time would spoil it.
        attached.session.check_nothing_waits()
        return
    with naming_the_layer(attached.engine.scheme, model):
        attached.engine.note_loaded()
        attached.check_loaded()
        with packed_once(attached.engine.shared):
            original(model, model_config, target_device)
        attached.engine.note_processed()
    attached.open()
    logger.info("flashquant looks after %s: %s", type(model).__name__, attached.session.status())
    if attached.is_draft:
        logger.warning(
            "%s drafts for the model that is served. It is not updated with it, also where a push "
            "holds its weights (an MTP layer): drafts grow stale, and fewer of their tokens are "
            "accepted; what is generated stays right. Push to it by start_draft_weight_update(), "
            "or into the model that worker.get_draft_model() returns.",
            type(model).__name__,
        )


def _attached(model: nn.Module) -> Attached | None:
    attached = vars(model).get("load_weights")
    return attached if isinstance(attached, Attached) else None


_LOADER = "vllm.model_executor.model_loader.base_loader"

POINTS = (
    PatchPoint(
        f"{_LOADER}:initialize_model",
        expects=("vllm_config", "prefix", "model_class", "model_config"),
        wrapper=_initialize_model,
    ),
    *(
        PatchPoint(
            f"vllm.model_executor.model_loader.{module}:initialize_model",
            expects=("vllm_config", "prefix", "model_class", "model_config"),
            wrapper=_refuse_to_initialize,
            within=versions,
        )
        for module, versions in {
            "tensorizer_loader": "",
            "weight_cache.ipc_loader": ">=0.30",
        }.items()
    ),
    PatchPoint(
        "vllm.v1.worker.gpu_worker:Worker.load_model",
        expects=("self", "load_dummy_weights"),
        wrapper=_load_model,
    ),
    # vLLM's loader has the name by value; the stacks import it when they call it.
    *(
        PatchPoint(
            f"{module}:process_weights_after_loading",
            expects=("model", "model_config", "target_device"),
            wrapper=_process_weights_after_loading,
        )
        for module in (_LOADER, "vllm.model_executor.model_loader.utils")
    ),
)
