import tomllib
from pathlib import Path

import celltron.core
from celltron.core.version import __version__


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__


def test_every_public_name_is_there_and_the_namespace_is_open() -> None:
    assert sorted(celltron.core.__all__) == sorted(set(celltron.core.__all__))
    for name in celltron.core.__all__:
        assert hasattr(celltron.core, name)
    assert not (Path(celltron.core.__file__).parents[1] / "__init__.py").exists()
    assert (Path(celltron.core.__file__).parent / "py.typed").exists()
