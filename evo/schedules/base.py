"""What a noise schedule is.

A latent at level t in [0, 1] is z = s(t)·e + n(t)·ε: s is the signal, n the noise, SNR = s²/n². Level 0 is the word,
level 1 the noisiest state. As a process in t it is dz = f(t)·z dt + g(t) dw with f = s'/s and g² = d(n²)/dt − 2·f·n²
(Kingma et al. 2021; Lu et al. 2022).

A schedule of one's own needs one method:

    class Linear(Schedule):
        def log_snr(self, t):
            return 8 - 16 * t
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .conversions import Conversions, interior


class Schedule(nn.Module, Conversions):
    """Signal and noise as functions of the level.

    Every method maps a float32 or float64 tensor of levels, of any shape, to one of the same shape and dtype. Written
    in closed form, as by this library's schedules, `signal` and `noise` are exact at both ends; whatever can be
    singular at an end (`log_snr`, derivatives, `drift`, `diffusion`) is evaluated at the level clamped to
    [1e-4, 1 − 1e-4], so that all is finite. Nothing here looks at the values it is given: `check_levels` does, for
    callers at the boundary.

    Abstract is `log_snr` alone, a strictly decreasing function. From it follow a variance preserving signal and noise,
    derivatives (automatic, and differentiable in turn) and the inverse (bisection). A subclass overrides what it knows
    in closed form. One that does not preserve variance overrides `signal`, `noise` and `scale` and sets
    `variance_preserving = False`. Where `log_snr` is infinite at an end, evaluate it at `interior(t)`; signal and noise
    that follow from it then are at the ends what they are 1e-4 before (a cosine: 1.6e-4 instead of 0).
    """

    variance_preserving: bool = True
    """Whether s² + n² = 1 at every level."""

    def __init__(self, *, t_min: float = 0.1) -> None:
        """`t_min` in (0, 1): a level at or below it counts as 0, a realised word. ValueError outside."""
        super().__init__()
        if not 0 < t_min < 1:
            raise ValueError(f"t_min = {t_min!r}: needs a level strictly between 0 and 1.")
        self.t_min = float(t_min)

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """log(s²/n²), strictly decreasing in t."""

    def signal(self, t: Tensor) -> Tensor:
        """s(t), the factor of the clean latent."""
        return self.log_snr(t).sigmoid().sqrt()

    def noise(self, t: Tensor) -> Tensor:
        """n(t), the factor of the unit noise."""
        return (-self.log_snr(t)).sigmoid().sqrt()

    def d_signal(self, t: Tensor) -> Tensor:
        """The derivative ds/dt."""
        t = interior(t)
        if self.variance_preserving:  # s² = sigmoid(log_snr)
            return 0.5 * self.signal(t) * self.noise(t).square() * self.d_log_snr(t)
        return _derivative(self.signal, t)

    def d_noise(self, t: Tensor) -> Tensor:
        """The derivative dn/dt."""
        t = interior(t)
        if self.variance_preserving:  # n² = sigmoid(−log_snr)
            return -0.5 * self.noise(t) * self.signal(t).square() * self.d_log_snr(t)
        return _derivative(self.noise, t)

    def d_log_snr(self, t: Tensor) -> Tensor:
        """The derivative of `log_snr`, negative."""
        return _derivative(self.log_snr, interior(t))

    def level_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The level in [0, 1] at which `log_snr` is reached, the nearer end where it is not.

        Bisection to the rounding of the dtype. The gradient is that of the inverse function, in `log_snr` and in the
        schedule's own parameters.
        """
        level = bisect(lambda t: self.log_snr(t) > log_snr, log_snr)
        if not torch.is_grad_enabled():
            return level
        # Implicit differentiation of log_snr(t) = l. The step has value 0, so that the bisection's result stands.
        inner = interior(level)
        step = (log_snr - self.log_snr(inner)) / self.d_log_snr(inner).detach()
        return level + torch.where((level > 0) & (level < 1), step - step.detach(), 0.0)

    def drift(self, t: Tensor) -> Tensor:
        """f(t) = s'/s of dz = f·z dt + g dw."""
        t = interior(t)
        return self.d_signal(t) / self.signal(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) ≥ 0 of dz = f·z dt + g dw, from g² = d(n²)/dt − 2·f·n² = −n²·d_log_snr."""
        t = interior(t)
        return self.noise(t) * (-self.d_log_snr(t)).sqrt()

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ(t) = s², the share of variance that is signal. ValueError where the schedule does not preserve variance."""
        if not self.variance_preserving:
            raise ValueError(
                f"{type(self).__name__} has no alpha_bar: ᾱ is the signal's share of a variance s² + n² = 1, and this "
                "schedule does not keep that sum at 1. Use signal(t) and noise(t), or snr(t)."
            )
        return self.signal(t).square()

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio s²/n²."""
        return self.log_snr(t).exp()

    def d_snr(self, t: Tensor) -> Tensor:
        """The derivative of `snr`, negative: minus twice the weight of the squared error in the diffusion bound."""
        return self.snr(t) * self.d_log_snr(t)

    def scale(self, signal: Tensor, noise: Tensor) -> Tensor:
        """What divides any pair (signal, noise) to give it this schedule's size; 1 for its own pairs.

        √(s² + n²) where variance is preserved. `Shifted`, which changes the ratio of a pair, restores its size by it.
        """
        return torch.hypot(signal, noise)

    def config(self) -> dict[str, Any]:
        """JSON types from which `from_config` builds this schedule; its parameters and buffers are in `state_dict`."""
        return {"name": schedule_name(type(self)), "t_min": self.t_min}

    def extra_repr(self) -> str:
        """The configuration, without the name and without nested schedules, which a module prints itself."""
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items() if k != "name" and not isinstance(v, dict))


def schedule_name(kind: type[Schedule]) -> str:
    """The name of a class in configurations: `LinearVP` is "linear_vp"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def check_levels(levels: Tensor, name: str = "levels") -> None:
    """Raise TypeError unless `levels` is a floating-point tensor, ValueError unless all of it lies in [0, 1].

    NaN does not lie in [0, 1]. On an accelerator this waits for the values: for the boundary, not for the hot path.
    """
    if not isinstance(levels, Tensor) or not levels.is_floating_point():
        given = f"a tensor of {levels.dtype}" if isinstance(levels, Tensor) else f"{type(levels).__name__} {levels!r}"
        raise TypeError(f"{name} is {given}: needs a floating-point tensor of levels in [0, 1].")
    outside = ~((levels >= 0) & (levels <= 1))
    if outside.any():
        first = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{name} has {int(outside.sum())} of {levels.numel()} values outside [0, 1], the first "
            f"{levels[first].item()} at {first}: a level is 0 for a realised word and 1 for noise."
        )


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of an elementwise function at every element of `t`, whatever gradient mode the caller is in."""
    return torch.func.grad(lambda t: function(t).sum())(t)


@torch.no_grad()
def bisect(is_below: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The point of [0, 1], of the shape of `like`, up to which `is_below` holds, to the spacing of floats below 1."""
    low, high = torch.zeros_like(like), torch.ones_like(like)
    for _ in range(64 if like.dtype == torch.float64 else 32):
        middle = (low + high) / 2
        below = is_below(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(low == 0, low, high)
