"""Tokens and their ids, and the medians by which a rank tokeniser divides; both immutable and known by fingerprint.

V tokens in the vocabulary, G genes.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from celltron.core.durable import write_atomically
from celltron.core.errors import InputError
from celltron.core.table_files import decode_table, read_columns, read_shipped_table

PAD, MASK, CLS, EOS = "<pad>", "<mask>", "<cls>", "<eos>"

_SPECIAL = re.compile(r"<[^<>]*>")
_MAX_FILE_BYTES = 256 * 1024 * 1024
_ADVICE = "write the file again or give another one"


class Vocabulary:
    """Special tokens and genes; a token's id is its place.

    The special tokens, which are those in angle brackets, stand first; `<pad>` and `<mask>` are among them, and at
    least one gene follows. Every name stands once.

    >>> vocabulary = Vocabulary([PAD, MASK, "ENSG00000000003"])
    >>> vocabulary.id_of("ENSG00000000003"), vocabulary.cls_id
    (2, None)
    """

    __slots__ = ("_fingerprint", "_first_gene_id", "_ids", "_tokens")

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = _unique_names(tokens, what="the vocabulary")
        self._ids = {token: place for place, token in enumerate(self._tokens)}
        for special in (PAD, MASK):
            if special not in self._ids:
                raise InputError(f"the vocabulary holds no {special} token; put the special tokens before the genes")
        is_special = [_SPECIAL.fullmatch(token) is not None for token in self._tokens]
        self._first_gene_id = sum(is_special)
        if self._first_gene_id == len(self._tokens):
            raise InputError("the vocabulary holds no gene; give at least one")
        if not all(is_special[: self._first_gene_id]):
            place = is_special.index(False)
            raise InputError(
                f"the vocabulary holds the gene {self._tokens[place]!r} at place {place}, before a special token; "
                "put the special tokens first"
            )
        self._fingerprint = _fingerprint(self._tokens)

    @classmethod
    def from_genes(cls, genes: Sequence[str], *, with_cls_eos: bool = False) -> "Vocabulary":
        """Make a vocabulary of `<pad>`, `<mask>`, perhaps `<cls>` and `<eos>`, then the genes in the given order."""
        return cls([PAD, MASK, *((CLS, EOS) if with_cls_eos else ()), *genes])

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens in the order of their ids."""
        return self._tokens

    @property
    def pad_id(self) -> int:
        """Id of `<pad>`."""
        return self._ids[PAD]

    @property
    def mask_id(self) -> int:
        """Id of `<mask>`."""
        return self._ids[MASK]

    @property
    def cls_id(self) -> int | None:
        """Id of `<cls>`, None without one."""
        return self._ids.get(CLS)

    @property
    def eos_id(self) -> int | None:
        """Id of `<eos>`, None without one."""
        return self._ids.get(EOS)

    @property
    def special_ids(self) -> npt.NDArray[np.int32]:
        """Ids of the special tokens, ascending: 0 to first_gene_id - 1."""
        return np.arange(self._first_gene_id, dtype=np.int32)

    @property
    def first_gene_id(self) -> int:
        """Id of the first gene; genes are the ids from here to the end."""
        return self._first_gene_id

    @property
    def genes(self) -> tuple[str, ...]:
        """The genes in the order of their ids."""
        return self._tokens[self._first_gene_id :]

    def id_of(self, token: str) -> int:
        """Look up one token; an unknown one is an InputError."""
        try:
            return self._ids[token]
        except KeyError:
            raise InputError(f"the token {token!r} is not among the {len(self)} of the vocabulary") from None

    def ids_of(self, tokens: Iterable[str]) -> npt.NDArray[np.int32]:
        """Look up many tokens: int32, -1 where a token is unknown."""
        return np.fromiter((self._ids.get(token, -1) for token in tokens), dtype=np.int32)

    def fingerprint(self) -> str:
        """Hash the tokens in their order: sha256, hexadecimal."""
        return self._fingerprint

    def to_json(self, path: Path) -> None:
        """Write the vocabulary as JSON, atomically."""
        content = {"format": "celltron-vocabulary", "version": 1, "fingerprint": self._fingerprint}
        write_atomically(Path(path), _to_json({**content, "tokens": list(self._tokens)}))

    @classmethod
    def from_json(cls, path: Path) -> "Vocabulary":
        """Read what `to_json` wrote; the file may come from anywhere, so everything in it is checked."""
        content = _from_json(Path(path), "celltron-vocabulary", {"tokens": str})
        try:
            vocabulary = cls(content["tokens"])
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        _check_fingerprint(path, content, vocabulary._fingerprint)
        return vocabulary

    def __eq__(self, other: object) -> bool:
        return self._tokens == other._tokens if isinstance(other, Vocabulary) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __repr__(self) -> str:
        return f"Vocabulary({self._first_gene_id} special tokens, {len(self._tokens) - self._first_gene_id} genes)"


class MedianTable:
    """A positive number for each gene: the median of its non-zero values, in counts per 10,000 of a cell.

    Source: Theodoris et al. 2023, "Transfer learning enables predictions in network biology", Methods, rank value
    encoding.
    """

    __slots__ = ("_fingerprint", "_genes", "_values_G")

    def __init__(self, genes: Sequence[str], values: npt.ArrayLike) -> None:
        """Take G unique gene ids and their G medians, each finite and above zero."""
        self._genes = _unique_names(genes, what="the table of medians")
        values_G = np.array(values, dtype=np.float64)
        if values_G.shape != (len(self._genes),):
            raise InputError(f"the table of medians holds {len(self._genes)} genes but {values_G.size} values")
        is_bad_G = ~(np.isfinite(values_G) & (values_G > 0))
        if is_bad_G.any():
            place = int(np.argmax(is_bad_G))
            raise InputError(
                f"the median of {self._genes[place]!r} is {values_G[place]}, wanted a finite number above zero; "
                "leave out genes that were never seen"
            )
        values_G.setflags(write=False)
        self._values_G = values_G
        self._fingerprint = _fingerprint(self._genes, values_G.astype("<f8").tobytes())

    def __len__(self) -> int:
        return len(self._genes)

    @property
    def genes(self) -> tuple[str, ...]:
        """The genes in the order of their values."""
        return self._genes

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The medians, float64 [G], read-only."""
        return self._values_G

    def for_vocabulary(self, vocabulary: Vocabulary) -> npt.NDArray[np.float64]:
        """Spread the medians over the token ids: float64 [V], NaN for special tokens and genes without a median."""
        ids_G = vocabulary.ids_of(self._genes)
        is_token_G = ids_G >= vocabulary.first_gene_id
        medians_V = np.full(len(vocabulary), np.nan)
        medians_V[ids_G[is_token_G]] = self._values_G[is_token_G]
        return medians_V

    def fingerprint(self) -> str:
        """Hash genes and values, to the last bit: sha256, hexadecimal."""
        return self._fingerprint

    def to_json(self, path: Path) -> None:
        """Write the table as JSON, atomically; the values come back to the last bit."""
        content = {"format": "celltron-medians", "version": 1, "fingerprint": self._fingerprint}
        write_atomically(
            Path(path), _to_json({**content, "genes": list(self._genes), "values": self._values_G.tolist()})
        )

    @classmethod
    def from_json(cls, path: Path) -> "MedianTable":
        """Read what `to_json` wrote; the file may come from anywhere, so everything in it is checked."""
        content = _from_json(Path(path), "celltron-medians", {"genes": str, "values": float})
        try:
            table = cls(content["genes"], content["values"])
        except (InputError, OverflowError) as error:
            raise InputError(f"{path}: {error}") from None
        _check_fingerprint(path, content, table._fingerprint)
        return table

    def __eq__(self, other: object) -> bool:
        return self._fingerprint == other._fingerprint if isinstance(other, MedianTable) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __repr__(self) -> str:
        return f"MedianTable({len(self._genes)} genes)"


def load_published_geneformer(name: Literal["gc30M", "gc95M"]) -> tuple[Vocabulary, MedianTable]:
    """Load the vocabulary and medians published with Geneformer.

    Source: Theodoris et al. 2023 (gc30M: 25,424 genes, `<pad>`, `<mask>`) and its successor of 2024 (gc95M: 20,271
    genes, `<pad>`, `<mask>`, `<cls>`, `<eos>`; its medians cover 42,005 genes). `tables/README.md` names the files.
    """
    if name not in ("gc30M", "gc95M"):
        raise InputError(f"there is no published Geneformer table {name!r}; choose gc30M or gc95M")
    return _parse_vocabulary(read_shipped_table(f"geneformer_{name}.tsv.gz"), f"geneformer_{name}.tsv.gz")


def load_vocabulary_table(path: Path) -> tuple[Vocabulary, MedianTable]:
    """Load a vocabulary and its medians from a table.

    Args:
        path: tab-separated text, gzip when the name ends in .gz, with a header that names `ensembl_id`, `token_id` and
            `median`; further columns are ignored. An empty `token_id` is a gene with a median but no token, an empty
            `median` a token without one. The token ids are 0 to n - 1, each once.
    """
    path = Path(path)
    text = decode_table(path.read_bytes(), str(path), compressed=path.name.endswith(".gz"))
    return _parse_vocabulary(text, str(path))


def _unique_names(names: Sequence[str], *, what: str) -> tuple[str, ...]:
    """Check that names are non-empty printable strings and that none stands twice."""
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise InputError(f"{what} holds {name!r}, wanted a name of printable letters")
        if name in seen:
            raise InputError(f"{what} holds {name!r} twice; every name must stand once")
        seen.add(name)
    return tuple(names)


def _fingerprint(names: Sequence[str], data: bytes = b"") -> str:
    """Hash names and bytes; names hold no line breaks, so joining them loses nothing."""
    return hashlib.sha256("\n".join(names).encode("utf-8") + b"\0" + data).hexdigest()


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=0, allow_nan=False) + "\n"


def _from_json(path: Path, format: str, lists: dict[str, type]) -> dict[str, Any]:
    """Read an untrusted JSON file of the given format, version 1; the named lists must hold values of one type."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {_MAX_FILE_BYTES} bytes, wanted a {format} file; {_ADVICE}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); {_ADVICE}") from error
    if not isinstance(content, dict) or content.get("format") != format:
        raise InputError(f"{path}: this is no {format} file; {_ADVICE}")
    if content.get("version") != 1:
        raise InputError(f"{path}: {format} version 1 is wanted, found {content.get('version')!r}; {_ADVICE}")
    for key, kind in lists.items():
        entries = content.get(key)
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(entries, list) or any(type(entry) not in kinds for entry in entries):
            raise InputError(f"{path}: {key!r} must be a list of {kind.__name__} values; {_ADVICE}")
    return content


def _check_fingerprint(path: Path, content: dict[str, Any], fingerprint: str) -> None:
    if content.get("fingerprint") != fingerprint:
        raise InputError(f"{path}: the content does not fit its fingerprint, so it was changed; {_ADVICE}")


def _parse_vocabulary(text: str, where: str) -> tuple[Vocabulary, MedianTable]:
    """Make the vocabulary from the rows with a token id, in its order, and the medians from those with a median."""
    names, token_ids, medians = read_columns(text, ("ensembl_id", "token_id", "median"), where)
    tokens: dict[int, str] = {}
    for number, (name, token_id) in enumerate(zip(names, token_ids, strict=True), start=2):
        if not token_id:
            continue
        # int() would take "1_0" and digits of other scripts.
        if not (token_id.isascii() and token_id.isdigit()):
            raise InputError(f"{where}: token_id {token_id!r} in line {number} is not a whole number; mend that line")
        if int(token_id) in tokens:
            raise InputError(f"{where}: token_id {token_id} stands twice, again in line {number}; ids must be unique")
        tokens[int(token_id)] = name
    gap = next((place for place in range(len(tokens)) if place not in tokens), None)
    if gap is not None:
        raise InputError(f"{where}: token_id {gap} is missing; the ids must be 0 to {len(tokens) - 1} without a gap")
    values = [
        _parse_median(median, f"{where}: line {number}") for number, median in enumerate(medians, start=2) if median
    ]
    genes = [name for name, median in zip(names, medians, strict=True) if median]
    try:
        return Vocabulary([tokens[place] for place in range(len(tokens))]), MedianTable(genes, values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _parse_median(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{where}: the median {text!r} is not a finite number above zero; mend that line")
    return value
