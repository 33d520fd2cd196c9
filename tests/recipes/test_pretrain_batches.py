"""The training batches of a run: made ahead of need, and where a checkpoint of them goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from celltron.cells import open_cells, shard_store
from celltron.cells.corpus import Corpus, DataConfig, build_corpus, read_corpus
from celltron.cells.order_config import OrderConfig
from celltron.core import InputError
from celltron.recipes.shared import pretrain_batches
from celltron.recipes.shared.pretrain_batches import MadeAhead, TrainStream
from celltron.recipes.shared.pretrain_config import Config
from celltron.recipes.shared.pretrain_resume import read_loader_state
from celltron.train.checkpoint_folder import RunState
from celltron.train.loop_config import LoopConfig

CPU = torch.device("cpu")
WHERE = Path("run/checkpoints/step_00000002")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, without Megatron's groups."""
    monkeypatch.setattr(pretrain_batches, "data_parallel_place", lambda: (0, 1))
    monkeypatch.setattr(pretrain_batches, "context_parallel_place", lambda: (0, 1))


def configure(store: Path, *, cells: int = 8, window: int = 0) -> Config:
    order = OrderConfig(length_window=window, window_blocks=1)
    data = DataConfig(paths=str(store), max_length=32, order=order)
    return Config(out="unused", data=data, loop=LoopConfig(global_batch_size=cells, micro_batch_size=2))


def corpus_of(config: Config) -> Corpus:
    return build_corpus(config.data, open_cells(config.data.sources), seed=config.loop.seed)


def state_of(stream: TrainStream) -> RunState:
    return RunState(step=2, seed=0, loader=stream.state(), distributed_optimizer=False, dtype="float32")


def test_state_and_cells_are_those_of_the_batch_handed_out(tiny_store: Path) -> None:
    config = configure(tiny_store)
    corpus = corpus_of(config)
    stream = TrainStream(config, corpus, CPU, None)
    assert stream.cells() == [] and stream.state()["position"] == 0
    seen = []
    for step in range(1, 6):
        step_batch = next(stream)
        assert stream.made is not None and stream.cells() == stream.made.batch.cells.tolist()
        assert stream.state()["position"] == 8 * step
        assert step_batch.num_cells == 8 and step_batch.flops > 0
        assert step_batch.num_tokens == stream.made.batch.lengths.sum()
        seen += stream.cells()
        if step == 2:
            resumed = state_of(stream)
    again = TrainStream(config, corpus, CPU, read_loader_state(config, corpus, resumed, WHERE))
    for step in (3, 4, 5):
        next(again)
        assert again.cells() == seen[8 * (step - 1) : 8 * step]


def test_a_batch_that_cannot_be_made_ends_the_step_that_wants_it() -> None:
    answers: list[Any] = [1, 2, InputError("shard 3 cannot be read"), 4]

    def make() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, InputError):
            raise answer
        return answer

    ahead = MadeAhead(make)
    assert [ahead.take(), ahead.take()] == [1, 2]
    with pytest.raises(InputError, match="shard 3"):
        ahead.take()


def test_other_batches_are_refused_where_they_change_which_cells_come_next(tiny_store: Path) -> None:
    windows = configure(tiny_store, window=3)
    corpus = corpus_of(windows)
    stream = TrainStream(windows, corpus, CPU, None)
    next(stream)
    resumed = state_of(stream)
    assert read_loader_state(windows, corpus, resumed, WHERE).position == 8
    with pytest.raises(InputError, match="step_00000002 would go on with other cells .* loop.global_batch_size"):
        read_loader_state(configure(tiny_store, cells=4, window=3), corpus, resumed, WHERE)
    # Without windows of like length the stream does not know of batches; older checkpoints hold no digest.
    plain = configure(tiny_store)
    stream = TrainStream(plain, corpus_of(plain), CPU, None)
    next(stream)
    assert read_loader_state(configure(tiny_store, cells=4), corpus_of(plain), state_of(stream), WHERE).position == 8
    del resumed.loader["next_cells"]
    read_loader_state(windows, corpus, resumed, WHERE)


def test_tar_shards_do_not_go_on_where_the_store_stood(tiny_store: Path, tmp_path: Path) -> None:
    shard_store(open_cells([str(tiny_store)]), tmp_path / "shards", block_cells=16)
    config = configure(tiny_store)
    corpus = corpus_of(config)
    corpus.write(tmp_path)
    stream = TrainStream(config, corpus, CPU, None)
    next(stream)
    shards = configure(tmp_path / "shards")
    of_shards = read_corpus(shards.data, open_cells(shards.data.sources), tmp_path)
    assert np.array_equal(of_shards.split.train, corpus.split.train)
    with pytest.raises(InputError, match="the same kind of --data"):
        read_loader_state(shards, of_shards, state_of(stream), WHERE)
