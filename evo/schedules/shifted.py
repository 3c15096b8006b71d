"""A schedule whose log-SNR is moved by a constant (Hoogeboom et al. 2023; Esser et al. 2024 for flows)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .base import Schedule


class Shifted(Schedule):
    """The log-SNR of `schedule` plus `log_snr_shift`, in the same kind of schedule: its own `scale` is kept.

    A radius r instead of r₀ of the latents multiplies their power by (r/r₀)²; a shift of −2·log(r/r₀) undoes that, so
    that words become unreadable at the levels at which they did. Ends that are exact stay exact.
    """

    def __init__(self, schedule: Schedule, log_snr_shift: float, *, t_min: float | None = None) -> None:
        """`t_min` None takes that of `schedule`, which is right where the shift undoes a change of radius.

        ValueError for a shift that is not finite.
        """
        super().__init__(t_min=schedule.t_min if t_min is None else t_min)
        if not math.isfinite(log_snr_shift):
            raise ValueError(f"log_snr_shift = {log_snr_shift!r}: needs a finite number.")
        self.schedule = schedule
        self.log_snr_shift = float(log_snr_shift)
        self.variance_preserving = schedule.variance_preserving
        self._noise_factor = math.exp(-log_snr_shift / 2)

    def _pair(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self.schedule.signal(t), self._noise_factor * self.schedule.noise(t)
        scale = self.schedule.scale(signal, noise)
        return signal / scale, noise / scale

    def signal(self, t: Tensor) -> Tensor:
        return self._pair(t)[0]

    def noise(self, t: Tensor) -> Tensor:
        return self._pair(t)[1]

    def log_snr(self, t: Tensor) -> Tensor:
        return self.schedule.log_snr(t) + self.log_snr_shift

    def d_log_snr(self, t: Tensor) -> Tensor:
        return self.schedule.d_log_snr(t)

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.schedule.level_of_log_snr(log_snr - self.log_snr_shift)

    def scale(self, signal: Tensor, noise: Tensor) -> Tensor:
        return self.schedule.scale(signal, noise)

    def config(self) -> dict[str, Any]:
        return super().config() | {"schedule": self.schedule.config(), "log_snr_shift": self.log_snr_shift}
