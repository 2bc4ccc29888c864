"""A trainer's tensor becomes what the engine's checkpoint-format parameters hold.

    q_proj.weight bf16  ->  q_proj.weight int8, q_proj.weight_scale float32
    experts.0.up_proj.weight bf16  ->  the same two; and of all experts at once, stacked
    norm.weight bf16    ->  norm.weight bf16

Where there is a calibration, what it speaks of is stored its way, norms included.
Codes pass through: what is quantized already is never quantized again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from flashquant.calibration import Calibration
from flashquant.errors import UnsupportedEngine
from flashquant.fit import check_finite
from flashquant.plan import TensorPlan
from flashquant.schemes.stored import holds_codes, quantizer


def as_stored(
    name: str,
    tensor: Tensor,
    entry: TensorPlan,
    parameters: Mapping[str, Tensor],
    calibration: Calibration | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensor itself, or its codes and its scales, each under its checkpoint name.

    Args:
        name: of the tensor, as the trainer sends it.
        tensor: `[N, K]` or `[E, N, K]` where it is to be quantized, unsharded; transposed where
            the engine's loader transposes it.
        entry: its plan.
        parameters: every checkpoint-format parameter, on meta.
        calibration: of an engine that is served through a profile.

    Raises:
        MisfitTensor: values that are not finite, or would not be once stored.
        UnsupportedEngine: the parameters store codes in none of our schemes.

    """
    tensor = tensor.contiguous()
    if calibration is not None and name in calibration:
        check_finite(name, tensor)  # before: codes of NaN would be zeros
        for stored, values in calibration.stored(name, tensor):
            check_finite(stored, values, [values.dtype])
            yield stored, values
        return
    codes = [target for target in entry.targets if holds_codes(parameters[target].dtype)]
    if not codes or not tensor.is_floating_point() or tensor.element_size() == 1:
        check_finite(name, tensor, [parameters[target].dtype for target in entry.targets])
        yield name, tensor
        return
    first = codes[0]
    quantize = quantizer(parameters[first], parameters.get(f"{first}_scale"), first)
    if entry.needs_loader:
        raise UnsupportedEngine(
            f"the engine's loader does more than copy {name} into {first}, so flashquant cannot "
            "tell its output channels, of which each has a scale. Serve this model in bf16."
        )
    if entry.turns_rows:
        values, scales = quantize(tensor.mT.contiguous())
        values = values.mT
    else:
        values, scales = quantize(tensor)
    # A row that holds NaN or Inf has such an absolute maximum, so its scale tells.
    check_finite(name, scales)
    yield name, values
    yield f"{name}_scale", scales
