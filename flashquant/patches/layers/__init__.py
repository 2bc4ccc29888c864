"""Live layers: what vLLM's kernels read, and how checkpoint tensors become it.

As the model was created, and as it serves:

blueprint, model_blueprint   the layers before their first weight; the way to load onto them
buffers                      those that a checkpoint may bring
aliases                      tensors of one layer that are windows of another's parameter
kernel_state                 every tensor and handle that the kernels of a layer read
attention                    the layers that vLLM processes after all others
made_once, run_once          what modules make of their weights by themselves, and keep
left_by_loader               what loaders do

What vLLM's processing makes of a kind of module, found by watching it once:

probe                        the look, and what is refused by it
memory_layout, provenance    what became of each parameter's memory
homes                        live memory into which rows can be written
pass_through                 parameters that go live by themselves

Live layers:

choice                       which kind a group of modules becomes
base                         the template: parameters wait until all of them can go live
in_place                     written row by row where the kernels read
per_tensor                   each parameter quantized whole: one scale a tensor, or experts
processed                    everything else: vLLM's own processing (`twins`), or copied
readiness                    which parameters wait for each other
live_parameters              which live tensors still are parameters in checkpoint format
packed_digests               fingerprints of what cannot be read any more

Two seams that only layers need:

tensor_parallel_maxima       scales over the shards of other workers
cpu                          what vLLM's CPU kernels lack
"""

from __future__ import annotations

from flashquant.patches.layers import cpu, tensor_parallel_maxima
from flashquant.patches.layers.attention import is_deferred_attention_layer
from flashquant.patches.layers.base import LiveLayer
from flashquant.patches.layers.blueprint import LayerBlueprint
from flashquant.patches.layers.buffers import buffer_layers
from flashquant.patches.layers.choice import LayerChoice, Quantizer
from flashquant.patches.layers.cpu import allow_amx, packed_once
from flashquant.patches.layers.in_place import InPlaceLayer
from flashquant.patches.layers.kernel_state import Carry, is_handle, is_processor, leaves
from flashquant.patches.layers.left_by_loader import (
    attributes_kept,
    plain_tensors,
    while_loaded,
)
from flashquant.patches.layers.made_once import MadeOnce, all_made_once
from flashquant.patches.layers.memory_layout import MemoryLayout, memory_layouts
from flashquant.patches.layers.model_blueprint import ModelBlueprint
from flashquant.patches.layers.per_tensor import PerTensorLayer
from flashquant.patches.layers.processed import ProcessedLayer

__all__ = [
    "POINTS",
    "Carry",
    "InPlaceLayer",
    "LayerBlueprint",
    "LayerChoice",
    "LiveLayer",
    "MadeOnce",
    "MemoryLayout",
    "ModelBlueprint",
    "PerTensorLayer",
    "ProcessedLayer",
    "Quantizer",
    "all_made_once",
    "allow_amx",
    "attributes_kept",
    "buffer_layers",
    "is_deferred_attention_layer",
    "is_handle",
    "is_processor",
    "leaves",
    "memory_layouts",
    "packed_once",
    "plain_tensors",
    "while_loaded",
]

POINTS = (*tensor_parallel_maxima.POINTS, *cpu.POINTS)
