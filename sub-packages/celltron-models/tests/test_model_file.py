import json
from pathlib import Path

import pytest

from celltron.core import InputError
from celltron.models.geneformer import MODEL_FILE_NAME, GeneformerConfig, ModelShape, read_model_shape

SHAPE = ModelShape(
    config=GeneformerConfig(num_layers=3, max_positions=64, norm_epsilon=1e-12), num_tokens=101, max_length=48
)


def write(folder: Path, **changes: object) -> Path:
    (folder / MODEL_FILE_NAME).write_text(json.dumps({**json.loads(SHAPE.to_json()), **changes}))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_model_shape(write(tmp_path)) == SHAPE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "hyena"}, "describes no geneformer"),
        ({"config": None}, "describes no geneformer"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"num_tokens": "101"}, "num_tokens is '101'"),
        ({"max_length": True}, "max_length is True"),
        ({"max_length": 65}, "more than the model's 64 positions"),
        ({"config": {"num_layer": 3}}, "num_layers"),
        ({"config": {"hidden_size": 10}}, "no multiple of model.num_attention_heads"),
        ({"config": {"norm_epsilon": 0.0}}, "norm_epsilon"),
        ({"config": {"variant": "pre-norm"}}, "variant"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError) as error:
        read_model_shape(write(tmp_path, **changes))
    assert expected in str(error.value) and str(tmp_path / MODEL_FILE_NAME) in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "has no model.json"), (b"{", "not readable"), (b"[1]", "describes no"), (b"[" * 100_000, "not readable")],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / MODEL_FILE_NAME).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        read_model_shape(tmp_path)
