import pytest

from celltron.core.errors import InputError
from celltron.core.genes import GeneNames, _choose
from celltron.core.vocabulary import load_published_geneformer

human = GeneNames.for_species("human")
mouse = GeneNames.for_species("mouse")


@pytest.mark.parametrize(
    ("name", "gene_id"),
    [
        ("ENSG00000000003", "ENSG00000000003"),
        ("ENSG00000000003.16", "ENSG00000000003"),
        (" ENSG00000000003.16 ", "ENSG00000000003"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378"),
        ("ENSGR0000214717.5", "ENSGR0000214717"),
        ("ENSMUSG00000051951.6", "ENSMUSG00000051951"),
        ("ENSDARG00000000001", "ENSDARG00000000001"),
        ("ENSG00000999999", "ENSG00000999999"),
        ("ENST00000000233", None),
        ("ENSG123", None),
        ("ENSG00000000003.x", None),
        ("ENSG000000000031", None),
        ("", None),
        ("\u0415NSG00000000003", None),
    ],
)
def test_ensembl_ids_lose_their_version_whatever_the_species(name: str, gene_id: str | None) -> None:
    assert human.resolve([name]) == [gene_id]
    assert mouse.resolve([name]) == [gene_id]


@pytest.mark.parametrize(
    ("name", "gene_id"),
    [
        ("TSPAN6", "ENSG00000000003"),
        ("GAPDH", "ENSG00000111640"),
        ("C1orf112", "ENSG00000000460"),
        ("C1ORF112", "ENSG00000000460"),
        ("SEPT7", "ENSG00000122545"),
        ("HER2", "ENSG00000141736"),
        ("tp53", "ENSG00000141510"),
        ("WASH7P", "ENSG00000227232"),
        ("no such gene", None),
    ],
)
def test_human_symbols_and_aliases(name: str, gene_id: str | None) -> None:
    assert human.resolve([name]) == [gene_id]


@pytest.mark.parametrize(
    ("name", "gene_id"),
    [
        ("Xkr4", "ENSMUSG00000051951"),
        ("4933401J01Rik", "ENSMUSG00000102693"),
        ("XKR4", None),
        ("Lhb", "ENSMUSG00000100916"),
        ("Tsc22d4", "ENSMUSG00000029723"),
        ("GAPDH", None),
    ],
)
def test_mouse_symbols_count_their_letter_case(name: str, gene_id: str | None) -> None:
    assert mouse.resolve([name]) == [gene_id]


def test_order_and_repetition_are_kept() -> None:
    assert human.resolve(["GAPDH", "?", "GAPDH", "TSPAN6"]) == [
        "ENSG00000111640", None, "ENSG00000111640", "ENSG00000000003",
    ]  # fmt: skip
    assert human.resolve([]) == []


def test_a_symbol_of_several_genes_goes_to_the_aliased_or_the_oldest() -> None:
    ids = ["ENSG00000000009", "ENSG00000000005", "ENSG00000000007"]
    assert _choose(["A"] * 3, ids, {}) == {"A": "ENSG00000000005"}
    assert _choose(["a"] * 3, ids, {"A": "ENSG00000000007"}) == {"a": "ENSG00000000007"}
    assert _choose(["A"] * 3, ids, {"A": "ENSG00000000001"}) == {"A": "ENSG00000000005"}


def test_symbols_come_before_aliases() -> None:
    assert GeneNames.for_species("human") is human
    table = GeneNames("toy", {"A": "ENSG00000000001"}, {"B": "ENSG00000000002"})
    assert table.resolve(["A", "a", "b", "B"]) == ["ENSG00000000001", None, "ENSG00000000002", "ENSG00000000002"]
    assert repr(table) == "GeneNames(toy, 1 symbols, 1 aliases)"


def test_the_published_symbols_lead_to_the_published_vocabulary() -> None:
    vocabulary, _ = load_published_geneformer("gc95M")
    markers = ["CD3E", "CD19", "NKG7", "LYZ", "MS4A1", "CD14", "FCGR3A", "PPBP", "MT-CO1", "HLA-DRA", "NKX2-1", "RPS27"]
    assert (vocabulary.ids_of([str(gene_id) for gene_id in human.resolve(markers)]) >= vocabulary.first_gene_id).all()


def test_an_unknown_species_is_refused() -> None:
    with pytest.raises(InputError, match="'yeast'; choose human or mouse"):
        GeneNames.for_species("yeast")  # type: ignore[arg-type]
