"""Names are learned together: one run of a loader may cost as much for one as for hundreds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from flashquant.errors import UnknownWeight
from tests.support.fake_engine import NEW, OLD, FakeEngine, serving


class CountingEngine(FakeEngine):
    """Counts how often it is laid out for a loader to be watched."""

    runs = 0

    @contextmanager
    def laid_out(self, values=None) -> Iterator[None]:
        self.runs += 1
        with super().laid_out(values):
            yield


def test_a_checkpoint_that_is_quantized_while_it_loads_is_learned_in_one_run():
    engine = CountingEngine(torch.int8)

    serving(engine)

    assert engine.runs == 1


def test_the_scales_that_were_made_of_it_are_learned_in_one_more():
    engine = CountingEngine(torch.int8)
    session = serving(engine)

    for pair in NEW.items():
        session.push([pair])

    assert engine.runs == 2


def test_a_checkpoint_that_is_not_quantized_is_learned_at_the_first_push():
    engine = CountingEngine()
    session = serving(engine)
    assert engine.runs == 0

    session.push(list(OLD.items())[:1])

    assert engine.runs == 1


class Lenient(FakeEngine):
    """As vLLM's loaders do, it drops each bias that it does not expect."""

    def load(self, weights):
        super().load((n, t) for n, t in weights if not n.endswith(".bias"))


def test_a_bias_of_a_layer_that_no_loader_knows_is_refused_with_the_nearest():
    """Though the loader drops it, as it drops one that its own layer does not have."""
    bias = torch.zeros(4, dtype=torch.bfloat16)
    session = serving(Lenient(), {**OLD, "q.bias": bias})

    with pytest.raises(UnknownWeight, match=r"nothing of 'tower.q'.* Did you mean 'q.bias'"):
        session.push([("tower.q.bias", bias)])

    report = session.reload({**NEW, "q.bias": bias, "k.bias": bias})
    assert set(report.ignored) == {"q.bias", "k.bias", "lm_head.weight"}
