"""How bytes become one of the API's objects, and how what is wrong with them is said in OpenAI's words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, TypeVar

import msgspec

from openai_api import limits
from openai_api.errors import InvalidRequest

T = TypeVar("T")

NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your "
    "HTTP library correctly. The API expects a JSON payload, but what was sent was not valid JSON.)"
)


def decode(body: bytes, decoder: Callable[[bytes], T]) -> T:
    """Read and bound a body. Raises InvalidRequest naming the field."""
    try:
        read = decoder(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest(NOT_JSON) from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(body)
    if b"\\u0000" in body:
        _refuse_nul(_decode_any(body), "")
    return read


def convert(given: Any, kind: type[T], path: str) -> T:
    """A part of a body that was decoded already, as `kind`. Raises InvalidRequest naming the field below
    `path`."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), path) from None


def check_headers(headers: Mapping[bytes, bytes]) -> None:
    """Raises InvalidRequest for a body that is told to be other than JSON, or packed: what a few bytes
    unpack to has no bound. A body that is told to be nothing is taken for JSON."""
    told = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if told not in _JSON:
        raise InvalidRequest(
            f"Unsupported content type: '{told[:100].decode('latin-1')}'. This API method only accepts "
            "'application/json' requests.",
            code="unsupported_content_type",
        )
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        raise InvalidRequest(
            "Compressed requests are not accepted: send the body without Content-Encoding.",
            code="unsupported_content_encoding",
        )


SESSION_HEADER = b"x-session-id"


def check_session(given: bytes) -> str:
    """The session that a header names. Raises InvalidRequest for one that is too long."""
    if len(given) > limits.SESSION_BYTES:
        raise InvalidRequest(
            f"Invalid 'X-Session-Id': longer than {limits.SESSION_BYTES} bytes.",
            param="X-Session-Id",
            code="string_above_max_length",
        )
    return given.decode("latin-1")


_JSON = (b"application/json", b"")

_decode_any = msgspec.json.Decoder().decode


def unsupported(field: str, model: str) -> InvalidRequest:
    """This model's engines do not honour `field`."""
    return InvalidRequest(
        f"Unsupported value: '{field}' is not supported with the model `{model}`. Leave it out.",
        param=field,
        code="unsupported_value",
    )


def invalid(param: str, problem: str, code: str = "invalid_value") -> InvalidRequest:
    """`param` cannot be used as it stands."""
    return InvalidRequest(f"Invalid '{param}': {problem}", param=param, code=code)


def missing(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
    )


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The JSON body is nested deeper than {limits.JSON_DEPTH} levels.")


def _check_depth(body: bytes) -> None:
    """Refuse nesting beyond the bound. `body` is valid JSON. Nearly all steps run in C over what the one
    before left: a prompt of a megabyte costs less than a millisecond, one full of quoted code a few."""
    if len(body.translate(None, _NO_OPENERS)) <= limits.JSON_DEPTH:
        return
    if b"\\" in body:
        # Whatever may follow a backslash is kept, so that each still stands before what it escapes.
        body = body.translate(None, _NO_ESCAPES).replace(b"\\\\", b"").replace(b'\\"', b"")
    # Strings that meet become one: what is inside of one, and what is not, stays so.
    marks = body.translate(_UP_AND_DOWN, _NO_MARKS).replace(b'""', b"")
    if b'"' in marks:
        # Every second piece between quotes is inside a string.
        marks = b"".join(marks.split(b'"')[::2])
    depth = 0
    while marks and depth <= limits.JSON_DEPTH:
        # One innermost level less each time.
        depth, before, marks = depth + 1, len(marks), marks.replace(_LEVEL, b"")
        if len(marks) > before * 3 // 4:
            # Long runs: soon a walk through what is left is shorter.
            depth += max(accumulate(memoryview(marks).cast("b")))
            break
    if depth > limits.JSON_DEPTH:
        raise _too_deep()


_UP_AND_DOWN = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")
_LEVEL = b"\x01\xff"


def _all_but(kept: bytes) -> bytes:
    return bytes(set(range(256)) - set(kept))


_NO_OPENERS = _all_but(b"[{")
_NO_ESCAPES = _all_but(b'[]{}"\\/bfnrtu')
_NO_MARKS = _all_but(b'[]{}"')


def _refuse_nul(value: Any, path: str) -> None:
    """PostgreSQL's text cannot hold NUL, nor does a prompt need one."""
    if isinstance(value, str):
        if "\x00" in value:
            raise InvalidRequest(
                f"Invalid '{path}': the text has a NUL character.", param=path, code="invalid_value"
            )
    elif isinstance(value, list):
        for at, item in enumerate(value):
            _refuse_nul(item, f"{path}[{at}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if "\x00" in key:
                raise InvalidRequest(
                    "A key of the JSON body has a NUL character.", param=path or None, code="invalid_value"
                )
            _refuse_nul(item, f"{path}.{key}" if path else key)


# -- msgspec's sentences, in OpenAI's words

_LOCATED = re.compile(r"^(?P<said>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING_FIELD = re.compile(r"^Object missing required field `(.+)`$")
_WRONG_TYPE = re.compile(r"^Expected `(?P<expected>[^`]+)`, got `(?P<got>[^`]+)`$")
_RANGE = re.compile(
    r"^Expected `(?P<type>int|float|str|array|object)`(?P<length> of length)? "
    r"(?P<sign><=|>=|<|>) (?P<bound>\S+)$"
)
_NAMES = {"str": "a string", "int": "an integer", "float": "a decimal", "bool": "a boolean", "null": "null"}


def _explain(problem: str, within: str = "") -> InvalidRequest:
    located = _LOCATED.match(problem)
    said, path = (located["said"], located["path"] or "") if located else (problem, "")
    # msgspec does not tell a dict's key: the dict is named.
    path = path.partition("[...]")[0]
    if within:
        path = f"{within}{path}" if path.startswith("[") or not path else f"{within}.{path}"
    if absent := _MISSING_FIELD.match(said):
        return missing(f"{path}.{absent[1]}" if path else absent[1])
    where = f"'{path}'" if path else "the body"
    if wrong := _WRONG_TYPE.match(said):
        expected = [
            _NAMES.get(name, f"an {name}") for name in wrong["expected"].split(" | ") if name != "null"
        ]
        got = _NAMES.get(wrong["got"], f"an {wrong['got']}")
        return InvalidRequest(
            f"Invalid type for {where}: expected {' or '.join(expected)}, but got {got} instead.",
            param=path or None,
            code="invalid_type",
        )
    if bound := _RANGE.match(said):
        return InvalidRequest(
            f"Invalid {where}: expected {'a length' if bound['length'] else 'a value'} "
            f"{bound['sign']} {bound['bound']}.",
            param=path or None,
            code=_range_code(bound["type"], upper=bound["sign"].startswith("<")),
        )
    if said == "Number out of range":
        return InvalidRequest(
            f"Invalid {where}: the number is out of range.", param=path or None, code="invalid_value"
        )
    return InvalidRequest(
        f"Invalid value for {where}: {said[:200]}.", param=path or None, code="invalid_value"
    )


def _range_code(kind: str, *, upper: bool) -> str:
    match kind:
        case "int":
            return "integer_above_max_value" if upper else "integer_below_min_value"
        case "float":
            return "decimal_above_max_value" if upper else "decimal_below_min_value"
        case "str":
            return "string_above_max_length" if upper else "string_below_min_length"
        case "array":
            return "array_above_max_length" if upper else "empty_array"
        case _:
            return "object_above_max_properties" if upper else "invalid_value"
