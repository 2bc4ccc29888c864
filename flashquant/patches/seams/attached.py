"""What takes the place of a model's `load_weights`, and keeps all that flashquant knows of it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flashquant.errors import ReloadError, UnsupportedEngine
from flashquant.patches.decided import kept_by, kv_scales_of
from flashquant.patches.engine import LiveEngine
from flashquant.patches.seams.blame import naming_the_layer
from flashquant.patches.seams.in_bf16 import leaves_any, why_in_bf16
from flashquant.patches.seams.kept import check_kept
from flashquant.patches.seams.overrides import served_overrides
from flashquant.patches.seams.peers import ballot_for
from flashquant.patches.seams.receiving import received
from flashquant.plan import named_forms
from flashquant.update import Deltas, Session, some_of

logger = logging.getLogger(__name__)


class Attached:
    """A model's `load_weights` while flashquant looks after it: an instance attribute."""

    def __init__(self, model: nn.Module, vllm_config: Any, own: Any, towers: Sequence[str]) -> None:
        self.engine = LiveEngine(model, vllm_config, quantized=own.quantization is not None)
        self.is_draft = _is_draft(own, vllm_config)
        self._vllm_config, self._towers = vllm_config, towers
        self.session = Session(
            self.engine,
            checks=self.engine.checks,
            ballot=ballot_for(vllm_config),
            calibration=self.engine.calibration,
        )
        self.deltas = Deltas(self.session)
        self._caches = bool(vllm_config.cache_config.enable_prefix_caching) or bool(
            own.is_multimodal_model
        )
        self._noted = self._served = 0
        self._loaded = False  # whether it started on a checkpoint, and not on dummy weights
        self.start = uuid.uuid4().hex

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> object:
        if self.session.live:
            return received(self._push, weights)
        self._loaded = True
        with naming_the_layer(self.engine.scheme, self.engine.model):  # online, they process here
            return self.session.first_load(weights)

    def open(self) -> None:
        """The model is processed: it serves, and pushes are reloads.

        Raises:
            ConfigError: scales of its KV cache are not for this model.

        """
        scales = {} if self.is_draft else kv_scales_of(self._vllm_config)
        dummy = self._vllm_config.load_config.load_format == "dummy"
        self.engine.cache_scales.open(scales, loaded=not dummy)
        self.session.open()
        self.note_in_bf16(self._landed)

    def _landed(self) -> Mapping[str, tuple[str, ...]]:
        """Where each tensor of the checkpoint lands, whether the engine started on it or not."""
        if self._loaded:
            return self.session.landed
        return self.session.lands(named_forms(self._vllm_config.model_config.model))

    def check_loaded(self) -> None:
        """What a model makes of its weights as they are loaded, no push would make anew.

        A draft may keep it, for it is served without being pushed to.
        """
        if (made := self.engine.made_while_loaded) and not self.is_draft:
            raise UnsupportedEngine(
                f"{type(self.engine.model).__name__} makes {some_of(made)} of its weights while "
                "they are loaded, which would go stale when new ones are pushed. Unset "
                "FLASHRL_CONFIG to serve this model unpatched."
            )

    def _push(self, weights: Iterable[tuple[str, Tensor]]) -> object:
        if made := self.engine.made_while_loaded:
            raise ReloadError(
                f"the draft {type(self.engine.model).__name__} made {some_of(made)} of its weights "
                "while they were loaded, which a push would leave as it is. Push to the model that "
                "is served only; what it generates stays right."
            )
        return self.session.push(weights)

    def note_in_bf16(self, landed: Callable[[], Mapping[str, tuple[str, ...]]]) -> None:
        """Find out what stays in bf16 of a model of codes, and what has another scheme.

        Args:
            landed: says where each tensor of the checkpoint lands, which costs a run of the loader.

        Raises:
            ConfigError: what was to be kept is quantized all the same, or in another scheme.

        """
        model, config, overrides = self.engine.model, self._vllm_config, self.engine.overrides
        kept = kept_by(config)
        if self.engine.scheme == "bf16" or not (kept or overrides or leaves_any(model)):
            return
        try:
            found = landed()
        except ReloadError:  # the first push will say it of the name that it is about
            if kept or overrides:
                raise
            return
        check_kept(model, kept, found)
        self.engine.overrides = served_overrides(model, overrides, found, config)
        self.engine.in_bf16 = why_in_bf16(model, found, config, self._towers)

    def note_version(self) -> int:
        """The scheduler asks, and will drop what it has cached of older weights."""
        self._noted = self.session.version
        return self._noted

    def check_servable(self) -> None:
        """Refuse to generate from a mixture; say once where old keys and values may be used.

        The first step after a sync is said in the log: many stacks show nothing else of one.
        """
        self.session.transactions.take_back_what_was_left()
        self.session.check_servable()
        if self.session.version != self._served:
            logger.info(
                "new weights are served: version %d (at the last step: %d)",
                self.session.version,
                self._served,
            )
            self._served = self.session.version
        if self._caches and self.session.version != self._noted:
            self._caches = False
            logger.warning(
                "weights were pushed straight into the model of a running engine, whose caches "
                "are out of reach from there: prompts that share a prefix, or an image, may reuse "
                "what was made of it by the old weights. Call llm.reset_prefix_cache() and "
                "llm.llm_engine.reset_encoder_cache() after each update, or push by "
                "llm.collective_rpc or flashquant.reload_weights(llm, ...), which do."
            )


def _is_draft(own: Any, vllm_config: Any) -> bool:
    """Whether a model of this configuration drafts for the one that is served.

    Some drafters put their own into a copy of the whole configuration; one that has no model
    (n-grams) calls the target its own.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or own is speculative.target_model_config:
        return False
    return own is speculative.draft_model_config or own is not vllm_config.model_config
