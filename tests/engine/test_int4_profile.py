"""int4 through a profile: groups and smoothing that were chosen once, for every push."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import flashquant
from flashquant.config.schemes import SCHEMES
from flashquant.errors import ConfigError, MisfitTensor, ProfileError
from flashquant.profiles import Entry, Profile, save_profile
from flashquant.profiles.making import Checkpoint, profile_of
from flashquant.profiles.making.calibrate import calibrate
from flashquant.schemes import DEFINITIONS
from flashquant.sender import Sender
from tests.engine.kernels import want_int4
from tests.engine.serving import Serving, serve
from tests.engine.test_doors import DOORS, Weights
from tests.engine.test_reload_equals_restart import WAYS, Push
from tools.models import tiny_models
from tools.models.policies import Policies

pytestmark = pytest.mark.engine

TEXT = " ".join(f"w{number * 7 % 1000}" for number in range(1200))
DOWN = "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True)
class Files:
    """Two policies, and the profile of the first in each scheme."""

    policies: Policies

    def config(self, scheme: str, profile: str = "", **entry: object) -> str:
        name = f"{scheme}-{profile}{len(entry)}.yaml"
        named = f"{profile or scheme}.safetensors"
        written = {"fn": scheme, "profile": named, **entry}
        path = self.policies.folder / name
        path.write_text(json.dumps({"configs": [written]}))
        return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    want_int4("int4")
    policies = Policies(tmp_path_factory.mktemp("policies"), "llama")
    start = tiny_models.add_tokenizer(policies.bf16("a"))
    shutil.copytree(start, policies.folder / "llama-b")  # a profile is refused for other models
    dice = torch.Generator().manual_seed(3)
    moved = {
        name: (tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=dice))).to(tensor.dtype)
        for name, tensor in tiny_models.tensors(start).items()
    }
    save_file(moved, policies.bf16("b") / "model.safetensors", metadata={"format": "pt"})
    source = Checkpoint(start)
    rows = Entry(torch.int8, None, None, torch.ones(len(moved[DOWN])))
    save_profile(Profile({DOWN: rows}, "here"), policies.folder / "int8.safetensors")
    for scheme in ("int4", "int4_g32"):
        made = calibrate(source, [TEXT], group=SCHEMES[scheme].group)
        layers = dict.fromkeys(made.layers)
        profile = profile_of(
            made.factors, source.items(), layers, scheme, scheme=scheme, held=made.held
        )
        save_profile(profile, policies.folder / f"{scheme}.safetensors")
    return Files(policies)


@pytest.fixture(scope="module", params=["int4", "int4_g32"])
def live(request: pytest.FixtureRequest, files: Files) -> Serving:
    return serve(files.policies.bf16("a"), files.config(request.param))


@pytest.fixture
def there(live: Serving, files: Files) -> Iterator[Serving]:
    """One that serves A, before and after."""
    yield live
    flashquant.reload_weights(live.llm, files.policies.tensors("a"))
    live.snapshot().assert_same(live.start)


def prepared(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, weights, prepare=True)


def whole(there: Serving, weights: Weights) -> None:
    flashquant.reload_weights(there.llm, weights)


def bundled(there: Serving, weights: Weights) -> None:
    flashquant.apply_delta(there.llm, Sender(flashquant.manifest(there.llm)).bundle(weights))


@pytest.mark.parametrize("push", [*DOORS, whole, prepared, bundled], ids=lambda door: door.__name__)
def test_what_arrives_by_a_door_equals_a_fresh_start(
    there: Serving, files: Files, push: Callable[[Serving, Weights], None]
) -> None:
    push(there, files.policies.tensors("b"))

    there.snapshot().assert_same(serve(files.policies.bf16("b"), there.scheme).start)


@pytest.mark.parametrize("push", WAYS, ids=lambda way: way.__name__)
def test_shards_in_any_order_equal_a_fresh_start(there: Serving, files: Files, push: Push) -> None:
    push(there.model, files.policies.tensors("b"))

    there.snapshot().assert_same(serve(files.policies.bf16("b"), there.scheme).start)


def test_it_is_nearer_to_bf16_than_without(live: Serving, files: Files) -> None:
    exact = serve(files.policies.bf16("a"), "bf16").start.outputs.logprobs
    scheme = json.loads(Path(live.scheme).read_text())["configs"][0]["fn"]

    def distance(other: Serving) -> float:
        pairs = zip(other.start.outputs.logprobs, exact, strict=True)
        prompts = [(torch.tensor(one[:39]), torch.tensor(two[:39])) for one, two in pairs]
        return sum(float((one - two).abs().mean()) for one, two in prompts)

    assert distance(live) < distance(serve(files.policies.bf16("a"), scheme))


def test_what_is_kept_is_smoothed_with_its_norm(files: Files) -> None:
    config = files.config("int4", keep=["*.q_proj", "*.k_proj", "*.v_proj"])
    live, fresh = (serve(files.policies.bf16(policy), config) for policy in "ab")
    exact, plain = (serve(files.policies.bf16("a"), name).start for name in ("bf16", "int4"))

    flashquant.reload_weights(live.llm, files.policies.tensors("b"))

    live.snapshot().assert_same(fresh.start)
    ours, theirs, wanted = (
        torch.tensor([prompt[:39] for prompt in said.outputs.logprobs])
        for said in (live.start, plain, exact)
    )
    assert (ours - wanted).abs().mean() < (theirs - wanted).abs().mean()


def test_codes_and_values_that_are_not_finite_are_refused(there: Serving, files: Files) -> None:
    weights = files.policies.tensors("b")
    codes, scales = DEFINITIONS["int4"](weights[DOWN])
    with pytest.raises(MisfitTensor, match="is quantized already"):
        whole(there, {**weights, DOWN: codes, f"{DOWN}_scale": scales})
    there.snapshot().assert_same(there.start)

    weights[DOWN][3, 5] = torch.nan
    with pytest.raises(MisfitTensor, match="holds NaN"):
        whole(there, weights)
    there.snapshot().assert_same(there.start)


@pytest.mark.parametrize(
    ("scheme", "profile"), [("int4", "int4_g32"), ("int4_g32", "int8"), ("int8", "int4")]
)
def test_a_profile_of_another_scheme_is_refused(files: Files, scheme: str, profile: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"is for {profile}, and fn '{scheme}' asks for {scheme}"
    ):
        _ = Serving(files.policies.bf16("a"), files.config(scheme, profile)).llm


def test_a_profile_of_another_model_stops_the_start(files: Files, tmp_path: Path) -> None:
    other = tiny_models.make("llama", 7, tmp_path / "other")

    with pytest.raises(ProfileError, match="it is another model"):
        _ = Serving(other, files.config("int4")).llm
