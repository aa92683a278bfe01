"""Tools and calls of tools, in the forms in which data sets write them, as chat templates read them.

    tools             [{"type": "function", "function": {"name": ..., "parameters": {...}}}, ...]
    a message's       [{"type": "function", "function": {"name": ..., "arguments": {...}}}, ...]
      tool_calls

Each part of it may be JSON text, since a column of a table has one type: the list, an entry, `parameters`, `arguments`.
Before there were tools, OpenAI wrote `functions` and `function_call`.

Nulls are taken out where they stand for a key of a mapping: Arrow, which is behind parquet and the data sets of the
hub, gives every mapping of a column the keys of all others. Who means a null, as in `"default": null`, writes JSON
text, in which nulls stay. The null of a list stays, as in `"enum": ["a", null]`.
"""

import json
from collections.abc import Mapping
from typing import Any

from lit_gpt.errors import InputError


class JsonMapping(dict[str, Any]):
    """The arguments of a call: a mapping that a template may also print as the text that OpenAI's format has there.

    transformers asks for a mapping, and most templates write `arguments | tojson`. Some, as DeepSeek's, write
    `'...' + arguments`, for which a mapping is an error, or `{{ arguments }}`, which would spell it as Python does.
    """

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, after: str) -> str:
        return str(self) + after

    def __radd__(self, before: str) -> str:
        return before + str(self)


def read_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """The tools of a record. Raises InputError if they are anything but a list of mappings, or JSON text of one."""
    return [read_tool(tool, where) for tool in read_list(without_nulls(value), f"{where}: tools")]


def read_functions(value: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's older `functions` as tools. Raises InputError: see `read_tools`."""
    functions = read_list(without_nulls(value), f"{where}: functions")
    return [read_tool({"type": "function", "function": function}, where) for function in functions]


def read_tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool, its function and its parameters as mappings."""
    tool = dict(tool)
    if "function" in tool:
        tool["function"] = dict(read_mapping(tool["function"], f"{where}: function of a tool"))
    for definition in (tool, tool.get("function", {})):
        if "parameters" in definition:
            definition["parameters"] = read_mapping(definition["parameters"], f"{where}: parameters of a tool")
    return tool


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a message. Raises InputError if they are no list of mappings, or no JSON text of one."""
    calls = []
    for call in read_list(without_nulls(value), f"{where}: tool_calls"):
        if "function" in call:
            calls.append(call | {"function": read_call(call["function"], where)})
        else:
            calls.append(read_call(call, where))
    return calls


def read_call(value: Any, where: str) -> dict[str, Any]:
    """The function of a call, its arguments as a mapping."""
    call = dict(read_mapping(value, f"{where}: function of a call"))
    arguments = call.get("arguments")
    call["arguments"] = JsonMapping(read_mapping(arguments, f"{where}: arguments of a call"))
    return call


def read_function_call(value: Any, where: str) -> dict[str, Any]:
    """OpenAI's older `function_call` as one of the tool_calls."""
    return {"type": "function", "function": read_call(without_nulls(value), where)}


def calls_in_text(text: str, where: str) -> list[dict[str, Any]] | None:
    """The calls that a message of ShareGPT's role function_call is: JSON of one or of several. None if it is none.

    Raises:
        InputError: the arguments are no mapping.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return None
    return [{"type": "function", "function": read_call(call, where)} for call in calls]


# ---- JSON text, nulls


def read_list(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of mappings, which may be JSON text, as may its entries. Raises InputError if it is none."""
    entries = parse_if_text(value, name)
    if entries is None:
        return []
    if not isinstance(entries, list):
        raise InputError(f"{name} is a {type(entries).__name__}, expected a list of mappings.")
    return [read_mapping(entry, f"{name}, entry {number},") for number, entry in enumerate(entries, 1)]


def read_mapping(value: Any, name: str) -> dict[str, Any]:
    """A mapping, which may be JSON text; empty for None. Raises InputError if it is none."""
    mapping = parse_if_text(value, name)
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping):
        raise InputError(f"{name} is a {type(mapping).__name__}, expected a mapping.")
    return dict(mapping)


def parse_if_text(value: Any, name: str) -> Any:
    """What JSON text says, None for blank text; another value as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        parsed = json.loads(value)
        if isinstance(parsed, str) and parsed.lstrip().startswith(("[", "{")):  # it was encoded twice
            parsed = json.loads(parsed)
        return parsed
    except (ValueError, RecursionError):
        shown = value if len(value) <= 40 else f"{value[:40]}..."
        raise InputError(f"{name} is the text {shown!r}, which is no JSON.") from None


def without_nulls(value: Any) -> Any:
    """The value without those keys of its mappings that are None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(entry) for entry in value]
    return value
