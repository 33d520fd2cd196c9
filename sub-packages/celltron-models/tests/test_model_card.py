import yaml

from celltron.core import MedianTable, Vocabulary
from celltron.models.geneformer import GeneformerConfig
from celltron.models.geneformer.model_card import describe_model


def describe(with_cls_eos: bool = False, medians: MedianTable | None = None, **facts: object) -> str:
    vocabulary = Vocabulary.from_genes(["ENSG1", "ENSG2"], with_cls_eos=with_cls_eos)
    return describe_model(
        GeneformerConfig(), vocabulary, medians, max_length=2048, num_parameters=10_316_000, facts=facts
    )


def test_the_card_says_what_the_model_is() -> None:
    card = describe(medians=MedianTable(["ENSG1"], [2.0]))
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and "license" not in head
    for part in (
        "| parameters | 10,316,000 |",
        "| vocabulary | 2 genes and `<pad>`, `<mask>` |",
        "| longest cell, in tokens | 2,048 |",
        "epsilon 1e-12",
        "keep the first 2,048 genes. Genes",
        "median (`gene_median_dictionary.json`), compute",
        "`<pad>` (id 0)",
        "`<mask>` (id 1)",
        "no facts of the training run",
    ):
        assert part in card
    assert "{" not in card


def test_the_frame_of_a_cell_takes_two_places() -> None:
    assert "keep the first 2,046 genes, and put `<cls>` before and `<eos>` after them" in describe(with_cls_eos=True)


def test_the_card_of_the_pre_norm_variant() -> None:
    vocabulary = Vocabulary(["<cls>", "<mask>", "<pad>", "ENSG1"])
    config = GeneformerConfig(variant="pre_norm")
    card = describe_model(config, vocabulary, None, max_length=2048, num_parameters=1, facts={})
    assert yaml.safe_load(card.split("---")[1])["tags"][-1] == "custom_code"
    for part in ("trust_remote_code=True", "GELU (tanh), pre-norm, epsilon 1e-12", "no `BertForMaskedLM` can hold it"):
        assert part in card
    assert "keep the first 2,047 genes, and put `<cls>` before them" in card


def test_missing_medians_are_said_and_asked_for() -> None:
    assert "(not known to this export)" in describe() and "model.medians" not in describe()
    assert 'medians = read_medians(Path("medians.json"))  # gene to median, as the model' in describe()
    assert "medians = model.medians\n" in describe(medians=MedianTable(["ENSG1"], [2.0]))


def test_a_fact_cannot_break_its_row() -> None:
    card = describe(note="a | b\n# c", loss=1.23456, steps=12_000)
    assert "| note | a \\| b # c |" in card
    assert "| loss | 1.2346 |" in card and "| steps | 12,000 |" in card
