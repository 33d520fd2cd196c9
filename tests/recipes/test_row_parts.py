"""Micro-batches of context-parallel processes: parts of the rows that one process would have."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.cells import NO_LABEL, Batch
from celltron.cells.corpus import DataConfig
from celltron.recipes.shared import pretrain_batches
from celltron.recipes.shared.pretrain_batches import make_step_batch
from celltron.recipes.shared.pretrain_config import Config
from celltron.train.loop import StepBatch
from celltron.train.loop_config import LoopConfig
from celltron.train.parallel import ParallelConfig

PAD_ID = 0
CORPUS: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocabulary=SimpleNamespace(pad_id=PAD_ID)))


def draw_batch(lengths: list[int]) -> Batch:
    """Cells of other tokens each, a third of them with a label."""
    tokens = 1 + np.arange(sum(lengths), dtype=np.int32)
    labels = np.where(tokens % 3 == 0, tokens + 1000, NO_LABEL).astype(np.int32)
    cells = np.arange(len(lengths))
    return Batch(tokens=tokens, labels=labels, lengths=np.array(lengths), cells=cells, epochs=np.zeros_like(cells))


def cut(batch: Batch, rank: int, *, context: int, tensor: int = 1, packing: bool) -> StepBatch:
    """What one of `context` processes computes on."""
    config = Config(
        out="unused",
        data=DataConfig(paths="unused", max_length=24),
        parallel=ParallelConfig(context=context, tensor=tensor, sequence_parallel=tensor > 1),
        loop=LoopConfig(micro_batch_size=2, packing=packing),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_batches, "context_parallel_place", lambda: (rank, context))
        return make_step_batch(config, CORPUS, batch, torch.device("cpu"))


def labels_at_places(micro_batch: dict[str, Any]) -> np.ndarray:
    labels_BS = np.full(micro_batch["tokens_BS"].shape, NO_LABEL)
    labels_BS.ravel()[micro_batch["places_M"].numpy()] = micro_batch["labels_M"].numpy()
    return labels_BS


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 24), min_size=1, max_size=7),
    context=st.integers(1, 5),
    tensor=st.sampled_from([1, 2]),
    packing=st.booleans(),
)
def test_parts_put_together_are_the_rows_of_one_process(
    lengths: list[int], context: int, tensor: int, packing: bool
) -> None:
    batch = draw_batch(lengths)
    parts = [cut(batch, rank, context=context, tensor=tensor, packing=packing) for rank in range(context)]
    alone = cut(batch, 0, context=1, packing=packing)
    assert {len(part.micro_batches) for part in parts} == {len(alone.micro_batches)}
    for place, expected in enumerate(alone.micro_batches):
        found = [part.micro_batches[place] for part in parts]
        widths = {micro_batch["tokens_BS"].shape[1] for micro_batch in found}
        assert len(widths) == 1 and widths.pop() % tensor == 0
        tokens_BS = np.concatenate([micro_batch["tokens_BS"] for micro_batch in found], axis=1)
        labels_BS = np.concatenate([labels_at_places(micro_batch) for micro_batch in found], axis=1)
        # A pack of no tokens at all is padding on one process as well.
        S = int((expected["tokens_BS"] != PAD_ID).sum()) if packing else expected["tokens_BS"].shape[1]
        assert S <= tokens_BS.shape[1] <= max(S - 1, 0) + context * tensor
        np.testing.assert_array_equal(tokens_BS[:, :S], expected["tokens_BS"][:, :S])
        np.testing.assert_array_equal(labels_BS[:, :S], labels_at_places(expected)[:, :S])
        assert (tokens_BS[:, S:] == PAD_ID).all() and (labels_BS[:, S:] == NO_LABEL).all()
        if packing:
            places_T = np.concatenate([micro_batch["packed"].places_T for micro_batch in found])
            np.testing.assert_array_equal(places_T[:S], expected["packed"].places_T[:S])
            np.testing.assert_array_equal(places_T[S:], np.arange(len(places_T) - S))
        else:
            for micro_batch in found:  # padding is hidden from every query, so all know of all of it
                np.testing.assert_array_equal(micro_batch["is_padding_BS"], tokens_BS == PAD_ID)


def test_a_replica_counts_its_cells_once() -> None:
    batch = draw_batch([24, 9, 0, 17])
    alone, parts = cut(batch, 0, context=1, packing=True), [cut(batch, r, context=2, packing=True) for r in (0, 1)]
    for part in parts:
        assert (part.num_cells, part.num_tokens) == (alone.num_cells, alone.num_tokens) == (4, 50)
        assert part.num_places == 2 * sum(one["tokens_BS"].numel() for one in part.micro_batches)
    assert parts[0].num_places - alone.num_places in range(len(alone.micro_batches) + 1)


def test_rows_that_parts_pad_beyond_the_position_table_are_refused() -> None:
    thirds: Any = {"out": "unused", "data": DataConfig(paths="unused"), "parallel": ParallelConfig(context=3)}
    with pytest.raises(ValueError, match=r"data.max_length is 2048 \(padded to 2049\), longer than model.max_position"):
        Config(**thirds, loop=LoopConfig(packing=False))
    assert Config(**thirds, loop=LoopConfig(packing=True)).data.max_length == 2048  # packs are padded by a cell
    with pytest.raises(ValueError, match=r"data.max_length is 2048 \(padded to 2999\), longer than model.max_position"):
        Config(**thirds | {"parallel": ParallelConfig(context=3000)})
