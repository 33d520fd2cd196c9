"""The one sentence for a source that cannot be read to its end."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from celltron.core import InputError

_BROKEN: tuple[type[Exception], ...] = (OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError)
_BROKEN += (AttributeError, ArithmeticError, zlib.error, zipfile.BadZipFile)


def damaged(name: str, reason: object) -> InputError:
    """The error for a file or address whose content cannot be read; ``reason`` is what was met."""
    words = " ".join(str(reason).strip("'\"").split()) or type(reason).__name__
    if "required filter" in words or "plugin" in words:  # how releases of HDF5 say it
        return InputError(
            f"{name} is compressed in a way this HDF5 lacks ({words}): write it again with compression='gzip'"
        )
    return InputError(f"{name} is truncated or damaged ({words}): copy or download it again")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what the libraries raise for broken content into an InputError; errors of the disk itself stay OSErrors."""
    try:
        yield
    except InputError:
        raise
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # h5py's own have no number
            raise
        raise damaged(name, error) from error
