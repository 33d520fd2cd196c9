import hashlib

import numpy as np
import pytest

from celltron.models.layers.initialise import draw_parameter


def test_a_draw_is_a_function_of_seed_and_name() -> None:
    first = draw_parameter(3, "encoder.layers.0.mlp.linear_fc1.weight", (40, 24), 0.02)
    assert first.dtype == np.float32
    assert np.array_equal(first, draw_parameter(3, "encoder.layers.0.mlp.linear_fc1.weight", (40, 24), 0.02))
    for seed, name in ((4, "encoder.layers.0.mlp.linear_fc1.weight"), (3, "encoder.layers.1.mlp.linear_fc1.weight")):
        assert not np.array_equal(first, draw_parameter(seed, name, (40, 24), 0.02))


def test_a_draw_is_normal() -> None:
    values = draw_parameter(0, "head.dense.weight", (400, 500), 0.02)
    assert abs(values.mean()) < 2e-4
    assert abs(values.std() - 0.02) < 2e-4
    assert abs((np.abs(values) < 0.02).mean() - 0.6827) < 5e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [("head.dense.bias", 0.0), ("head.norm.bias", 0.0), ("head.norm.weight", 1.0), ("e.layers.0.mlp_norm.weight", 1.0)],
)
def test_biases_start_at_zero_and_norms_at_one(name: str, value: float) -> None:
    assert (draw_parameter(0, name, (7,), 0.02) == value).all()


def test_the_bits_never_change() -> None:
    """Runs started by an older celltron must start the same today, on every machine."""
    values = draw_parameter(1, "embedding.word_embeddings.weight", (4, 3), 0.02)
    digest = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
    assert digest == "a4d38be653fd93a4f6774959add43b650e7dda716eca7682431a96452150689a"
