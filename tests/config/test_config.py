"""FLASHRL_CONFIG: what it may say, and how it is told that it may not."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from flashquant.config.schema import (
    FlashConfig,
    RolloutConfig,
    config_from_env,
    load_config,
)
from flashquant.config.schemes import NAMES, SCHEMES
from flashquant.errors import ConfigError

# What FlashRL's own `setup` writes for int8, followed by `setup -a --fn bf16`.
FLASHRL_FILE = """\
configs:
- distributed_executor_backend: external_launcher
  fn: int8
  load_format: auto
  model: RedHatAI/Qwen2.5-0.5B-Instruct-quantized.w8a8
  profile: /root/profile.0_5b.pt
- distributed_executor_backend: external_launcher
  fn: bf16
  load_format: dummy
"""


@pytest.fixture
def write(tmp_path):
    """A function that writes a YAML file and returns its path as text."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "rollout.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("fp8", "fp8_vllm"),
        ("fp8_vllm", "fp8_vllm"),
        ("fp8_fast", "fp8_vllm"),
        ("fp8_vllm_fast", "fp8_vllm"),
        ("fp8_tensor", "fp8_tensor"),
        ("fp8_channel", "fp8_channel"),
        ("fp8_block", "fp8_block"),
        ("int8", "int8"),
        ("int8_fast", "int8"),
        ("int8_wo_prune", "int8"),
        ("int8_prune", "int8_prune"),
        ("bf16", "bf16"),
    ],
)
def test_a_name_stands_for_one_scheme(name, scheme):
    config = load_config(name)

    assert [entry.scheme for entry in config.configs] == [scheme]
    assert config.source == name


def test_every_scheme_is_its_own_name():
    assert all(NAMES[name].name == name for name in SCHEMES)


def test_a_flashrl_file_loads_as_it_is(write):
    path = write(FLASHRL_FILE)

    config = load_config(path)

    assert config.source == path
    assert config.configs[0] == RolloutConfig(
        fn="int8",
        model="RedHatAI/Qwen2.5-0.5B-Instruct-quantized.w8a8",
        profile="/root/profile.0_5b.pt",
        load_format="auto",
        distributed_executor_backend="external_launcher",
    )


def test_a_flashrl_file_may_list_what_to_preserve_and_ignore(write):
    entry = load_config(
        write(
            "configs:\n"
            "- {fn: fp8_vllm, quantization: fp8,"
            " module_attribute_to_preserve: [workspace], params_to_ignore: [q_scale]}\n"
        )
    ).configs[0]

    assert entry.module_attribute_to_preserve == ("workspace",)
    assert entry.params_to_ignore == ("q_scale",)


def test_an_entry_without_fn_is_int8_as_in_flashrl(write):
    assert load_config(write("configs: [{model: some/model}]")).configs[0].scheme == "int8"


def test_ranks_take_the_entries_in_turn(write):
    config = load_config(write(FLASHRL_FILE))

    assert [config.for_rank(rank).fn for rank in range(5)] == [
        "int8",
        "bf16",
        "int8",
        "bf16",
        "int8",
    ]


def test_a_negative_rank_is_refused():
    with pytest.raises(ConfigError, match="ranks count from 0"):
        load_config("fp8").for_rank(-1)


def test_a_config_is_frozen():
    entry = load_config("fp8").configs[0]

    with pytest.raises(ValueError, match="frozen"):
        entry.fn = "bf16"


def test_a_path_may_be_relative_or_start_at_home(write, monkeypatch, tmp_path):
    path = write(FLASHRL_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert load_config("rollout.yaml").source == path
    assert load_config("~/rollout.yaml").source == path


def test_a_misspelt_key_gives_one_line_with_file_entry_and_nearest_key(write):
    path = write("configs:\n- fn: bf16\n- fn: int8\n  quantisation: int8\n")

    with pytest.raises(ConfigError) as refused:
        load_config(path)

    assert str(refused.value) == (
        f"{path}, configs[1]: 'quantisation' is not a key of an entry; did you mean 'quantization'?"
    )


def test_an_unknown_fn_gives_one_line_with_the_nearest_name(write):
    path = write("configs: [{fn: int8_fastt}]")

    with pytest.raises(ConfigError) as refused:
        load_config(path)

    assert str(refused.value) == (
        f"{path}, configs[0].fn: 'int8_fastt' names no configuration; did you mean 'int8_fast'?"
    )


def test_a_misspelt_configs_gives_one_line(write):
    with pytest.raises(ConfigError, match=r"^[^\n]*'config' is not a key of the file; did you "):
        load_config(write("config: [{fn: int8}]"))


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "must be a mapping; write it as lines of `key: value`"),
        ("", "is empty, but must be a mapping"),
        ("- fn: int8", "must be a mapping"),
        ("fn: int8", "'fn' is not a key of the file; it is one of an entry, of which `configs` is"),
        ("{}", "has no key 'configs'; put the entries in a list under it"),
        ("configs: []", "at least one entry, such as `- fn: fp8`"),
        ("configs: {fn: int8}", "must be a list"),
        ("configs: [int8]", r"configs\[0\]: is 'int8' \(str\), but must be a mapping"),
        ("configs: [{fn: 8}]", r"configs\[0\]\.fn: is 8 \(int\), but must be text; put it in q"),
        ("configs: [{on: 8}]", "a key must be text; put it in quotes"),
        ("configs: [{params_to_ignore: q_scale}]", r"write it as \[first, second\]"),
        ("configs: [{model: ' '}]", "is blank; write a value, or leave the key out"),
        ("configs: [{fn: int8, quantization: fp8}]", "leave quantization out, or change fn"),
        ("configs: [{fn: bf16, quantization: fp8}]", "leave quantization out, or change fn"),
        ("configs: [{fn: fp8, scales: frozen}]", "leave scales out, or write fn: int8"),
        ("configs: [{fn: int4, scales: frozen}]", "has none to keep"),
        ("configs: [{kv_scales: kv.json}]", "write kv_cache: fp8, or leave kv_scales out"),
        ("configs: [{fn: bf16, quantize_towers: true}]", "leave it out, or change fn"),
        ("configs: [{quantize_towers: 1}]", "must be true or false"),
        ("configs: [{fn: int8, scales: fresh}]", r"is 'fresh' .* must be frozen or refreshed"),
        ("configs: [{fn: int8, profile: p.pt, load_format: dummy}]", "write load_format: auto"),
    ],
)
def test_an_impossible_file_is_told_what_to_write(write, text, remedy):
    with pytest.raises(ConfigError, match=remedy):
        load_config(write(text))


def test_every_problem_of_a_file_has_its_line_and_none_sends_to_a_website(write):
    path = write("configs:\n- {fn: 8, model: 3}\n- {zz: 1}\n")

    with pytest.raises(ConfigError) as refused:
        load_config(path)

    lines = str(refused.value).splitlines()
    assert [line.startswith(path) for line in lines] == [True, True, True]
    assert "pydantic" not in str(refused.value)


def test_a_python_tag_is_refused_and_never_run(write, tmp_path):
    trace = tmp_path / "ran"

    with pytest.raises(ConfigError, match="text and lists only"):
        load_config(write(f"configs: !!python/object/apply:os.mkdir ['{trace}']"))

    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    [b"\x80abc", "configs: [", "[" * 100_000, "day: 2024-13-45", "? [1]\n: 2"],
    ids=["not text", "unclosed", "bottomless", "no such month", "list as key"],
)
def test_broken_yaml_is_a_config_error(write, text):
    with pytest.raises(ConfigError, match="is not plain YAML"):
        load_config(write(text))


def test_an_alias_bomb_is_refused_in_few_words(write):
    nine = "[" + "*{0}, " * 9 + "]"
    layers = "".join(f"{b}: &{b} {nine.format(a)}\n" for a, b in pairwise("abcdefgh"))

    with pytest.raises(ConfigError) as refused:
        load_config(write(f"a: &a [x]\n{layers}configs: [{{fn: *h}}]"))

    assert len(str(refused.value)) < 3000


def test_a_file_over_a_mebibyte_is_not_a_configuration(write):
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_config(write(b"#" * ((1 << 20) + 1)))


def test_names_in_a_file_hold_from_anywhere(write, tmp_path, monkeypatch):
    """What lies beside the file is meant; `~` is whoever started the engine."""
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "w8a8").mkdir()
    (tmp_path / "p.pt").touch()
    text = "configs: [{model: w8a8, profile: p.pt}, {model: org/w8a8@v1, profile: ~/p.pt}]"

    first, second = load_config(write(text)).configs

    assert (first.model, first.profile) == (str(tmp_path / "w8a8"), str(tmp_path / "p.pt"))
    assert (second.model, second.profile) == ("org/w8a8@v1", "/home/me/p.pt")


def test_a_name_that_leads_out_is_told_where_it_is_written(write):
    path = write("configs: [{fn: bf16}, {fn: int8, profile: ../p.pt}]")

    with pytest.raises(ConfigError) as refused:
        load_config(path)

    assert str(refused.value).startswith(f"{path}, configs[1].profile: '../p.pt' has '..' in it")


def test_scales_are_refreshed_unless_the_file_says_otherwise(write):
    text = "configs: [{fn: int8}, {fn: int8, scales: frozen}]"

    assert [entry.scales for entry in load_config(write(text)).configs] == ["refreshed", "frozen"]


@pytest.mark.parametrize(
    ("reference", "remedy"),
    [
        ("", "Write a name"),
        ("  ", "Write a name"),
        ("int_8", "did you mean 'int8'"),
        ("FP8", "did you mean 'fp8'"),
        ("zzzz", "known: bf16, fp8"),
        ("./no/such.yaml", "Write a path that exists"),
        ("x" * 5000, "known: bf16, fp8"),
        ("a\0b", "known: bf16, fp8"),
        ("/", "is a folder"),
        (os.devnull, "not a regular file"),
    ],
)
def test_a_reference_that_leads_nowhere_is_told_where_to_go(reference, remedy):
    with pytest.raises(ConfigError, match=remedy):
        load_config(reference)


@pytest.mark.parametrize("environ", [{}, {"FLASHRL_CONFIG": ""}])
def test_without_the_variable_there_is_no_config(environ):
    assert config_from_env(environ) is None


@pytest.mark.parametrize("said", ["off", "0", "none", "False"])
def test_who_writes_off_is_told_how_to_switch_it_off(said):
    with pytest.raises(ConfigError, match="to switch flashquant off, unset FLASHRL_CONFIG"):
        config_from_env({"FLASHRL_CONFIG": said})


def test_the_variable_is_read():
    config = config_from_env({"FLASHRL_CONFIG": "fp8_tensor"})

    assert config == FlashConfig(configs=(RolloutConfig(fn="fp8_tensor"),), source="fp8_tensor")


def test_a_wrong_variable_is_named_in_the_error():
    with pytest.raises(ConfigError, match=r"^FLASHRL_CONFIG: 'int9' is neither"):
        config_from_env({"FLASHRL_CONFIG": "int9"})


def test_reading_a_config_imports_neither_torch_nor_vllm():
    program = (
        "import sys; from flashquant.config.schema import load_config; load_config('fp8');"
        "sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False
    )

    assert done.returncode == 0
