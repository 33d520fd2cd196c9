import numpy as np

from celltron.cells import compiled


def double(x: np.ndarray) -> np.ndarray:
    return x * 2


def test_a_kernel_computes() -> None:
    assert compiled.compiled(double)(np.array([1, 2])).tolist() == [2, 4]


def test_an_unwritable_folder_means_no_cache_and_a_reason(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(compiled.os, "access", lambda path, mode: False)
    assert "cannot be written" in compiled._reason_not_to_cache()
