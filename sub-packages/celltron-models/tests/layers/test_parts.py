"""Layers out of Transformer Engine's parts, which need a GPU, with stand-ins that want what those want."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType

from celltron.models.geneformer import build_geneformer
from celltron.models.layers.attention import SdpaCoreAttention
from celltron.models.layers.norm import LayerNorm, RoundedLayerNorm
from celltron.models.layers.packing import PackedCells
from celltron.models.layers.parts import TeCoreAttention, layer_parts

pytestmark = pytest.mark.usefixtures("one_process", "float64_stays")
LENGTHS = [7, 1, 16, 4]


class WithExtraState(torch.nn.Module):
    """Transformer Engine's modules have a state besides their parameters."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Empty."""


class Column(WithExtraState, ColumnParallelLinear):
    pass


class Row(WithExtraState, RowParallelLinear):
    pass


class Norm(WithExtraState, torch.nn.LayerNorm):
    """As Megatron makes Transformer Engine's: it takes no other arguments."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class Attention(WithExtraState):
    """What Transformer Engine 2.20 demands of the arguments, and PyTorch's attention from where cells end alone."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, pg_collection: Any = None
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attn_mask_type is AttnMaskType.padding

    def forward(
        self, q: Any, k: Any, v: Any, attention_mask: Any, attn_mask_type: Any, packed_seq_params: Any = None
    ) -> torch.Tensor:
        if packed_seq_params is not None:
            assert packed_seq_params.qkv_format == "thd" and attn_mask_type is AttnMaskType.padding
            assert q.dim() == 3 and packed_seq_params.cu_seqlens_q.dtype is torch.int32
            ends = packed_seq_params.cu_seqlens_q.tolist()
            assert packed_seq_params.max_seqlen_q == max(b - a for a, b in zip(ends, ends[1:], strict=False))
            cells = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
            return torch.cat([attend(q[cell], k[cell], v[cell]) for cell in cells])
        S, B = q.shape[:2]
        if attention_mask is None:
            assert attn_mask_type is AttnMaskType.no_mask, "Please provide attention_mask for padding!"
            lengths = [S] * B
        else:
            assert attn_mask_type is AttnMaskType.padding and attention_mask.shape == (B, 1, 1, S)
            lengths = attention_mask[:, 0, 0].logical_not().sum(dim=1).tolist()
        out = torch.zeros(S, B, q.shape[2] * q.shape[3], dtype=q.dtype)
        for cell, length in enumerate(lengths):
            out[:length, cell] = attend(*(tensor[:length, cell] for tensor in (q, k, v)))
        return out


def attend(q_SNH: torch.Tensor, k_SNH: torch.Tensor, v_SNH: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q_SNH, k_SNH, v_SNH)))
    return out[0].transpose(0, 1).flatten(1)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "TEColumnParallelLinear": Column,
        "TERowParallelLinear": Row,
        "TENorm": Norm,
        "TEDotProductAttention": Attention,
    }
    for name, stand_in in names.items():
        monkeypatch.setattr(megatron_te, name, stand_in)


def build(small: Any, layers: Any) -> Any:
    return build_geneformer(
        small, num_tokens=101, dtype=torch.float64, sequence_parallel=False, seed=3, layers=layers
    ).eval()


@pytest.fixture(params=["post_norm", "pre_norm"])
def variant(request: pytest.FixtureRequest, small: Any) -> Any:
    return replace(small, variant=request.param)


def test_parameters_have_the_same_names_and_values(stand_ins: None, variant: Any) -> None:
    in_torch, in_te = build(variant, "torch"), build(variant, "te")
    theirs = dict(in_te.named_parameters())
    for name, parameter in in_torch.named_parameters():
        other = theirs.pop(name)
        assert torch.equal(parameter, other), name
    assert not theirs
    assert isinstance(in_te.encoder.layers[0].self_attention.core_attention, TeCoreAttention)


@pytest.mark.parametrize("lengths", [LENGTHS, [16] * 4], ids=["padded", "unpadded"])
def test_padded_rows_are_asked_for_as_transformer_engine_wants(
    stand_ins: None, variant: Any, make_cells: Any, lengths: list[int]
) -> None:
    tokens_BS, is_padding_BS = make_cells(*lengths, num_places=16)
    places_M = (~is_padding_BS).flatten().nonzero()[:, 0]
    expected, found = (build(variant, kind)(tokens_BS, is_padding_BS, places_M) for kind in ("torch", "te"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_packed_cells_are_asked_for_as_transformer_engine_wants(
    stand_ins: None, variant: Any, make_cells: Any
) -> None:
    tokens_BS, is_padding_BS = make_cells(*LENGTHS)
    row = tokens_BS[~is_padding_BS][None]
    packed = PackedCells.of(LENGTHS, torch.device("cpu"))
    expected, found = (build(variant, kind)(row, packed=packed) for kind in ("torch", "te"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def config(**settings: Any) -> Any:
    return SimpleNamespace(**{"fp32_residual_connection": False, "context_parallel_size": 1} | settings)


def test_context_parallel_rows_keep_our_attention(stand_ins: None) -> None:
    parts = layer_parts("te", config(context_parallel_size=2))
    assert parts.core_attention is SdpaCoreAttention and parts.column_linear is Column and parts.norm is Norm


def test_a_float32_residual_keeps_our_norms(stand_ins: None) -> None:
    parts = layer_parts("te", config(fp32_residual_connection=True))
    assert (parts.norm, parts.branch_norm) == (LayerNorm, RoundedLayerNorm)
    assert parts.core_attention is TeCoreAttention
