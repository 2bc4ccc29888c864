"""Two 64-bit sums of the bytes of a tensor, equal on every device, taken where the bytes lie.

    definition.py   eager torch, on any device
    native.py       its equal in C (`words.c`, `words.h`), for host memory
    fused.py        its equal in Triton, for GPUs
    quick.py        who takes them for this tensor
    regions.py      sums that are followed from one value of a tensor to the next
    digests.py      128 bits of a tensor as text, and one digest of many

Not cryptographic: whoever knows the keys can make two tensors with equal sums.
"""
