import pytest

from celltron.models.geneformer import GeneformerConfig

FITTING = GeneformerConfig(num_layers=6, hidden_size=256, ffn_hidden_size=512, num_attention_heads=4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 0}, "model.num_layers is 0"),
        ({"hidden_size": -8}, "model.hidden_size is -8"),
        ({"max_positions": 0}, "model.max_positions is 0"),
        ({"hidden_size": 250}, "no multiple of model.num_attention_heads"),
        ({"hidden_dropout": 1.0}, "model.hidden_dropout is 1.0"),
        ({"attention_dropout": -0.1}, "model.attention_dropout is -0.1"),
        ({"norm_epsilon": 0.0}, "model.norm_epsilon is 0.0"),
        ({"initial_standard_deviation": -0.02}, "model.initial_standard_deviation is -0.02"),
        ({"vocabulary_multiple": 0}, "model.vocabulary_multiple is 0"),
    ],
)
def test_a_value_without_sense_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        GeneformerConfig(**changes)


@pytest.mark.parametrize(
    ("config", "layout", "expected"),
    [
        (FITTING, (8, 1), "num_attention_heads is 4, which parallel.tensor (8)"),
        (GeneformerConfig(ffn_hidden_size=511), (2, 1), "ffn_hidden_size is 511, which parallel.tensor (2)"),
        (GeneformerConfig(vocabulary_multiple=1), (2, 1), "vocabulary_multiple is 1, which parallel.tensor (2)"),
        (FITTING, (1, 4), "num_layers is 6, which parallel.pipeline (4)"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(config, layout, expected) -> None:
    with pytest.raises(ValueError) as error:
        config.check_layout(tensor_parallel=layout[0], pipeline_parallel=layout[1])
    assert expected in str(error.value)


@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (2, 3), (1, 6)])
def test_a_layout_that_divides_the_model_is_let_through(layout: tuple[int, int]) -> None:
    FITTING.check_layout(tensor_parallel=layout[0], pipeline_parallel=layout[1])


@pytest.mark.parametrize(("num_tokens", "rows"), [(1, 128), (128, 128), (129, 256), (25_426, 25_472), (20_275, 20_352)])
def test_the_vocabulary_is_padded_to_the_multiple(num_tokens: int, rows: int) -> None:
    assert FITTING.padded_vocabulary(num_tokens) == rows
