"""Each stack's own settings, under its own names, as a `Correction`.

A user pastes what is in their config: `from_verl(**config.algorithm.rollout_correction)`. The names
and meanings are those of verl 0.9.1, SkyRL 0.3.0, TRL 1.16.0, OpenRLHF 0.11.2, ms-swift 4.6.0 and
NeMo-RL of 2026.
Weights and kept tokens are theirs; where they are not, the function's docstring says why. What a
stack would take for "off" or ignore in silence, although it was set, is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from flashquant.errors import CorrectionError
from flashquant.tis.correction import Correction, Level, masked
from flashquant.tis.rejection import Over, Rejection, Statistic, one_of

_NONE = Correction(level=None, cap=None)

_VERL_OVER: dict[str, Over] = {
    "token": "token",
    "seq_sum": "sum",
    "seq_mean": "mean",
    "seq_max": "any",
}
_VERL_REJECTIONS: dict[str, tuple[Over, Statistic]] = {
    f"{prefix}_{k}": (over, k)
    for prefix, over in _VERL_OVER.items()
    for k in ("k1", "k2", "k3")
    if (prefix, k) != ("seq_max", "k1")
}


def from_flashrl(*, tis_imp_ratio_cap: float = -1.0) -> Correction:
    """FlashRL's patch of verl: `actor.tis_imp_ratio_cap`; anything not above 0 is off."""
    return Correction(cap=tis_imp_ratio_cap) if tis_imp_ratio_cap > 0 else _NONE


def from_verl(
    *,
    rollout_is: str | None = None,
    rollout_is_threshold: str | float | None = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    rollout_rs_threshold: str | float | None = None,
    bypass_mode: bool = False,
    loss_type: str = "ppo_clip",
) -> Correction:
    """verl: `algorithm.rollout_correction`; the defaults are those of its YAML.

    * A threshold "0.5_5.0" is IcePop: outside of it the weight is 0, and the loss counts it.
    * What `rollout_rs` takes leaves the mean of the loss.
    * Bounds of a `*_k1` are for the ratio, but verl compares their logarithms with -log r. So they
      bound pi_rollout / pi_trainer, and "0.5_4" keeps ratios from 1/4 to 2.
    * With `bypass_mode` and "ppo_clip", PPO's ratio is the weight already, so verl uses no other;
      neither does this. Give `loss` no `old_logprobs` then. With "reinforce" the weights stay: they
      multiply `logprobs * advantages`.
    * Batches are normalized by the mean over all ranks there, over the batch given here.
    """
    weights = _NONE
    one_of("loss_type", loss_type, ("ppo_clip", "reinforce"))
    in_the_ratio = bypass_mode and loss_type == "ppo_clip"
    if rollout_is is not None and rollout_is_threshold is not None and not in_the_ratio:
        one_of("rollout_is", rollout_is, ("token", "sequence"))
        level = cast(Level, rollout_is)
        low, high = _bounds("rollout_is_threshold", rollout_is_threshold)
        truncated = low is None
        weights = Correction(level=level, cap=high) if truncated else masked(low, high, level=level)
    return Correction(
        level=weights.level,
        cap=weights.cap,
        rejections=weights.rejections + _verl_rejections(rollout_rs, rollout_rs_threshold),
        normalize=rollout_is_batch_normalize and weights.level is not None,
    )


def from_skyrl(
    *,
    tis_ratio_type: str | None = None,
    token_tis_ratio_clip_high: float = 2.0,
    sequence_tis_ratio_clip_high: float = 5.0,
    sequence_mask_metric: str | None = None,
    geo_mask_high: float = 1.01,
    geo_mask_low: float = 0.99,
    product_mask_high: float = 2.0,
    product_mask_low: float = 0.5,
    outlier_token_is_threshold_low: float | None = None,
    outlier_token_is_threshold_high: float | None = None,
    token_mask_is_threshold_low: float | None = None,
    token_mask_is_threshold_high: float | None = None,
    use_tis: bool = False,
    tis_imp_ratio_cap: float = -1.0,
) -> Correction:
    """SkyRL: `trainer.algorithm.off_policy_correction`, and the older `use_tis`.

    * Rejections are chained: outliers, then tokens, then the sequence by the tokens that are left.
    * Its loss is divided by the tokens there were at first, so what is rejected is counted.
    * `use_tis` overrides the type, as there. With its default cap of -1 every weight would become
      -1 in SkyRL; here it is refused. So is one bound of the token mask without the other, with
      which SkyRL masks nothing.
    """
    rejections = []
    if outlier_token_is_threshold_low is not None or outlier_token_is_threshold_high is not None:
        low, high = outlier_token_is_threshold_low, outlier_token_is_threshold_high
        rejections.append(Rejection("ratio", "any", low, high, counted=True))
    if token_mask_is_threshold_low is not None or token_mask_is_threshold_high is not None:
        low, high = token_mask_is_threshold_low, token_mask_is_threshold_high
        if low is None or high is None:
            raise CorrectionError(
                f"token_mask_is_threshold_low={low} and token_mask_is_threshold_high={high}: "
                "with one of them alone SkyRL masks nothing. Give both, or neither."
            )
        rejections.append(Rejection("ratio", "token", low, high, counted=True))
    if sequence_mask_metric is not None:
        one_of("sequence_mask_metric", sequence_mask_metric, ("product", "geometric"))
        rejections.append(
            Rejection("ratio", "sum", product_mask_low, product_mask_high, counted=True)
            if sequence_mask_metric == "product"
            else Rejection("ratio", "mean", geo_mask_low, geo_mask_high, counted=True)
        )
    if use_tis:
        tis_ratio_type, token_tis_ratio_clip_high = "token", tis_imp_ratio_cap
    if tis_ratio_type is None:
        return Correction(level=None, cap=None, rejections=tuple(rejections), chained=True)
    one_of("tis_ratio_type", tis_ratio_type, ("token", "sequence"))
    per_token = tis_ratio_type == "token"
    return Correction(
        level=cast(Level, tis_ratio_type),
        cap=token_tis_ratio_clip_high if per_token else sequence_tis_ratio_clip_high,
        rejections=tuple(rejections),
        chained=True,
    )


def from_trl(
    *,
    vllm_importance_sampling_correction: bool = True,
    vllm_importance_sampling_mode: str = "sequence_mask",
    vllm_importance_sampling_clip_max: float | None = 3.0,
    vllm_importance_sampling_clip_min: float | None = None,
    vllm_importance_sampling_cap: float | None = None,
) -> Correction:
    """TRL: `GRPOConfig`; `vllm_importance_sampling_cap` is its older name for `_clip_max`.

    * It is on by default, and masks sequences.
    * TRL has no safety bound: without a `_clip_max` its ratio may overflow. Here exp(20) ends it.
    * TRL takes a NaN from vLLM for a ratio of 1; here it is an error.
    """
    if not vllm_importance_sampling_correction:
        return _NONE
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    one_of("vllm_importance_sampling_mode", vllm_importance_sampling_mode, modes)
    if vllm_importance_sampling_cap is not None:
        vllm_importance_sampling_clip_max = vllm_importance_sampling_cap
    level, _, how = vllm_importance_sampling_mode.partition("_")
    low = _or_none(vllm_importance_sampling_clip_min)
    high = vllm_importance_sampling_clip_max
    if how == "mask" and not (low is None and high is None):
        return masked(low, high, level=cast(Level, level))
    return Correction(level=cast(Level, level), cap=high, floor=low)


def from_openrlhf(
    *,
    is_correction_level: str = "off",
    is_correction_mode: str = "mask",
    is_correction_gating: str = "ratio",
    is_correction_threshold: float | Sequence[float] = (0.5, 5.0),
    is_correction_enable: bool | None = None,
    is_correction_type: str = "tis",
) -> Correction:
    """OpenRLHF: `--algo.advantage.is_correction_*`; enable and type are the names before 0.11.

    * Clipping (the older "tis") clamps on both sides: weights below the low threshold are raised.
    * At level "seq" (the older "seq-mask-tis") a sequence is judged by its geometric mean. Tokens
      of those that stay have their own ratio as weight, without a cap but the safety bound.
    * What is rejected is counted in the mean of the loss.
    * Gating by "binary_kl" or "tv" is refused: it needs probabilities, not their ratio.
    * With the policy loss "gspo" a correction level puts the ratio into the loss itself, and no
      weight beside it: that is `loss` without `old_logprobs`.
    """
    if is_correction_enable is not None:
        older = {
            "tis": ("token", "clip"),
            "icepop": ("token", "mask"),
            "seq-mask-tis": ("seq", "mask"),
        }
        one_of("is_correction_type", is_correction_type, tuple(older))
        is_correction_level, is_correction_mode = older[is_correction_type]
        if not is_correction_enable:
            is_correction_level = "off"
    one_of("is_correction_level", is_correction_level, ("off", "token", "seq"))
    one_of("is_correction_mode", is_correction_mode, ("mask", "clip"))
    one_of("is_correction_gating", is_correction_gating, ("ratio",))
    if is_correction_level == "off":
        return _NONE
    low, high = _low_high(is_correction_threshold)
    if is_correction_mode == "mask":
        return masked(low, high) if is_correction_level == "token" else _seq_mask_tis(low, high)
    if is_correction_level == "seq":
        raise CorrectionError(
            "is_correction_mode='clip' with is_correction_level='seq', but OpenRLHF clips tokens "
            "only. Choose mode 'mask', or level 'token'."
        )
    return Correction(cap=high, floor=low)


def from_ms_swift(
    *,
    rollout_importance_sampling_mode: str | None = None,
    rollout_importance_sampling_threshold: float = 2.0,
) -> Correction:
    """ms-swift: `--rollout_importance_sampling_*`.

    * A "sequence" is judged by its geometric mean, and not by its product as in TRL.
    * With "sequence_mask", tokens of sequences that stay have their own ratio as weight.
    * What is masked is counted in the mean of the loss.
    """
    mode, high = rollout_importance_sampling_mode, rollout_importance_sampling_threshold
    if mode is None:
        return _NONE
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    one_of("rollout_importance_sampling_mode", mode, modes)
    if mode == "token_mask":
        return masked(None, high)
    if mode == "sequence_mask":
        return _seq_mask_tis(None, high)
    return Correction(level="token" if mode == "token_truncate" else "geometric", cap=high)


def from_nemo_rl(
    *,
    use_importance_sampling_correction: bool = False,
    truncated_importance_sampling_type: str | None = None,
    truncated_importance_sampling_ratio: float | None = None,
    truncated_importance_sampling_ratio_min: float | None = None,
    sequence_level_importance_ratios: bool = False,
) -> Correction:
    """NeMo-RL: `loss_fn`.

    * A type without `use_importance_sampling_correction` is refused, as there.
    * Without a type, the weight is the whole ratio, unbounded but for the safety bound.
    * A ratio that overflows is weight 0 in NeMo-RL; here it is the cap, which is what it is above.
    * What is rejected is counted in the mean of the loss.
    """
    kind = truncated_importance_sampling_type
    level: Level = "sequence" if sequence_level_importance_ratios else "token"
    low = _or_none(truncated_importance_sampling_ratio_min)
    high = truncated_importance_sampling_ratio
    if not use_importance_sampling_correction:
        if kind is not None:
            raise CorrectionError(
                f"truncated_importance_sampling_type={kind!r} without "
                "use_importance_sampling_correction. Set it to true, or the type to null."
            )
        return _NONE
    if kind is None:
        if high is not None:
            raise CorrectionError(
                f"truncated_importance_sampling_ratio={high:g} without a type. Set "
                "truncated_importance_sampling_type to 'tis', 'icepop' or 'seq-mask-tis'."
            )
        return Correction(level=level, cap=None)
    one_of("truncated_importance_sampling_type", kind, ("tis", "icepop", "seq-mask-tis"))
    if high is None:
        raise CorrectionError(
            f"truncated_importance_sampling_type={kind!r} needs truncated_importance_sampling_ratio"
        )
    if kind == "tis":
        return Correction(level=level, cap=high, floor=low)
    if truncated_importance_sampling_ratio_min is None:
        raise CorrectionError(
            f"truncated_importance_sampling_type={kind!r} needs "
            "truncated_importance_sampling_ratio_min"
        )
    if kind == "icepop":
        return masked(low, high, level=level)
    if sequence_level_importance_ratios:
        raise CorrectionError(
            "'seq-mask-tis' weighs tokens, sequence_level_importance_ratios weighs sequences. "
            "Leave one out."
        )
    return _seq_mask_tis(low, high)


def _seq_mask_tis(low: float | None, high: float | None) -> Correction:
    return Correction(cap=None, rejections=(Rejection("ratio", "mean", low, high, counted=True),))


def _verl_rejections(options: str | None, thresholds: str | float | None) -> tuple[Rejection, ...]:
    if options is None:
        return ()
    names = list(dict.fromkeys(name.strip() for name in options.split(",") if name.strip()))
    for name in names:
        one_of("rollout_rs", name, tuple(_VERL_REJECTIONS))
    given = [part.strip() for part in str(thresholds or "").split(",") if part.strip()]
    if len(given) == 1:
        given *= len(names)
    if not names or len(given) != len(names):
        raise CorrectionError(
            f"rollout_rs={options!r} with rollout_rs_threshold={thresholds!r}. Give one threshold, "
            "or one for each option, with commas between."
        )
    return tuple(map(_verl_rejection, names, given))


def _verl_rejection(name: str, threshold: str) -> Rejection:
    over, statistic = _VERL_REJECTIONS[name]
    low, high = _bounds(f"rollout_rs_threshold of {name}", threshold)
    if statistic != "k1":
        return Rejection(statistic, over, low=low, high=high)
    low = 1 / high if low is None else low
    return Rejection("k1", over, low=math.log(low), high=math.log(high))


def _bounds(name: str, threshold: str | float) -> tuple[float | None, float]:
    """(None, 2.0) of 2.0 or "2.0"; (0.5, 2.0) of "0.5_2.0"."""
    try:
        numbers = [float(part) for part in str(threshold).split("_")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(number > 0 for number in numbers):
        raise CorrectionError(
            f"{name} is {threshold!r}, but is a number above 0, or two of them as '0.5_2.0'"
        )
    return (None, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def _low_high(threshold: float | Sequence[float]) -> tuple[float | None, float]:
    numbers = [threshold] if isinstance(threshold, int | float) else list(threshold)
    if len(numbers) not in (1, 2):
        raise CorrectionError(
            f"is_correction_threshold is {threshold!r}, but is HIGH, or LOW and HIGH"
        )
    return (None, numbers[0]) if len(numbers) == 1 else (_or_none(numbers[0]), numbers[1])


def _or_none(low: float | None) -> float | None:
    """A ratio is above 0 anyway: as a lower bound, 0 is none."""
    return None if low == 0 else low
