"""Calibrated int8 on the real engine: FlashRL's arithmetic to the bit, by every door.

What oneDNN holds shows no bytes, so codes are compared through an engine that was started on
the checkpoint that the arithmetic makes: its snapshot holds every one of them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import flashquant
from examples.demo import smollm2
from flashquant.errors import ConfigError, MisfitTensor, ProfileError
from flashquant.profiles import Base, Profile, fingerprint, load_profile, save_profile
from flashquant.profiles.making import Checkpoint, factors_of_twins, profile_of, write_w8a8
from flashquant.schemes import int8_channel
from flashquant.sender import Sender
from tests.engine.serving import Serving, serve
from tests.engine.test_doors import DOORS, Weights
from tests.engine.test_reload_equals_restart import buckets_cut_inside_qkv
from tools.models import flashrl, tiny_models

pytestmark = pytest.mark.engine


@dataclass(frozen=True)
class Files:
    """A bf16 policy, its W8A8 twin, the profile of the two, and what a trainer makes of it."""

    folder: Path
    bf16: Path
    w8a8: Path
    fields: flashrl.Fields
    moved: Weights

    def config(self, profile: str, **entry: str) -> str:
        entry = {"scales": "frozen", **entry}
        path = self.folder / f"{profile}{''.join(entry.values())}.yaml"
        return flashrl.config(path, fn="int8", model="w8a8", profile=profile, **entry)

    def expected(self) -> Path:
        """The checkpoint that FlashRL's arithmetic makes of the trainer's weights."""
        path = self.folder / "expected"
        if not path.exists():
            flashrl.make_expected(self.w8a8, self.moved, self.fields, path)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("calibrated")
    bf16 = tiny_models.make("qwen2", 0, folder / "bf16")
    w8a8 = flashrl.make_smoothed(bf16, folder / "w8a8")
    fields = flashrl.make_profile(bf16, w8a8)
    torch.save(fields, folder / "old.pt")
    stored = tiny_models.tensors(w8a8)
    name = "model.layers.1.mlp.down_proj.weight"
    base = Base(model=str(w8a8), fingerprint={name: fingerprint(stored[name])})
    old = load_profile(folder / "old.pt")
    save_profile(Profile(old.entries, old.source, base), folder / "new.safetensors")
    dice = torch.Generator().manual_seed(3)
    moved = {
        name: (tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=dice))).to(tensor.dtype)
        for name, tensor in tiny_models.tensors(bf16).items()
    }
    return Files(folder, bf16, w8a8, fields, moved)


@pytest.fixture(params=["old.pt", "new.safetensors"])
def live(request: pytest.FixtureRequest, files: Files) -> Serving:
    serving = serve(files.w8a8, files.config(request.param))
    flashquant.reload_weights(serving.llm, tiny_models.tensors(files.bf16))
    return serving


def test_a_calibrated_engine_starts_on_the_checkpoint_as_it_is(files: Files) -> None:
    live = serve(files.w8a8, files.config("old.pt"))

    live.start.assert_same(serve(files.w8a8, "int8").start)


def shuffled(live: Serving, weights: Weights) -> None:
    names = sorted(weights)
    random.Random(7).shuffle(names)
    for name in names:
        live.model.load_weights([(name, weights[name])])


def cut_inside_qkv(live: Serving, weights: Weights) -> None:
    buckets_cut_inside_qkv(live.model, weights)


def reload_weights(live: Serving, weights: Weights) -> None:
    flashquant.reload_weights(live.llm, weights)


@pytest.mark.parametrize(
    "push", [*DOORS, reload_weights, shuffled, cut_inside_qkv], ids=lambda door: door.__name__
)
def test_every_code_norm_and_scale_is_flashrls_arithmetic(
    live: Serving, files: Files, push: Callable[[Serving, Weights], None]
) -> None:
    """Norms and scales are read from the engine besides, and compared with the arithmetic."""
    push(live, files.moved)

    live.snapshot().assert_same(serve(files.expected(), "int8").start)
    held, stored = live.contents(), tiny_models.tensors(files.w8a8)
    for name in files.moved:
        if "layernorm" in name:
            expected = flashrl.quantize(name, files.moved[name], files.fields)
            assert torch.equal(held[name], expected)
            assert not torch.equal(expected, files.moved[name])
    down = "model.layers.1.mlp.down_proj.weight_scale"
    assert torch.equal(held[down], stored[down])


def test_smollm2_holds_flashrls_codes_to_the_bit(tmp_path: Path) -> None:
    """Real weights; packed memory is compared by the digests of what was packed."""
    source = smollm2.checkpoint(smollm2.default_cache_dir())
    w8a8 = flashrl.make_smoothed(source, tmp_path / "w8a8")
    fields = flashrl.make_profile(source, w8a8)
    torch.save(fields, tmp_path / "profile.pt")
    moved = {
        name: (tensor * 1.02).to(tensor.dtype)
        for name, tensor in tiny_models.tensors(source).items()
    }
    config = flashrl.config(
        tmp_path / "a.yaml", fn="int8", model=str(w8a8), profile="profile.pt", scales="frozen"
    )
    live = serve(w8a8, config)
    before = live.session.proofs.digests()

    report = flashquant.reload_weights(live.llm, moved)

    expected = serve(flashrl.make_expected(w8a8, moved, fields, tmp_path / "expected"), "int8")
    assert live.session.proofs.digests() == expected.session.proofs.digests() != before
    assert len(report.drift) == 7 * 30


def test_refreshed_scales_fit_the_smoothed_weights(files: Files, tmp_path: Path) -> None:
    """Each channel by its own maximum, as in plain int8, but of the smoothed weight."""
    live = serve(files.w8a8, files.config("new.safetensors", scales="refreshed"))
    stored = tiny_models.tensors(files.w8a8)
    for name, weight in files.moved.items():
        fields = files.fields.get(name)
        if fields and fields["type"] == torch.int8:
            codes, counted = int8_channel(weight * fields["output_scale"] * fields["input_scale"])
            stored[name], stored[f"{name}_scale"] = codes, stored[f"{name}_scale"] * counted
        else:
            stored[name] = flashrl.quantize(name, weight, files.fields)
    expected = _with(files.w8a8, stored, tmp_path / "expected")

    flashquant.reload_weights(live.llm, files.moved)

    live.snapshot().assert_same(serve(expected, "int8").start)


@dataclass(frozen=True)
class Made:
    """A profile that was made here, and the W8A8 checkpoint of it."""

    folder: Path
    source: Checkpoint
    profile: Profile

    def config(self, scales: str = "frozen") -> str:
        path = self.folder / f"{scales}.yaml"
        where = str(self.folder / "made.safetensors")
        return flashrl.config(path, fn="int8", profile=where, scales=scales)

    def keeping(self, keep: list[object], scales: str = "frozen") -> str:
        """The same, with some modules in bf16."""
        profile = str(self.folder / "made.safetensors")
        entry = {"fn": "int8", "profile": profile, "scales": scales, "keep": keep}
        path = self.folder / f"keep-{len(keep)}-{scales}.yaml"
        path.write_text(json.dumps({"configs": [entry]}))  # JSON is YAML
        return str(path)

    def write(self, name: str, weights: Weights) -> Path:
        """A bf16 checkpoint of other weights."""
        path = self.folder / name
        shutil.copytree(self.source.folder, path)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path


@pytest.fixture(scope="module")
def made(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read off the twin; how factors were chosen does not matter here."""
    folder, source = tmp_path_factory.mktemp("made"), Checkpoint(files.bf16)
    factors, scales = factors_of_twins(source, Checkpoint(files.w8a8))
    profile = profile_of(factors, source.items(), dict.fromkeys(scales), "made")
    save_profile(profile, folder / "made.safetensors")
    write_w8a8(source, profile, folder / "w8a8")
    return Made(folder, source, profile)


def test_a_bf16_checkpoint_is_served_through_a_profile_that_knows_its_scales(
    made: Made, files: Files
) -> None:
    """And holds what an engine does that starts on the W8A8 checkpoint of the two."""
    live = serve(files.bf16, made.config())
    twin = serve(made.folder / "w8a8", made.config())

    live.start.assert_same(twin.start)
    for serving in (live, twin):
        flashquant.reload_weights(serving.llm, files.moved)

    live.snapshot().assert_same(twin.snapshot())


@pytest.mark.parametrize("scales", ["frozen", "refreshed"])
def test_reload_equals_restart_through_a_made_profile(
    made: Made, files: Files, scales: str
) -> None:
    live = serve(files.bf16, made.config(scales))

    flashquant.reload_weights(live.llm, files.moved)

    restarted = serve(made.write(f"moved-{scales}", files.moved), made.config(scales))
    live.snapshot().assert_same(restarted.start)
    flashquant.reload_weights(live.llm, tiny_models.tensors(files.bf16))
    live.snapshot().assert_same(live.start)


def test_a_report_tells_how_many_codes_changed(made: Made, files: Files) -> None:
    live = serve(files.bf16, made.config())
    flashquant.reload_weights(live.llm, files.moved)

    again = flashquant.reload_weights(live.llm, files.moved)
    back = flashquant.reload_weights(live.llm, tiny_models.tensors(files.bf16))

    assert again.changed == 0
    # Of the 5 % by which each weight moved, a code sees the larger part.
    assert 0.3 < back.changed < 0.8
    assert set(back.drift) == {n for n, e in made.profile.entries.items() if e.kind == torch.int8}
    assert back.clipped == 0
    assert back.peak == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("scales", ["frozen", "refreshed"])
def test_what_is_kept_beside_a_profile_is_scaled_and_stays_in_bf16(
    made: Made, files: Files, scales: str
) -> None:
    """The norms in front of it are smoothed, so its columns are, too."""
    config = made.keeping(["*.down_proj", {"first": 1}], scales)
    live = serve(files.bf16, config)
    fresh = serve(made.write(f"kept-{scales}", files.moved), config)

    for push in (reload_weights, shuffled):
        push(live, files.moved)
        live.snapshot().assert_same(fresh.start)
        push(live, tiny_models.tensors(files.bf16))
        live.snapshot().assert_same(live.start)

    kept = flashquant.status(live.llm).in_bf16
    assert "model.layers.1.mlp.down_proj" in kept
    assert len(kept) == 8


def test_a_model_that_is_kept_whole_is_the_model_whatever_its_profile(
    made: Made, files: Files
) -> None:
    """But for the rounding of what is smoothed."""
    exact, kept, codes = (
        torch.tensor([said[:39] for said in serve(files.bf16, name).start.outputs.logprobs])
        for name in ("bf16", made.keeping(["*_proj"]), made.config())
    )

    assert 4 * (kept - exact).abs().mean() < (codes - exact).abs().mean()


def test_the_profile_of_another_model_is_refused_by_a_bf16_checkpoint(
    made: Made, tmp_path: Path
) -> None:
    other = tiny_models.make("qwen2", 77, tmp_path / "other")

    with pytest.raises(ProfileError, match=r"have other maxima than .* so it is another model"):
        _ = Serving(other, made.config()).llm


@pytest.mark.parametrize("push", [reload_weights, shuffled], ids=lambda door: door.__name__)
def test_int8_prune_silences_norms_by_every_push(
    files: Files, push: Callable[[Serving, Weights], None], tmp_path: Path
) -> None:
    """FlashRL raises KeyError on a push of less than the whole model."""
    path = flashrl.config(
        files.folder / "prune.yaml",
        fn="int8_prune",
        model="w8a8",
        profile="old.pt",
        scales="frozen",
    )
    live = serve(files.w8a8, path)
    dead = dict(files.moved)
    for name in dead:
        if "layers.0" in name and name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        ):
            dead[name] = dead[name].clone()
            dead[name][:, 5:9] = 0
    stored = {**tiny_models.tensors(files.w8a8), **flashrl.quantize_and_prune(dead, files.fields)}

    push(live, dead)

    live.snapshot().assert_same(serve(_with(files.w8a8, stored, tmp_path / "x"), "int8").start)
    norm = live.contents()["model.layers.0.input_layernorm.weight"]
    assert norm.eq(0).nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_a_push_that_fails_leaves_codes_scales_and_norms(live: Serving, files: Files) -> None:
    before = live.snapshot()
    bad = {**files.moved, "model.norm.weight": torch.full((256,), torch.nan)}

    with pytest.raises(MisfitTensor, match="NaN"):
        flashquant.reload_weights(live.llm, bad)

    live.snapshot().assert_same(before)


def test_changed_floats_are_a_whole_push_where_a_profile_makes_codes(
    live: Serving, files: Files
) -> None:
    """A sender is told to send floats: it cannot make such codes."""
    sender = Sender(flashquant.manifest(live.llm), delta=True)
    flashquant.apply_delta(live.llm, sender.bundle(tiny_models.tensors(files.bf16)))

    report = flashquant.apply_delta(live.llm, sender.bundle(files.moved))

    assert report.digest == flashquant.reload_weights(live.llm, files.moved).digest


def test_codes_are_refused_where_a_profile_makes_them(live: Serving, files: Files) -> None:
    """Of the norms beside them nobody could tell whether they are smoothed."""
    before = live.snapshot()

    with pytest.raises(MisfitTensor, match=r"quantized already .* Push the weights as the trainer"):
        flashquant.reload_weights(live.llm, tiny_models.tensors(files.w8a8))

    live.snapshot().assert_same(before)


def _other_model(files: Files) -> str:
    """The profile of a twin with other smoothing: same names, same shapes."""
    twin = flashrl.make_smoothed(files.bf16, files.folder / "twin", seed=1)
    torch.save(flashrl.make_profile(files.bf16, twin), files.folder / "twin.pt")
    return files.config("twin.pt")


def _without(files: Files, name: str) -> str:
    held = {key: value for key, value in files.fields.items() if key != name}
    torch.save(held, files.folder / "without.pt")
    return files.config("without.pt")


def _fewer_rows(files: Files, name: str) -> str:
    fields = {**files.fields[name], "output_scale": torch.ones(7, 1, dtype=torch.float32)}
    torch.save({**files.fields, name: fields}, files.folder / "fewer.pt")
    return files.config("fewer.pt")


def _of_another_checkpoint(files: Files) -> str:
    base = Base(model="another", fingerprint={"model.norm.weight": "0" * 64})
    profile = load_profile(files.folder / "old.pt")
    save_profile(
        Profile(profile.entries, profile.source, base), files.folder / "another.safetensors"
    )
    return files.config("another.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_other_model, "layers have other weight scales than it was made with"),
        (lambda files: _without(files, UP), f"{UP} has no entry"),
        (lambda files: _fewer_rows(files, UP), rf"{UP} has shape .*, and \(7, 256\) by the prof"),
        (_of_another_checkpoint, "model.norm.weight should be 000000000000 .sha256., but the"),
    ],
)
def test_a_profile_that_does_not_fit_starts_no_engine(
    files: Files, spoil: Callable[[Files], str], says: str
) -> None:
    with pytest.raises(ProfileError, match=f"does not fit this checkpoint.*{says}"):
        _ = Serving(files.w8a8, spoil(files)).llm


def test_a_profile_on_a_bf16_checkpoint_starts_no_engine(files: Files) -> None:
    path = flashrl.config(files.folder / "bf16.yaml", fn="int8", model="bf16", profile="old.pt")

    with pytest.raises(ConfigError, match="Name that checkpoint under `model`"):
        _ = Serving(files.bf16, path).llm


def _with(source: Path, stored: dict[str, Tensor], path: Path) -> Path:
    return flashrl.make_expected(source, stored, {}, path)
