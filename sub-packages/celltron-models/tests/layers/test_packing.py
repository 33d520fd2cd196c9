import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.models.layers.packing import PackedCells

CPU = torch.device("cpu")


def test_what_packing_says_of_cells() -> None:
    packed = PackedCells.of([3, 1, 2], CPU)
    assert packed.cu_seqlens_q.tolist() == [0, 3, 4, 6] and packed.cu_seqlens_q.dtype == torch.int32
    assert packed.places_T is not None and packed.places_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 3
    assert packed.lengths == packed.key_lengths == (3, 1, 2) and packed.keys == slice(0, 6)
    assert packed.cu_seqlens_kv is packed.cu_seqlens_q


def test_a_part_begins_and_ends_within_cells() -> None:
    packed = PackedCells.of([3, 5, 1, 4], CPU, part=slice(4, 11))
    assert packed.lengths == (4, 1, 2) and packed.key_lengths == (5, 1, 4) and packed.keys == slice(3, 13)
    assert packed.cu_seqlens_q.tolist() == [0, 4, 5, 7] and packed.cu_seqlens_kv.tolist() == [0, 5, 6, 10]
    assert packed.cu_seqlens_kv.dtype == torch.int32
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (4, 5)
    assert packed.places_T is not None and packed.places_T.tolist() == [1, 2, 3, 4, 0, 0, 1]


def test_a_part_in_the_middle_of_a_cell_has_all_its_keys() -> None:
    packed = PackedCells.of([2, 9, 1], CPU, part=slice(4, 8))
    assert packed.lengths == (4,) and packed.key_lengths == (9,) and packed.keys == slice(2, 11)
    assert packed.places_T is not None and packed.places_T.tolist() == [2, 3, 4, 5]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 143), max_size=6),
)
def test_parts_are_together_the_row_whatever_the_cuts(lengths: list[int], cuts: set[int]) -> None:
    num_places, whole = sum(lengths), PackedCells.of(lengths, CPU)
    cell_of_T = [cell for cell, length in enumerate(lengths) for _ in range(length)]
    bounds = [0, *sorted(cut for cut in cuts if cut < num_places), num_places]
    places: list[int] = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        part = PackedCells.of(lengths, CPU, part=slice(begin, end))
        assert part.places_T is not None
        places += part.places_T.tolist()
        here = cell_of_T[begin:end]
        cells = sorted(set(here))
        assert part.lengths == tuple(here.count(cell) for cell in cells)
        assert part.key_lengths == tuple(lengths[cell] for cell in cells)
        assert cell_of_T[part.keys] == [cell for cell in cells for _ in range(lengths[cell])]
        assert part.cu_seqlens_q.diff().tolist() == list(part.lengths)
        assert part.cu_seqlens_kv.diff().tolist() == list(part.key_lengths)
    assert whole.places_T is not None and places == whole.places_T.tolist()
