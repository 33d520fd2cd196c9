"""Batches of masked tokens: the stream of `sampler`, this rank's part of it, tokenised and masked ahead of need.

What a batch holds is a function of (store, tokenizer, masking, seed, epoch, position) and of the rank's share of it;
threads only make it earlier.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt

from celltron.cells.batch import NO_LABEL, Batch
from celltron.cells.mask import Masking, apply_masking
from celltron.cells.sampler import EpochOrder, LoaderState
from celltron.cells.store import CellStore
from celltron.cells.tokenize import RankTokenizer
from celltron.core import InputError


class Loader:
    """Iterates over the batches of one rank.

    A global batch is the next ``cells_per_batch`` cells of the stream epoch 0, epoch 1, … without a gap between
    epochs, so that every cell comes once an epoch; the last one of the last epoch may be shorter. Of its n cells rank r
    takes ``n*r//world_size .. n*(r+1)//world_size``, which may be none. Masks and order do not depend on ranks, batch
    size or prefetch. An iterator, not a list: a second ``for`` goes on where the first one stopped; `seek` goes back.

    Args:
        store: where the counts are.
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
        prefetch: batches made ahead, by as many threads; 0 makes each when it is asked for.
        shuffle: False takes the cells in the given order in every epoch.
    """

    def __init__(  # noqa: PLR0913
        self,
        store: CellStore,
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
    ) -> None:
        if cells_per_batch < 1:
            raise InputError(f"cells_per_batch is {cells_per_batch}: wanted 1 or more cells in a batch")
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank} of world_size {world_size}: wanted a rank from 0 to world_size - 1")
        if epochs is not None and epochs < 0:
            raise InputError(f"epochs is {epochs}: wanted 0 or more, or None to go on without end")
        if prefetch < 0:
            raise InputError(f"prefetch is {prefetch}: wanted 0 (make each batch when asked) or more threads")
        self.store = store
        self.tokenizer = tokenizer
        self.cells_per_batch = cells_per_batch
        self.masking = masking if mask else None
        self.epochs = epochs
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self.order = EpochOrder(len(store) if cells is None else store.check_cells(cells), seed, shuffle=shuffle)
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[LoaderState, Future[Batch]]] = deque()
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
        self._state = self._ahead_state = state

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        while len(self._ahead) < self.prefetch and self._submit():
            pass
        if self.prefetch:
            if not self._ahead:
                raise StopIteration
            state, future = self._ahead[0]
            batch = future.result()
            self._ahead.popleft()
            self._state = state
            self._submit()
            return batch
        cells, epochs, after = self._next_cells(self._state)
        if len(cells) == 0:
            raise StopIteration
        batch = self._make(cells, epochs)
        self._state = after
        return batch

    def _submit(self) -> bool:
        """Have the next batch made ahead; False at the end of the stream."""
        cells, epochs, after = self._next_cells(self._ahead_state)
        if len(cells) == 0:
            return False
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.prefetch, thread_name_prefix="celltron-loader")
        self._ahead.append((after, self._pool.submit(self._make, cells, epochs)))
        self._ahead_state = after
        return True

    def _next_cells(self, state: LoaderState) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], LoaderState]:
        return self.order.take(state, self.cells_per_batch, epochs=self.epochs)

    def _make(self, cells: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """This rank's part of a global batch."""
        part = slice(len(cells) * self.rank // self.world_size, len(cells) * (self.rank + 1) // self.world_size)
        return self.make_batch(cells[part], epochs[part])

    def make_batch(self, cells: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> Batch:
        """The batch of the given cells as they come in the given epochs (int64 [C] each)."""
        tokens, lengths = self.tokenizer.tokenize(self.store, cells)
        if self.masking is None:
            return Batch(tokens, np.full(len(tokens), NO_LABEL, dtype=np.int32), lengths, cells, epochs)
        seen, labels = apply_masking(
            tokens, lengths, cells, self.tokenizer.vocabulary, self.masking, seed=self.order.seed, epoch=epochs
        )
        return Batch(seen, labels, lengths, cells, epochs)

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
