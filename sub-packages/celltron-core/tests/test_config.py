import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celltron.core.config import build_config, config_to_dict, config_to_yaml, load_config, parse_arguments
from celltron.core.errors import InputError


class Device(Enum):
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """How the weights move."""

    learning_rate: float = 1e-3
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    kind: Literal["adam", "sgd"] = "adam"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}; raise it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    num_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Train something."""

    seed: int = 0
    """Seed of everything."""
    is_fast: bool = False
    out: Path | None = None
    label: str = ""
    limit: int | str | None = None
    width: Literal[1, 2] = 1
    device: Device = Device.CPU
    sizes: list[int] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    stages: list[Stage] = field(default_factory=list)
    optimizer: Optimizer = field(default_factory=Optimizer)
    slow_optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-5, kind="sgd"))
    second: Optimizer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Strict:
    stage: Stage
    count: int


FLAGS = {"--lr": "optimizer.learning_rate", "--fast": "is_fast", "--out": "out", "-n": "seed"}


def test_defaults_and_nested_values() -> None:
    assert build_config(Config, {}) == Config()
    values = {
        "optimizer": {"learning_rate": 2, "betas": [0.5, 0.6], "clip": 1.5},
        "second": {"kind": "sgd"},
        "stages": [{"name": "warm"}, {"name": "main", "num_steps": 7}],
        "sizes": (1, 2),
        "weights": {"x": 1},
        "device": "cuda",
        "out": "runs/a",
        "limit": "all",
    }
    config = build_config(Config, values)
    assert config.optimizer == Optimizer(learning_rate=2.0, betas=(0.5, 0.6), clip=1.5)
    assert type(config.optimizer.learning_rate) is float
    assert config.second == Optimizer(kind="sgd")
    assert config.stages == [Stage(name="warm"), Stage(name="main", num_steps=7)]
    assert (config.sizes, config.weights, config.device) == ([1, 2], {"x": 1.0}, Device.CUDA)
    assert (config.out, config.limit) == (Path("runs/a"), "all")


def test_objects_and_numpy_floats_are_taken_as_values() -> None:
    values = {
        "optimizer": Optimizer(kind="sgd"),
        "out": Path("x"),
        "device": Device.CUDA,
        "weights": {"a": np.float64(2)},
    }
    config = build_config(Config, values)
    assert (config.optimizer.kind, config.out, config.device) == ("sgd", Path("x"), Device.CUDA)
    assert "weights:\n  a: 2.0\n" in config_to_yaml(dataclasses.replace(config, weights={"a": np.float64(2)}))


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("1E3", 1000.0), ("-2e+1", -20.0), (".5e1", 5.0), ("3.", 3.0)]
)
def test_text_of_a_number_is_a_number_where_one_is_wanted(text: str, number: float) -> None:
    config = build_config(Config, {"optimizer": {"clip": text, "betas": [text, 0.5]}, "weights": {"x": text}})
    assert config.optimizer.clip == number
    assert config.optimizer.betas == (number, 0.5)
    assert config.weights == {"x": number}
    assert build_config(Config, {"label": text}).label == text


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"seed": True}, "a.yaml: 'seed' is true, wanted a whole number"),
        ({"width": True}, "a.yaml: 'width' is true, wanted one of 1, 2"),
        ({"weights": {"a": True}}, "a.yaml: 'weights.a' is true, wanted a number"),
        ({"optimizer": {"learning_rate": "fast"}}, "a.yaml: 'optimizer.learning_rate' is \"fast\", wanted a number"),
        ({"optimizer": None}, "a.yaml: 'optimizer' is null, wanted a section (a mapping of keys)"),
        ({"stages": [{"name": 3}]}, "a.yaml: 'stages.0.name' is 3, wanted text"),
        ({"stages": [{}]}, "a.yaml: 'stages.0.name' is missing; give text"),
        ({"second": {"learning_rate": -1}}, "a.yaml: second: learning_rate must be above 0, got -1.0; raise it"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_wanted(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        build_config(Config, values, where="a.yaml")
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"optimzer": {"learning_rate": 1}}, "optimzer", "optimizer"),
        ({"optimizer": {"learning_rat": 1}}, "optimizer.learning_rat", "optimizer.learning_rate"),
        ({"optimizer": {"seed": 1}}, "optimizer.seed", "seed"),
        ({"betas": [1, 2]}, "betas", "optimizer.betas"),
        ({"second": {"clipp": 1}}, "second.clipp", "second.clip"),
        ({"stages": [{"name": "a", "num_step": 1}]}, "stages.0.num_step", "stages.0.num_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(values: dict[str, Any], unknown: str, nearest: str) -> None:
    with pytest.raises(InputError) as caught:
        build_config(Config, values, where="a.yaml")
    assert str(caught.value) == f"a.yaml: unknown key {unknown!r}; did you mean {nearest!r}?"


def test_an_unknown_key_like_no_other_lists_the_keys_there() -> None:
    with pytest.raises(InputError, match="the keys here are optimizer.learning_rate, optimizer.betas"):
        build_config(Config, {"optimizer": {"zzzzzz": 1}})
    with pytest.raises(
        InputError, match="'optimizer.learning_rate' is written in one piece; in a file, write it nested"
    ):
        build_config(Config, {"optimizer.learning_rate": 1})


def test_required_keys_and_a_typo_that_hides_one() -> None:
    assert build_config(Strict, {"stage": {"name": "a"}, "count": 2}).count == 2
    with pytest.raises(InputError, match="'stage' is missing; give a section"):
        build_config(Strict, {"count": 2})
    with pytest.raises(InputError, match="unknown key 'cuont'; did you mean 'count'"):
        build_config(Strict, {"stage": {"name": "a"}, "cuont": 2})
    with pytest.raises(InputError, match=r"wanted a mapping of keys, found \[1\]"):
        build_config(Strict, [1])  # type: ignore[arg-type]


def test_a_section_given_in_part_keeps_the_defaults_of_its_parent() -> None:
    assert build_config(Config, {"slow_optimizer": {"clip": 1.0}}).slow_optimizer == Optimizer(
        learning_rate=1e-5, kind="sgd", clip=1.0
    )
    assert load_config(Config, overrides=["weights.b=2"]).weights == {"a": 1.0, "b": 2.0}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_then_overrides_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\noptimizer:\n  learning_rate: 1e-4\n  clip: 2\nsecond:\n")
    assert load_config(Config, path).optimizer == Optimizer(learning_rate=1e-4, clip=2.0)
    config = load_config(
        Config,
        path,
        ["seed=4", "optimizer.clip=null", "seed=5", "second.kind=sgd", "sizes=[1, 2]", "out=2024", "label=no"],
    )
    assert (config.seed, config.optimizer.clip, config.sizes) == (5, None, [1, 2])
    assert config.second == Optimizer(kind="sgd")
    assert (config.out, config.label) == (Path("2024"), "no")
    replaced = load_config(Config, path, ["optimizer={kind: sgd}", "optimizer.clip=1"])
    assert replaced.optimizer == Optimizer(kind="sgd", clip=1.0)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeffseed: 0\n"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(Config, write(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("- 1\n- 2\n", "wanted a mapping of keys, found"),
        ("hello\n", 'wanted a mapping of keys, found "hello"'),
        ("seed: 1\nseed: 2\n", "line 2 repeats the key 'seed'"),
        ("seed: &a 1\nwidth: *a\n", "alias"),
        ("seed: [1\n", "not readable as YAML"),
        ("optimizer:\n", "'optimizer' is null, wanted a section"),
        ("# " + "x" * 1_000_001, "larger than 1000000 bytes"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, pattern: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=pattern) as caught:
        load_config(Config, path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing.yaml: there is no such config file"):
        load_config(Config, tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="this is a folder"):
        load_config(Config, tmp_path)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"label: caf\xe9\n")
    with pytest.raises(InputError, match="latin.yaml: not UTF-8 text"):
        load_config(Config, path)
    with pytest.raises(InputError, match="there is no such config file"):
        load_config(Config, path / "below.yaml")


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("seed", "wanted section.key=value"),
        ("=3", "wanted section.key=value"),
        ("sead=3", "unknown key 'sead'; did you mean 'seed'"),
        ("optimzer.learning_rate=3", "did you mean 'optimizer.learning_rate'"),
        ("optimizer.learning_rate.x=3", "'optimizer.learning_rate' is a number, not a section"),
        ("seed.x=3", "'seed' is a whole number, not a section; set 'seed' itself"),
        ("sizes.0=3", "'sizes' is a list .* not a section"),
        ("optimizer.=3", "unknown key"),
        ("seed=x", "'seed' is \"x\", wanted a whole number"),
        ("seed=", "'seed' is null, wanted a whole number"),
        ("sizes=[1", "not readable as YAML"),
        ("sizes=*a", "alias"),
        ("optimizer.learning_rate=-1", "learning_rate must be above 0"),
    ],
)
def test_a_bad_override_is_named(override: str, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        load_config(Config, None, [override])
    assert override in str(caught.value)


def test_an_override_below_what_the_file_has_as_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: fast\n")
    with pytest.raises(InputError, match='run.yaml holds "fast", which is no section'):
        load_config(Config, path, ["optimizer.clip=1"])


def test_errors_say_whether_file_or_override_is_meant(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: x\n")
    with pytest.raises(InputError, match=r"run.yaml: 'seed'"):
        load_config(Config, path, ["width=2"])
    with pytest.raises(InputError, match=r"^override 'seed=y': 'seed'"):
        load_config(Config, path, ["seed=y"])


texts = st.text(st.characters(codec="utf-8"), max_size=12)
optimizers = st.builds(
    Optimizer,
    learning_rate=st.floats(min_value=1e-300, allow_infinity=True),
    betas=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    kind=st.sampled_from(["adam", "sgd"]),
    clip=st.none() | st.floats(allow_nan=False),
)
configs = st.builds(
    Config,
    seed=st.integers(),
    is_fast=st.booleans(),
    out=st.none() | texts.filter(lambda text: "\0" not in text).map(Path),
    label=texts | st.sampled_from(["1e-4", "null", "no", "2024-01-01", "12:30", "0x1f", "~", "=", "<<", "- a", "\x85"]),
    limit=st.none() | st.integers() | texts,
    width=st.sampled_from([1, 2]),
    device=st.sampled_from(Device),
    sizes=st.lists(st.integers(), max_size=3),
    weights=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
    stages=st.lists(st.builds(Stage, name=texts, num_steps=st.integers()), max_size=2),
    optimizer=optimizers,
    slow_optimizer=optimizers,
    second=st.none() | optimizers,
)


@given(configs)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_yaml_brings_the_same_config_back(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = write(tmp_path_factory.getbasetemp(), config_to_yaml(config))
    assert load_config(Config, path) == config
    assert build_config(Config, config_to_dict(config)) == config


def test_config_to_dict_is_plain() -> None:
    values = config_to_dict(Config(out=Path("a/b"), second=Optimizer(clip=math.inf)))
    assert values["out"] == "a/b" and values["device"] == "cpu"
    assert values["optimizer"] == {"learning_rate": 1e-3, "betas": [0.9, 0.999], "kind": "adam", "clip": None}
    assert values["second"]["clip"] == math.inf
    with pytest.raises(TypeError, match="dataclass"):
        config_to_dict(3)


def parse(arguments: Sequence[str], **options: Any) -> Any:
    return parse_arguments(Config, arguments, flags=FLAGS, **options)


def test_every_way_to_write_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 9\nlabel: file\n")
    words = ["--lr", "1e-4", "--config", str(path), "optimizer.kind=sgd", "--second.clip", "-2", "--fast", "--out=1e5"]
    parsed = parse([*words, "--sizes=[1]", "-n", "4", "--slow-optimizer.learning-rate=2"])
    config = parsed.config
    assert config.optimizer == Optimizer(learning_rate=1e-4, kind="sgd")
    assert config.second == Optimizer(clip=-2.0)
    assert (config.is_fast, config.out, config.label, config.seed) == (True, Path("1e5"), "file", 4)
    assert (config.sizes, config.slow_optimizer.learning_rate) == ([1], 2.0)
    assert parsed.config_path == path and parsed.positionals == ()
    assert parsed.values == {
        "optimizer.learning_rate": 1e-4,
        "optimizer.kind": "sgd",
        "second.clip": -2.0,
        "is_fast": True,
        "out": Path("1e5"),
        "sizes": [1],
        "seed": 4,
        "slow_optimizer.learning_rate": 2.0,
    }


def test_the_later_word_wins() -> None:
    parsed = parse(["--lr=1", "optimizer.learning_rate=2", "--optimizer.learning_rate", "3", "--lr", "4"])
    assert parsed.config.optimizer.learning_rate == 4.0
    assert parsed.values == {"optimizer.learning_rate": 4.0}


@pytest.mark.parametrize(
    ("words", "is_fast"),
    [(["--fast"], True), (["--fast", "false"], False), (["--fast=false"], False), (["--fast", "seed=1"], True)],
)
def test_a_flag_for_a_bool_may_stand_alone(words: list[str], is_fast: bool) -> None:
    assert parse(words).config.is_fast is is_fast


def test_positionals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "donor=3.h5ad").touch()
    parsed = parse(["a.h5ad", "donor=3.h5ad", "seed=2", "dir/x=1.h5ad", "--fast", "--", "--odd"], positional_ok=True)
    assert parsed.positionals == ("a.h5ad", "donor=3.h5ad", "dir/x=1.h5ad", "--odd")
    assert parsed.config.seed == 2
    with pytest.raises(InputError, match="'a.h5ad' is neither a flag nor section.key=value"):
        parse(["a.h5ad"])


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--ler", "1"], "unknown flag --ler; did you mean --lr?"),
        (["--optimizer.learning_rat=1"], "did you mean --optimizer.learning_rate?"),
        (["--qqqqqqq"], "unknown flag --qqqqqqq; see --help"),
        (["--lr"], "--lr wants a value"),
        (["--lr", "--fast"], "--lr wants a value"),
        (["--config"], "--config wants a value"),
        (["--lr", "abc"], "--lr: 'optimizer.learning_rate' is \"abc\", wanted a number"),
        (["--fast=1"], "--fast: 'is_fast' is 1, wanted true or false"),
        (["sead=1"], "did you mean 'seed'"),
    ],
)
def test_a_bad_command_line_is_one_sentence(words: list[str], pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(words)
    assert pattern in str(caught.value)


def test_a_flag_for_no_key_is_a_defect_of_the_program() -> None:
    with pytest.raises(ValueError, match="does not have: nothing.here"):
        parse_arguments(Config, [], flags={"--x": "nothing.here"})
    with pytest.raises(TypeError, match="dataclass"):
        load_config(int)


def test_help_prints_and_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--lr", "1", "--help"])
    assert caught.value.code == 0
    assert "optimizer.learning_rate  a number; default 0.001\n      Highest learning rate." in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True, slots=True)
class Several:
    paths: tuple[str, ...] | str = ()
    label: str = ""


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["--data", "a.h5ad"], "a.h5ad"),
        (["--data", "a.h5ad", "b.h5ad"], ("a.h5ad", "b.h5ad")),
        (["--data", "a.h5ad", "b.h5ad", "label=x"], ("a.h5ad", "b.h5ad")),
        (["--data", "a.h5ad", "b.h5ad", "--label", "x"], ("a.h5ad", "b.h5ad")),
        (["--data=a.h5ad"], "a.h5ad"),
        (["--data", "[a.h5ad, b.h5ad]"], ("a.h5ad", "b.h5ad")),
    ],
)
def test_a_flag_that_takes_several_words_takes_them(words: list[str], paths: str | tuple[str, ...]) -> None:
    assert parse_arguments(Several, words, flags={"--data": "paths"}).config.paths == paths


def test_a_flag_that_takes_one_word_takes_no_more() -> None:
    with pytest.raises(InputError, match="'b' is neither"):
        parse_arguments(Several, ["--label", "a", "b"], flags={})
