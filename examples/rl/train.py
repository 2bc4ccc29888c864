"""One run: an arm and a seed, from the supervised start to the last step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from examples.rl import dapo, task
from examples.rl.dapo import Batch
from examples.rl.model import accuracy, logprobs, pushed
from examples.rl.record import Record
from examples.rl.rollout import Engine
from examples.rl.settings import Arm, Settings
from flashquant import tis

# Far apart, so that no step of one run draws what a step of another drew.
_SEED_STRIDE = 100_000


class Run:
    """One arm with one seed.

    All chance in a step comes from the seed and the step's number, so a run that goes on from a
    checkpoint needs the weights and the optimizer, and nothing else, to be the same run.
    """

    def __init__(
        self,
        arm: Arm,
        seed: int,
        settings: Settings,
        *,
        model: LlamaForCausalLM,
        engine: Engine,
        record: Record,
    ) -> None:
        self.arm, self.seed, self.settings = arm, seed, settings
        self._model, self._engine, self._record = model, engine, record
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def go(self, *, resume: bool, progress: Callable[[int, dict[str, Any]], None]) -> None:
        """All steps that are still to be made."""
        first = 1 + self._begin(resume)
        self._push()  # the engine was another run's, or has the weights of the supervised start
        for step in range(first, self.settings.steps + 1):
            line = self._step(step)
            self._record.write(line)
            if self._is_due(step, self.settings.checkpoint_every):
                self._record.save(step, self._model, self._optimizer)
            progress(step, line)

    def _begin(self, resume: bool) -> int:
        if resume:
            return self._record.resume(self._model, self._optimizer)
        self._record.begin()
        return 0

    def _step(self, step: int) -> dict[str, Any]:
        """Roll out, learn, push; what is worth a line in the record."""
        began = time.perf_counter()
        chance = self.seed * _SEED_STRIDE + step
        dice = torch.Generator().manual_seed(chance)
        asked = task.problems(self.settings.prompts, dice)
        episodes = self._engine.play(
            asked,
            self.settings.group,
            seed=chance,
            calculator=self.arm.calculator,
            top_p=self.arm.top_p,
        )
        rolled = time.perf_counter()
        batch = dapo.batch(episodes, self.settings.group)
        learned = {} if batch is None else self._learn(batch)
        trained = time.perf_counter()
        report = self._push()
        line = {
            "arm": self.arm.name,
            "seed": self.seed,
            "step": step,
            "reward": sum(episode.reward for episode in episodes) / len(episodes),
            "calls": sum(e.tokens.count(task.CALL) for e in episodes) / len(episodes),
            "kept_episodes": 0 if batch is None else len(batch.tokens),
            **learned,
            "rollout_seconds": rolled - began,
            "train_seconds": trained - rolled,
            "sync_seconds": report.seconds,
            "codes_changed": report.changed,
        }
        if self._is_due(step, self.settings.evaluate_every):
            line["accuracy"] = accuracy(
                self._model, self.settings.held_out, calculator=self.arm.calculator
            )
        return line

    def _learn(self, batch: Batch) -> dict[str, float]:
        """A few optimizer steps on one batch; the metrics of the last."""
        with torch.no_grad():
            old = self._logprobs(batch)
        for _ in range(self.settings.updates):
            loss, metrics = tis.loss(
                self._logprobs(batch),
                old_logprobs=old,
                rollout_logprobs=batch.rollout_logprobs,
                advantages=batch.advantages,
                mask=batch.mask,
                correction=self.arm.correction,
            )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
        found = {name: float(value) for name, value in metrics.to_dict().items()}
        return found | {"loss": loss.item(), "gradient_norm": float(norm)}

    def _logprobs(self, batch: Batch) -> Tensor:
        return logprobs(self._model, batch.tokens, self.arm.truncation)

    def _push(self) -> Any:
        return self._engine.push(pushed(self._model, self.arm.bits))

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.settings.steps
