"""Prompts from standard-library modules that the tiny model was not trained on.

The text is read from the running Python's own standard library, so nothing has to be shipped with the model.
"""

import re
import sysconfig
from itertools import count as count_from
from itertools import islice
from pathlib import Path

HELD_OUT = (
    "textwrap",
    "heapq",
    "shlex",
    "fractions",
    "dataclasses",
    "statistics",
    "calendar",
    "configparser",
    "difflib",
    "queue",
)

# Later prompts from one file start this many definitions further on, so that they overlap little.
STRIDE = 7
DEFINITION = re.compile(r"^ *(?:def|class) ", re.MULTILINE)


def held_out_files(stdlib: Path | None = None) -> list[Path]:
    """The held-out modules' files in a standard library (by default the running Python's)."""
    folder = stdlib or Path(sysconfig.get_paths()["stdlib"])
    return [folder / f"{name}.py" for name in HELD_OUT]


def cut_at_line_end(text: str, start: int, characters: int) -> str:
    """The text from `start` to the first line end at or after `start + characters`.

    The newline itself is left to the model: its tokens hold a newline together with the indentation that follows.
    """
    end = text.find("\n", start + characters)
    return text[start:] if end < 0 else text[start:end]


def prompts_of(text: str, characters: int) -> list[str]:
    """Prompts that start at a source file's definitions, those that fit in front of the file's end."""
    starts = [match.start() for match in DEFINITION.finditer(text) if match.start() + characters < len(text)]
    return [cut_at_line_end(text, start, characters) for start in starts]


def demonstration_prompts(count: int, characters: int) -> list[str]:
    """`count` prompts of at least `characters` characters each, taken from the held-out modules in turn."""
    files = [prompts_of(path.read_text(encoding="utf-8"), characters) for path in held_out_files()]
    files = [prompts for prompts in files if prompts]
    if not files:
        raise ValueError(f"no held-out module is {characters} characters long")
    in_turn = (prompts[STRIDE * turn % len(prompts)] for turn in count_from() for prompts in files)
    return list(islice(in_turn, count))
