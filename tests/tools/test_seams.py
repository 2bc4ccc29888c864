"""What `tools.next_vllm` says of a release is read from its sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.seams import Sources, difference

OLD = """
class Worker:
    def sleep(self, level):
        return level

if True:
    def load(model):
        return model
"""


@pytest.fixture
def old(tmp_path: Path) -> Sources:
    return sources(tmp_path / "old", worker=OLD)


def sources(root: Path, **modules: str) -> Sources:
    (root / "vllm").mkdir(parents=True)
    for name, text in modules.items():
        (root / "vllm" / f"{name}.py").write_text(text)
    return Sources(root)


def test_the_text_of_a_seam_is_found_also_under_an_if(old: Sources):
    assert old.of("vllm.worker:Worker.sleep") == "def sleep(self, level):\n        return level"
    assert old.of("vllm.worker:load") == "def load(model):\n        return model"


@pytest.mark.parametrize("target", ["vllm.none:load", "vllm.worker:none", "vllm.worker:Worker.no"])
def test_what_is_not_defined_has_no_text(old: Sources, target: str):
    assert old.of(target) is None


def test_a_changed_body_is_shown_and_an_unchanged_one_is_not(old: Sources, tmp_path: Path):
    new = sources(tmp_path / "new", worker=OLD.replace("return level", "return -level"))

    assert "+        return -level" in difference("vllm.worker:Worker.sleep", old, new)
    assert difference("vllm.worker:load", old, new) == ""


def test_a_seam_that_moved_is_found_where_it_stands_now(tmp_path: Path):
    new = sources(tmp_path / "new", worker="", gpu=OLD, other="class Other:\n    def sleep(s): 0\n")

    assert list(new.elsewhere("vllm.worker:Worker.sleep")) == ["vllm.gpu:Worker.sleep"]
    assert list(new.elsewhere("vllm.worker:load")) == ["vllm.gpu:load"]
