"""What a run is: the arms that are compared, and the numbers they share."""

from __future__ import annotations

from dataclasses import dataclass

from flashquant import tis


class UnknownArm(ValueError):
    """An arm that is not in the list."""


@dataclass(frozen=True)
class Arm:
    """One way to roll out and to learn from it.

    Attributes:
        name: as on the command line and in the plot.
        scheme: as in FLASHRL_CONFIG.
        cap: of the token-level correction; None for none.
        bits: the engine is pushed weights that were rounded to so few bits (a mismatch larger
            than any scheme's own); None for the trainer's weights.
        calculator: the policy may ask for the sum of a column; several turns an episode.
        top_p: rollouts are sampled from the fewest tokens that hold this probability; 1 for all.
        renormalize: the trainer's log-probs are over those tokens, too.

    """

    name: str
    scheme: str
    cap: float | None = None
    bits: int | None = None
    calculator: bool = False
    top_p: float = 1.0
    renormalize: bool = False

    @property
    def truncation(self) -> tis.Truncation | None:
        """The cut that the trainer repeats; None where it normalizes over the vocabulary."""
        return tis.Truncation(top_p=self.top_p) if self.renormalize else None

    @property
    def correction(self) -> tis.Correction:
        return tis.Correction(level=None) if self.cap is None else tis.Correction(cap=self.cap)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("bf16", "bf16"),
        Arm("int8+tis", "int8", cap=2.0),
        Arm("int8", "int8"),
        Arm("fp8+tis", "fp8_vllm", cap=2.0),
        Arm("fp8", "fp8_vllm"),
        Arm("coarse+tis", "bf16", cap=2.0, bits=3),
        Arm("coarse", "bf16", bits=3),
        Arm("top-p+mask", "bf16", cap=2.0, top_p=0.9, renormalize=True),
        Arm("top-p", "bf16", cap=2.0, top_p=0.9),
        Arm("int8+tis+tool", "int8", cap=2.0, calculator=True),
    )
}


def arm(name: str) -> Arm:
    """The arm of that name."""
    if name not in ARMS:
        raise UnknownArm(f"there is no arm {name!r}. Choose among {', '.join(ARMS)}.")
    return ARMS[name]


@dataclass(frozen=True)
class Settings:
    """The numbers that all arms share.

    Attributes:
        hidden: width of the decoder; heads are 64 wide.
        layers: of the decoder.
        warm_accuracy: the supervised start ends where so many held-out sums come out right,
        warm_steps: or after so many steps.
        warm_rate: AdamW's learning rate in it.
        steps: of RL.
        prompts: a step.
        group: answers a prompt.
        updates: optimizer steps on one batch of rollouts. With more than one, PPO's clip acts.
        rate: AdamW's learning rate.
        evaluate_every: steps between two looks at held-out sums; the last step is always one.
        held_out: sums in such a look.
        checkpoint_every: steps between two checkpoints; the last step is always one.

    """

    hidden: int = 128
    layers: int = 2
    warm_accuracy: float = 0.4
    warm_steps: int = 3000
    warm_rate: float = 1e-3
    steps: int = 150
    prompts: int = 32
    group: int = 8
    updates: int = 2
    rate: float = 1e-4
    evaluate_every: int = 5
    held_out: int = 256
    checkpoint_every: int = 20
