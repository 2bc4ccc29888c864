"""A seam as a value: applied, it returns an undo that leaves no trace."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from flashquant.errors import PatchError
from flashquant.patches.point import PatchPoint

ENGINE = """
class Base:
    def load(self, weights, strict=True):
        "Load them."
        return ("loaded", weights, strict)

class Model(Base):
    limit = 4

    @staticmethod
    def version(): return 1

    @classmethod
    def make(cls): return cls()

    @property
    def size(self): return 2

def process(model, config): return (model, config)
"""


@pytest.fixture
def engine(monkeypatch) -> ModuleType:
    """An engine of two classes and a function, importable as `fake_engine`."""
    module = ModuleType("fake_engine")
    exec(ENGINE, vars(module))
    monkeypatch.setitem(sys.modules, "fake_engine", module)
    return module


def doubled(original, *args, **kwargs):
    return original(*args, **kwargs) * 2


PROCESS = PatchPoint("fake_engine:process", expects=("model", "config"), wrapper=doubled)
LOAD = PatchPoint("fake_engine:Base.load", expects=("self", "weights", "strict"), wrapper=doubled)
INHERITED = PatchPoint(
    "fake_engine:Model.load", expects=("self", "weights", "strict"), wrapper=doubled
)
ADDED = PatchPoint("fake_engine:Model.reload", expects=None, wrapper=lambda self, path: path)


def test_a_wrapper_goes_around_a_function(engine):
    PROCESS.apply()

    assert engine.process("m", config="c") == ("m", "c") * 2


def test_a_wrapper_goes_around_a_method(engine):
    LOAD.apply()

    assert engine.Base().load("w", strict=False) == ("loaded", "w", False) * 2
    assert engine.Model().load("w") == ("loaded", "w", True) * 2


def test_a_wrapped_function_keeps_its_name_and_its_words(engine):
    LOAD.apply()

    assert engine.Base.load.__name__ == "load"
    assert engine.Base.load.__doc__ == "Load them."
    assert engine.Base.load.__flashquant__ == "fake_engine:Base.load"


@pytest.mark.parametrize("point", [PROCESS, LOAD, INHERITED, ADDED], ids=lambda p: p.target)
def test_undo_leaves_no_trace(engine, point):
    owners = (engine, engine.Base, engine.Model)
    before = [dict(vars(owner)) for owner in owners]

    undo = point.apply()
    changed = [dict(vars(owner)) for owner in owners]
    undo()

    assert changed != before
    assert [dict(vars(owner)) for owner in owners] == before


def test_an_inherited_method_is_wrapped_on_the_subclass_alone(engine):
    INHERITED.apply()

    assert engine.Model().load("w") == ("loaded", "w", True) * 2
    assert engine.Base().load("w") == ("loaded", "w", True)


def test_an_inherited_method_is_not_frozen_onto_the_subclass(engine):
    INHERITED.apply()()

    engine.Base.load = lambda self, weights: "newer"

    assert engine.Model().load("w") == "newer"


def test_a_new_method_is_called_as_it_is(engine):
    ADDED.apply()

    assert engine.Model().reload("a/path") == "a/path"


def test_a_new_method_is_not_put_over_one_that_is_there(engine):
    engine.Base.reload = lambda self: None

    with pytest.raises(PatchError, match=r"Model\.reload exists already"):
        ADDED.apply()


def test_a_new_method_that_was_taken_out_can_be_added_again(engine):
    ADDED.apply()()
    ADDED.apply()

    assert engine.Model().reload("a/path") == "a/path"


@pytest.mark.parametrize(
    "target",
    [
        "fake_engine_that_is_not_there:process",
        "fake_engine.sub:process",
        "fake_engine:Modell.load",
        "fake_engine:Model.limit.deeper.still",
    ],
)
def test_a_seam_whose_owner_is_missing_says_what_to_install(engine, target):
    with pytest.raises(PatchError, match="install a tested one, or unset FLASHRL_CONFIG"):
        PatchPoint(target, expects=(), wrapper=doubled).apply()


def test_a_missing_seam_is_refused(engine):
    with pytest.raises(PatchError, match=r"fake_engine:procezz is nothing"):
        PatchPoint("fake_engine:procezz", expects=(), wrapper=doubled).apply()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("limit", "int"),
        ("version", "staticmethod"),
        ("make", "classmethod"),
        ("size", "property"),
    ],
)
def test_what_is_no_plain_function_is_refused(engine, name, kind):
    before = dict(vars(engine.Model))

    with pytest.raises(PatchError, match=f"Model.{name} is {kind}, but .* a plain function"):
        PatchPoint(f"fake_engine:Model.{name}", expects=(), wrapper=doubled).apply()

    assert dict(vars(engine.Model)) == before


@pytest.mark.parametrize(
    "expects", [(), ("model",), ("config", "model"), ("model", "config", "device")]
)
def test_a_seam_of_another_shape_is_refused_and_left_alone(engine, expects):
    original = engine.process

    with pytest.raises(PatchError, match=r"takes \('model', 'config'\).*install a tested one"):
        PatchPoint("fake_engine:process", expects=expects, wrapper=doubled).apply()

    assert engine.process is original


def test_a_seam_is_wrapped_once(engine):
    PROCESS.apply()

    with pytest.raises(PatchError, match="wrapped by flashquant already"):
        PROCESS.apply()


def test_a_check_changes_nothing(engine):
    before = dict(vars(engine))

    PROCESS.check()

    assert dict(vars(engine)) == before


def test_undo_refuses_when_someone_wrapped_over_it(engine):
    undo = PROCESS.apply()
    ours = engine.process
    engine.process = theirs = lambda *args: ours(*args)

    with pytest.raises(PatchError, match=r"cannot unpatch fake_engine:process.*Undo theirs first"):
        undo()

    assert engine.process is theirs


def test_undo_works_after_they_undid_theirs(engine):
    original = engine.process
    undo = PROCESS.apply()
    ours, engine.process = engine.process, SimpleNamespace()
    with pytest.raises(PatchError):
        undo()

    engine.process = ours
    undo()

    assert engine.process is original


def test_points_are_undone_newest_first(engine):
    before = dict(vars(engine.Base)), dict(vars(engine.Model))
    undos = [LOAD.apply(), ADDED.apply()]

    for undo in reversed(undos):
        undo()

    assert (dict(vars(engine.Base)), dict(vars(engine.Model))) == before


ENDING_OPEN = PatchPoint("fake_engine:Base.load", expects=("self", "weights", ...), wrapper=doubled)


@pytest.mark.parametrize("tail", ["", ", strict=True", ", strict=True, *rest, **more"])
def test_an_open_end_stands_for_whatever_is_passed_through(engine, tail):
    exec(f"def load(self, weights{tail}): return ('loaded', weights)", found := {})
    engine.Base.load = found["load"]

    ENDING_OPEN.apply()

    assert engine.Base().load("w") == ("loaded", "w") * 2


@pytest.mark.parametrize("parameters", ["self", "self, strict", "weights, self"])
def test_an_open_end_still_has_a_beginning(engine, parameters):
    exec(f"def load({parameters}): ...", found := {})
    engine.Base.load = found["load"]

    with pytest.raises(PatchError, match="written against"):
        ENDING_OPEN.check()


@pytest.mark.parametrize(
    ("within", "versions"),
    [
        ("", {"0.27.1", "0.31.0", "0.31.0+cpu", "0.32.0", "0.32.1rc1"}),
        (">=0.32", {"0.32.0", "0.32.1rc1"}),
        ("<0.32", {"0.27.1", "0.31.0", "0.31.0+cpu"}),
    ],
)
def test_a_point_says_in_which_versions_it_is(within, versions):
    point = PatchPoint("fake_engine:process", expects=(), wrapper=doubled, within=within)
    all_of_them = ("0.27.1", "0.31.0", "0.31.0+cpu", "0.32.0", "0.32.1rc1")

    assert {version for version in all_of_them if point.is_in(version)} == versions


@pytest.mark.parametrize("target", ["fake_engine:newer", "fake_engine.newer:process"])
def test_a_seam_of_other_versions_may_be_missing(engine, target):
    PatchPoint(target, expects=(), wrapper=doubled, within=">=9").check_absent()


def test_a_seam_of_other_versions_that_is_there_is_not_passed_over(engine):
    point = PatchPoint("fake_engine:process", expects=(), wrapper=doubled, within=">=9")

    with pytest.raises(PatchError, match=r"process is there, .* in vllm>=9 only"):
        point.check_absent()
