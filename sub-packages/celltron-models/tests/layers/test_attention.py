import pytest
import torch

from celltron.models.geneformer import make_transformer_config
from celltron.models.layers.attention import SdpaCoreAttention
from celltron.models.layers.packing import PackedCells

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def core(small) -> SdpaCoreAttention:
    return SdpaCoreAttention(make_transformer_config(small, dtype=torch.float64, sequence_parallel=False), 1)


def draw(B: int = 3, N: int = 2, S: int = 7, H: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, N, S, H, generator=generator, dtype=torch.float64) for _ in range(3)]


def apply(core: SdpaCoreAttention, parts: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """Megatron's layout is [S, B, N, H]; back to [B, S, N x H]."""
    return core(*(part.permute(2, 0, 1, 3) for part in parts), mask).transpose(0, 1)


def test_without_a_mask_it_is_the_formula(core, attention) -> None:
    parts = draw()
    expected = attention(*parts, torch.zeros(3, 7, dtype=torch.bool)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(apply(core, parts, None), expected, rtol=0, atol=1e-13)


def test_hidden_places_get_no_weight(core, attention) -> None:
    parts = draw()
    is_hidden_BS = torch.arange(7)[None, :] >= torch.tensor([7, 4, 1])[:, None]
    mask = is_hidden_BS[:, None, None, :]
    found = apply(core, parts, mask)
    torch.testing.assert_close(
        found, attention(*parts, is_hidden_BS).transpose(1, 2).flatten(2), rtol=0, atol=1e-13
    )
    for part in parts[1:]:
        part[is_hidden_BS[:, None, :].expand(3, 2, 7)] = 1e6
    assert torch.equal(apply(core, parts, mask), found)


def test_packed_cells_attend_to_themselves_alone(core, attention) -> None:
    parts = draw()
    lengths = (7, 4, 1)
    packed = PackedCells.of(lengths, torch.device("cpu"))
    rows = [torch.cat([part[i, :, :n].transpose(0, 1) for i, n in enumerate(lengths)]) for part in parts]
    found = core(*rows, None, packed_seq_params=packed)
    is_hidden_BS = torch.arange(7)[None, :] >= torch.tensor(lengths)[:, None]
    expected = attention(*parts, is_hidden_BS).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected[~is_hidden_BS], rtol=0, atol=1e-13)
    core.dropout = 0.5
    core.train()
    assert not torch.equal(core(*rows, None, packed_seq_params=packed), found)


def test_what_packing_says_of_cells() -> None:
    packed = PackedCells.of([3, 1, 2], torch.device("cpu"))
    assert packed.cu_seqlens_q.tolist() == [0, 3, 4, 6] and packed.cu_seqlens_q.dtype == torch.int32
    assert packed.places_T.tolist() == [0, 1, 2, 0, 0, 1] and packed.max_seqlen_q == 3


def test_no_dropout_in_evaluation(core) -> None:
    core.dropout = 0.5
    parts = draw()
    core.eval()
    assert torch.equal(apply(core, parts, None), apply(core, parts, None))
    core.train()
    assert not torch.equal(apply(core, parts, None), apply(core.eval(), parts, None))
