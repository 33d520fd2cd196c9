import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celltron.core.errors import InputError
from celltron.core.strict_yaml import dump_yaml, parse_yaml

texts = st.text(st.characters(codec="utf-8"), max_size=20)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(texts, plain_values, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_dumped_is_read_back(values: dict[str, object]) -> None:
    assert parse_yaml(dump_yaml(values), where="x") == values


def test_one_list_in_two_places_is_written_out() -> None:
    shared = [1, 2]
    assert parse_yaml(dump_yaml({"a": shared, "b": shared}), where="x") == {"a": [1, 2], "b": [1, 2]}


def test_dates_and_exponents_without_a_point_stay_text() -> None:
    assert parse_yaml("a: 2024-01-31\nb: 1e-4\nc: 1.0e-4", where="x") == {"a": "2024-01-31", "b": "1e-4", "c": 1e-4}


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml: line 3 repeats the key 'a'"),
        ("s:\n  a: 1\n  a: 1", "line 3 repeats the key 'a'"),
        ("a: &x [1]\nb: *x", r"line 2 holds an alias"),
        ("base: &b {a: 1}\nc:\n  <<: *b", "alias"),
        ("<<: {a: 1}", "key that is not a name"),
        ("a: !!python/object/apply:os.system ['true']", "line 1 holds a tag"),
        ("a: !mine 3", "tag"),
        ("a: !!int ''", "tag"),
        ("1: a", "key that is not a name"),
        ("on: 3", "key that is not a name"),
        ("? [a, b]\n: 3", "key that is not a name"),
        ("a: [1", "not readable as YAML in line 1"),
        ("a: 1\n\tb: 2", "not readable as YAML in line 2"),
        ("--- 1\n--- 2", "not readable as YAML"),
        ("a: \x00", "not readable as YAML"),
        ("[" * 100_000, "not readable as YAML"),
        ("a: " + "9" * 5000, "not readable as YAML"),
        ("a" * 1_000_001, "larger than 1000000 bytes"),
    ],
)
def test_what_a_config_may_not_hold_is_refused_in_one_line(text: str, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        parse_yaml(text, where="x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_yaml_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    start = time.monotonic()
    with pytest.raises(InputError, match="alias"):
        parse_yaml("\n".join(lines), where="x")
    assert time.monotonic() - start < 5
