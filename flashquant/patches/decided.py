"""What was decided for an engine travels in vLLM's `additional_config`, under these keys."""

from __future__ import annotations

from typing import Final

ADDITIONAL_CONFIG_KEY: Final = "flashquant"
PROFILE_KEY: Final = "profile"  # in it, where pushes are quantized by one
STARTS_ON_FLOATS: Final = "starts_on_floats"  # in it: the load makes the codes
