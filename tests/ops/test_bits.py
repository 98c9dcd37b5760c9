from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.ops.bits import pack, unpack


@given(st.integers(1, 8), st.data())
def test_unpacking_gives_back_what_was_packed_in_as_few_bytes_as_possible(bits, data):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), np.uint8)
    packed = pack(codes, bits)
    assert packed.size == (len(codes) * bits + 7) // 8
    assert np.array_equal(unpack(packed, bits, len(codes)), codes)


def test_the_stream_starts_with_the_least_significant_bit():
    assert pack(np.array([1, 2, 3, 0], np.uint8), 2).tolist() == [0b00_11_10_01]
    assert pack(np.array([0b101, 0b011, 0b110], np.uint8), 3).tolist() == [0b10_011_101, 0b1]


def test_a_wrong_length_or_a_dirty_tail_is_refused():
    with pytest.raises(ValueError, match="do not take"):
        unpack(np.zeros(3, np.uint8), 3, 3)
    with pytest.raises(ValueError, match="not zero"):
        unpack(np.array([0, 0b10], np.uint8), 3, 3)
