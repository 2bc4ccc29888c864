"""Our corrections beside a stack's own code, on random batches; no engine.

Usage: python -m tests.stacks.programs.corrections STACK
Prints one JSON object: how many settings were compared, and the largest relative difference of the
weights (for OpenRLHF: of loss and gradient). Kept tokens are compared exactly.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from flashquant import tis
from tests.stacks.programs import settings
from tests.stacks.programs.rollouts import print_result

Batch = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


def batches() -> Iterator[Batch]:
    """Policies near each other, and far apart; some tokens are masked, none of the first."""
    for step in (1 / 8, 3 / 4):
        rollout = -torch.randint(0, 64, (5, 9)) / 8
        mask = (torch.rand(5, 9) < 0.7).index_fill(1, torch.tensor([0]), True)
        yield rollout + torch.randint(-8, 9, (5, 9)) * step, rollout, mask


def verl() -> Iterator[Pair]:
    helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    rejections = [
        (None, None),
        ("token_k1", "0.4_3.3"),
        ("seq_sum_k1", 3.3),
        ("seq_mean_k1", "0.9_1.15"),
        ("seq_max_k3", 1.1),
        ("token_k3,seq_mean_k2", "0.9,0.6"),
    ]
    weights = product([None, "token", "sequence"], [2.0, "0.4_2.2"], [False, True])
    for (level, threshold, normalize), (rejection, bound) in product(weights, rejections):
        given = {
            "rollout_is": level,
            "rollout_is_threshold": threshold,
            "rollout_is_batch_normalize": normalize,
            "rollout_rs": rejection,
            "rollout_rs_threshold": bound,
        }
        for trainer, rollout, mask in batches():
            try:
                found, kept, _ = helper.compute_rollout_correction_and_rejection_mask(
                    trainer, rollout, mask.float(), **given
                )
            except ZeroDivisionError:  # of its metrics, where every weight is 0
                continue
            weight = found.batch["rollout_is_weights"] if found else torch.ones_like(trainer)
            ours = tis.from_verl(**given)(trainer, rollout, mask)
            assert torch.equal(ours.keep_mask, kept.bool()), given
            yield ours.weights, weight * kept


def skyrl() -> Iterator[Pair]:
    from tests.stacks.programs import skyrl as program  # importable with its stack alone

    program.enter_the_gym()
    # It annotates with it, and the overlay goes without.
    annotations = types.ModuleType("jaxtyping")
    annotations.__getattr__ = lambda _: _Anything  # type: ignore[method-assign]
    sys.modules.setdefault("jaxtyping", annotations)
    helper = importlib.import_module("skyrl.backends.skyrl_train.utils.off_policy_correction_utils")
    config = importlib.import_module("skyrl.train.config.config").OffPolicyCorrectionConfig
    for kind, metric, (low, high), (least, most) in product(
        [None, "token", "sequence"],
        [None, "product", "geometric"],
        [(None, None), (0.37, None), (None, 2.6), (1e-4, 100.0)],
        [(None, None), (0.4, 2.2)],
    ):
        given = {
            "tis_ratio_type": kind,
            "sequence_mask_metric": metric,
            "outlier_token_is_threshold_low": low,
            "outlier_token_is_threshold_high": high,
            "token_mask_is_threshold_low": least,
            "token_mask_is_threshold_high": most,
        }
        for trainer, rollout, mask in batches():
            weight, _, kept = helper.compute_off_policy_correction(
                trainer, rollout, mask.float(), config(**given)
            )
            ours = tis.from_skyrl(**given)(trainer, rollout, mask)
            yield ours.weights, (1.0 if weight is None else weight) * kept


def openrlhf() -> Iterator[Pair]:
    """Its whole loss. Its package imports more than the overlay has, so the class is cut out."""
    policy_loss = _class("openrlhf", "models/loss.py", "PolicyLoss")
    for (level, mode, threshold), per_token in product(
        [
            ("off", "mask", [0.5, 5.0]),
            ("token", "mask", [0.4, 2.2]),
            ("token", "clip", [0.4, 2.2]),
            ("token", "clip", [0.0, 2.0]),
            ("seq", "mask", [0.9, 1.1]),
        ],
        [True, False],
    ):
        given = {
            "is_correction_level": level,
            "is_correction_mode": mode,
            "is_correction_threshold": threshold,
        }
        for old, rollout, mask in batches():
            logprobs = (old + torch.randint(-6, 7, old.shape) / 8).requires_grad_()
            advantages = torch.randn_like(old)
            theirs, *_ = policy_loss(0.2, 0.28, token_level_loss=per_token, **given)(
                logprobs, old, advantages, mask.float(), rollout
            )
            ours, _ = tis.loss(
                logprobs,
                old_logprobs=old,
                rollout_logprobs=rollout,
                advantages=advantages,
                mask=mask,
                correction=tis.from_openrlhf(**given),
                reduce="token-mean" if per_token else "sequence-mean",
            )
            yield ours.detach(), theirs.detach()
            yield torch.autograd.grad(ours, logprobs)[0], torch.autograd.grad(theirs, logprobs)[0]


def ms_swift() -> Iterator[Pair]:
    """Two methods of its trainer, without the trainer."""
    trainer_class = importlib.import_module("swift.rlhf_trainers.grpo_trainer").GRPOTrainer
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    for mode, threshold in product(modes, (1.2, 2.0)):
        given = {
            "rollout_importance_sampling_mode": mode,
            "rollout_importance_sampling_threshold": threshold,
        }
        itself = object.__new__(trainer_class)
        vars(itself).update(given)
        for trainer, rollout, mask in [batch for _ in range(3) for batch in batches()]:
            theirs = itself._apply_rollout_importance_sampling(trainer - rollout, mask)
            ours = tis.from_ms_swift(**given)(trainer, rollout, mask)
            yield ours.weights, theirs * mask


class _Anything:
    def __class_getitem__(cls, _: object) -> type[_Anything]:
        return cls


def _class(package: str, path: str, name: str) -> Callable[..., Any]:
    source = settings._source(package, path)
    (found,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )

    def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
        return (values * mask).sum(dim) / mask.sum(dim)

    def aggregate_loss(values: Tensor, mask: Tensor, *, token_level_loss: bool, **_: Any) -> Tensor:
        return masked_mean(values, mask, None if token_level_loss else -1).mean()

    scope: dict[str, Any] = {
        "torch": torch,
        "nn": torch.nn,
        "masked_mean": masked_mean,
        "aggregate_loss": aggregate_loss,
    }
    exec("from __future__ import annotations\n" + ast.unparse(found), scope)
    return scope[name]  # type: ignore[no-any-return]


def main() -> None:
    torch.manual_seed(0)
    compared, worst = 0, 0.0
    stacks = {"verl": verl, "skyrl": skyrl, "openrlhf": openrlhf, "ms-swift": ms_swift}
    for ours, theirs in stacks[sys.argv[1]]():
        compared += 1
        apart = (ours - theirs).abs() / theirs.abs().clamp(min=1e-6)
        worst = max(worst, apart.max().item())
    print_result({"compared": compared, "worst": worst})


if __name__ == "__main__":
    main()
