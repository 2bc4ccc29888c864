"""Making profiles: which factors a model can be smoothed by, and which serve it best.

SmoothQuant (Xiao et al., 2022, arXiv:2211.10438) divides a channel of activations by s and
multiplies the column of weights that reads it, so that large activations cost fewer codes:

    x @ W.T  =  (x / s) @ (W * s).T

Whoever made x is divided once and for all: a norm, or the rows of the layer before.

    discovery   bf16 model            -> sites: who may be divided for whom, proved by running it
    search      sites and activations -> s of each, for int8
    groups      the same for int4, and how much of each group its codes reach
    kv_scales   model and prompts     -> what its keys and values are divided by in a cache
    w8a8_pairs  bf16 and W8A8 weights -> the s that another tool has chosen
    checkpoint  profile and weights   -> the W8A8 checkpoint in compressed-tensors format
"""

from __future__ import annotations

from flashquant.profiles.making.checkpoint import Checkpoint, write_w8a8
from flashquant.profiles.making.factors import Factors, Producer, Site, profile_of
from flashquant.profiles.making.kv_scales import kv_scales
from flashquant.profiles.making.w8a8_pairs import factors_of_twins

__all__ = [
    "Checkpoint",
    "Factors",
    "Producer",
    "Site",
    "factors_of_twins",
    "kv_scales",
    "profile_of",
    "write_w8a8",
]
