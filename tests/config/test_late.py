"""The plugin is asked again, until FLASHRL_CONFIG says something."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest

from flashquant.config.late import ask_again


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM's loader of plugins, which does nothing the second time."""
    module = ModuleType("vllm.plugins")
    module.load_general_plugins = lambda: None
    monkeypatch.setitem(sys.modules, "vllm.plugins", module)
    monkeypatch.delenv("FLASHRL_CONFIG", raising=False)
    return module


def test_an_engine_that_begins_after_the_variable_was_set_is_patched_and_the_log_says_so(
    plugins: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once; an earlier one is left as it is."""
    asked: list[str] = []
    kept = plugins.load_general_plugins

    for _ in range(2):
        ask_again(lambda: asked.append("patch"), lambda: False)
    plugins.load_general_plugins()
    assert asked == []
    monkeypatch.setenv("FLASHRL_CONFIG", "int8")
    with caplog.at_level(logging.WARNING, "flashquant"):
        plugins.load_general_plugins()
        plugins.load_general_plugins()

    assert asked == ["patch"]
    (warning,) = caplog.messages
    assert "set after vLLM had loaded its plugins" in warning
    assert plugins.load_general_plugins is kept


def test_whoever_patched_by_hand_hears_nothing(
    plugins: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their engines are patched already."""
    ask_again(lambda: None, lambda: True)
    monkeypatch.setenv("FLASHRL_CONFIG", "int8")

    plugins.load_general_plugins()

    assert caplog.messages == []


def test_a_misspelt_configuration_stops_that_engine(
    plugins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would have stopped the first one."""
    import flashquant
    from flashquant.errors import ConfigError

    flashquant.patch_from_env()
    monkeypatch.setenv("FLASHRL_CONFIG", "int88")

    with pytest.raises(ConfigError, match="int8"):
        plugins.load_general_plugins()
