"""Public data sets on disk: the folder that EVO_DATA names, by default `shared/data` beside the project's own folder."""

from __future__ import annotations

import lzma
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Absent(Exception):
    """A data set that is not there; rows that need it are passed over with this as the reason."""


def read_text(name: str) -> str:
    """The text of an xz-compressed file of the data folder, such as "wikitext-2/valid.txt.xz".

    Raises:
        Absent: if it is not there.
    """
    folder = Path(os.environ.get("EVO_DATA", ROOT.parent / "shared" / "data"))
    file = folder / name
    if not file.is_file():
        raise Absent(f"{name} is not in {folder}: set EVO_DATA to a folder that has it")
    with lzma.open(file, "rt", encoding="utf-8", newline="") as stream:
        return stream.read()
