import torch


@torch.no_grad()
def test_values_are_the_formula(make_model, make_cells, layer_norm) -> None:
    embedding = make_model(dtype=torch.float64).embedding
    tokens_BS, _ = make_cells(9, 4)
    sum_BSD = (
        embedding.word_embeddings.weight[tokens_BS]
        + embedding.position_embeddings.weight[:9]
        + embedding.token_type_embeddings.weight[0]
    )
    expected_BSD = layer_norm(sum_BSD, embedding.norm.weight, embedding.norm.bias)
    found_SBD = embedding(tokens_BS)
    assert found_SBD.is_contiguous()
    torch.testing.assert_close(found_SBD, expected_BSD.transpose(0, 1), rtol=0, atol=1e-13)


@torch.no_grad()
def test_dropout_works_in_training_only(make_model, make_cells) -> None:
    embedding = make_model().embedding
    embedding.dropout.p = 0.5
    tokens_BS, _ = make_cells(9, 4)
    plain = embedding(tokens_BS)
    dropped = embedding.train()(tokens_BS)
    share = (dropped == 0).double().mean().item()
    assert 0.4 < share < 0.6
    torch.testing.assert_close(dropped[dropped != 0], 2 * plain[dropped != 0])
