"""Whatever is handed over becomes pairs; nothing is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashquant.errors import ReloadError, UnknownWeight
from flashquant.plan import CARRIED, few_at_a_time, named_forms, named_tensors, naming_the_file

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2).bfloat16()}


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of two safetensors files, and what else lies in a checkpoint."""
    for file, name in (("model-00002", "a.weight"), ("model-00001", "b.bias")):
        save_file({name: WEIGHTS[name]}, tmp_path / f"{file}.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def equal(pairs, expected) -> bool:
    found = dict(pairs)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
        for name in expected
    )


def test_a_dictionary_is_read_as_pairs():
    assert equal(named_tensors(WEIGHTS), WEIGHTS)


def test_pairs_are_passed_on_one_at_a_time():
    taken = []

    def weights():
        for name, tensor in WEIGHTS.items():
            taken.append(name)
            yield name, tensor

    name, tensor = next(named_tensors(weights()))

    assert (name, tensor) == ("a.weight", WEIGHTS["a.weight"])
    assert taken == ["a.weight"]


def test_a_repeated_name_is_not_swallowed():
    pairs = [("a", torch.zeros(1)), ("a", torch.ones(1))]

    assert list(named_tensors(pairs)) == pairs


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_one_safetensors_file_is_read(tmp_path, kind):
    save_file(WEIGHTS, tmp_path / "model.safetensors")

    assert equal(named_tensors(kind(tmp_path / "model.safetensors")), WEIGHTS)


def test_a_folder_is_read_file_by_file_in_order(checkpoint):
    pairs = list(named_tensors(str(checkpoint)))

    assert [name for name, _ in pairs] == ["b.bias", "a.weight"]
    assert equal(pairs, WEIGHTS)


@pytest.mark.parametrize("name", ["nothing-here", "nothing.safetensors"])
def test_a_missing_path_says_what_to_save(tmp_path, name):
    with pytest.raises(ReloadError, match="Save the weights with safetensors"):
        list(named_tensors(tmp_path / name))


def test_a_folder_without_safetensors_is_refused(tmp_path):
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")

    with pytest.raises(ReloadError, match="Save the weights with safetensors"):
        list(named_tensors(tmp_path))


def test_a_pickle_is_never_loaded(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model.pt")

    with pytest.raises(ReloadError, match="pickled files are never loaded"):
        list(named_tensors(str(tmp_path / "model.pt")))


def test_a_broken_safetensors_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")

    with pytest.raises(ReloadError, match=r"model\.safetensors is no safetensors file"):
        list(named_tensors(tmp_path))


@pytest.fixture
def indexed(checkpoint):
    """The same folder with an index of its two files."""
    listed = {"a.weight": "model-00002.safetensors", "b.bias": "model-00001.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return checkpoint


def test_what_an_index_does_not_list_is_not_read(indexed):
    """An older, larger checkpoint was saved over; an adapter lies beside."""
    save_file({"a.weight": torch.zeros(2, 3)}, indexed / "model-00003.safetensors")
    save_file({"lora_A": torch.zeros(2)}, indexed / "adapter_model.safetensors")

    assert equal(list(named_tensors(indexed)), WEIGHTS)


def test_consolidated_files_come_before_others_as_in_vllm(indexed):
    save_file(WEIGHTS, indexed / "consolidated.safetensors")
    save_file({"a.weight": torch.zeros(2, 3)}, indexed / "model-00001.safetensors")

    assert equal(list(named_tensors(indexed)), WEIGHTS)


def test_a_file_that_an_index_lists_and_nobody_wrote_is_named(indexed):
    (indexed / "model-00002.safetensors").unlink()

    with pytest.raises(ReloadError, match=r"index\.json lists .* not there: model-00002"):
        list(named_tensors(indexed))


@pytest.mark.parametrize("says", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(indexed, says):
    (indexed / "model.safetensors.index.json").write_text(says)

    with pytest.raises(ReloadError, match=r"index\.json is no index of safetensors"):
        list(named_tensors(indexed))


def test_a_refusal_names_the_file_that_its_tensor_came_from(checkpoint):
    tensors = named_tensors(checkpoint)
    next(tensors)

    told = naming_the_file(UnknownWeight("no such weight."), tensors)

    assert type(told) is UnknownWeight
    assert "read from" in str(told)
    assert str(checkpoint / "model-00001.safetensors") in str(told)
    same = UnknownWeight("no such weight.")
    assert naming_the_file(same, WEIGHTS) is same


def test_what_was_carried_to_another_process_is_no_file_of_the_caller(tmp_path):
    (tmp_path / CARRIED).mkdir()
    save_file(WEIGHTS, tmp_path / CARRIED / "000000.safetensors")
    tensors, same = named_tensors(tmp_path / CARRIED), UnknownWeight("no such weight.")
    next(tensors)

    assert naming_the_file(same, tensors) is same


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), None, 3])
def test_what_is_no_weights_is_told_what_is(wrong):
    with pytest.raises(ReloadError, match=r"is no weights\. Pass a dict .* `state_dict\(\)`"):
        named_tensors(wrong)


@pytest.mark.parametrize(
    "wrong", [["a.weight"], [("a.weight",)], [(1, torch.ones(1))], b"weights", [torch.ones(2)]]
)
def test_what_is_no_pair_is_told_what_should_be(wrong):
    with pytest.raises(ReloadError, match=r"came a .*Pass a dict of name to tensor, or pairs"):
        list(named_tensors(wrong))


def test_a_file_that_ends_too_early_is_named(checkpoint):
    whole = (checkpoint / "model-00002.safetensors").read_bytes()
    (checkpoint / "model-00002.safetensors").write_bytes(whole[:-4])

    with pytest.raises(ReloadError, match=r"model-00002\.safetensors is no safetensors file"):
        list(named_tensors(checkpoint))


def meanwhile(checkpoint, act):
    """Read it, and have something done after the first tensor."""
    tensors = named_tensors(checkpoint)
    found = [next(tensors)]
    act()
    return found + list(tensors)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    """Mapped memory would end the process by SIGBUS."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(1 << 20)}, file)

    with pytest.raises(ReloadError, match=r"model\.safetensors is no .*it was cut"):
        meanwhile(tmp_path, lambda: os.truncate(file, 5000))


@pytest.mark.parametrize("which", ["model-00001.safetensors", "model-00002.safetensors"])
@pytest.mark.parametrize("moves", [False, True])
def test_a_checkpoint_that_is_written_while_it_is_read_is_no_policy(checkpoint, which, moves):
    """Half of it may be of the next step: `save_pretrained` into the same folder."""
    file, data = checkpoint / which, (checkpoint / which).read_bytes()
    os.utime(file, (0, 0))  # a clock has ticks

    def write():
        other = file.with_suffix(".new") if moves else file
        other.write_bytes(data)
        other.replace(file)

    with pytest.raises(ReloadError, match=rf"{which} was written while it was read"):
        meanwhile(checkpoint, write)


def test_a_checkpoint_that_is_removed_when_it_has_been_opened_is_read(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")

    assert equal(meanwhile(tmp_path, (tmp_path / "model.safetensors").unlink), WEIGHTS)


def test_where_each_tensor_need_be_good_until_the_next_only_one_is_held(tmp_path):
    save_file({name: torch.ones(64) for name in "abc"}, tmp_path / "model.safetensors")

    addresses = {t.data_ptr() for _, t in named_tensors(tmp_path, reuses=True)}

    assert len(addresses) == 1
    assert len({t.data_ptr() for _, t in list(named_tensors(tmp_path))}) == 3


def test_few_at_a_time_keeps_order_and_says_everything_once():
    sent = [(f"w{number}", torch.full((4,), float(number))) for number in range(150)]

    together = list(few_at_a_time(iter(sent)))

    assert [len(few) for few in together] == [64, 64, 22]
    assert [name for few in together for name, _ in few] == [name for name, _ in sent]


def test_what_waits_for_others_is_a_copy():
    """A sender may reuse its buffer as soon as it is asked for the next tensor."""

    def reusing() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(4)
        for number in range(3):
            yield f"w{number}", buffer.fill_(number)

    (few,) = few_at_a_time(reusing())

    assert [tensor[0].item() for _, tensor in few] == [0, 1, 2]


def test_a_large_tensor_comes_alone_and_is_not_copied():
    large = torch.empty(3 << 20, dtype=torch.float32)
    small = torch.ones(4)

    together = list(few_at_a_time([("a", small), ("large", large), ("b", small)]))

    assert [[name for name, _ in few] for few in together] == [["a"], ["large"], ["b"]]
    assert together[1][0][1] is large


def test_forms_are_those_of_the_tensors(tmp_path):
    held = {
        "a": torch.zeros(3, 4, dtype=torch.bfloat16),
        "b": torch.zeros(2, dtype=torch.int8),
        "c": torch.tensor(1.0),
        "d": torch.zeros(0, 5),
    }
    save_file(held, tmp_path / "model.safetensors")

    forms = dict(named_forms(tmp_path))

    assert {name: (t.shape, t.dtype) for name, t in forms.items()} == {
        name: (t.shape, t.dtype) for name, t in held.items()
    }
    assert all(form.is_meta for form in forms.values())
    with pytest.raises(ReloadError, match="holds some"):
        list(named_forms(tmp_path / "nothing"))
