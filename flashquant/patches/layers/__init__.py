"""Live layers: what vLLM's kernels read, and how checkpoint tensors become it.

blueprint      the layers as they were when the model was created
kernel_state   every tensor and handle that the kernels of a layer read
memory_layout  which memory of a checkpoint-format layer is the memory that kernels read, found
               by watching (pass_through, provenance)
base           what every layer is: parameters that wait until all of them can go live
in_place       written row by row where the kernels read (direct says which layers can be)
per_tensor     quantized when all of it is there: its codes share a scale, or are of experts
processed      everything else: vLLM's own processing, on a twin
shard_maxima   scales over the shards of other ranks
cpu            what vLLM's CPU kernels lack
"""

from __future__ import annotations

from flashquant.patches.layers import cpu, shard_maxima
from flashquant.patches.layers.attention import is_deferred_attention_layer
from flashquant.patches.layers.blueprint import LayerBlueprint, ModelBlueprint
from flashquant.patches.layers.cpu import allow_amx, packed_once
from flashquant.patches.layers.direct import Direct
from flashquant.patches.layers.in_place import DirectLayer
from flashquant.patches.layers.kernel_state import Carry, is_handle, is_processor, leaves
from flashquant.patches.layers.memory_layout import Quantize, Storage, storages
from flashquant.patches.layers.per_tensor import LateLayer
from flashquant.patches.layers.processed import Learned, LiveLayer

__all__ = [
    "POINTS",
    "Carry",
    "Direct",
    "DirectLayer",
    "LateLayer",
    "LayerBlueprint",
    "Learned",
    "LiveLayer",
    "ModelBlueprint",
    "Quantize",
    "Storage",
    "allow_amx",
    "is_deferred_attention_layer",
    "is_handle",
    "is_processor",
    "leaves",
    "packed_once",
    "storages",
]

POINTS = (*shard_maxima.POINTS, *cpu.POINTS)
