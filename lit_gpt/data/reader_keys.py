"""Keys that readers put into records, beside those of the file. No key of a file begins so."""

from collections.abc import Mapping
from typing import Any

UNREADABLE = "\0unreadable"
"""The only key of a record that a reader could not read; its value says why."""
PART_OF_FILE = "\0part_of_file"
"""True in a text that is one of several of a file: its pieces go to training or validation one by one."""
IS_REPEAT = "\0is_repeat"
"""True in a record that is the one before once more, as a weight asks for."""
SOURCE = "\0source"
"""What the record is from, where several sources are read."""
NUMBER = "\0number"
"""Which record of its source it is, counted from 1, where it is another number than in what is passed on."""
NAMES = (SOURCE, NUMBER)
READER_KEYS = (UNREADABLE, PART_OF_FILE, IS_REPEAT, *NAMES)


def name_record(record: Mapping[str, Any], number: int) -> str:
    """What people call a record, such as Record 7. `number` counts those that have been read."""
    name = f"Record {record.get(NUMBER, number)}"
    return f"{name} of {record[SOURCE]}" if SOURCE in record else name


def own_keys(record: Mapping[Any, Any]) -> list[Any]:
    """The keys that a record has in its file."""
    return [key for key in record if key not in READER_KEYS]
