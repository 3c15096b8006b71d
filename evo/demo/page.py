"""A generation as one self-contained HTML page in which the refinement can be stepped through."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from evo.core import Generation
from evo.demo.picture import visible
from evo.files import write_text
from evo.text import BOS


def write_page(file: Path, prompt: Tensor, written: Generation) -> None:
    """Write the page of prompts (B, P) and the first window of what was written behind them.

    Raises:
        ValueError: for a generation without a trajectory.
    """
    if not written.trajectory:
        raise ValueError("there is no trajectory to show: generate with trajectory=True")
    steps = written.trajectory[0]
    sequences = [
        {
            "prompt": bytes(token for token in prompt[row].tolist() if token < BOS).decode("utf-8", errors="replace"),
            "levels": [[round(level, 3) for level in step] for step in steps.levels[row, :, :length].tolist()],
            "text": [[_glyph(token) for token in step] for step in steps.tokens[row, :, :length].tolist()],
        }
        for row, length in enumerate(written.lengths.clamp(max=steps.levels.shape[2]).tolist())
    ]
    template = (files("evo.demo") / "page.html").read_text(encoding="utf-8")
    # Inside a script element no "<" of the text may be taken for markup.
    data = json.dumps(sequences, ensure_ascii=False).replace("<", "\\u003c")
    write_text(file, template.replace("/*DATA*/", data))


def _glyph(token: int) -> str:
    return "↵\n" if token == ord("\n") else visible(token)
