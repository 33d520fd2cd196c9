"""YAML as a config needs it: plain types, no aliases, tags or repeated keys, dates left as text, one megabyte."""

from collections.abc import Mapping
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from celltron.core.errors import InputError

MAX_YAML_BYTES = 1_000_000


class _Refused(yaml.YAMLError):
    """A construct that a config may not hold."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases (a few can unfold to gigabytes), tags, repeated keys, and dates."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"line {line} holds an alias (*name), which a config may not; write the value out")
        if getattr(event, "tag", None) is not None:
            raise _Refused(f"line {line} holds a tag ({event.tag!r:.40}), which a config may not; write a plain value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise _Refused(f"line {line} holds a key that is not a name ({key_node.value!r:.40}); quote it")
            if key_node.value in seen:
                raise _Refused(f"line {line} repeats the key {key_node.value!r}; keep one of them")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    letter: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:timestamp"]
    for letter, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse one YAML document; what cannot be read is an InputError that names `where` and the line."""
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"{where}: larger than {MAX_YAML_BYTES} bytes, no config is; check the path")
    try:
        # _StrictLoader descends from SafeLoader: it makes plain types and nothing else.
        return yaml.load(text, Loader=_StrictLoader)
    except _Refused as error:
        raise InputError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {mark.line + 1}" if (mark := error.problem_mark) else ""
        raise InputError(f"{where}: not readable as YAML{line} ({error.problem}); mend it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as YAML ({error}); mend it") from None


class _PlainDumper(yaml.SafeDumper):
    """The safe dumper, which would otherwise write an alias where one list stands in two places."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> ScalarNode:
        # Unquoted, these line breaks of Unicode would be read back as spaces.
        style = '"' if any(letter in text for letter in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _PlainDumper.represent_text)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values as YAML that `parse_yaml` reads back."""
    text: str = yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=1_000_000)
    return text
