"""JSON files beside foreign checkpoints; their faults are tested with the folders that hold them, too."""

from pathlib import Path

import pytest

from celltron.core import InputError
from celltron.models.geneformer import read_medians
from celltron.models.geneformer.foreign_json import is_number


@pytest.mark.parametrize("value", [0, -1, 2.5, 10**300])
def test_numbers(value: object) -> None:
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, [1], float("nan"), float("-inf"), 10**400])
def test_no_numbers(value: object) -> None:
    assert not is_number(value)


def test_medians(tmp_path: Path) -> None:
    path = tmp_path / "medians.json"
    path.write_text('{"ENSG2": 1.5, "ENSG1": 3}')
    table = read_medians(path)
    assert table.genes == ("ENSG2", "ENSG1") and table.values.tolist() == [1.5, 3.0]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"1"', "true", "0", "-1", "1" + "0" * 400, "null"])
def test_a_median_that_is_no_positive_number_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "medians.json"
    path.write_text(f'{{"ENSG1": {value}}}')
    with pytest.raises(InputError, match="the median of 'ENSG1' is .*wanted a"):
        read_medians(path)
