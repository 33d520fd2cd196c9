import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from celltron.core.errors import InputError
from celltron.core.vocabulary import (
    CLS,
    EOS,
    MASK,
    PAD,
    MedianTable,
    Vocabulary,
    load_published_geneformer,
    load_vocabulary_table,
)

genes_lists = st.lists(st.from_regex(r"ENSG[0-9]{11}", fullmatch=True), min_size=1, max_size=8, unique=True)
medians = st.floats(min_value=5e-324, allow_nan=False, allow_infinity=False)


def test_ids_are_places() -> None:
    vocabulary = Vocabulary([PAD, MASK, CLS, EOS, "g1", "g2"])
    assert len(vocabulary) == 6 and vocabulary.tokens == (PAD, MASK, CLS, EOS, "g1", "g2")
    assert (vocabulary.pad_id, vocabulary.mask_id, vocabulary.cls_id, vocabulary.eos_id) == (0, 1, 2, 3)
    assert vocabulary.special_ids.tolist() == [0, 1, 2, 3] and vocabulary.special_ids.dtype == np.int32
    assert vocabulary.first_gene_id == 4 and vocabulary.genes == ("g1", "g2")
    assert vocabulary.id_of("g2") == 5
    ids = vocabulary.ids_of(["g2", "nothing", PAD, "g2"])
    assert ids.tolist() == [5, -1, 0, 5] and ids.dtype == np.int32
    assert vocabulary.ids_of([]).shape == (0,)
    with pytest.raises(InputError, match="'g3' is not among the 6"):
        vocabulary.id_of("g3")
    assert repr(vocabulary) == "Vocabulary(4 special tokens, 2 genes)"


def test_specials_may_stand_in_any_order() -> None:
    vocabulary = Vocabulary(["<unk>", MASK, PAD, "g"])
    assert (vocabulary.pad_id, vocabulary.mask_id, vocabulary.first_gene_id) == (2, 1, 3)
    assert vocabulary.cls_id is None and vocabulary.eos_id is None


def test_made_of_genes() -> None:
    assert Vocabulary.from_genes(["b", "a"]).tokens == (PAD, MASK, "b", "a")
    assert Vocabulary.from_genes(["b", "a"], with_cls_eos=True).tokens == (PAD, MASK, CLS, EOS, "b", "a")


@pytest.mark.parametrize(
    ("tokens", "pattern"),
    [
        ([], "no <pad> token"),
        ([PAD, "g"], "no <mask> token"),
        ([MASK, "g"], "no <pad> token"),
        ([PAD, MASK], "holds no gene"),
        ([PAD, MASK, "g", "g"], "'g' twice"),
        ([PAD, "g", MASK], "'g' at place 1, before a special token"),
        ([PAD, MASK, "g", CLS], "before a special token"),
        ([PAD, MASK, ""], "wanted a name"),
        ([PAD, MASK, "a\nb"], "wanted a name"),
        ([PAD, MASK, 3], "holds 3, wanted a name"),
    ],
)
def test_a_bad_vocabulary_is_refused(tokens: list[Any], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        Vocabulary(tokens)


def test_equality_and_fingerprint_depend_on_order() -> None:
    first, second, other = Vocabulary.from_genes("ab"), Vocabulary.from_genes(["a", "b"]), Vocabulary.from_genes("ba")
    assert first == second and hash(first) == hash(second) and first.fingerprint() == second.fingerprint()
    assert first != other and first.fingerprint() != other.fingerprint() and first != "ab"
    # Fixed for ever: caches and checkpoints are known by it.
    assert first.fingerprint() == "64e5713a4f3b4d51f836ce0f2ad8c4fe1650c3881774224191d11e60967b5e9b"
    assert (
        MedianTable(["a", "b"], [0.1, 2.0]).fingerprint()
        == "0c774e966a0b22fc2dab04abc89d556d9ae2f0245de0e6854f128502d2f0b67f"
    )


def test_nothing_can_be_changed() -> None:
    vocabulary, table = Vocabulary.from_genes("ab"), MedianTable(["a"], [1.0])
    with pytest.raises(AttributeError):
        vocabulary.tokens = ()  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        table.values[0] = 2.0
    given_values = np.array([1.0])
    table = MedianTable(["a"], given_values)
    given_values[0] = 5.0
    assert table.values[0] == 1.0
    vocabulary.special_ids[0] = 9
    assert vocabulary.special_ids[0] == 0


@given(genes_lists, st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_vocabulary_comes_back(
    tmp_path_factory: pytest.TempPathFactory, genes: list[str], with_cls_eos: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "vocabulary.json"
    vocabulary = Vocabulary.from_genes(genes, with_cls_eos=with_cls_eos)
    vocabulary.to_json(path)
    assert Vocabulary.from_json(path) == vocabulary
    assert json.loads(path.read_text())["format"] == "celltron-vocabulary"


@given(st.dictionaries(st.from_regex(r"ENSG[0-9]{11}", fullmatch=True), medians, max_size=8))
@settings(deadline=None, max_examples=30)
def test_medians_come_back_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, values: dict[str, float]) -> None:
    path = tmp_path_factory.getbasetemp() / "medians.json"
    table = MedianTable(list(values), list(values.values()))
    table.to_json(path)
    back = MedianTable.from_json(path)
    assert back == table and hash(back) == hash(table) and len(back) == len(values)
    assert back.genes == tuple(values) and back.values.tobytes() == table.values.tobytes()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_median_is_named(value: float) -> None:
    with pytest.raises(InputError, match="the median of 'b' is .*, wanted a finite number above zero"):
        MedianTable(["a", "b"], [1.0, value])


def test_bad_tables_of_medians() -> None:
    with pytest.raises(InputError, match="2 genes but 1 values"):
        MedianTable(["a", "b"], [1.0])
    with pytest.raises(InputError, match="'a' twice"):
        MedianTable(["a", "a"], [1.0, 2.0])
    assert MedianTable(["a"], [1.0]) != MedianTable(["a"], [np.nextafter(1.0, 2.0)])
    assert MedianTable(["a"], [1.0]) != "a"
    assert repr(MedianTable(["a"], [1.0])) == "MedianTable(1 genes)"


def test_medians_for_a_vocabulary() -> None:
    table = MedianTable(["c", "a", "x", PAD], [3.0, 1.0, 9.0, 5.0])
    medians_V = table.for_vocabulary(Vocabulary.from_genes(["a", "b", "c"]))
    assert medians_V.dtype == np.float64
    np.testing.assert_array_equal(medians_V, [np.nan, np.nan, 1.0, np.nan, 3.0])
    assert np.isnan(MedianTable([], []).for_vocabulary(Vocabulary.from_genes("a"))).all()


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"format": "other"}, "this is no celltron-vocabulary file"),
        ({"version": 2}, "version 1 is wanted, found 2"),
        ({"tokens": None}, "'tokens' must be a list of str"),
        ({"tokens": [PAD, MASK, 3]}, "'tokens' must be a list of str"),
        ({"tokens": [PAD, "g"]}, "no <mask> token"),
        ({"tokens": [PAD, MASK, "b", "a"]}, "does not fit its fingerprint"),
        ({"fingerprint": None}, "does not fit its fingerprint"),
    ],
)
def test_a_damaged_vocabulary_file_is_named(tmp_path: Path, change: dict[str, Any], pattern: str) -> None:
    path = tmp_path / "v.json"
    Vocabulary.from_genes("ab").to_json(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=pattern) as caught:
        Vocabulary.from_json(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"values": [1.0, True]}, "'values' must be a list of float"),
        ({"values": [1.0, "2"]}, "'values' must be a list of float"),
        ({"values": [1.0, float("nan")]}, "above zero"),
        ({"values": [1.0]}, "2 genes but 1 values"),
        ({"values": [1.0, 10**400]}, "m.json: "),
        ({"values": [1.0, 2.5]}, "does not fit its fingerprint"),
        ({"genes": [["a"], "b"]}, "'genes' must be a list of str"),
    ],
)
def test_a_damaged_file_of_medians_is_named(tmp_path: Path, change: dict[str, Any], pattern: str) -> None:
    path = tmp_path / "m.json"
    MedianTable(["a", "b"], [1.0, 2.0]).to_json(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=pattern):
        MedianTable.from_json(path)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\x80\x04pickle", b"[" * 100_000, b"\xff\xfe\x00"])
def test_files_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    for read in (Vocabulary.from_json, MedianTable.from_json):
        with pytest.raises(InputError, match=r"x\.json: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "num_specials", "num_genes", "num_medians", "gene", "gene_id", "median"),
    [
        ("gc30M", 2, 25_424, 25_424, "ENSG00000000003", 2, 2.001186019549122),
        ("gc95M", 4, 20_271, 42_005, "ENSG00000000003", 4, None),
    ],
)
def test_the_published_vocabularies(
    name: Any, num_specials: int, num_genes: int, num_medians: int, gene: str, gene_id: int, median: float | None
) -> None:
    vocabulary, table = load_published_geneformer(name)
    assert (vocabulary.first_gene_id, len(vocabulary.genes), len(table)) == (num_specials, num_genes, num_medians)
    assert vocabulary.tokens[:num_specials] == (PAD, MASK, CLS, EOS)[:num_specials]
    assert vocabulary.id_of(gene) == gene_id
    medians_V = table.for_vocabulary(vocabulary)
    assert np.isnan(medians_V[:num_specials]).all() and (medians_V[num_specials:] > 0).all()
    if median is not None:
        assert medians_V[gene_id] == median


def test_there_is_no_third() -> None:
    with pytest.raises(InputError, match="'gc1M'; choose gc30M or gc95M"):
        load_published_geneformer("gc1M")  # type: ignore[arg-type]


TABLE = (
    "ensembl_id\ttoken_id\tmedian\tsymbol\n<mask>\t1\t\t\n<pad>\t0\t\t\ng2\t3\t1e-3\tB\ng1\t2\t0.5\tA\nextra\t\t7\t\n"
)


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_a_table_of_ones_own(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(gzip.compress(TABLE.encode()) if suffix.endswith(".gz") else TABLE.encode())
    vocabulary, table = load_vocabulary_table(path)
    assert vocabulary.tokens == (PAD, MASK, "g1", "g2")
    assert table == MedianTable(["g2", "g1", "extra"], [1e-3, 0.5, 7.0])


@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        ("token_id", "token", "no column 'token_id'"),
        ("g2\t3", "g2\t4", "token_id 3 is missing; the ids must be 0 to 3 without a gap"),
        ("g2\t3", "g2\t2", "token_id 2 stands twice, again in line 5"),
        ("g2\t3", "g2\t-3", "token_id '-3' in line 4 is not a whole number"),
        ("g2\t3", "g2\t3.0", "not a whole number"),
        ("g2\t3", "g2\t\u0663", "not a whole number"),
        ("g2\t3", "g1\t3", "'g1' twice"),
        ("1e-3", "zero", "line 4: the median 'zero' is not a finite number above zero"),
        ("1e-3", "0", "the median '0'"),
        ("1e-3", "inf", "the median 'inf'"),
        ("1e-3\tB", "1e-3", "line 4 has 3 columns where the header has 4"),
        ("<pad>", "pad", "no <pad> token"),
        ("<mask>\t1", "<mask>\t", "token_id 1 is missing"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, old: str, new: str, pattern: str) -> None:
    path = tmp_path / "t.tsv"
    path.write_text(TABLE.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=pattern) as caught:
        load_vocabulary_table(path)
    assert str(caught.value).startswith(str(path))
