"""A completion as a picture: every token coloured by the level it was sketched at, and the levels over refinement steps."""

from __future__ import annotations

from pathlib import Path

from evo.core import Generation
from evo.text import BOS

COLUMNS = 48


def visible(token: int) -> str:
    """One character for a byte token."""
    if token >= BOS:
        return "◦"
    return {10: "↵", 9: "→", 32: " "}.get(token, chr(token) if 32 < token < 127 else "·")


def draw_levels(file: Path, written: Generation, row: int = 0) -> None:
    """Write a PNG of one sequence of a generation that kept its trajectory: its tokens, and the steps of its first window.

    Raises:
        ImportError: without matplotlib.
        ValueError: without a trajectory.
    """
    if not written.trajectory:
        raise ValueError("there is no trajectory to draw: generate with trajectory=True")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'evo-lm[train]'") from error
    length = int(written.lengths[row])
    tokens, levels = written.tokens[row, :length].tolist(), written.levels[row, :length]
    lines = -(-length // COLUMNS)
    figure = Figure(figsize=(12, 0.42 * lines + 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[0.42 * lines, 3.2])
    padded = levels.new_full((lines * COLUMNS,), float("nan"))
    padded[:length] = levels
    image = above.imshow(padded.view(lines, COLUMNS).numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for index, token in enumerate(tokens):
        colour = "white" if levels[index] < 0.6 else "black"
        above.text(
            index % COLUMNS,
            index // COLUMNS,
            visible(token),
            ha="center",
            va="center",
            color=colour,
            family="monospace",
        )
    above.set(title="each token, coloured by the level t it was sketched at", xticks=[], yticks=[])
    window = written.trajectory[0].levels[row, :, :length]
    below.imshow(window.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    below.set(title="levels over refinement steps", xlabel="token", ylabel="step")
    figure.colorbar(image, ax=[above, below], label="level (1 is noise, 0 is a word)")
    temporary = file.with_name(f".{file.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(file)
