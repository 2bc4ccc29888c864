"""What trainers do to a sender: whatever it was, the next bundle is right."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import threading

import pytest
import torch

from flashquant.errors import MisfitTensor, ReloadError
from flashquant.sender import Sender, TensorSpec
from flashquant.sender import sender as module
from tests.sender.test_sender import EMBED, HEAD, NORM, W, applied, manifest, moved, policy, same


def is_right(delta, base, weights):
    """Whether a receiver then holds what a new sender would send, and the header says so."""
    new = Sender(manifest()).bundle(weights)
    return delta.header.digest == new.header.digest and same(applied(delta, base), new.parts)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_interrupt_while_a_bundle_is_kept_has_the_next_one_sent_whole(monkeypatch, steps):
    sender, left = Sender(manifest(), delta=True), iter(range(steps))
    sender.bundle(policy())

    def cut_off(found, base):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return found.values if found.form == "whole" else real(found, base)

    real = module.apply
    with monkeypatch.context() as patch:
        patch.setattr(module, "apply", cut_off)
        with pytest.raises(KeyboardInterrupt):
            sender.bundle(moved(policy(), 1))
    weights = moved(policy(), 2)
    whole = sender.bundle(weights)

    assert whole.is_whole
    assert is_right(whole, {}, weights)
    assert is_right(sender.bundle(moved(policy(), 3)), whole.parts, moved(policy(), 3))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tied_head_is_compared_as_the_engine_would_hold_it(dtype, first):
    weights = {name: tensor.to(dtype) for name, tensor in policy().items()}
    head = {HEAD: weights[EMBED]}
    pairs = {**head, **weights} if first else {**weights, **head}

    bundle = Sender(manifest()).bundle(pairs)

    assert bundle.header.digest == Sender(manifest()).bundle(weights).header.digest
    with pytest.raises(MisfitTensor, match=r"lm_head\.weight differs"):
        Sender(manifest()).bundle(pairs | {HEAD: weights[EMBED] + 1})


def test_a_head_that_is_tied_to_codes_is_compared_as_codes():
    codes = manifest().model_copy(update={"tied": {"other.weight": W}})
    weights = {name: tensor.float() for name, tensor in policy().items()}

    Sender(codes, delta=True).bundle(weights | {"other.weight": weights[W].clone()})
    with pytest.raises(MisfitTensor, match=r"other\.weight differs from w\.weight"):
        Sender(codes, delta=True).bundle(weights | {"other.weight": -weights[W]})


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (torch.zeros(3), "has shape"),
        ([1.0], "is a list"),
        (torch.full((128, 48), torch.nan), "NaN"),
    ],
)
def test_a_tied_head_that_does_not_fit_is_refused_by_name(odd, says):
    with pytest.raises(MisfitTensor, match=rf"lm_head\.weight .*{says}"):
        Sender(manifest()).bundle(policy() | {HEAD: odd})
    with pytest.raises(MisfitTensor, match=r"lm_head\.weight came twice"):
        Sender(manifest()).bundle([*policy().items(), *[(HEAD, policy()[EMBED])] * 2])


def test_threads_take_turns():
    """A bundle of one thread never holds what another one is making."""
    sender, bundles, failures = Sender(manifest(), delta=True), {}, []
    whole = sender.bundle(policy())

    def push(seed):
        try:
            for step in range(25):
                bundle = sender.bundle(moved(policy(), 100 * seed + step))
                bundles[bundle.header.base] = bundle
        except ReloadError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=push, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    held, digest = dict(whole.parts), whole.header.digest
    while (bundle := bundles.get(digest)) is not None:
        held, digest = applied(bundle, held), bundle.header.digest
    snapshot = sender.snapshot()
    assert (failures, len(bundles), digest) == ([], 75, snapshot.header.digest)
    assert same(held, snapshot.parts)


@pytest.mark.parametrize(
    "call", [Sender.snapshot, lambda sender: sender.bundle(moved(policy(), 5))]
)
def test_a_call_by_what_yields_the_weights_has_them_refused_and_the_next_bundle_goes(call):
    """Half of them were compared with what was sent before that, half with what was sent then."""
    sender = Sender(manifest(), delta=True)
    whole, inner = sender.bundle(policy()), []

    def weights():
        yield from moved(policy(), 1).items()
        inner.append(call(sender))

    with pytest.raises(ReloadError, match="one bundle at a time"):
        sender.bundle(weights())

    held = applied(inner[0], dict(whole.parts))
    after = sender.bundle(moved(policy(), 2))
    assert after.header.base == inner[0].header.digest
    assert is_right(after, held, moved(policy(), 2))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda sender: pickle.loads(pickle.dumps(sender))]
)
def test_a_copy_goes_on_by_itself(copied):
    sender = Sender(manifest(), delta=True)
    whole = sender.bundle(policy())
    other = copied(sender)

    for one, seed in ((sender, 1), (other, 2)):
        assert is_right(one.bundle(moved(policy(), seed)), whole.parts, moved(policy(), seed))


def test_weights_that_change_while_they_are_read_spoil_one_bundle_and_no_snapshot(monkeypatch):
    """An optimizer in another thread: what was summed is not what was copied."""
    sender, weights = Sender(manifest(), delta=True), policy()
    real = module.change

    def racing(old, new, region):
        found = real(old, new, region)
        if new.shape == weights[NORM].shape:
            weights[NORM].add_(1)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "change", racing)
        sender.bundle(weights)
    snapshot = sender.snapshot()

    assert is_right(snapshot, {}, weights)
    assert is_right(sender.bundle(moved(policy(), 2)), snapshot.parts, moved(policy(), 2))


def test_a_scale_that_its_dtype_cannot_hold_is_refused():
    tensors = manifest().tensors
    halves = {f"{W}_scale": TensorSpec(shape=(64, 1), dtype="float16")}
    narrow = manifest().model_copy(update={"tensors": tensors | halves})

    with pytest.raises(MisfitTensor, match=r"w\.weight .*float16"):
        Sender(narrow).bundle(policy() | {W: torch.full((64, 48), 1e8)})


def test_a_bundle_may_be_made_in_inference_mode_and_the_next_one_outside():
    sender = Sender(manifest(), delta=True)
    with torch.inference_mode():
        whole = sender.bundle(policy())

    assert is_right(sender.bundle(moved(policy(), 1)), whole.parts, moved(policy(), 1))


class Wrapped(torch.Tensor):
    """As other libraries make them: the values are in another tensor, and there is no address."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inner = [arg.inner if isinstance(arg, cls) else arg for arg in args]
        return function(*inner, **(kwargs or {}))


@pytest.mark.parametrize("name", [NORM, EMBED, W, HEAD])
def test_a_tensor_that_another_library_wraps_is_read(name):
    """Its address would be read as that of values, and end the trainer."""
    weights = policy() | {HEAD: policy()[EMBED]}

    bundle = Sender(manifest(), delta=True).bundle(weights | {name: Wrapped(weights[name])})

    assert is_right(bundle, {}, policy())


@pytest.mark.parametrize("name", [NORM, EMBED, W, HEAD])
def test_a_tensor_whose_memory_was_given_back_is_refused_by_name(name):
    weights = policy() | {HEAD: policy()[EMBED]}
    weights[name].untyped_storage().resize_(0)

    with pytest.raises(MisfitTensor, match=f"{name} holds no values: its memory"):
        Sender(manifest()).bundle(weights)


class CutOff:
    """Ctrl-C at one line of flashquant, counted as they run."""

    def __init__(self, at):
        self.left = at

    def __call__(self, frame, event, _):
        return self.line if "/flashquant/" in frame.f_code.co_filename else None

    def line(self, frame, event, _):
        self.left -= event == "line"
        if event == "line" and self.left == 0:
            raise KeyboardInterrupt
        return self.line


def test_wherever_a_bundle_is_cut_off_the_next_one_is_right():
    """It is whole, or starts from the last bundle, or from the one that nobody got."""
    lost, at, left = Sender(manifest()).bundle(moved(policy(), 1)), 1, 0
    while left <= 0:
        sender = Sender(manifest(), delta=True)
        first, cut = sender.bundle(policy()), CutOff(at)
        before = sys.gettrace()
        sys.settrace(cut)
        with contextlib.suppress(KeyboardInterrupt):
            sender.bundle(moved(policy(), 1))
        sys.settrace(before)

        bases = {None: {}, first.header.digest: first.parts, lost.header.digest: lost.parts}
        after = sender.bundle(moved(policy(), 2))
        assert is_right(after, dict(bases[after.header.base]), moved(policy(), 2)), at
        assert is_right(sender.snapshot(), {}, moved(policy(), 2)), at
        at, left = at + 17, cut.left
    assert at > 200
