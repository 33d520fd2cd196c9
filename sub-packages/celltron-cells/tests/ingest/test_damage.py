import errno
import zlib

import pytest

from celltron.cells.ingest.damage import damaged, reading
from celltron.core import InputError


@pytest.mark.parametrize("error", [OSError("truncated\nfile"), KeyError("X"), zlib.error("bad data"), EOFError()])
def test_what_libraries_raise_for_broken_content(error: Exception) -> None:
    with pytest.raises(InputError, match=r"a.h5ad is truncated or damaged \(.+\): copy or download it again") as caught:
        with reading("a.h5ad"):
            raise error
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


def test_errors_of_the_disk_and_of_the_user_stay_what_they_are() -> None:
    for error in (OSError(errno.ENOSPC, "no space"), InputError("a sentence"), MemoryError()):
        with pytest.raises(type(error)) as caught:
            with reading("a.h5ad"):
                raise error
        assert caught.value is error


def test_a_compression_that_is_not_installed() -> None:
    for reason in ("required filter 'zstd' is not registered", "can't open directory (/usr/lib/plugin)"):
        assert "write it again with compression='gzip'" in str(damaged("a.h5ad", OSError(reason)))
