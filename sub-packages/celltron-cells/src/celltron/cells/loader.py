"""Batches of masked tokens: the stream of `sampler`, this rank's part of it, tokenised and masked ahead of need.

What a batch holds is a function of (store, tokenizer, masking, order, epoch, position) and of the rank's share of it;
threads only make it earlier. They make several small batches at once, since every call from Python costs.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from celltron.cells.array_pool import ArrayPool
from celltron.cells.batch import NO_LABEL, Batch
from celltron.cells.block_order import BlockOrder
from celltron.cells.mask import Masking, mask_rows
from celltron.cells.reader import CellReader
from celltron.cells.sampler import EpochOrder, LoaderState, Order, rank_part
from celltron.cells.tar_store import TarStore
from celltron.cells.token_cache import TokenCache, open_or_build_cache
from celltron.cells.token_rows import copy_tokens
from celltron.cells.tokenize import RankTokenizer
from celltron.core import InputError

CELLS_AT_ONCE = 4096
"""About so many cells of a rank are tokenised and masked in one call."""


_Cells = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Cell ids and the epochs they come in."""


class Loader:
    """Iterates over the batches of one rank.

    A global batch is the next ``cells_per_batch`` cells of the stream epoch 0, epoch 1, … without a gap between
    epochs, so that every cell comes once an epoch; the last one of the last epoch may be shorter. Of its n cells rank r
    takes ``n*r//world_size .. n*(r+1)//world_size``, which may be none. Masks and order do not depend on ranks, batch
    size or prefetch. An iterator, not a list: a second ``for`` goes on where the first one stopped; `seek` goes back.

    Args:
        store: where the counts are: a store, a collection, or tar shards.
        tokenizer: made for the store's genes.
        cells_per_batch: cells of the global batch, over all ranks.
        seed: of order and masks.
        cells: int64 ids of the cells to use; all otherwise.
        masking: shares of masked places; None masks nothing.
        mask: False masks nothing, and every label is `NO_LABEL`.
        epochs: when to end; None never ends.
        rank: this rank among the data-parallel ones.
        world_size: number of data-parallel ranks.
        state: where to go on; the beginning otherwise.
        prefetch: threads, each with some batches that it makes ahead; 0 makes each batch when it is asked for.
        shuffle: False takes the cells in the given order in every epoch.
        order: which cells in which order, instead of ``cells`` and ``shuffle``; its seed must be ``seed``.
        cache: read ranked tokens instead of counts: True keeps them beside the store (``<store>.tokens``), a path
            there; built if they are not there, refused if they are of another store, vocabulary or setting.
    """

    def __init__(  # noqa: PLR0913
        self,
        store: CellReader,
        tokenizer: RankTokenizer,
        *,
        cells_per_batch: int,
        seed: int,
        cells: npt.NDArray[np.int64] | None = None,
        masking: Masking | None = Masking(),  # noqa: B008 - frozen
        mask: bool = True,
        epochs: int | None = 1,
        rank: int = 0,
        world_size: int = 1,
        state: LoaderState | None = None,
        prefetch: int = 2,
        shuffle: bool = True,
        order: Order | None = None,
        cache: bool | str | Path = False,
    ) -> None:
        if cells_per_batch < 1:
            raise InputError(f"cells_per_batch is {cells_per_batch}: wanted 1 or more cells in a batch")
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank} of world_size {world_size}: wanted a rank from 0 to world_size - 1")
        if epochs is not None and epochs < 0:
            raise InputError(f"epochs is {epochs}: wanted 0 or more, or None to go on without end")
        if prefetch < 0:
            raise InputError(f"prefetch is {prefetch}: wanted 0 (make each batch when asked) or more threads")
        if order is not None and (cells is not None or not shuffle or order.seed != seed):
            raise InputError(
                f"order (of seed {order.seed}) was given beside cells, shuffle=False or seed {seed}: give the order "
                "alone, with its own seed"
            )
        self.store = store
        self.tokenizer = tokenizer
        self.cells_per_batch = cells_per_batch
        self.masking = masking if mask else None
        self.epochs = epochs
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self.order: Order = order or EpochOrder(
            len(store) if cells is None else store.check_cells(cells), seed, shuffle=shuffle
        )
        self.cache: TokenCache | None = open_or_build_cache(store, tokenizer, cache) if cache else None
        self._batches_at_once = max(1, CELLS_AT_ONCE * world_size // cells_per_batch)
        self._pool: ThreadPoolExecutor | None = None
        self._arrays = ArrayPool(2 * (prefetch + 2))
        self._ready: deque[tuple[LoaderState, Batch]] = deque()
        self._ahead: deque[tuple[list[LoaderState], Future[list[Batch]]]] = deque()
        self._window = (-1, -1)
        self._state = self._ahead_state = LoaderState(seed)
        self.seek(state or LoaderState(seed))

    @property
    def state(self) -> LoaderState:
        """Where the batch after the last one handed out begins; batches made ahead do not move it."""
        return self._state

    def seek(self, state: LoaderState) -> None:
        """Go on from a state, of whatever number of ranks."""
        if state.seed != self.order.seed:
            raise InputError(
                f"the loader's state has seed {state.seed}, the loader {self.order.seed}: use the seed of the run "
                "that is to go on"
            )
        if state.epoch < 0 or not 0 <= state.position < len(self.order):
            raise InputError(
                f"the loader's state is at place {state.position} of epoch {state.epoch}, but an epoch has "
                f"{len(self.order)} cells: "
                "use the cells and the split of the run that is to go on"
            )
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._ready.clear()
        self._state = self._ahead_state = state

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if not self._ready:
            self._refill()
        if not self._ready:
            raise StopIteration
        self._state, batch = self._ready.popleft()
        return batch

    def _refill(self) -> None:
        """Take the next batches that are made, and have others made ahead; none are left at the end of the stream."""
        if not self.prefetch:
            plans, states = self._plan(self._state, 1)
            self._ready.extend(zip(states, self._make(plans), strict=True))
            return
        while len(self._ahead) < self.prefetch and self._submit():
            pass
        if self._ahead:
            states, future = self._ahead[0]
            self._ready.extend(zip(states, future.result(), strict=True))
            self._ahead.popleft()
            self._submit()

    def _submit(self) -> bool:
        """Have the next batches made ahead; False at the end of the stream."""
        plans, states = self._plan(self._ahead_state, self._batches_at_once)
        if not plans:
            return False
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.prefetch, thread_name_prefix="celltron-loader")
        self._fetch_ahead(self._ahead_state)
        self._ahead.append((states, self._pool.submit(self._make, plans)))
        self._ahead_state = states[-1]
        return True

    def _fetch_ahead(self, state: LoaderState) -> None:
        """While cells of one window of tar shards are read, have the next one's fetched."""
        if not (isinstance(self.store, TarStore) and isinstance(self.order, BlockOrder)):
            return
        window = self.order.window_at(state.epoch, state.position)
        if self._window != (state.epoch, window):
            self._window = (state.epoch, window)
            for near in (window, window + 1):
                if near < self.order.num_windows:
                    self.store.prefetch(self.order.window_of(state.epoch, near))

    def _plan(self, state: LoaderState, num_batches: int) -> tuple[list[_Cells], list[LoaderState]]:
        """This rank's cells and their epochs in the next global batches, and the state after each of them."""
        plans: list[_Cells] = []
        states: list[LoaderState] = []
        for _ in range(num_batches):
            cells, epochs, state = self.order.take(state, self.cells_per_batch, epochs=self.epochs)
            if len(cells) == 0:
                break
            part = rank_part(len(cells), self.rank, self.world_size)
            plans.append((cells[part], epochs[part]))
            states.append(state)
        return plans, states

    def _make(self, plans: list[_Cells]) -> list[Batch]:
        if not plans:
            return []
        whole = self.make_batch(*(np.concatenate(parts) for parts in zip(*plans, strict=True)))
        return whole.split_at(np.cumsum([0] + [len(cells) for cells, _ in plans]))

    def make_batch(self, cells: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """The batch of the given cells as they come in the given epochs (int64 [C] each)."""
        rows = (self.cache or self.tokenizer).encode(self.store, cells)
        tokens, labels = self._arrays.empty(rows.num_tokens), self._arrays.empty(rows.num_tokens)
        if self.masking is None:
            copy_tokens(rows, tokens)
            labels.fill(NO_LABEL)
        else:
            seed, vocabulary = self.order.seed, self.tokenizer.vocabulary
            mask_rows(rows, cells, vocabulary, self.masking, seed=seed, epoch=epochs, out=(tokens, labels))
        return Batch(tokens, labels, rows.lengths, cells, epochs)

    def close(self) -> None:
        """Stop the threads; the state stays."""
        self.seek(self._state)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
