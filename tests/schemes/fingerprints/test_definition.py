"""What the sums of a tensor's bytes tell apart, and that they are for ever the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashquant.schemes.fingerprints import definition
from flashquant.schemes.fingerprints.definition import BLOCK, BLOCK_BYTES, sums

MASK = (1 << 64) - 1


def drawn(size, seed=0):
    dice = torch.Generator().manual_seed(seed)
    return torch.empty(size, dtype=torch.uint8).random_(generator=dice)


def mixed(word):
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def by_hand(data):
    """Numbers of any size, one after the other: the sums as they are described."""
    step = 0x9E3779B97F4A7C15
    keys = [mixed((definition.SEED + i * step) & MASK) for i in range(BLOCK + 1)]
    data += bytes(-len(data) % BLOCK_BYTES)
    totals = [0, 0]
    for block in range(len(data) // BLOCK_BYTES):
        pair = [0, 0]
        for i in range(BLOCK):
            at = block * BLOCK_BYTES + 8 * i
            word = int.from_bytes(data[at : at + 8], "little")
            for which in (0, 1):
                key = keys[i + which]
                low, high = (word + key) % 2**32, ((word >> 32) + (key >> 32)) % 2**32
                pair[which] += low * high
        first = mixed((pair[0] + (block + 1) * step) & MASK)
        second = mixed((pair[1] & MASK) ^ first)
        totals = [totals[0] + second, totals[1] + mixed((first + second) & MASK)]
    return [definition.signed(total & MASK) for total in totals]


@pytest.mark.parametrize("size", [0, 1, 8, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES + 13])
def test_the_sums_are_those_of_the_description(size):
    data = drawn(size)

    assert sums(data).tolist() == by_hand(bytes(data.tolist()))


def test_the_sums_are_the_same_in_every_release():
    """A digest may be written down, and compared with that of an engine of next year."""
    assert sums(torch.arange(2000, dtype=torch.int32)).tolist() == [
        -6003500642087781386,
        -2134298136851439748,
    ]


@given(position=st.integers(0, 3 * BLOCK_BYTES - 1), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=200)
def test_they_depend_on_every_bit(position, bit):
    data = drawn(3 * BLOCK_BYTES)
    before = sums(data).tolist()

    data[position] ^= 1 << bit

    assert all(new != old for new, old in zip(sums(data).tolist(), before, strict=True))


@given(
    places=st.lists(st.integers(0, 2 * BLOCK - 1), min_size=2, max_size=2, unique=True),
    bit=st.integers(0, 63),
)
@settings(deadline=None, max_examples=200)
def test_the_same_bit_in_two_words_does_not_cancel(places, bit):
    """As signs do, in a sum of products by odd numbers."""
    words = drawn(2 * BLOCK_BYTES).view(torch.int64)
    before = sums(words).tolist()

    words[places] ^= definition.signed(1 << bit)

    assert all(new != old for new, old in zip(sums(words).tolist(), before, strict=True))


@pytest.mark.parametrize("columns", [8, 512, 4096, 5000], ids=lambda k: f"{k} bytes a row")
@pytest.mark.parametrize("kind", ["random", "one-hot", "of one value each"])
def test_they_depend_on_the_order_of_rows(kind, columns):
    rows = drawn((7, columns))
    if kind == "one-hot":
        rows = torch.eye(7, columns, dtype=torch.uint8)
    if kind == "of one value each":
        rows = torch.arange(7, dtype=torch.uint8)[:, None].repeat(1, columns)
    seen = {tuple(sums(rows).tolist())}

    for one in range(7):
        for other in range(one):
            order = list(range(7))
            order[one], order[other] = other, one
            seen.add(tuple(sums(rows[order]).tolist()))

    assert len(seen) == 22


def test_blocks_and_words_that_trade_places_show():
    data = drawn(4 * BLOCK_BYTES).view(torch.int64)
    blocks, halves = data.view(4, BLOCK), data.view(8, BLOCK // 2)

    assert sums(blocks[[1, 0, 2, 3]]).tolist() != sums(data).tolist()
    assert sums(halves[[1, 0, 2, 3, 4, 5, 6, 7]]).tolist() != sums(data).tolist()
    assert sums(data.flip(0)).tolist() != sums(data).tolist()
