from typing import Any

import pytest

from celltron.train.engine import EngineConfig, transformer_settings


def test_megatron_is_told_nothing_by_default() -> None:
    assert transformer_settings(EngineConfig()) == {}


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"fp32_residual": True}, {"fp32_residual_connection": True}),
        ({"fp8": "tensorwise"}, {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        ({"fp8": "blockwise"}, {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
        ({"fp8": "mxfp8"}, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
        ({"recompute": "selective"}, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    ],
)
def test_megatron_is_told_what_is_asked_for(engine: dict[str, Any], expected: dict[str, Any]) -> None:
    assert transformer_settings(EngineConfig(**engine)) == expected


def test_eight_bits_want_transformer_engine() -> None:
    with pytest.raises(ValueError, match=r"engine\.fp8 is blockwise, which only Transformer Engine's layers have"):
        EngineConfig(fp8="blockwise", layers="torch")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"fp8": "mxfp8"}, r"engine\.fp8 is mxfp8 with precision fp32, but is a variant of bf16; set precision=bf16"),
        ({"fp32_residual": True}, r"engine\.fp32_residual is true with precision fp32, but is a variant of bf16"),
    ],
)
def test_some_settings_want_bf16(engine: dict[str, Any], message: str) -> None:
    config = EngineConfig(**engine)
    config.check_precision("bf16")
    with pytest.raises(ValueError, match=message):
        config.check_precision("fp32")


def test_eight_bits_want_rows_of_a_multiple() -> None:
    multiples = [EngineConfig(fp8=kind).rows_multiple for kind in ("none", "tensorwise", "blockwise", "mxfp8")]
    assert multiples == [1, 16, 16, 32]
