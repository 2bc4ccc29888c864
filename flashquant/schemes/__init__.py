"""What a quantized layer stores: bf16 rows become codes and scales.

The eager functions in `int8`, `fp8`, `smoothed` and `absmax` are the definition. Whatever is
faster returns the same bits, because a reload has to equal a restart to the bit; which of
them does the work is decided in `quick`, and nowhere else.

    int8_channel   codes [N, K] int8   scales [N, 1] float32   one scale an output channel
    fp8_channel    codes [N, K] e4m3   scales [N, 1] float32   one scale an output channel
    fp8_tensor     codes [N, K] e4m3   scales [1]    float32   one scale a tensor
"""

from flashquant.schemes.quick import fp8_channel, fp8_static, fp8_tensor, int8_channel, warm

__all__ = ["fp8_channel", "fp8_static", "fp8_tensor", "int8_channel", "warm"]
