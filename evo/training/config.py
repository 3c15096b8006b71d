"""What a training run is made of. The docstring under a field is also its help on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from evo.data import CorpusConfig
from evo.training.manifest import checkpoints
from evo.training.parallel import ParallelConfig
from evo.training.precision import Precision

PathName = Literal["early_stop", "late_start", "full"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay, and the average of the weights that is kept for use."""

    learning_rate: float = 2e-3
    """Peak rate, reached after the warm-up."""
    warmup: int = 100
    """Steps over which the rate rises linearly to its peak."""
    floor: float = 0.05
    """Rate at the last step, as a share of the peak; the way down is a half cosine."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moving averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, on the matrices of linear layers alone."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    ema: float = 0.9999
    """Decay of the averaged weights; at step k it is at most (1 + k) / (10 + k), so that short runs profit too."""
    patience: int = 20
    """Steps with a loss or gradient that is not finite are left out; so many in a row end the run."""

    def __post_init__(self) -> None:
        _check(0 < self.learning_rate < math.inf, "optimizer.learning_rate", self.learning_rate, "a positive rate")
        _check(self.warmup >= 0, "optimizer.warmup", self.warmup, "0 or more steps")
        _check(0 <= self.floor <= 1, "optimizer.floor", self.floor, "a share in [0, 1]")
        betas = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _check(betas, "optimizer.betas", self.betas, "two decays in [0, 1)")
        _check(0 < self.eps < math.inf, "optimizer.eps", self.eps, "a positive number")
        _check(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _check(self.clip > 0, "optimizer.clip", self.clip, "a positive norm")
        _check(0 <= self.ema < 1, "optimizer.ema", self.ema, "a decay in [0, 1)")
        _check(self.patience >= 1, "optimizer.patience", self.patience, "1 or more steps")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """What a step asks of the model: levels to explore, windows, and the weights of the terms beside the bound."""

    path: PathName = "early_stop"
    """How levels fall from where a token is sketched to 0, in training and in evaluation."""
    explore: float = 0.8
    """Share of sequences whose levels are random at the first step; the others take the levels of the timestep head. It is from the random
    ones that the flow learns, whatever the head chooses."""
    explore_floor: float = 0.8
    """The same at the last step; in between it changes linearly."""
    masked: float = 0.7
    """Of the sequences with random levels, the share whose tokens are each known or not at all; the others have levels of all kinds."""
    # Of an untrained model a timestep head learns that the flow, whose weight is capped, is cheap; it goes to level 1, where
    # the gradient in the level is nearly nothing but noise, and stays there.
    explore_alone: float = 0.2
    """Share of the run, from its start, in which all levels are random and the timestep head does not learn."""
    level_noise: float = 1.0
    """Scale of the logistic noise on the head's levels at the first step."""
    level_noise_floor: float = 0.1
    """The same at the last step; it falls linearly."""
    window: float = 0.5
    """Share of sequences that are a random prefix as prompt and a window of random end behind it."""
    suffix: float = 0.1
    """Share of sequences that are a window between a random prefix and a random suffix, which it sees: a model of 0 cannot infill."""
    auxiliary: float = 1.0
    """Weight of the auxiliary cross-entropies at the first step."""
    auxiliary_floor: float = 1.0
    """The same once it has fallen, after `auxiliary_share` of the run."""
    auxiliary_share: float = 0.2
    """Share of the run over which the auxiliary weight falls linearly to its floor."""
    label_smoothing: float = 0.0
    """Of the auxiliary cross-entropies alone; the bound is never smoothed."""
    causal: float = 10.0
    """Weight of the causal cross-entropy of a clean first pass, which the timestep head then reads: it costs a third of a step, and
    the causal half learns from every token whatever its level. Much, since an optimizer that divides by the size of the whole gradient
    would else move the causal half less than on its own. 0 makes that pass a noisy one that nothing is learned from."""
    flow: float = 0.1
    """Weight of the flow bits in what the network learns; the timestep head learns from them in full. Their gradient is far noisier than
    that of the auxiliary cross-entropies, which have the same minimum and teach the flow."""
    teaching: float = 0.5
    """Share of the sequences at the head's levels from which the head learns; the others teach the network at these levels."""
    self_conditioning: float = 0.5
    """Share of sequences refined with the network's own earlier estimate, where the model takes one."""
    parallel: float = 0.0
    """Share of sequences sketched in parallel behind a random place, for a model that is to write with a `stride`."""
    importance: bool = True
    """Measure the flow where its integrand has been found to live, instead of evenly over the clock."""
    compare_ends: bool = True
    """Compare what the head's levels cost with level 0 and with level 1, and move them towards an end that is better."""
    trials: float = 1.0
    """Weight of what the head learns by trial: single levels are measured at their other end too. 0 makes no trials."""
    weight_cap: float = 50.0
    """Largest weight of the flow's error at a level, in training; in evaluation there is no limit."""
    level_entropy: float = 0.01
    """Weight β of the entropy of the levels within a sequence; more spreads them."""
    level_price: float = 0.0
    """Price λ of the mean level in nats a token; more makes refinement rarer."""

    def __post_init__(self) -> None:
        paths = get_args(PathName)
        _check(self.path in paths, "curriculum.path", self.path, f"one of {', '.join(paths)}")
        for name in (
            "explore",
            "explore_floor",
            "explore_alone",
            "masked",
            "teaching",
            "window",
            "suffix",
            "auxiliary_share",
            "self_conditioning",
            "parallel",
        ):
            _check(0 <= getattr(self, name) <= 1, f"curriculum.{name}", getattr(self, name), "a share in [0, 1]")
        _check(
            self.window + self.suffix <= 1,
            "curriculum.window + curriculum.suffix",
            self.window + self.suffix,
            "shares of the same sequences, together at most 1",
        )
        _check(self.flow > 0, "curriculum.flow", self.flow, "a positive weight")
        _check(self.trials >= 0, "curriculum.trials", self.trials, "0 or more")
        _check(self.weight_cap > 0, "curriculum.weight_cap", self.weight_cap, "a positive weight")
        _check(self.level_noise >= 0, "curriculum.level_noise", self.level_noise, "0 or more")
        _check(self.level_noise_floor >= 0, "curriculum.level_noise_floor", self.level_noise_floor, "0 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The bound on held-out text, measured with the averaged weights at levels 0, 1 and learned."""

    every: int = 500
    """Steps from one evaluation to the next; the last step is always followed by one. What is evaluated is saved first."""
    sequences: int = 16
    """Held-out sequences measured."""
    clock_values: int = 4
    """Points of the flow integral a sequence; more make the standard error smaller."""
    batch_size: int = 16
    """Sequences in one pass."""

    def __post_init__(self) -> None:
        for name in ("every", "sequences", "clock_values", "batch_size"):
            _check(getattr(self, name) >= 1, f"evaluation.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train an Evo on the text under --data, byte by byte, or on tokens that `evo prepare` made.

    The run lives in the folder --out: config.json, metrics.jsonl, checkpoints/ and, when it is done, model/. The same
    command continues a run that was cut off, and on as many ranks the result is the same to the last bit.
    """

    data: Path | None = None
    """File or folder of text, or a folder made by `evo prepare`."""
    out: Path = Path("runs/evo")
    """Folder of the run; for ranks on several machines, on a file system that they share."""
    preset: str = "tiny"
    """Size of the model; `evo info` lists them."""
    overrides: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Options of the model that differ from the preset, in pairs: dropout 0.1 depth 4."""
    steps: int = 2000
    """Steps of the optimizer."""
    batch_size: int = 16
    """Sequences of a step, over all ranks and passes together."""
    micro_batch: int | None = None
    """Sequences that a rank computes in one pass; by default all of its share. The gradients of all passes make one step."""
    length: int = 256
    """Tokens of a sequence."""
    seed: int = 0
    """Everything random is a function of this seed and the step."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes an accelerator where there is one."""
    precision: Precision = "auto"
    """bf16 is autocast; auto takes it where the hardware multiplies bf16 matrices faster."""
    log_every: int = 10
    """Steps from one line of metrics to the next."""
    save_every: int = 250
    """Steps from one checkpoint to the next; the last step is always saved, and each that is evaluated."""
    keep: int = 2
    """Checkpoints kept, the latest."""
    timeout: float = 1800.0
    """Seconds after which a job whose ranks wait for one another in vain ends, and says what each was doing."""
    tensorboard: bool = False
    """Write the figures for TensorBoard too, into tensorboard/."""
    peak_tflops: float | None = None
    """What utilisation is a share of: operations of one device, in 10^12 a second; by default the rate of a large product of matrices,
    measured when the run begins."""
    elastic: Literal["no", "replicate", "shard"] = "no"
    """Which size of --parallel grows by what the others leave of a job's ranks, however many there are."""
    progress: bool = True
    """Report on standard error: a bar on a terminal, otherwise a line now and then."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            if isinstance(given := getattr(self, name), str):
                object.__setattr__(self, name, Path(given))
        for name in ("steps", "batch_size", "log_every", "save_every", "keep"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _check(self.length >= 2, "length", self.length, "2 or more tokens")
        _check(0 <= self.seed < 1 << 63, "seed", self.seed, "0 or more, below 2^63")
        _check(self.micro_batch is None or self.micro_batch >= 1, "micro_batch", self.micro_batch, "1 or more")
        _check(
            self.precision in get_args(Precision),
            "precision",
            self.precision,
            f"one of {', '.join(get_args(Precision))}",
        )
        _check(
            "vocab_size" not in self.overrides, "overrides", self.overrides, "no vocab_size, which is that of the data"
        )
        _check(self.timeout > 0, "timeout", self.timeout, "a positive number of seconds")
        _check(self.peak_tflops is None or self.peak_tflops > 0, "peak_tflops", self.peak_tflops, "a positive rate")

    def over(self, ranks: int) -> ParallelConfig:
        """How the run is spread over so many ranks: `parallel`, with the size that `elastic` names grown to take all of them.

        Raises:
            ValueError: where the other sizes do not divide the number of ranks.
        """
        if self.elastic == "no":
            return self.parallel
        taken, size = self.parallel.world, getattr(self.parallel, self.elastic)
        if ranks % taken:
            raise ValueError(
                f"the job has {ranks} ranks, which the sizes of --parallel, {taken} ranks together, do not divide: "
                f"start a multiple of {taken}"
            )
        return replace(self.parallel, **{self.elastic: size * (ranks // taken)})

    def shares(self, count: int) -> tuple[int, int]:
        """Sequences of a step of each of `count` data-parallel ranks, and of one pass of a rank.

        Raises:
            ValueError: where they do not come out even.
        """
        share = self.batch_size // count
        size = share if self.micro_batch is None else self.micro_batch
        if self.batch_size % count or size < 1 or share % size:
            given = "" if self.micro_batch is None else f", passes of micro_batch {size}"
            raise ValueError(
                f"batch_size {self.batch_size} over {count} data-parallel rank(s) is {self.batch_size / count:g} sequences each{given}: "
                f"needed is a multiple of {count * (self.micro_batch or 1)}"
            )
        return share, size

    def to_json(self) -> dict[str, Any]:
        """The same as a tree of JSON values."""
        return {name: str(value) if isinstance(value, Path) else _listed(value) for name, value in asdict(self).items()}


# What may change between the parts of one run without changing its weights (device, passes and ranks, by their rounding alone).
_FREE = (
    "data",
    "out",
    "micro_batch",
    "device",
    "log_every",
    "save_every",
    "keep",
    "timeout",
    "tensorboard",
    "peak_tflops",
    "elastic",
    "progress",
    "evaluation",
    "parallel",
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Sentences naming each option by which the runs `old` and `new` (as `to_json`) would differ in their weights."""
    flat_old, flat_new = _flat(old), _flat(new)
    return [
        f"{name} was {flat_old.get(name)!r} and is now {flat_new.get(name)!r}"
        for name in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(name) != flat_new.get(name) and name.partition(".")[0] not in _FREE
    ]


def check_same_run(config: TrainConfig, described: Mapping[str, Any]) -> None:
    """Raises `ValueError` where `out` has checkpoints made with options that lead to other weights, or nothing says with which."""
    if not checkpoints(config.out / "checkpoints"):
        return
    known = config.out / "config.json"
    try:
        options = json.loads(known.read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError(f"a JSON object is needed, and it holds a {type(options).__name__}")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{config.out} has checkpoints, and {known}, which says with what options they were made, cannot be read ({error}): "
            "put it back as it was, or give another --out to start anew"
        ) from error
    if changed := differences(options, described):
        raise ValueError(
            f"{config.out} holds a run with other options: {'; '.join(changed)}. "
            "Give the same options to go on with it, or another --out to start anew"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return leaves


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _listed(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check(holds: bool, name: str, value: object, needed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; needed: {needed}")
