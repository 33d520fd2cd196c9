"""Counts of cells: files in, a memory-mapped store, rank tokens, masks, and batches in a reproducible order."""

from celltron.cells.append import append
from celltron.cells.batch import NO_LABEL, Batch, PaddedBatch, pad_batch
from celltron.cells.block_order import BlockOrder
from celltron.cells.collection import CellCollection
from celltron.cells.convert import ConversionReport, ConvertOptions, convert
from celltron.cells.length_order import LengthOrder
from celltron.cells.loader import Loader
from celltron.cells.mask import Masking, apply_masking
from celltron.cells.medians import compute_medians
from celltron.cells.open_cells import open_cells
from celltron.cells.pack import PackedBatch, cut_into_packs, plan_packs
from celltron.cells.reader import CellIndexError, CellReader
from celltron.cells.sampler import EpochOrder, LoaderState, Order
from celltron.cells.sampler_entropy import ShuffleEntropy, shuffle_entropy
from celltron.cells.sampling_weights import balanced_weights, store_weights
from celltron.cells.split import Split, split_cells
from celltron.cells.store import CellStore
from celltron.cells.tar_store import TarStore
from celltron.cells.tar_writer import ShardReport, shard_store
from celltron.cells.token_cache import TokenCache, build_token_cache, default_cache_path
from celltron.cells.tokenize import RankTokenizer, count_tokens
from celltron.cells.verify import DamageError, verify_store
from celltron.cells.weighted_order import WeightedOrder

__all__ = [
    "NO_LABEL",
    "Batch",
    "BlockOrder",
    "CellCollection",
    "CellIndexError",
    "CellReader",
    "CellStore",
    "ConversionReport",
    "ConvertOptions",
    "DamageError",
    "EpochOrder",
    "LengthOrder",
    "Loader",
    "LoaderState",
    "Masking",
    "Order",
    "PackedBatch",
    "PaddedBatch",
    "RankTokenizer",
    "ShardReport",
    "ShuffleEntropy",
    "Split",
    "TarStore",
    "TokenCache",
    "WeightedOrder",
    "append",
    "apply_masking",
    "balanced_weights",
    "build_token_cache",
    "compute_medians",
    "convert",
    "cut_into_packs",
    "count_tokens",
    "default_cache_path",
    "open_cells",
    "pad_batch",
    "plan_packs",
    "shard_store",
    "shuffle_entropy",
    "split_cells",
    "store_weights",
    "verify_store",
]
