"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """A bar on standard error where that is a terminal, otherwise a line for every twentieth of the run.

    Either shows loss, bits per byte and tokens/s; the bar adds the time left.
    """

    def __init__(self, start: int, steps: int, *, shown: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, desc="training", unit=" steps", disable=not (shown and terminal))
        self._lines = shown and not terminal
        self._steps, self._due = steps, start

    def advance(self) -> None:
        """One step more."""
        self._bar.update()

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures after `step` steps: `loss`, `bits_per_byte`, `tokens_per_second`."""
        text = (
            f"loss {figures['loss']:.3f}, {figures['bits_per_byte']:.3f} bits/byte, "
            f"{figures['tokens_per_second']:,.0f} tokens/s"
        )
        self._bar.set_postfix_str(text, refresh=False)
        if self._lines and (step >= self._due or step == self._steps):
            self._due = step + self._steps / 20
            self.note(f"step {step}/{self._steps}: {text}")

    def note(self, text: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self._lines or not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
