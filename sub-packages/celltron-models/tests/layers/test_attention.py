import pytest
import torch

from celltron.models.geneformer import make_transformer_config
from celltron.models.layers import attention as attention_layer
from celltron.models.layers.attention import (
    SdpaCoreAttention,
    attend_and_drop,
    attend_jagged,
    attend_packed,
    draw_places,
)
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


@pytest.mark.parametrize(
    ("lengths", "num_parts"),
    # Cells that lie in one part, in two, in all three; parts that begin with a cell and within one.
    [((7, 4, 1), 2), ((2, 9, 1), 3), ((12,), 4), ((1, 1, 1, 1, 1, 7), 3), ((5, 2, 5), 12)],
)
def test_parts_of_a_row_of_packed_cells_are_the_row(lengths: tuple[int, ...], num_parts: int) -> None:
    """Every part has the whole cells' keys; what it adds to their gradients is summed, as gathering does it."""
    num_places = sum(lengths)
    weight = torch.randn(num_places, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = [row[0].transpose(0, 1).clone().requires_grad_() for row in draw(B=1, S=num_places)]
    q, k, v = rows
    whole = attend_packed(q, k, v, PackedCells.of(lengths, torch.device("cpu")), 0.0)
    expected = torch.autograd.grad((whole * weight).sum(), rows)
    found = [torch.zeros_like(row) for row in rows]
    size = num_places // num_parts
    for begin in range(0, num_places, size):
        part = slice(begin, begin + size)
        packed = PackedCells.of(lengths, torch.device("cpu"), part=part)
        out = attend_packed(q[part], k[packed.keys], v[packed.keys], packed, 0.0)
        torch.testing.assert_close(out, whole[part], rtol=0, atol=1e-14)
        of_part = torch.autograd.grad((out * weight[part]).sum(), rows)
        found = [total + more for total, more in zip(found, of_part, strict=True)]
    for total, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(total, gradient, rtol=0, atol=1e-13)


def draw_packed(part: slice | None = None, device: str = "cpu") -> tuple[PackedCells, list[torch.Tensor]]:
    """Cells, and their queries of such a part, keys and values, in float64."""
    packed = PackedCells.of((70, 9, 130, 47), torch.device(device), part=part)
    q, k, v = (row[0].transpose(0, 1).to(device) for row in draw(B=1, S=256, H=64))
    return packed, [q[part or slice(None)], k[packed.keys], v[packed.keys]]


@pytest.mark.parametrize("part", [None, slice(64, 128)], ids=["row", "part"])
def test_jagged_attention_is_that_of_each_cell(part: slice | None) -> None:
    packed, rows = draw_packed(part)
    found, expected = [], []
    for attend, results in ((attend_jagged, found), (attend_packed, expected)):
        own = [row.detach().requires_grad_() for row in rows]
        out = attend(*own, packed, 0.0)
        results += [out, *torch.autograd.grad(out.square().sum(), own)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def check_jagged_dropout(device: str, dtype: torch.dtype) -> None:
    """As many weights are dropped as asked for, others in every call, and the mean is that without dropout."""
    packed, rows = draw_packed(device=device)
    q, k, v = (row.to(dtype) for row in rows)
    ones = torch.ones_like(v)  # each output is then the sum of the weights that are left
    torch.manual_seed(0)
    left = attend_jagged(torch.zeros_like(q), k, ones, packed, 0.25)
    assert left.std() > 0 and abs(left.double().mean().item() - 1.0) < 0.02
    again = [attend_jagged(q, k, v, packed, 0.25) for _ in range(2)]
    assert not torch.equal(*again)
    mean = torch.stack([attend_jagged(q, k, v, packed, 0.25).double() for _ in range(200)]).mean(0)
    plain = attend_jagged(q, k, v, packed, 0.0).double()
    assert (mean - plain).square().mean() < 0.02 * plain.square().mean()


def test_jagged_attention_drops_weights() -> None:
    check_jagged_dropout("cpu", torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("part", [None, slice(64, 128)], ids=["row", "part"])
def test_jagged_attention_on_a_gpu(dtype: torch.dtype, part: slice | None) -> None:
    (packed, rows), (on_gpu, _) = draw_packed(part), draw_packed(part, "cuda")
    own = [row.to("cuda", dtype).requires_grad_() for row in rows]
    out = attend_jagged(*own, on_gpu, 0.0)
    rounded = [row.detach().double().cpu().requires_grad_() for row in own]
    expected = attend_packed(*rounded, packed, 0.0)
    pairs = zip(
        (out, *torch.autograd.grad(out.square().sum(), own)),
        (expected, *torch.autograd.grad(expected.square().sum(), rounded)),
        strict=True,
    )
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for one, other in pairs:
        torch.testing.assert_close(one.double().cpu(), other, rtol=0, atol=tolerance * other.abs().max().item())
    if part is None:
        check_jagged_dropout("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flash_attention_takes_fewer_queries_than_keys() -> None:
    """A part of a row in bfloat16, keys and values lying as gathering leaves them, against float64 on the CPU."""
    lengths, part = (70, 9, 130, 47), slice(64, 128)
    packed = {device: PackedCells.of(lengths, torch.device(device), part=part) for device in ("cpu", "cuda")}
    q, k, v = (row[0].transpose(0, 1).bfloat16().double() for row in draw(B=1, S=256, H=64))
    q, both = q[part], torch.stack((k, v), dim=1)
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        own = [tensor.to(device, dtype).detach().requires_grad_() for tensor in (q, both)]
        keys, values = own[1][packed[device].keys].unbind(1)
        out = attend_packed(own[0], keys, values, packed[device], 0.0)
        gradients = torch.autograd.grad(out.square().sum(), own)
        results.append([tensor.detach().double().cpu() for tensor in (out, *gradients)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        # bfloat16 keeps three digits.
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=2e-2 * on_cpu.abs().max().item())


def test_keys_of_other_places_are_refused() -> None:
    q, k, v = (row[0].transpose(0, 1) for row in draw(B=1, S=6))
    packed = PackedCells.of([2, 4], torch.device("cpu"), part=slice(3, 6))
    with pytest.raises(AssertionError, match="6 keys, wanted those of 4 places"):
        attend_packed(q[3:], k, v, packed, 0.0)


def test_queries_of_a_part_of_padded_rows_attend_to_the_whole_rows(core, attention) -> None:
    q, k, v = draw()
    is_hidden_BS = torch.arange(7)[None, :] >= torch.tensor([7, 4, 1])[:, None]
    expected = attention(q, k, v, is_hidden_BS).transpose(1, 2).flatten(2)
    for part in (slice(0, 3), slice(3, 7)):
        found = apply(core, [q[:, :, part], k, v], is_hidden_BS[:, None, None, :])
        torch.testing.assert_close(found, expected[:, part], rtol=0, atol=1e-13)


@pytest.mark.parametrize("probability", [0.02, 0.5])
def test_dropped_places_are_independent_trials(probability: float) -> None:
    num_places = 1_000_000
    torch.manual_seed(0)
    places = draw_places(num_places, probability)
    assert places.dtype == torch.int64 and places[0] >= 0 and places[-1] < num_places
    gaps = places.diff()
    assert gaps.min() == 1
    deviation = (probability * (1 - probability) / num_places) ** 0.5
    assert abs(len(places) / num_places - probability) < 4 * deviation
    # After a place that is drawn the next one is as often as any other.
    assert abs((gaps == 1).double().mean() - probability) < 4 * deviation / probability**0.5
    torch.manual_seed(0)
    assert torch.equal(draw_places(num_places, probability), places)


def test_few_places_may_have_none_drawn() -> None:
    torch.manual_seed(1)
    counts = [len(draw_places(3, 0.1)) for _ in range(4000)]
    assert max(counts) <= 3 and abs(sum(counts) / 12000 - 0.1) < 0.011
    assert len(draw_places(5, 1e-300)) == 0


def test_dropped_weights_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (part[0].requires_grad_() for part in draw())
    dropped = torch.tensor([0, 5, 48, 49, 97])
    monkeypatch.setattr(attention_layer, "draw_places", lambda num, probability: dropped)
    found = attend_and_drop(q, k, v, 0.25)
    weights = (q @ k.transpose(1, 2) / 5**0.5).softmax(-1)
    keep = torch.ones(98, dtype=torch.float64)
    keep[dropped] = 0.0
    expected = (weights * keep.view(2, 7, 7)) @ v / 0.75
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert attend_and_drop(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.25).dtype is torch.bfloat16


def test_no_dropout_in_evaluation(core) -> None:
    core.dropout = 0.5
    parts = draw()
    core.eval()
    assert torch.equal(apply(core, parts, None), apply(core, parts, None))
    core.train()
    assert not torch.equal(apply(core, parts, None), apply(core.eval(), parts, None))
