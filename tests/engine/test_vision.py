"""Vision-language models: a push equals a fresh start, images included; towers stay in bf16."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

import flashquant
from flashquant.errors import IncompleteUpdate, UnknownWeight, UnsupportedEngine
from flashquant.patches.seams.loading import session_of
from tests.engine import processes, serving, sights
from tests.engine.programs import seen
from tests.engine.serving import FP8_CHANNEL, choosing
from tools.models.tiny_models import tensors

pytestmark = pytest.mark.engine

SCHEMES = ["bf16", "int8", pytest.param("fp8_channel", marks=FP8_CHANNEL)]
ELSEWHERE = os.environ.get("FLASHQUANT_TEST_VISION") == "1"  # as `make vision` sets it
_KEPT: list[Any] = []  # vLLM's parallel state goes with the first engine that is collected


@pytest.fixture(scope="module", params=sights.SIGHTS if ELSEWHERE else sights.TESTED)
def policies(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """B differs from A everywhere."""
    if why := sights.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp(request.param)
    return {
        which: sights.make(request.param, folder / which, seed) for seed, which in enumerate("ab")
    }


def started(checkpoint: Path, config: str, *, caching: bool = False, **options: Any) -> Any:
    from vllm import LLM

    flashquant.patch()
    with mock.patch.dict(os.environ, FLASHRL_CONFIG=config), sights.understood():
        llm = LLM(str(checkpoint), **sights.options(enable_prefix_caching=caching, **options))
    _KEPT.append(llm)
    return llm


@cache
def fresh(checkpoint: Path, scheme: str, caching: bool) -> Any:
    """What an engine says that started there."""
    return seen.stands(started(checkpoint, scheme, caching=caching))


def expected(policies: dict[str, Path], scheme: str, caching: bool) -> list[Any]:
    a, b = (fresh(policies[which], scheme, caching) for which in "ab")
    assert a[0] != b[0]
    assert a[2] != b[2]
    assert a[2] != a[1]  # the image matters
    return [a, b, a, b, a]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("caching", [False, True], ids=["no prefix cache", "prefix cache"])
def test_an_engine_in_this_process_sees_as_a_fresh_one(
    policies: dict[str, Path], scheme: str, caching: bool
) -> None:
    """By path, by a trainer's names, a tensor a call; after words, and the same image again."""
    llm = started(policies["a"], scheme, caching=caching)

    told = seen.converse(llm, policies["a"], policies["b"])

    assert told == expected(policies, scheme, caching)
    assert torch.get_num_threads() == 1  # or engines are slow beside each other


@pytest.mark.skipif(not ELSEWHERE, reason="a minute a model: `make vision` does this")
def test_engines_in_other_processes_see_as_fresh_ones(policies: dict[str, Path]) -> None:
    schemes = ["bf16", "int8", *(["fp8_channel"] if serving.BY_ROW == "fp8_channel" else [])]

    told = processes.run(
        "seen",
        policies["a"],
        policies["b"],
        *schemes,
        FLASHRL_CONFIG=schemes[0],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )

    for scheme in schemes:
        assert told[scheme] == [expected(policies, scheme, caching) for caching in (False, True)]


@pytest.mark.parametrize("scheme", SCHEMES[:2])
def test_the_text_tower_alone_is_a_part_and_says_so(
    policies: dict[str, Path], scheme: str, tmp_path: Path
) -> None:
    """By the names of a live model; the tower that sees, and nothing else, stays as it was."""
    live = sights.live(policies["b"])
    text = {n: t for n, t in live.items() if "language_model" in n or n.startswith("lm_head")}
    assert 0 < len(text) < len(live)
    mixed = tmp_path / "mixed"
    shutil.copytree(policies["a"], mixed)
    both = tensors(policies["a"]) | {
        name: tensor for name, tensor in tensors(policies["b"]).items() if not sees(name)
    }
    save_file(both, mixed / "model.safetensors", metadata={"format": "pt"})
    llm = started(policies["a"], scheme)
    a = seen.stands(llm)

    with pytest.raises(IncompleteUpdate, match=r"without \d+ of the engine's parameters: "):
        flashquant.reload_weights(llm, text)
    assert seen.stands(llm) == a
    report = flashquant.reload_weights(llm, text, strict=False)

    assert report.tensors == len(text)
    assert seen.stands(llm) == seen.stands(started(mixed, scheme))


@pytest.fixture
def connectors() -> Iterator[None]:
    """vLLM has one KV connector a process, which every later engine would take for its own."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    yield
    ensure_kv_transfer_shutdown()


def connected(checkpoint: Path, keys: Path, *, caching: bool) -> Any:
    """An engine that keeps keys and values of prompts in a folder, too."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    from tests.engine.programs import dropping

    ensure_kv_transfer_shutdown()
    connector = dropping.connected(str(keys))
    return started(checkpoint, "int8", caching=caching, kv_transfer_config=connector, block_size=32)


@pytest.mark.usefixtures("connectors")
@pytest.mark.parametrize("policies", ["qwen2.5-vl"], indirect=True)
@pytest.mark.parametrize("caching", [False, True], ids=["no prefix cache", "prefix cache"])
def test_keys_of_an_image_that_a_connector_keeps_go_with_a_push(
    policies: dict[str, Path], caching: bool, tmp_path: Path
) -> None:
    """Until then the same image is answered from them."""
    prompt = sights.prompt()
    prompt["prompt_token_ids"] += range(29, 89)  # more than a block
    fresh = connected(policies["b"], tmp_path / "b", caching=caching)
    b = [seen.said(fresh, prompt) for _ in range(2)]
    llm = connected(policies["a"], tmp_path / "a", caching=caching)
    a = [seen.said(llm, prompt) for _ in range(2)]
    assert any((tmp_path / "a").iterdir())

    flashquant.reload_weights(llm, policies["b"])

    assert not (tmp_path / "a").exists()
    assert [seen.said(llm, prompt) for _ in range(2)] == b != a


def sees(name: str) -> bool:
    """Whether a weight is of the tower, or of what follows it."""
    return sights.in_tower(name) or any(w in name for w in ("projector", "image_newline"))


def test_names_that_vllm_does_not_take_are_refused_with_the_nearest(
    policies: dict[str, Path],
) -> None:
    """Of the text tower by itself, as a trainer of that alone has it."""
    llm = started(policies["a"], "int8")
    before = flashquant.status(llm).digest
    name = "layers.0.self_attn.q_proj.weight"
    tensor = next(t for n, t in tensors(policies["b"]).items() if n.endswith(name))

    with pytest.raises(UnknownWeight, match=rf"'{name}'.*Did you mean '.*{name}'"):
        flashquant.reload_weights(llm, {name: tensor})

    assert flashquant.status(llm).digest == before


def linears(llm: Any) -> dict[str, torch.dtype]:
    """The dtype in which each linear layer's weight is stored, by its name in the model."""
    model = llm.apply_model(lambda model: model)[0]
    stored = session_of(model)._engine.stored
    return {k: tensor.dtype for k, tensor in stored.items() if tensor.dim() == 2}


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_a_tower_stays_in_bf16_and_the_log_says_so(
    policies: dict[str, Path], scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it, and nothing else; for it is marked by vLLM, whatever it is called."""
    with caplog.at_level(logging.INFO, "flashquant"):
        found = linears(started(policies["a"], scheme))

    assert {dtype for k, dtype in found.items() if sights.in_tower(k)} == {torch.bfloat16}
    rest = {dtype for k, dtype in found.items() if k.startswith("language_model.model.layers")}
    assert torch.bfloat16 not in rest
    (line,) = [r.message for r in caplog.records if r.name.endswith("towers")]
    assert re.search(r"stay in bf16: vis\w+ \(", line)
    assert "quantize_towers: true" in line


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_status_lists_the_layers_of_towers_and_why(policies: dict[str, Path], scheme: str) -> None:
    """By their names in the checkpoint; what is no linear layer is not among them."""
    others = re.compile(r"norm|ln_q|pos_embed|patch_embed|_embedding")
    names = {name.rpartition(".")[0] for name in tensors(policies["a"])}
    linear = [name for name in names if sights.in_tower(name) and not others.search(name)]

    status = flashquant.status(started(policies["a"], scheme))

    assert status.in_bf16 == dict.fromkeys(linear, "tower")
    assert f"{len(status.in_bf16)} of towers in bf16 (" in str(status)


def test_flashrls_list_does_not_quantize_the_towers_that_it_lists(
    policies: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It lists every linear layer; and what it lists of towers is quantized where that is asked."""
    listed = [n for n in tensors(policies["a"]) if ".mlp." in n and n.endswith("_proj.weight")]
    towers = [n for n in tensors(policies["a"]) if sights.in_tower(n)]
    listed += [n for n in towers if re.search(r"attn\.\w+\.weight$", n)]
    torch.save(listed, tmp_path / "profile.pt")
    config = tmp_path / "list.yaml"
    entry = f"fn: fp8_channel, profile: {tmp_path / 'profile.pt'}"
    config.write_text(f"configs:\n  - {{{entry}}}\n")

    with caplog.at_level(logging.WARNING, "flashquant"):
        left = flashquant.status(started(policies["a"], str(config))).in_bf16
    config.write_text(f"configs:\n  - {{{entry}, quantize_towers: true}}\n")
    asked = flashquant.status(started(policies["a"], str(config))).in_bf16

    assert {why for name, why in left.items() if sights.in_tower(name)} == {"keep", "tower"}
    assert "quantize_towers: true" in caplog.text
    assert left.keys() - asked.keys() == {n.removesuffix(".weight") for n in listed} & left.keys()
    assert set(asked.values()) == {"keep"}


@pytest.mark.parametrize("policies", ["qwen2.5-vl", "qwen3-vl"], indirect=True)
def test_a_width_that_no_kernel_holds_is_refused_by_layer_or_kept(
    policies: dict[str, Path], tmp_path: Path
) -> None:
    """Blocks of fp8 are multiplied 32 rows at a time here, and the tower has layers of 108.

    Of SigLIP's, the tower of the others, vLLM leaves such layers in bf16 by itself.
    """
    file = tmp_path / "towers.yaml"
    entry = "fn: fp8_block, quantize_towers: true"

    with choosing("amx"):
        file.write_text(f"configs:\n  - {{{entry}}}\n")
        with pytest.raises(
            UnsupportedEngine, match=r"^visual\.blocks\.0\.mlp\.\w+ .* rows.*`keep`"
        ):
            started(policies["a"], str(file))
        file.write_text(f"configs:\n  - {{{entry}, keep: ['*visual.blocks.*.mlp.*']}}\n")
        status = flashquant.status(started(policies["a"], str(file)))

    assert set(status.in_bf16.values()) == {"keep"}
    assert all(".mlp." in name for name in status.in_bf16)


def test_a_tower_is_quantized_where_that_is_asked(
    policies: dict[str, Path], tmp_path: Path
) -> None:
    """Then, too, a push equals a fresh start."""
    config = tmp_path / "towers.yaml"
    config.write_text("configs:\n  - {fn: int8, quantize_towers: true}\n")
    llm = started(policies["a"], str(config))
    assert torch.int8 in {d for k, d in linears(llm).items() if sights.in_tower(k)}

    told = seen.converse(llm, policies["a"], policies["b"])

    assert told == expected(policies, str(config), caching=False)
