"""The keys of the schema, by dotted path."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from xlstm_distill.contract.schema import Config, Expert, Placement, Source

NAME = "NAME"
"""Stands for any name in the path of a key: `cluster.stages.NAME.nodes`."""


def hint_of(key: str, cls: type = Config) -> Any:
    """Type of the value at a dotted key, or None where the schema has no such key."""
    hint: Any = cls
    for name in key.split("."):
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(name)
        elif is_mapping(hint) and name:
            hint = get_args(hint)[1]
        else:
            return None
    return hint


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every key, inner nodes included, names of mappings as `NAME`."""
    found = []
    for key, hint in _walk(cls, prefix):
        found.append(key)
        inner = get_args(hint)[1] if is_mapping(hint) else hint
        if is_dataclass(inner):
            found += known_keys(inner, f"{key}.{NAME}" if is_mapping(hint) else key)  # type: ignore[arg-type]
    return found


def leaf_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Every setting once: what may stand under any name (a source, a placement, an expert) is counted once."""
    shared = {Source: "SOURCE", Placement: "PLACEMENT", Expert: "EXPERT"}
    found: list[str] = []
    for key, hint in _walk(cls, prefix):
        inner = get_args(hint)[1] if is_mapping(hint) else hint
        if inner in shared:
            found += leaf_keys(inner, shared[inner])
        elif is_dataclass(inner):
            found += leaf_keys(inner, key)  # type: ignore[arg-type]
        else:
            found.append(key)
    return list(dict.fromkeys(found))


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        yield (f"{prefix}.{field.name}" if prefix else field.name), hints[field.name]


def is_mapping(hint: Any) -> bool:
    """Whether a hint is `Mapping[str, …]`."""
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)
