"""A trainer's weights become what an engine wants: codes and scales, or what changed of them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from flashquant.errors import IncompleteUpdate, MisfitTensor, ReloadError, UnknownWeight
from flashquant.schemes import (
    Quantize,
    Region,
    check_dtype,
    check_finite,
    check_form,
    check_plain,
    fingerprint,
    in_ordinary_memory,
    quantizer,
)
from flashquant.scratch import Scratch
from flashquant.sender.changes import Change, apply, change
from flashquant.sender.delta import MARK, Delta
from flashquant.sender.manifest import Manifest, TensorSpec, policy_digest

_OWN: Final = ("_codes", "_turn")  # what no copy of a sender shares

Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Sender:
    """Makes of a trainer's weights what one engine, or many of a kind, want to be sent.

    Codes are made by the definitions that the engine itself goes by, on the device where the
    weights are: what comes out is, to the bit, what the engine would make of the same weights.

    Threads take turns at its bundles. It can be copied and pickled: a copy goes on from the same
    bundle by itself.

    Args:
        manifest: what `flashquant.manifest(target)` returned, or the plain data of it.
        delta: keep what a bundle held, so that the next one holds what changed. That is one byte
            a weight in an 8-bit scheme (two of what stays in bf16), where the weights are.

    """

    def __init__(self, manifest: Manifest | Mapping[str, Any], *, delta: bool = False) -> None:
        """Raises:
        ReloadError: a tensor of the manifest has a name that a bundle cannot hold.

        """
        self.manifest = Manifest.model_validate(manifest)
        self._keeps = delta
        self._kept = _Kept({}, {})
        self._version = 0
        self._quantizers: dict[str, Quantize] = {}
        self._codes = Scratch()
        self._turn = threading.RLock()
        if odd := next((name for name in self.manifest.tensors if MARK in name), None):
            raise ReloadError(f"{odd}: {MARK} may not be in a name. Push this model in bf16.")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _codes=Scratch(), _turn=threading.RLock())

    def __copy__(self) -> Sender:
        return copy.deepcopy(self)  # what is kept is written into

    def stream(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """Each tensor as the engine wants it, under its checkpoint name; codes before their scales.

        Every door takes them: `flashquant.reload_weights(llm, sender.stream(weights))`.

        Args:
            weights: `(name, tensor)` pairs or a dict; full tensors, or `DTensor`s, which are
                gathered one at a time (so every rank has to iterate).

        Raises:
            UnknownWeight: the engine wants no such tensor.
            MisfitTensor: its shape, dtype or values are wrong.

        """
        for name, home, tensor in self._arriving(weights):
            if name == home:
                yield from self._made(name, home, tensor, None)
            else:
                yield name, tensor

    def _arriving(self, weights: Weights) -> Iterator[tuple[str, str, Tensor]]:
        """Each tensor, and the name under which the engine holds it."""
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        for name, sent in pairs:
            home = self.manifest.tied.get(name, name)
            if home not in self.manifest.tensors:
                raise UnknownWeight(
                    f"{name} is none of the {len(self.manifest.tensors)} tensors that the engine "
                    "wants. Send the names of its checkpoint, without the marks of wrappers."
                )
            yield name, home, _gathered(sent)

    def bundle(self, weights: Weights) -> Delta:
        """One update: what changed since the last bundle, if the sender keeps that; else all of it.

        Args:
            weights: a complete set, as `stream` takes it. What fails leaves the last bundle the
                last.

        Raises:
            IncompleteUpdate: some tensors are missing.
            ReloadError: as `stream`; or what yields the weights calls this sender itself.

        """
        with self._turn, torch.no_grad():
            kept = self._kept
            changes, sums = self._changes(weights)
            if self._kept is not kept:
                raise ReloadError(
                    "a sender makes one bundle at a time, and was called by what yields the "
                    "weights of another one. Call it before or after, or make a second Sender."
                )
            base = _digest(self._kept.sums) if self._kept.tensors else None
            made = self._bundled(changes, base, sums)
            if self._keeps:
                self._keep(changes, sums)
        return made

    def _changes(
        self, weights: Weights
    ) -> tuple[dict[str, tuple[TensorSpec, Change]], dict[str, _Sums]]:
        """What is other than in the last bundle, and the sums of all."""
        changes: dict[str, tuple[TensorSpec, Change]] = {}
        last, sums = self._kept.tensors, dict(self._kept.sums)
        tied: list[tuple[str, str, str]] = []
        for alias, name, value in self._complete(weights):
            if alias:
                tied.append((alias, name, fingerprint(value)))
                continue
            region = self._region(value, sums.get(name))
            found = change(last.get(name), value, region)
            if found is None:
                continue
            sums[name] = _Sums.of(value, region)
            if found.form == "whole":  # what else it holds is in memory of its own
                found = found._replace(values=found.values.clone())
            changes[name] = self.manifest.tensors[name], found
        for alias, name, claimed in tied:
            if claimed != sums[name].fingerprint:
                raise MisfitTensor(f"{alias} differs from {name}, which the engine holds once")
        return changes, sums

    def _region(self, value: Tensor, last: _Sums | None) -> Region | None:
        """What follows the sums of a tensor from one bundle to the next: on the host, if any is
        kept."""
        if not (self._keeps and value.is_cpu):
            return None
        if last is None or last.blocks is None:
            return Region.of(value)
        return Region(value, last.blocks.clone())

    def _keep(
        self, changes: Mapping[str, tuple[TensorSpec, Change]], sums: dict[str, _Sums]
    ) -> None:
        """The last bundle is this one: what changed is written into what was sent before."""
        last, self._kept = self._kept.tensors, _Kept({}, {})  # cut off here, the next is whole
        for name, (_, found) in changes.items():
            last[name] = found.values.clone() if found.form == "whole" else apply(found, last[name])
        self._kept = _Kept(last, sums)

    def snapshot(self) -> Delta:
        """The last bundle's policy, whole: for an engine that is not at its base.

        Raises:
            ReloadError: nothing is kept.

        """
        with self._turn:
            if not self._kept.tensors:
                raise ReloadError(
                    "this sender keeps no bundle. Make it with delta=True, and call "
                    "bundle(weights)."
                )
            tensors, kept = self.manifest.tensors, self._kept.tensors
            whole = {
                name: (tensors[name], Change("whole", None, kept[name].clone())) for name in kept
            }
            # Read anew: a trainer that wrote while its last bundle was made has spoilt its sums.
            sums = {n: _Sums.of(value, self._region(value, None)) for n, value in kept.items()}
            self._kept = _Kept(kept, sums)
            return self._bundled(whole, None, sums)

    def _bundled(
        self,
        changes: Mapping[str, tuple[TensorSpec, Change]],
        base: str | None,
        sums: Mapping[str, _Sums],
    ) -> Delta:
        self._version += 1
        return Delta.of(
            changes,
            scheme=self.manifest.scheme,
            version=self._version,
            base=base,
            digest=_digest(sums),
            fingerprints={name: sums[name].fingerprint for name in changes},
        )

    def _complete(self, weights: Weights) -> Iterator[tuple[str, str, Tensor]]:
        """A complete set as it is sent, or an error.

        Yields:
            The other name under which it came, if the engine holds it under its first one; the
            name of the manifest; and the value, contiguous and good until the next one.

        """
        came, scratch = set[tuple[str, str]](), self._codes if self._keeps else None
        for sent, home, tensor in self._arriving(weights):
            alias = "" if sent == home else sent
            for name, value in self._made(sent, home, tensor, scratch):
                if (alias, name) in came:
                    raise MisfitTensor(
                        f"{alias or name} came twice in one update; send each tensor once"
                    )
                came.add((alias, name))
                yield alias, name, value.contiguous()
        if missing := [name for name in self.manifest.tensors if ("", name) not in came]:
            raise IncompleteUpdate(
                f"the update ended without {len(missing)} of the engine's tensors, first "
                f"{missing[0]}. A bundle is made of a complete set of weights."
            )

    def _made(
        self, sent: str, home: str, tensor: Tensor, scratch: Scratch | None
    ) -> Iterator[tuple[str, Tensor]]:
        """A tensor as it is wanted, by the names of the manifest; codes that the trainer made
        itself pass.

        Args:
            sent: its name, for errors.
            home: the name of its place in the manifest.
            tensor: it.
            scratch: where its codes may be made.

        """
        spec = self.manifest.tensors[home]
        check_plain(sent, tensor)
        check_form(sent, tensor, spec.shape)
        check_dtype(sent, tensor.dtype, spec.torch_dtype)
        if spec.scales is None or tensor.dtype == spec.torch_dtype:
            check_finite(sent, tensor, (spec.torch_dtype,))
            yield home, tensor.detach().to(spec.torch_dtype)
            return
        if spec.rounds_to_torch not in (None, tensor.dtype):
            check_finite(sent, tensor, (spec.rounds_to_torch,))
            tensor = tensor.to(spec.rounds_to_torch)
        scale_spec = self.manifest.tensors[spec.scales]
        quantize = self._quantizers.get(home)
        stacked = len(spec.shape) > 2
        if quantize is None:
            scheme = spec.scheme or self.manifest.scheme
            quantize = quantizer(_form(spec), _form(scale_spec), home, scheme, stacked=stacked)
            self._quantizers[home] = quantize
        into = None
        if scratch is not None and not stacked:
            room = scratch.room(tensor.numel(), tensor.device)  # a byte a code
            into = room.view(spec.torch_dtype).view(spec.shape)
        codes, scales = quantize(tensor.detach().contiguous(), into)
        # A row that holds NaN or Inf has such a scale.
        check_finite(sent, scales, (scale_spec.torch_dtype,))
        yield home, codes.reshape(spec.shape)
        yield spec.scales, scales.reshape(scale_spec.shape).to(scale_spec.torch_dtype)


class _Sums(NamedTuple):
    """Of one tensor that was sent.

    Attributes:
        fingerprint: of it.
        blocks: the sums of its blocks, on the host, if it is kept there.

    """

    fingerprint: str
    blocks: Tensor | None

    @classmethod
    def of(cls, value: Tensor, region: Region | None) -> _Sums:
        if region is None:
            return cls(fingerprint(value), None)
        return cls(fingerprint(value, region.sums), region.blocks)


class _Kept(NamedTuple):
    """What was sent last, and its sums: both of one bundle, or of none.

    Attributes:
        tensors: by name, in memory of their own; the next bundle is written into it.
        sums: of each of them.

    """

    tensors: dict[str, Tensor]
    sums: dict[str, _Sums]


def _digest(sums: Mapping[str, _Sums]) -> str:
    return policy_digest({name: one.fingerprint for name, one in sums.items()})


def _gathered(sent: Any) -> Any:
    """All of a tensor, in ordinary memory: of one that is sharded, which every rank has to ask for,
    and of one that another library wraps, which has an address only in there."""
    full = getattr(sent, "full_tensor", None)
    tensor = sent if full is None else full()
    return in_ordinary_memory(tensor) if isinstance(tensor, Tensor) else tensor


def _form(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.torch_dtype, device="meta")
