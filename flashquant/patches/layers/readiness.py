"""Which parameters of a layer must be complete before any of it goes live.

What has begun to arrive must be complete: half a parameter is never served. Beyond that:

    scales and zero points   wait for the codes they describe, and codes for them
    processed together       vLLM's processing reads every parameter of a module that it makes
                             something of, so those that cannot be taken from the live layer wait
                             for each other
    passed through           by processing as they are (a bias): they go live alone
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from flashquant.update import Stage

Stages = Mapping[str, Stage]


def belong_together(one: str, other: str) -> bool:
    """Whether one parameter says how the other is to be read, as scales and zero points do.

    vLLM names them after it: `weight`, `weight_scale`, `weight_scale_inv`, `weight_zero_point`.
    Whatever a kernel makes of them, one without the other is another weight.
    """
    return one.startswith(f"{other}_") or other.startswith(f"{one}_")


def partners(stages: Stages) -> dict[str, tuple[Stage, ...]]:
    """The stages of each parameter's scales, or of the codes that it describes."""
    return {
        target: tuple(stage for other, stage in stages.items() if belong_together(target, other))
        for target in stages
    }


def half_arrived(stages: Stages) -> tuple[str, ...]:
    """The parameters of which a part has arrived, and a part has not."""
    return tuple(t for t, stage in stages.items() if stage.started and not stage.complete)


def lacking_with_partners(
    stages: Stages, partners: Mapping[str, tuple[Stage, ...]]
) -> tuple[str, ...]:
    """The parameters that are not complete although they, or one of their partners, have begun.

    Args:
        stages: of the layer, by parameter.
        partners: as `partners` gives them.

    """
    return tuple(
        target
        for target, stage in stages.items()
        if not stage.complete and (stage.started or any(one.started for one in partners[target]))
    )


def lacking_to_process(
    stages: Stages, alone: Collection[str], kept: Collection[str]
) -> tuple[str, ...]:
    """The parameters that are not complete although what has arrived cannot go live without them.

    Args:
        stages: of the layer, by parameter.
        alone: the parameters that processing passes through.
        kept: those whose live tensor still is the parameter in checkpoint format: they may be
            read from there, unless they, or their scales or codes, have begun to arrive.

    """
    started = {target for target, stage in stages.items() if stage.started}
    incomplete = {target for target, stage in stages.items() if not stage.complete}
    if not started or not incomplete:
        return ()
    needed = set(started)
    if any(target not in alone for target in started):
        needed |= {
            target
            for target in stages
            if target not in alone and (target not in kept or _is_moving(target, started))
        }
    return tuple(target for target in stages if target in needed & incomplete)


def _is_moving(target: str, started: Iterable[str]) -> bool:
    """Whether any of a parameter has arrived, or of the codes or scales it goes with."""
    return any(other == target or belong_together(other, target) for other in started)
