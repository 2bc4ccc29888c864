"""FlashRL's profile.pt: read as it is, refused where it is more, and never run."""

from __future__ import annotations

import io
import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from flashquant.errors import ProfileError
from flashquant.profiles import load_profile

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def fields(**changes):
    made = {
        "input_scale": torch.tensor([[1.0, 2.0, 3.0]]),
        "output_scale": torch.tensor([[4.0], [5.0]]),
        "type": torch.int8,
    }
    return made | changes


@pytest.fixture
def save(tmp_path):
    """A function that saves what it is given as FlashRL does, and returns the path."""

    def save(held: object, **options: object) -> Path:
        torch.save(held, tmp_path / "profile.pt", **options)
        return tmp_path / "profile.pt"

    return save


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_profile_of_flashrl_is_read(save, zipped):
    norm = {"input_scale": torch.tensor([0.5, 0.25]), "output_scale": 1.0, "type": torch.bfloat16}

    profile = load_profile(save({UP: fields(), NORM: norm}, _use_new_zipfile_serialization=zipped))

    assert list(profile.entries) == [UP, NORM]
    up, norm = profile.entries[UP], profile.entries[NORM]
    assert (up.kind, up.shape) == (torch.int8, (2, 3))
    assert up.input_scale.tolist() == [1, 2, 3]
    assert up.output_scale.tolist() == [4, 5]
    assert (norm.kind, norm.shape, norm.output_scale) == (torch.bfloat16, (2,), None)
    assert profile.base is None


def test_numbers_that_want_gradients_are_taken(save):
    """What FlashRL saves was computed from parameters."""
    scale = torch.nn.Parameter(torch.ones(1, 3)) * 2

    assert (
        not load_profile(save({UP: fields(input_scale=scale)}))
        .entries[UP]
        .input_scale.requires_grad
    )


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_profile_is_refused_and_not_run(save, tmp_path, zipped):
    trap = {UP: fields(output_scale=Trap(tmp_path / "ran"))}

    with pytest.raises(
        ProfileError, match=r"asks for (posix|nt|os)\.mkdir, which no profile needs"
    ):
        load_profile(save(trap, _use_new_zipfile_serialization=zipped))

    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_not_run_either(tmp_path):
    path = tmp_path / "profile.pt"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "ran")))

    with pytest.raises(ProfileError):
        load_profile(path)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ([], "holds a list, but a profile is a dict"),
        ({}, "a profile is a dict of weights"),
        ({"w": torch.ones(2)}, r"w holds Tensor, but should hold \['input_scale', "),
        ({UP: {"type": torch.int8}}, r"holds \['type'\], but should"),
        ({UP: fields(extra=1)}, "holds .*'extra'"),
        ({UP: fields(type="int8")}, "is stored as int8; known: int8, bfloat16"),
        ({UP: fields(type=torch.float64)}, r"is stored as torch\.float64"),
        ({UP: fields(input_scale=0.5)}, r"an input_scale that is 0\.5; it should be a tensor"),
        ({UP: fields(input_scale=torch.ones(2, 3))}, r"input_scale of shape \(2, 3\)"),
        ({UP: fields(input_scale=torch.ones(3).double())}, r"input_scale of torch\.float64 \(3,\)"),
        ({UP: fields(output_scale=torch.ones(0, 1))}, "output_scale of 0 channels"),
        ({UP: fields(output_scale=torch.ones(1).expand(10**10))}, r"of shape \(10000000000,\)"),
        ({NORM: fields(type=torch.bfloat16)}, "is a norm and has an output_scale"),
    ],
)
def test_what_is_no_profile_is_told_so(save, held, says):
    with pytest.raises(ProfileError, match=says):
        load_profile(save(held))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("side", ["input_scale", "output_scale"])
def test_a_factor_that_is_not_finite_and_positive_is_refused_by_name(save, side, number):
    scale = fields()[side].clone()
    scale.view(-1)[1] = number

    with pytest.raises(ProfileError, match=rf"{UP} has an {side} with 1 of . numbers that are not"):
        load_profile(save({UP: fields(**{side: scale})}))


@pytest.mark.parametrize("keep", [0, 10, 400, -1])
def test_a_part_of_a_file_is_refused(save, keep):
    path = save({UP: fields()})
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(ProfileError, match="no file that torch"):
        load_profile(path)


def rewritten(path: Path, change, **options) -> None:
    """The same archive with each record changed."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
    path.write_bytes(buffer.getvalue())


def test_a_compressed_file_is_refused_before_it_is_unpacked(save):
    path = save({UP: fields()})
    rewritten(path, lambda _, content: content, compression=zipfile.ZIP_DEFLATED)

    with pytest.raises(ProfileError, match="holds a compressed record"):
        load_profile(path)


def test_a_storage_that_is_not_there_is_refused(save):
    """The pickle claims three floats; the record holds none, so nothing is made up."""
    path = save({UP: fields()})
    rewritten(path, lambda name, content: b"" if "/data/" in name else content)

    with pytest.raises(ProfileError, match=r"a part of one \(record size \(0 bytes\) does not"):
        load_profile(path)


class Claim:
    """A tensor of 10 GB, and nothing behind it."""

    class Storage:
        pass

    def __reduce__(self):
        size = (2_500_000_000,)
        return torch._utils._rebuild_tensor_v2, (self.Storage(), 0, size, (1,), False, None)


class Claimer(pickle.Pickler):
    def persistent_id(self, thing):
        if isinstance(thing, Claim.Storage):
            return ("storage", torch.FloatStorage, "0", "cpu", 2_500_000_000)
        return None


def test_a_claim_of_10_gb_is_refused_before_there_is_memory_for_it(save):
    path, pickled = save({UP: fields()}), io.BytesIO()
    Claimer(pickled, protocol=2).dump({UP: fields(input_scale=1.0, output_scale=Claim())})
    rewritten(path, lambda name, content: pickled.getvalue() if "data.pkl" in name else content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(ProfileError, match="no file that torch"):
        load_profile(path)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
