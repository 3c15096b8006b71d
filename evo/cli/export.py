"""`evo export`: the model of a checkpoint, for use."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from evo.training.checkpoint import averaged_model


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn a checkpoint into a model that Evo.from_pretrained and evo generate read.

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
    averaged_model(options.run / "checkpoints", options.step).save_pretrained(options.folder)
    print(f"the model is in {options.folder}", file=sys.stderr)
