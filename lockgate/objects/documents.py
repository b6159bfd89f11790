"""Text to plain values: YAML as Kubernetes reads it, and JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from lockgate.objects.errors import FieldError, ManifestError, clean, describe

__all__ = ["documents"]

_MAX_DEPTH = 100
_DOCUMENT_START = re.compile(r"\n---(?=[ \t\r\n])")  # ends brackets and quotes, too
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_INDENT = re.compile(r"[ \t?:-]{100}")
_MAX_VALUES = 2_000_000  # a few hundred bytes of YAML aliases can stand for billions of values


def documents(data: bytes | str, source: str) -> list[Any]:
    """The documents of a file, empty ones as None. Raises ManifestError and nothing else."""
    result = _read(_text(data, source), source)
    for number, document in enumerate(result, 1):
        _check_size(document, f"{source}, document {number}")
    return result


def _text(data: bytes | str, source: str) -> str:
    if isinstance(data, str):
        return data.removeprefix("\ufeff")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{source}: expected UTF-8 text, got byte {error.start} = {data[error.start]:#04x}"
        ) from None


def _read(text: str, source: str) -> list[Any]:
    if text.lstrip()[:1] == "{":
        found: list[Any] = []
        try:
            for value in _json_values(text):
                found.append(value)
            return found
        except FieldError as error:
            place = f"{source}, document {len(found) + 1}"
            raise ManifestError(f"{place}, field {clean(error.path)}: {error.text}") from None
        except (ValueError, RecursionError):
            pass  # YAML's flow style begins with a brace, too
    result: list[Any] = []
    try:
        _check_nesting(text, source)
        result.extend(yaml.load_all(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = clean(error.problem or error.context or "a syntax error")
        raise ManifestError(
            f"{source}, document {len(result) + 1}{line}: expected valid YAML, got: {problem}"
        ) from None
    except yaml.reader.ReaderError as error:
        raise ManifestError(
            f"{source}: expected valid YAML, got a character that YAML forbids,"
            f" at position {error.position}"
        ) from None
    except RecursionError:
        raise ManifestError(f"{source}: expected values nested at most {_MAX_DEPTH} deep") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
    ) as error:
        # PyYAML's constructors leak these for odd scalars, such as !!timestamp 2024-99-99.
        raise ManifestError(
            f"{source}, document {len(result) + 1}: expected valid YAML, got: {clean(str(error))}"
        ) from None
    return result


def _json_values(text: str) -> Iterator[Any]:
    """Values one after the other, as kubectl reads them."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    end = 0
    while start := _NO_SPACE.search(text, end):
        value, end = decoder.raw_decode(text, start.start())
        yield value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise FieldError(twice, "each key once in an object", twice)
    return result


class _Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it: no dates, no base-60 numbers, no key twice in a mapping."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: dict[int, yaml.MappingNode] = {}
        self._pairs = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for each mapping before it is built; resolves the merge key `<<`."""
        if id(node) not in self._checked:
            self._checked[id(node)] = node
            _check_keys(node)
        super().flatten_mapping(node)
        self._pairs += len(node.value)
        if self._pairs > _MAX_VALUES:
            raise _yaml_error(f"more than {_MAX_VALUES} values", node)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise _yaml_error(f"the key {describe(key.value)} twice in one object", key)
            seen.add(key.value)


def _yaml_error(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    kept = ("bool", "null", "merge")
    resolvers = {
        first: [(tag, pattern) for tag, pattern in entries if tag.rpartition(":")[2] in kept]
        for first, entries in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }
    integer = re.compile(r"[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
    decimal = re.compile(
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    )
    for first in "-+.0123456789":
        resolvers.setdefault(first, []).extend(
            [("tag:yaml.org,2002:int", integer), ("tag:yaml.org,2002:float", decimal)]
        )
    return resolvers


_Loader.yaml_implicit_resolvers = _resolvers()


def _check_nesting(text: str, source: str) -> None:
    """Refuses deep nesting before libyaml's composer, which recurses in C, overflows the stack.

    Depth needs brackets or indentation; only text with much of either is looked at closely.
    """
    brackets = (part.count("[") + part.count("{") for part in _DOCUMENT_START.split(text))
    if max(brackets) < 200 and not _INDENT.search(text):
        return
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise ManifestError(f"{source}: expected values nested at most {_MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_size(document: Any, place: str) -> None:
    """Refuses what would take forever: endless or exploding aliases, absurd nesting."""
    stack, seen = [(document, 0)], 0
    while stack:
        value, depth = stack.pop()
        seen += 1
        if depth > _MAX_DEPTH:
            raise ManifestError(f"{place}: expected values nested at most {_MAX_DEPTH} deep")
        if seen > _MAX_VALUES:
            raise ManifestError(f"{place}: expected at most {_MAX_VALUES} values")
        if isinstance(value, dict):
            stack.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, list):
            stack.extend((item, depth + 1) for item in value)
