"""Print what the packages of this repository need from others, for an image's layer that is made without their code.

`python docker/list_requirements.py hf s3` adds the root package's extras `hf` and `s3`.
"""

import argparse
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^]]*)\])?")


def read_projects(root: Path) -> dict[str, Any]:
    """Name to pyproject.toml of the root and its sub-packages."""
    paths = [root / "pyproject.toml", *sorted(root.glob("sub-packages/*/pyproject.toml"))]
    files = [tomllib.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {file["project"]["name"]: file for file in files}


def list_requirements(projects: dict[str, Any], name: str, extras: list[str]) -> Iterator[str]:
    """Requirements of a package, its build and its extras; in place of a sibling, the sibling's own."""
    project = projects[name]["project"]
    yield from projects[name]["build-system"]["requires"]
    own = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    for line in own:
        found = REQUIREMENT.match(line)
        assert found, line
        if found["name"] in projects:
            inner = found["extras"].split(",") if found["extras"] else []
            yield from list_requirements(projects, found["name"], inner)
        else:
            yield line


def main() -> None:
    """Read the arguments and print, each requirement once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*", help="extras of the root package")
    projects = read_projects(ROOT)
    print("\n".join(sorted(set(list_requirements(projects, "celltron", parser.parse_args().extras)))))


if __name__ == "__main__":
    main()
