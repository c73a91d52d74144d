"""One value that a JSON schema allows, for an engine that makes its answers up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from inference.engines.base import BadRequest

DEEPEST = 16
FULL_DEPTH = 4
"""Deeper than this only what is required is made, so that a schema that contains itself comes to an end."""
MOST_VALUES = 10_000


def instance(
    schema: dict[str, Any] | bool, *, param: str, texts: Sequence[str] = (), numbers: Sequence[float] = ()
) -> Any:
    """The same value for the same schema, with these texts and numbers at the first places that allow
    them. `pattern` and `format` are not looked at. Raises BadRequest, naming `param`, for a schema that
    has no end, no instance, or is none."""
    return _Maker(schema, param, texts, numbers).make(schema, 0)


class _Maker:
    def __init__(
        self, root: dict[str, Any] | bool, param: str, texts: Sequence[str], numbers: Sequence[float]
    ) -> None:
        self._root = root
        self._param = param
        self._texts = list(texts)
        self._numbers = list(numbers)
        self._values = 0

    def make(self, schema: Any, depth: int) -> Any:
        self._values += 1
        if depth > DEEPEST or self._values > MOST_VALUES:
            raise self._refusal("too deep or too large")
        if schema is True or schema == {}:
            return "steam"
        if not isinstance(schema, dict):
            raise self._refusal("not one that a value can satisfy")
        if "$ref" in schema:
            return self.make(self._referred(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        if isinstance(enum := schema.get("enum"), list) and enum:
            return enum[0]
        for several in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(several), list) and branches:
                return self.make(_branch(branches, depth), depth + 1)
        if isinstance(parts := schema.get("allOf"), list) and parts:
            return self._together(schema, parts, depth)
        return self._of_type(schema, depth)

    def _of_type(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((one for one in kind if one != "null" or depth > FULL_DEPTH), "null")
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema, depth)
        if kind == "array" or (kind is None and "items" in schema):
            return self._array(schema, depth)
        if kind in ("integer", "number"):
            return self._number(schema, whole=kind == "integer")
        if kind == "boolean":
            return True
        if kind == "null":
            return None
        if kind in ("string", None):
            return self._string(schema)
        raise self._refusal("of a type that JSON does not have")

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise self._refusal("not well formed")
        names = required if depth >= FULL_DEPTH else [*properties, *required]
        return {str(name): self.make(properties.get(name, True), depth + 1) for name in dict.fromkeys(names)}

    def _array(self, schema: dict[str, Any], depth: int) -> list[Any]:
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise self._refusal("not well formed")
        made = [self.make(one, depth + 1) for one in first]
        least = self._count(schema, "minItems")
        items = schema.get("items", True)
        wanted = least if depth >= FULL_DEPTH or items is False else max(least, 1)
        if isinstance(most := schema.get("maxItems"), int):
            wanted = min(wanted, most)
        made += [self.make(items, depth + 1) for _ in range(wanted - len(made))]
        return made

    def _number(self, schema: dict[str, Any], *, whole: bool) -> int | float:
        low, high, step = (_bound(schema, name) for name in ("minimum", "maximum", "multipleOf"))
        above, below = _bound(schema, "exclusiveMinimum"), _bound(schema, "exclusiveMaximum")
        for given in self._numbers:
            inside = (low is None or given >= low) and (high is None or given <= high)
            between = (above is None or given > above) and (below is None or given < below)
            even = given % (step or 1) == 0 if whole or step else True
            if inside and between and even and (not whole or given.is_integer()):
                self._numbers.remove(given)
                return int(given) if whole else given
        step = step or (1 if whole else 0.5)
        highest = [high, None if below is None else below - step]
        lowest = [low, None if above is None else above + step]
        value = min([1.0, *(one for one in highest if one is not None)])
        value = max([value, *(one for one in lowest if one is not None)])
        if whole or "multipleOf" in schema:
            value = math.ceil(value / step) * step
        return int(value) if whole else float(value)

    def _string(self, schema: dict[str, Any]) -> str:
        least, most = self._count(schema, "minLength"), schema.get("maxLength")
        for given in self._texts:
            if least <= len(given) and (not isinstance(most, int) or len(given) <= most):
                self._texts.remove(given)
                return given
        text = "steam" + " steam" * math.ceil((least - 5) / 6) if least > 5 else "steam"
        return text[: max(least, most)] if isinstance(most, int) else text

    def _together(self, schema: dict[str, Any], parts: list[Any], depth: int) -> Any:
        merged: dict[str, Any] = {name: value for name, value in schema.items() if name != "allOf"}
        for part in parts:
            while isinstance(part, dict) and "$ref" in part:
                self._values += 1
                if self._values > MOST_VALUES:
                    raise self._refusal("too deep or too large")
                part = self._referred(part["$ref"])
            if not isinstance(part, dict):
                continue
            properties = {**merged.get("properties", {}), **part.get("properties", {})}
            required = [*merged.get("required", []), *part.get("required", [])]
            merged |= part | {"properties": properties, "required": required} if properties else part
        return self.make(merged, depth + 1)

    def _count(self, schema: dict[str, Any], name: str) -> int:
        value = schema.get(name, 0)
        if not isinstance(value, int) or not 0 <= value <= MOST_VALUES:
            raise self._refusal("too deep or too large")
        return value

    def _referred(self, reference: Any) -> Any:
        found: Any = self._root
        if reference != "#":
            for name in str(reference).removeprefix("#/").split("/"):
                name = name.replace("~1", "/").replace("~0", "~")
                if not isinstance(found, dict) or name not in found:
                    raise self._refusal("one with a '$ref' that leads nowhere")
                found = found[name]
        return found

    def _refusal(self, what: str) -> BadRequest:
        return BadRequest(f"The JSON schema is {what}.", param=self._param, code="invalid_value")


def _branch(branches: list[Any], depth: int) -> Any:
    if depth >= FULL_DEPTH:
        for branch in branches:
            if isinstance(branch, dict) and branch.get("type") == "null":
                return branch
    return branches[0]


def _bound(schema: dict[str, Any], name: str) -> float | None:
    value = schema.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
