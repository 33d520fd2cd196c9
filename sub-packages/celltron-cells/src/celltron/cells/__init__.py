"""Counts of cells: files in, a memory-mapped store, rank tokens, masks, and batches in a reproducible order."""

from celltron.cells.batch import NO_LABEL, Batch, PaddedBatch, pad_batch
from celltron.cells.convert import ConversionReport, ConvertOptions, convert
from celltron.cells.loader import Loader
from celltron.cells.mask import Masking, apply_masking
from celltron.cells.medians import compute_medians
from celltron.cells.sampler import EpochOrder, LoaderState
from celltron.cells.split import Split, split_cells
from celltron.cells.store import CellIndexError, CellStore
from celltron.cells.tokenize import RankTokenizer, count_tokens

__all__ = [
    "NO_LABEL",
    "Batch",
    "CellIndexError",
    "CellStore",
    "ConversionReport",
    "ConvertOptions",
    "EpochOrder",
    "Loader",
    "LoaderState",
    "Masking",
    "PaddedBatch",
    "RankTokenizer",
    "Split",
    "apply_masking",
    "compute_medians",
    "convert",
    "count_tokens",
    "pad_batch",
    "split_cells",
]
