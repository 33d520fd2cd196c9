from dataclasses import dataclass, field

from celltron.core.config_help import format_help
from celltron.core.config_schema import list_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    width: int
    """Width of a layer, in places; the sentence
    goes on."""
    rate: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """Do a thing.

    More about it.
    """

    name: str = "x"
    """What it is called."""
    inner: Inner = field(default_factory=lambda: Inner(width=3))
    """The inner part."""
    other: Inner | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    inner: Inner


def test_help_shows_every_flag_key_type_default_and_sentence() -> None:
    text = format_help(Outer, {"--width": "inner.width"}, positional_ok=True)
    lines = text.splitlines()
    assert lines[0] == "Do a thing."
    assert lines[2].endswith("[WORD ...]")
    assert "  --width        sets inner.width" in lines
    assert '  name  text; default "x"' in lines
    assert "      What it is called." in lines
    assert lines[lines.index("  inner:") + 1] == "      The inner part."
    assert "  inner.width  a whole number; default 3" in lines
    assert "      Width of a layer, in places; the sentence goes on." in lines
    assert "  other: a section or null; default null" in lines
    assert "  other.width  a whole number; must be given" in lines
    for name in list_keys(Outer):
        assert f"  {name}" in text


def test_a_class_without_a_docstring_has_no_heading() -> None:
    assert format_help(Silent, {}).startswith("usage:")
