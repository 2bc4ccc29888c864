"""What a quantized layer stores: bf16 rows become codes and scales.

The eager functions in `int8`, `int4`, `nvfp4`, `fp8`, `smoothed` and `absmax` are the definition.
Whatever is faster returns the same bits, because a reload has to equal a restart to the bit; which
of them does the work is decided in `quick`, and nowhere else.

    int8_channel   codes [N, K] int8   scales [N, 1] float32   one scale an output channel
    fp8_channel    codes [N, K] e4m3   scales [N, 1] float32   one scale an output channel
    fp8_tensor     codes [N, K] e4m3   scales [1]    float32   one scale a tensor
    fp8_tensor_rows   the same codes   scales [N, 1] float32   that one scale, in every row
    int4_group     codes [N, K] int8   scales [N, K/G] bf16    one scale a group of G columns
    nvfp4_matrix   codes [N, K/2] u8   scales [N, K/16] e4m3   and a divisor [1] for all of them

What tensors hold is told apart by their fingerprints (fingerprints/).
"""

from __future__ import annotations

from flashquant.schemes.absmax import absmax as largest
from flashquant.schemes.build import BuildError, built
from flashquant.schemes.by_name import DEFINITIONS, WHOLE
from flashquant.schemes.chunks import row_chunks
from flashquant.schemes.devices import current, resolved
from flashquant.schemes.fingerprints.definition import keys as sum_keys
from flashquant.schemes.fingerprints.digests import (
    Fingerprints,
    SeenMemory,
    digest,
    digests,
    fingerprint,
)
from flashquant.schemes.fingerprints.regions import Region
from flashquant.schemes.int4 import check_int4
from flashquant.schemes.nvfp4 import GROUP as NVFP4_GROUP
from flashquant.schemes.nvfp4 import nvfp4_matrix
from flashquant.schemes.quick import (
    Quantize,
    Storing,
    fp8_channel,
    fp8_static,
    fp8_tensor,
    fp8_tensor_rows,
    int8_channel,
    int8_frozen,
    int8_refreshed,
    row_absmax,
    storing,
    warm,
)
from flashquant.schemes.smoothed import int4_refreshed, scaled, scaled_norm
from flashquant.schemes.stored import has_groups, holds_codes, quantizer
from flashquant.schemes.validation import (
    Doubts,
    check_dtype,
    check_finite,
    check_form,
    check_peak,
    check_plain,
    in_ordinary_memory,
)

__all__ = [
    "DEFINITIONS",
    "NVFP4_GROUP",
    "WHOLE",
    "BuildError",
    "Doubts",
    "Fingerprints",
    "Quantize",
    "Region",
    "SeenMemory",
    "Storing",
    "built",
    "check_dtype",
    "check_finite",
    "check_form",
    "check_int4",
    "check_peak",
    "check_plain",
    "current",
    "digest",
    "digests",
    "fingerprint",
    "fp8_channel",
    "fp8_static",
    "fp8_tensor",
    "fp8_tensor_rows",
    "has_groups",
    "holds_codes",
    "in_ordinary_memory",
    "int4_refreshed",
    "int8_channel",
    "int8_frozen",
    "int8_refreshed",
    "largest",
    "nvfp4_matrix",
    "quantizer",
    "resolved",
    "row_absmax",
    "row_chunks",
    "scaled",
    "scaled_norm",
    "storing",
    "sum_keys",
    "warm",
]
