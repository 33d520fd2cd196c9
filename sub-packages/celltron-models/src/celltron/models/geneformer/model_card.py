"""The model card that goes with an exported Geneformer."""

from collections.abc import Mapping

from celltron.core import CLS, EOS, MASK, PAD, MedianTable, Vocabulary
from celltron.models.geneformer.config import GeneformerConfig

CARD_NAME = "README.md"

_CARD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags:
- biology
- single-cell
- geneformer
- {tag}
---

# Geneformer, exported from celltron

{kind}

```python
from transformers import AutoModelForMaskedLM

model = AutoModelForMaskedLM.from_pretrained("path/to/this/folder"{trust})
```

| | |
|---|---|
{shape}

## From counts to tokens

The input is raw counts of one cell, genes by Ensembl id. For every gene that has both a token
(`token_dictionary.json`) and a median {medians}, compute

    value = count / (sum of the cell's counts, of all genes) x 10,000 / (median of the gene)

Sort by value, highest first, equal values by rising token id; keep the first {num_genes:,} genes{frame}. Genes with
count 0 are left out. Shorter cells are filled with `{pad}` (id {pad_id}), which `attention_mask` hides with 0;
`{mask}` (id {mask_id}) stands for a gene to predict. With celltron:

```python
from pathlib import Path

from celltron.cells import CellStore, RankTokenizer, convert
from celltron.models.geneformer import {imports}

model = from_huggingface(Path("path/to/this/folder"))
medians = {give_medians}
convert(["cells.h5ad"], "cells.store")
store = CellStore.open("cells.store")
tokenizer = RankTokenizer(model.vocabulary, medians, store.gene_ids, max_length=model.max_length)
tokens, lengths = tokenizer.tokenize(store, [0, 1, 2])
```

## Training

{facts}

## Licence

Not stated by the export. Whoever publishes this model chooses a licence that fits the cells it was trained on, names
it here, and adds `license:` to the head of this file.
"""


_POST_NORM = {
    "tag": "bert",
    "kind": """\
A Geneformer (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9): a post-norm BERT that reads a cell as its genes in
falling order of expression and predicts the genes that are masked. It is a stock `BertForMaskedLM`; no other code is
needed to run it.""",
    "trust": "",
}
_PRE_NORM = {
    "tag": "custom_code",
    "kind": """\
The pre-norm variant of Geneformer that NVIDIA's BioNeMo trained: a BERT that reads a cell as its genes in falling order
of expression and predicts the genes that are masked. It differs from the Geneformer of Theodoris et al. 2023
(doi:10.1038/s41586-023-06139-9), which is post-norm with ReLU, so no `BertForMaskedLM` can hold it;
`modeling_geneformer_prenorm.py` in this folder is the model.""",
    "trust": ", trust_remote_code=True",
}
_WITH_MEDIANS = {
    "medians": "(`gene_median_dictionary.json`)",
    "imports": "from_huggingface",
    "give_medians": "model.medians",
}
_WITHOUT_MEDIANS = {
    "medians": "(not known to this export)",
    "imports": "from_huggingface, read_medians",
    "give_medians": 'read_medians(Path("medians.json"))  # gene to median, as the model was trained with',
}
_ACTIVATIONS = {"post_norm": "ReLU", "pre_norm": "GELU (tanh)", "pre_norm_erf": "GELU"}


def describe_model(
    config: GeneformerConfig,
    vocabulary: Vocabulary,
    medians: MedianTable | None,
    *,
    max_length: int,
    num_parameters: int,
    facts: Mapping[str, object],
) -> str:
    """Write the model card.

    Args:
        config: The model's shape.
        vocabulary: Its tokens.
        medians: The genes' medians, where they are known.
        max_length: Longest cell, in tokens.
        num_parameters: Trained numbers.
        facts: What to say of the training run: name to value.
    """
    shape = {
        "layers": config.num_layers,
        "width": config.hidden_size,
        "feed-forward width": config.ffn_hidden_size,
        "attention heads": config.num_attention_heads,
        "parameters": num_parameters,
        "longest cell, in tokens": max_length,
        "vocabulary": f"{len(vocabulary.genes):,} genes and {', '.join(f'`{name}`' for name in _specials(vocabulary))}",
        "activation, layer norm": f"{_ACTIVATIONS[config.variant]}, "
        f"{'pre' if config.is_pre_norm else 'post'}-norm, epsilon {config.norm_epsilon}",
    }
    frame = [
        f"`{token}` {place}"
        for token, place in ((CLS, "before"), (EOS, "after"))
        if token in vocabulary.tokens[: vocabulary.first_gene_id]
    ]
    return _CARD.format(
        **(_PRE_NORM if config.is_pre_norm else _POST_NORM),
        **(_WITHOUT_MEDIANS if medians is None else _WITH_MEDIANS),
        shape=_rows(shape),
        num_genes=max_length - len(frame),
        frame=f", and put {' and '.join(frame)} them" if frame else "",
        pad=PAD,
        pad_id=vocabulary.pad_id,
        mask=MASK,
        mask_id=vocabulary.mask_id,
        facts=f"| | |\n|---|---|\n{_rows(facts)}" if facts else "The export was given no facts of the training run.",
    )


def _specials(vocabulary: Vocabulary) -> tuple[str, ...]:
    return vocabulary.tokens[: vocabulary.first_gene_id]


def _rows(values: Mapping[str, object]) -> str:
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items())


def _cell(value: object) -> str:
    """A value as it stands in a table: thousands grouped, nothing that ends the row."""
    text = f"{value:,}" if type(value) is int else f"{value:.4f}" if type(value) is float else str(value)
    return " ".join(text.replace("|", "\\|").split())
