"""JSON values against type hints: dataclasses and signatures filled strictly, every problem collected with its path."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal


def from_json(cls: type, value: Any, path: str, problems: list[str]) -> Any:
    """An instance of dataclass `cls` from a JSON object, or None after adding to `problems`."""
    if not isinstance(value, dict):
        problems.append(f"{path}: must be an object, got {show(value)}")
        return None
    before = len(problems)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    report_unknown(value, list(fields), path, problems)
    made = {}
    for name, spec in fields.items():
        if name in value:
            made[name] = _convert(value[name], hints[name], f"{path}.{name}", problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"{path}.{name}: is missing")
    return cls(**made) if len(problems) == before else None


def check_call(
    target: Callable[..., Any], args: Mapping[str, Any], path: str, problems: list[str], *, check_types: bool = True,
    given: Sequence[str] = ("self", "roots"),
) -> None:
    """Check keyword arguments against the signature of `target`; `given` are the ones that the caller adds."""
    parameters = {n: p for n, p in inspect.signature(target).parameters.items() if n not in given}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(f"{target}: **kwargs cannot be checked")
    report_unknown(args, list(parameters), path, problems)
    init = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(init) if check_types else {}
    for name, parameter in parameters.items():
        if name not in args:
            if parameter.default is inspect.Parameter.empty:
                problems.append(f"{path}.{name}: is missing")
        elif name in hints:
            _convert(args[name], hints[name], f"{path}.{name}", problems)


def report_unknown(value: Mapping[str, Any], valid: Sequence[str], path: str, problems: list[str]) -> None:
    for key in value:
        if key not in valid:
            where = f"{path}.{key}" if path else key
            problems.append(f"{where}: unknown key{did_you_mean(key, valid)}; valid keys: {', '.join(sorted(valid))}")


def did_you_mean(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _convert(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """`value` as `hint` wants it (JSON lists become tuples, whole numbers floats), with a problem where it is not."""
    found: list[str] = []
    made = _match(value, hint, path, found)
    problems.extend(found)
    return made


def _match(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    def wrong(expected: str) -> None:
        close = did_you_mean(value, _texts(hint)) if isinstance(value, str) else ""
        problems.append(f"{path}: must be {expected}, got {show(value)}{close}")

    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        attempts = []
        for option in inner:
            found: list[str] = []
            made = _match(value, option, path, found)
            if not found:
                return made
            attempts.append((option, found))
        nested = [found for option, found in attempts if dataclasses.is_dataclass(option)]
        if isinstance(value, dict) and nested:
            problems.extend(nested[0])
        else:
            wrong(_describe(hint))
    elif origin is Literal:
        if value not in inner or isinstance(value, bool) and True not in inner:
            wrong(_describe(hint))
    elif dataclasses.is_dataclass(hint):
        return from_json(hint, value, path, problems)
    elif hint is float:
        if not _is_finite_number(value):
            wrong("a number")
        else:
            return float(value)
    elif hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            wrong("a whole number")
    elif hint in (bool, str, type(None)):
        if not isinstance(value, hint):
            wrong(_describe(hint))
    elif origin in (list, tuple) or hint in (list, tuple):
        if not isinstance(value, list):
            wrong("a list")
        else:
            kinds = [k for k in inner if k is not Ellipsis] or [Any]
            if origin is tuple and Ellipsis not in inner and len(kinds) != len(value):
                wrong(f"a list of {len(kinds)}")
            items = [_match(v, kinds[i % len(kinds)], f"{path}[{i}]", problems) for i, v in enumerate(value)]
            return tuple(items) if (origin or hint) is tuple else items
    elif origin is dict or hint is dict:
        if not isinstance(value, dict):
            wrong("an object")
        elif inner:
            return {k: _match(v, inner[1], f"{path}.{k}", problems) for k, v in value.items()}
    return value


def _is_finite_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _texts(hint: Any) -> list[str]:
    """Texts that a hint allows, where it lists them."""
    if typing.get_origin(hint) is Literal:
        return [text for text in typing.get_args(hint) if isinstance(text, str)]
    return [text for option in typing.get_args(hint) for text in _texts(option)]


def _describe(hint: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
             list: "a list", dict: "an object"}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in inner)
    if origin is Literal:
        return " or ".join(json.dumps(option) for option in inner)
    if dataclasses.is_dataclass(hint):
        return "an object with " + ", ".join(f.name for f in dataclasses.fields(hint))
    return plain.get(hint) or plain.get(origin) or str(hint)
