"""`evo export`: the model of a checkpoint, for use."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from evo.training.checkpoint import export_average


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn a checkpoint into a model that Evo.from_pretrained and evo generate read; one composed by hand, into what load_weights reads.

    Takes the averaged weights of a checkpoint written by any number of processes. The run may go on meanwhile.
    """

    run: Positional[Path]
    """Folder of the run, OUT of evo train."""
    folder: Positional[Path]
    """Where the model goes; made if it is not there."""
    step: int | None = None
    """The checkpoint of this step; by default the latest that is whole."""


def run(options: Options) -> None:
    """Read, write, and say where."""
    config = export_average(options.run / "checkpoints", options.folder, options.step)
    how = "" if config is not None else "; it was composed by hand: compose it again, and call its load_weights"
    print(f"the model is in {options.folder}{how}", file=sys.stderr)
