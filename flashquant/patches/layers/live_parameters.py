"""Where the parameters of a processed layer are live, as far as processing has left them alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from flashquant.errors import ReloadError
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.update import digests


class LiveParameters:
    """The live tensors behind the parameters of some modules, looked up by parameter.

    Args:
        blueprints: the modules.
        metas: their parameters in checkpoint format, on meta.
        loaded: the fingerprints of these parameters, taken just before processing.
        changed: parameters that processing makes something else of, whatever the live ones show.

    Attributes:
        kept: the parameters that processing has left as they were loaded.

    """

    def __init__(
        self,
        blueprints: Sequence[LayerBlueprint],
        metas: Mapping[str, Tensor],
        loaded: Mapping[str, str],
        changed: Collection[str] = (),
    ) -> None:
        self._blueprints, self._metas = blueprints, metas
        # Processing may rewrite a parameter without changing its layout, so only
        # values show whether it is still the one that was loaded.
        readable = ((target, self.read_back(target)) for target in metas if target not in changed)
        found = digests((target, value) for target, value in readable if value is not None)
        self.kept = frozenset(target for target in found if found[target] == loaded.get(target))

    def in_place(self, target: str) -> Tensor | None:
        """The live tensor that still is this parameter in the checkpoint's own layout."""
        live = self._live(target) if target in self.kept else None
        return (
            live.detach() if live is not None and live.dtype == self._metas[target].dtype else None
        )

    def read_back(self, target: str) -> Tensor | None:
        """The live value of a parameter in checkpoint format, if its layout still shows it.

        vLLM's CPU kernels keep a bf16 bias widened to float32: that is narrowed back.
        """
        meta, live = self._metas[target], self._live(target)
        if live is None or live.shape != meta.shape or live.stride() != meta.stride():
            return None
        if live.dtype == meta.dtype:
            return live.detach()
        widened = live.dtype == torch.float32 and meta.dtype.is_floating_point
        return live.detach().to(meta.dtype) if widened else None

    def value(self, target: str) -> Tensor:
        """What the live layer holds of a parameter that was not sent.

        Raises:
            ReloadError: no live tensor shows it.

        """
        live = self.in_place(target)
        kept = live if live is not None else self.read_back(target)
        if kept is None:
            raise ReloadError(f"{target} was not sent, and cannot be read back from the engine")
        return kept

    def check_ties(self, staged: Mapping[str, Tensor]) -> None:
        """Refuse two parameters that vLLM stores once, arriving with different values."""
        homes: dict[int, list[str]] = defaultdict(list)
        for target in staged:
            if (live := self.in_place(target)) is not None:
                homes[live.data_ptr()].append(target)
        for first, *others in homes.values():
            for other in others:
                if not torch.equal(staged[first], staged[other]):
                    raise ReloadError(
                        f"{first} and {other} arrived with different values, but were equal in "
                        "the checkpoint the engine started on, so vLLM stores them once. Start the "
                        "engine with hf_overrides={'tie_word_embeddings': False}, or push them "
                        "equal."
                    )

    def _live(self, target: str) -> Tensor | None:
        for blueprint in self._blueprints:
            for name, own in blueprint.targets.items():
                live = blueprint.module._parameters.get(name)
                if own == target and live is not None:
                    return live
        return None
