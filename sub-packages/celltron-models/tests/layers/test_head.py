import torch


@torch.no_grad()
def test_values_are_the_formula(make_model, layer_norm) -> None:
    head = make_model(dtype=torch.float64).head
    hidden_MD = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_MD = layer_norm(
        (hidden_MD @ head.dense.weight.T + head.dense.bias).relu(), head.norm.weight, head.norm.bias
    )
    torch.testing.assert_close(head(hidden_MD), expected_MD, rtol=0, atol=1e-13)


def test_its_norm_is_never_split_along_the_sequence(make_model) -> None:
    head = make_model().head
    assert not head.norm.weight.sequence_parallel and not head.norm.bias.sequence_parallel
