"""Trainers send names with the marks of their wrappers: they are taken off, or explained."""

from __future__ import annotations

import logging

import pytest

from flashquant.errors import MisfitTensor, UnknownWeight
from flashquant.plan.wrappers import hint, unwrapped
from tests.support.fake_engine import NEW, OLD, FakeEngine, fresh, only, serves, serving

BARE = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "name",
    [
        BARE,
        f"_orig_mod.{BARE}",
        f"module.{BARE}",
        f"module._orig_mod.{BARE}",
        f"_fsdp_wrapped_module.{BARE}",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
        "model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
        f"base_model.model.{BARE}",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "_orig_mod.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
    ],
)
def test_the_marks_of_wrappers_come_off(name):
    assert unwrapped(name) == BARE


@pytest.mark.parametrize("mark", ["_orig_mod.", "module.", "base_model.model."])
def test_a_wrapped_name_is_taken_for_what_it_wraps_and_said_once(mark, caplog):
    caplog.set_level(logging.INFO, "flashquant")
    engine = FakeEngine()
    session = serving(engine)

    for name, tensor in NEW.items():
        if name != "lm_head.weight":
            session.push([(mark + name, tensor)])

    assert serves(engine, fresh(NEW))
    assert caplog.text.count("taken off") == 1
    assert session.status().refused == ()


def test_a_whole_update_of_wrapped_names_is_complete():
    engine = FakeEngine()

    serving(engine).reload({f"module.{name}": t for name, t in NEW.items() if name[0] != "l"})

    assert serves(engine, fresh(NEW))


def test_a_name_with_and_without_its_wrapper_is_one_name():
    engine = FakeEngine()
    session = serving(engine)

    with pytest.raises(MisfitTensor, match=r"q\.weight arrived twice"):
        session.push([*only("q.weight"), ("module.q.weight", NEW["q.weight"])])

    assert serves(engine, fresh(OLD))


def test_what_is_unknown_without_its_wrappers_too_says_so():
    engine = FakeEngine()

    with pytest.raises(UnknownWeight, match=r"Without its wrappers it is 'nom\.weight'.*'norm\.w"):
        serving(engine).push([("_orig_mod.nom.weight", NEW["norm.weight"])])


def test_a_factor_of_an_adapter_is_no_misspelt_weight():
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"

    assert "merge" in hint(name, [BARE])
    assert "Did you mean" not in hint(name, [BARE])
