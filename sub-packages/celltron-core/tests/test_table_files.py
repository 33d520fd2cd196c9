import gzip
import hashlib
import importlib.resources

import pytest

from celltron.core import table_files
from celltron.core.errors import InputError
from celltron.core.table_files import decode_table, read_columns, read_shipped_table

TABLES = importlib.resources.files("celltron.core").joinpath("tables")


def test_columns_are_picked_by_name() -> None:
    assert read_columns("a\tb\tc\n1\t2\t3\n4\t\t6\n", ("c", "b"), "x") == [["3", "6"], ["2", ""]]
    assert read_columns("a\n", ("a",), "x") == [[]]
    with pytest.raises(InputError, match="x: no column 'a' in the header"):
        read_columns("", ("a",), "x")
    with pytest.raises(InputError, match="x: line 3 has 1 columns where the header has 2"):
        read_columns("a\tb\n1\t2\n3\n", ("a",), "x")


@pytest.mark.parametrize(
    ("data", "compressed"),
    [
        (b"\xff\xfe", False),
        (b"not gzip", True),
        (b"", True),
        (gzip.compress(b"text" * 100)[:-9], True),
        (gzip.compress(b"text" * 100)[:20] + b"damage" + gzip.compress(b"text" * 100)[26:], True),
    ],
)
def test_what_is_no_table_is_named(data: bytes, compressed: bool) -> None:
    if data == b"":
        assert decode_table(data, "x", compressed=compressed) == ""
        return
    with pytest.raises(InputError, match=r"^x: not a readable table"):
        decode_table(data, "x", compressed=compressed)


def test_a_table_that_unfolds_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_MAX_TABLE_BYTES", 1000)
    assert len(decode_table(gzip.compress(b"a" * 1000), "x", compressed=True)) == 1000
    for data, compressed in ((gzip.compress(b"a" * 1_000_000), True), (b"a" * 1001, False)):
        with pytest.raises(InputError, match="larger than 1000 bytes"):
            decode_table(data, "x", compressed=compressed)


@pytest.mark.parametrize(
    ("name", "num_rows", "digest"),
    [
        ("geneformer_gc30M.tsv.gz", 25_426, "c250e47f8890cfb32b1729cc9bf5096d49e6278e4a99c53f3dad685eae655a6a"),
        ("geneformer_gc95M.tsv.gz", 42_009, "6925e3e52a1166fb017f4e61f27c9678d2fc6847e540986929451e57333e10f6"),
        (
            "gene_alias_to_ensembl_gc95M.tsv.gz",
            110_022,
            "34626536b638970bfb8fb1919028e80677c87a00a5dbea8527dfc6aae26e8e45",
        ),
        ("symbols_human.tsv.gz", 42_760, "e30941b9444bcdf5a074595f5896fea91631554ed193d7d3660538f42039a7de"),
        ("symbols_mouse.tsv.gz", 56_408, "7ca8e99d3df52923c8bfaa4c34ba4b74f4cdbc700194b657857fefb23a292150"),
    ],
)
def test_the_shipped_tables_are_those_that_were_taken(name: str, num_rows: int, digest: str) -> None:
    text = read_shipped_table(name)
    assert len(text.splitlines()) == num_rows + 1
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    # Bytes 4 to 7 of a gzip file are a time stamp, which would make each build differ.
    assert TABLES.joinpath(name).read_bytes()[4:8] == bytes(4)


def test_each_table_has_a_source_and_all_are_small() -> None:
    readme = TABLES.joinpath("README.md").read_text(encoding="utf-8")
    tables = [entry for entry in TABLES.iterdir() if entry.name.endswith(".gz")]
    assert len(tables) == 5
    assert all(f"`{entry.name}`" in readme for entry in tables)
    assert sum(len(entry.read_bytes()) for entry in tables) < 3_500_000
