"""Every Python snippet of the pages, and of the docstrings of public functions, runs.

The blocks of a page run in order, in one namespace that has what the page takes for granted (`llm`,
`model`): NAMESPACES says what that is. A block that stands anywhere else, or wants a name that its
page is not given, fails. What cannot run here is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import flashquant
from flashquant.config import schemes
from tests.docs import pages
from tests.docs.pages import ROOT, Block
from tests.engine.serving import Serving, serve
from tests.support import isa
from tools.models.policies import Policies

BY_NAME = importlib.import_module("flashquant.schemes.by_name")
BLOCKS = pages.of("python")
SEQUENCES, TOKENS, VOCABULARY = 2, 6, 50

# By what a block begins with: why it is not run, and what is looked at instead.
NOT_RUN = {
    "from trl import": "wants TRL; its settings are those of the example that `tests/stacks` runs",
    "from vllm.distributed": "wants a server; `tests/engine/test_transfer.py` has one",
}
# What stands for `...`, which a reader fills in.
FILLED_IN = {
    "docs/loss-correction.md": {
        "LLM(...,": "LLM('model',",
        "    ...\n": "    loss = logits.logsumexp(-1).sum()\n",
        "b.logprobs, ...,": "b.logprobs, old_logprobs=b.old, rollout_logprobs=b.rollout, "
        "advantages=b.advantages, mask=b.mask,",
    },
}

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return Policies(tmp_path_factory.mktemp("policies"), "qwen2")


@pytest.fixture
def given(policies: Policies, tmp_path: Path) -> SimpleNamespace:
    return SimpleNamespace(policies=policies, folder=tmp_path)


def served(given: SimpleNamespace, **options: Any) -> Serving:
    return serve(given.policies.bf16("a"), options.pop("config", "int8"), **options)


def trained(given: SimpleNamespace) -> torch.nn.Module:
    """The trainer's model."""
    return AutoModelForCausalLM.from_pretrained(given.policies.bf16("b"), dtype=torch.bfloat16)


def with_engine(given: SimpleNamespace) -> dict[str, Any]:
    """What a page about a loop has: an engine, a trainer, and a checkpoint."""
    model, path = trained(given), given.policies.bf16("b")
    names = {"model": model, "trainer_model": model, "policy": model, "path": str(path)}
    return {"flashquant": flashquant, "llm": served(given).llm, **names}


def quickstart(given: SimpleNamespace) -> dict[str, Any]:
    """The first line of the page is about the engine's own model."""
    name, tensor = next(iter(given.policies.tensors("b").items()))
    names = with_engine(given)
    return {**names, "model": served(given).model, "name": name, "tensor": tensor}


def deltas(given: SimpleNamespace) -> dict[str, Any]:
    weights = given.policies.tensors("b")
    return {**with_engine(given), "weights_of_the_checkpoint": weights}


def cache(given: SimpleNamespace) -> dict[str, Any]:
    file = given.folder / "cached.yaml"
    file.write_text("configs:\n  - {fn: int8, kv_cache: fp8}\n")
    llm = served(given, config=str(file)).llm
    return {**with_engine(given), "llm": llm, "prompts": [[1, 2, 3, 4] * 4]}


def prepared(given: SimpleNamespace) -> dict[str, Any]:
    """An engine that is awaited; `tests/engine/test_processes.py` has a real `AsyncLLM`."""

    async def awaited(target: Any, weights: Any, **options: Any) -> Any:
        return flashquant.reload_weights(target, weights, **options)

    names = with_engine(given)
    return {**names, "engine": names["llm"], "flashquant": SimpleNamespace(reload_weights=awaited)}


def batch() -> SimpleNamespace:
    shape = (SEQUENCES, TOKENS)
    return SimpleNamespace(
        logprobs=torch.full(shape, -1.0, requires_grad=True),
        old=torch.full(shape, -1.1),
        rollout=torch.full(shape, -1.2),
        advantages=torch.ones(shape),
        mask=torch.ones(shape, dtype=torch.bool),
    )


def loss(given: SimpleNamespace) -> dict[str, Any]:
    """Batches, a tiny mixture of experts, and what vLLM returns beside tokens."""
    b, mixture = batch(), experts()
    config = mixture.config
    routed = torch.zeros(TOKENS, config.num_hidden_layers, config.num_experts_per_tok).long()
    routed[..., 1] = 1
    output = SimpleNamespace(
        routed_experts=routed.numpy(), sampling_mask=[[1, 2, 3]] * (TOKENS - 1)
    )
    return {
        "LLM": known_to_vllm,
        "advantages": b.advantages,
        "attention_mask": torch.ones(SEQUENCES, TOKENS, dtype=torch.long),
        "group": None,
        "input_ids": torch.ones(SEQUENCES, TOKENS, dtype=torch.long),
        "log": lambda metrics: None,
        "logits": torch.zeros(SEQUENCES, TOKENS, VOCABULARY, requires_grad=True),
        "logprobs": b.logprobs,
        "mask": b.mask,
        "micro_batches": [batch(), batch()],
        "model": mixture,
        "old_logprobs": b.old,
        "outputs": [output] * SEQUENCES,
        "rollout_logprobs": b.rollout,
        "world_size": 1,
    }


def known_to_vllm(model: str, **options: Any) -> None:
    """No engine, but its arguments."""
    from vllm import EngineArgs

    assert options.keys() <= inspect.signature(EngineArgs).parameters.keys()


def experts() -> torch.nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


NAMESPACES: dict[str, Callable[[SimpleNamespace], dict[str, Any]]] = {
    "README.md": lambda given: {**with_engine(given), **loss(given)},
    "docs/adding-a-scheme.md": lambda given: {**vars(schemes), **vars(BY_NAME)},
    "docs/delta.md": deltas,
    "docs/errors.md": with_engine,
    "docs/kv-cache.md": cache,
    "docs/loss-correction.md": loss,
    "docs/prepared-updates.md": prepared,
    "docs/quickstart.md": quickstart,
    "docs/stacks/others.md": with_engine,
}


def run(code: str, namespace: dict[str, Any], where: str) -> None:
    """Execute a snippet, which may await."""
    compiled = compile(code, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if inspect.iscoroutine(result := eval(compiled, namespace)):
        asyncio.run(result)


def is_run(block: Block) -> bool:
    return not block.text.startswith(tuple(NOT_RUN))


def of_page(page: str) -> list[Block]:
    return [block for block in BLOCKS if block.page == page and is_run(block)]


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if is_run(block)}))
def test_the_snippets_of_a_page_run(page: str, given: SimpleNamespace) -> None:
    if page == "docs/kv-cache.md" and isa.breaks_fp8():
        pytest.skip(isa.FP8_IS_LOST)
    namespace = NAMESPACES[page](given)
    for block in of_page(page):
        code = block.text.replace("/shared/run-7", str(given.folder / "run-7"))
        for shown, meant in FILLED_IN.get(page, {}).items():
            code = code.replace(shown, meant)
        run(code, namespace, str(block))


@pytest.mark.parametrize("block", [b for b in BLOCKS if not is_run(b)], ids=str)
def test_a_snippet_that_is_not_run_is_of_names_that_are_there(block: Block) -> None:
    """Its imports, as far as they are here, and the names of arguments of what it calls."""
    if block.text.startswith("from trl import"):
        example = calls((ROOT / "examples" / "trl_grpo.py").read_text())["GRPOConfig"]
        assert calls(block.text)["GRPOConfig"].items() <= example.items()
        return
    tree = ast.parse(block.text)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
    namespace: dict[str, Any] = {}
    run(ast.unparse(ast.Module(imports, [])), namespace, str(block))
    for name, given_names in calls(block.text).items():
        if "." not in name and name in namespace:
            known = inspect.signature(namespace[name]).parameters
            assert given_names.keys() <= known.keys()


def calls(code: str) -> dict[str, dict[str, str]]:
    """The arguments that are given by name, as they are written, by what is called."""
    return {
        ast.unparse(node.func): {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
    }


EXAMPLES = [
    (name, example)
    for name in flashquant.__all__
    if inspect.isfunction(function := getattr(flashquant, name))
    for example in doctest.DocTestParser().get_examples(function.__doc__ or "")
]


@pytest.fixture
def patched_again() -> Iterator[None]:
    """`unpatch()` is one of the examples."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    flashquant.patch()


@pytest.mark.usefixtures("patched_again")
def test_the_examples_of_docstrings_run_and_say_what_is_said(
    given: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashquant.sender import Sender

    namespace = {**with_engine(given), "os": os, "Sender": Sender}
    llm = namespace["llm"]
    namespace |= {"LLM": lambda model: llm, "async_llm": llm, "prompt": [1, 2], "batch": []}
    for name, example in EXAMPLES:
        if not_here(name, example.source):
            continue
        if name == "apply_delta":
            namespace["sender"] = Sender(flashquant.manifest(llm), delta=True)
        capsys.readouterr()
        shown = shown_by(example.source, namespace, name)
        said = capsys.readouterr().out + ("" if shown is None else f"{shown!r}\n")
        assert shape(said).startswith(shape(example.want)) or not example.want, name


def not_here(name: str, source: str) -> bool:
    """The scales of a cache in fp8, and an engine that is awaited: other tests have those."""
    return name == "kv_scales" or "await " in source


def shown_by(source: str, namespace: dict[str, Any], where: str) -> Any:
    """What an interpreter would show of a line."""
    try:
        return eval(compile(source, where, "eval"), namespace)
    except SyntaxError:
        run(source, namespace, where)
        return None


def shape(said: str) -> str:
    """Without numbers, and without what stands for more."""
    said = re.sub(r"\b[0-9a-f]{12}\b", "HEX", said)
    return re.sub(r"\d+(\.\d+)?", "N", said).replace("(...)", "").strip()
