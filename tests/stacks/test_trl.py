"""TRL 1.16.0: GRPO with the colocated engine, all of it TRL's own code.

The engine is compiled, as TRL starts it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from examples.demo import smollm2
from tests import tiny_models
from tests.stacks import overlays
from tests.stacks.running import run

pytestmark = overlays.needed("trl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two layers of SmolLM2: a real tokenizer, a tied head, and quick to compile."""
    path = tmp_path_factory.mktemp("trl") / "model"
    shutil.copytree(smollm2.checkpoint(smollm2.default_cache_dir()), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    kept = {
        name: tensor
        for name, tensor in tiny_models.tensors(path).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < 2
    }
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("int8", "bfloat16"), ("int8", "float32"), ("fp8_vllm", "bfloat16")]
)
def test_a_step_of_grpo_rolls_out_the_policy_it_has_just_made(
    model: Path, tmp_path: Path, scheme: str, dtype: str
) -> None:
    """float32 is what TRL trains in where it is not told otherwise; so are its pushes then."""
    answer = run(
        "trl",
        "trl_grpo",
        model,
        dtype,
        tmp_path,
        scheme=scheme,
        TORCHDYNAMO_DISABLE="0",  # TRL's engine is compiled; it has no setting for eager
        VLLM_CPU_KVCACHE_SPACE="1",
    )

    first, second = answer["generated with"]
    assert min(answer["gradients"]) > 0
    assert first == answer["started"]["digest"]
    assert second == answer["fresh on step 1"]["digest"] != first
    assert answer["after two steps"] == answer["fresh on step 1"]
    assert answer["synced"] == answer["fresh on step 2"] != answer["after two steps"]
