"""Training, on one laptop core or on all ranks of a job: a plain loop, to be read in one sitting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from evo.core import ClockDensity, Evo, Extremes, Objective, evaluate
from evo.data import Corpus, Data, Packed, load, open_corpus
from evo.data.loader import checked
from evo.files import write_json
from evo.training import curriculum
from evo.training.checkpoint import Checkpointer, export_average
from evo.training.config import OptimizerConfig, TrainConfig, check_same_run
from evo.training.flops import Flops
from evo.training.guard import Delayed, FolderLock, Preempted, Suspects, Termination, Watch
from evo.training.launch import launched
from evo.training.metrics import Meter, MetricsLog, memory_bytes
from evo.training.optimizer import adamw, learning_rate
from evo.training.parallel import gathered, parallelize
from evo.training.peers import Peers
from evo.training.precision import peak_flops, pick_device, width
from evo.training.progress import Progress
from evo.training.seeds import Purpose, generator
from evo.training.state import TrainState
from evo.training.step import Share, report, train_step

_NAMED = 4
"""Sequences that are named where more of them spoil a step."""
_GIVEN = "none, the model was given"
"""The preset of such a run in its config.json."""

Asked = Callable[[int, ClockDensity, Extremes], Objective]
"""What a step (from 0) asks of the model, given what the run has found so far of the clock and of the extremes of the level."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run: the averaged model in evaluation mode (in shards, where it was trained in shards; `out`/model has it whole), steps
    made and left out, the last held-out evaluation.
    """

    model: Evo
    steps: int
    skipped: int
    evaluation: Mapping[str, Any]


def train(config: TrainConfig, model: Evo | None = None) -> TrainResult:
    """Train on `config.data` in the folder `config.out`, or go on where a run of the same options was cut off there.

    `model` is trained in place; by default one is built from the preset. The averaged weights end in `out`/model.
    Everything random but dropout is a function of (seed, step, sequence): a run cut off anywhere, any number of times, ends with the
    weights of a run left alone, bit for bit on the same machine and number of threads and ranks.

    Started by `torchrun`, it is one rank of the job.

    Raises:
        ValueError: where `out` holds checkpoints of other options or data, or of options that its config.json does not tell; where ranks
            or sequences do not come out even.
        BlockingIOError: where another process trains in `out`.
        FileNotFoundError, ValueError: for data not there or empty.
        FloatingPointError: when loss or gradient stay non-finite, with the sequences that spoil them; and at the end for weights that are
            spoilt, of which no model is made.
        Preempted: (a `SystemExit` with status 75) after SIGTERM, once everything is saved.
    """
    with launched(config.device, config.timeout) as device:
        return Trainer(config, model=model, device=device).run()


class Trainer:
    """A run made of pieces, of which any may be one's own; `train` takes all of them as they come.

    To be made by all ranks of a job together, in a process group that is there already (`launched` makes one).

    Args:
        config: of the run.
        model: whole; by default built from the preset.
        data: by default the corpus at `config.data`.
        device: of this rank; by default that of the config.
        optimizer: makes the optimizer of the model as it is called in training, maybe in shards. Adam and AdamW with `fused=True`
            leave a step out without waiting for the device; any other waits for it at every step.
        rate: learning rate of a step (from 0): finite, and 0 or more.
        objective: what a step asks of the model; by default the curriculum of the config. A run that goes on must be given the same.
        after_step: called with the trainer after every step, on every rank.

    Attributes:
        state: what a step changes; `state.model` is what is called.
        share: which rows are this rank's.
        log: where figures go.

    Raises:
        ValueError, TypeError: for data that the model cannot read: more entries of the vocabulary, longer sequences than its context, or
            batches that are none; and as `train` does.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Evo | None = None,
        data: Data | None = None,
        device: torch.device | None = None,
        optimizer: Callable[[nn.Module, OptimizerConfig], torch.optim.Optimizer] = adamw,
        rate: Callable[[int], float] | None = None,
        objective: Asked | None = None,
        after_step: Sequence[Callable[[Trainer], None]] = (),
    ) -> None:
        self.config, self.after_step = config, after_step
        self.rate = rate or (lambda step: learning_rate(config.optimizer, step, config.steps))
        self.objective: Asked = objective or (
            lambda step, clock, extremes: curriculum.objective(config.curriculum, step, config.steps, clock, extremes)
        )
        self.device = device = pick_device(config.device) if device is None else device
        peers = Peers(timedelta(seconds=config.timeout))
        self.first, self.ranks = peers.first, peers.count
        parallel = config.over(peers.count)
        mesh = parallel.mesh(device.type)
        self.share = Share.of(config, mesh)
        described = config.to_json() | ({} if model is None else {"preset": _GIVEN, "overrides": {}})
        peers.from_first(lambda: check_same_run(config, described))
        self._lock: FolderLock | None = None
        # The first rank tokenizes what the others then find.
        if data is None:
            peers.from_first(self._tokenize)
        self.data: Data = _opened(config) if data is None else data
        if model is None:
            torch.manual_seed(config.seed)
            model = Evo.from_preset(config.preset, vocab_size=self.data.vocabulary, **config.overrides)
        _check_fits(model, self.data, config)
        rows = config.evaluation.sequences
        self.held_out = checked(self.data.held_out_batch(rows, config.length), rows, config.length, least=1)
        self.state = TrainState.begin(
            model.to(device),
            config.optimizer,
            spread=lambda whole: parallelize(whole, parallel, mesh, dtype=width(device, config.precision)),
            optimizer=optimizer,
        )
        peers.from_first(self._enter)
        self.saved = Checkpointer(config.out / "checkpoints", keep=config.keep)
        self.saved.restore(self.state, corpus=self.data.fingerprint)
        if self.first:
            write_json(config.out / "config.json", described)
        self.log = MetricsLog(
            config.out / "metrics.jsonl" if self.first else None,
            self.state.step,
            config.out / "tensorboard" if config.tensorboard else None,
        )
        latest = self.log.latest.get("evaluation", {}).get("step")
        self._owed = peers.from_first(lambda: self._evaluates(self.state.step) and latest != self.state.step)
        peers.close()
        self.watch = Watch(config.timeout)
        self._suspects, self._meter, self._told = Suspects(config.batch_size, device), Meter(), Delayed()
        self._skipped = int(self.state.skipped)
        self._left = False
        self._peak = None
        if self.first:
            given = config.peak_tflops
            self._peak = peak_flops(device, config.precision) if given is None else given * 1e12

    def _enter(self) -> None:
        """Keep other processes out of the folder."""
        self._lock = FolderLock.of(self.config.out)

    def _tokenize(self) -> None:
        source = self.config.data
        if source is not None and source.exists():
            self._enter()
        _opened(self.config)

    def run(self) -> TrainResult:
        """The steps that are left, and what belongs between them.

        Raises as `train` does, and `RuntimeError` for a trainer whose run did not come to its end.
        """
        if self._left:
            raise RuntimeError(
                f"the run of this Trainer was left at step {self.state.step} of {self.config.steps}, maybe half-way through it: make a new "
                f"Trainer of the same options, which goes on from the last checkpoint in {self.config.out}"
            )
        self._left = True
        try:
            result = self._run()
        finally:
            self._lock = None
        self._left = False
        return result

    def _run(self) -> TrainResult:
        config, state = self.config, self.state
        progress = Progress(state.step, config.steps, shown=config.progress and self.first)
        steps = range(state.step, config.steps)
        batches = load(
            self.data, config.seed, steps, self.share.rows, config.batch_size, config.length, device=self.device
        )
        self._meter.restart_clock()
        with self.watch, self.log, self.saved, batches, progress, Termination() as termination:
            if state.step:
                progress.note(f"going on from step {state.step} of {config.steps}")
            if self._owed:
                self._log_evaluation(progress)
            while state.step < config.steps:
                ending = self.step(batches, told=termination.asked)
                progress.advance()
                evaluating = self._evaluates(state.step)
                saving = ending or evaluating or state.step % config.save_every == 0
                # A line before each checkpoint makes the lines of a resumed run those of a run left alone.
                if saving or state.step % config.log_every == 0:
                    figures = self._read(progress)
                    self.log.write("train", state.step, **figures)
                    progress.show(state.step, figures)
                if saving:
                    self.watch.at(f"checkpoint of step {state.step}")
                    self.log.sync()
                    self.saved.save(state, corpus=self.data.fingerprint)
                    self._meter.restart_clock()
                if ending and state.step < config.steps:
                    self.saved.wait()
                    raise Preempted(state.step, config.steps)
                if evaluating:
                    self._log_evaluation(progress)
            self.watch.at("the last checkpoint")
            self.saved.wait()
            self.watch.at("the model")
            self._export()
        return TrainResult(
            model=state.ema.model,
            steps=state.step,
            skipped=int(state.skipped),
            evaluation=self.log.latest.get("evaluation", {}),
        )

    def step(self, batches: Iterator[Packed], *, told: bool = False) -> bool:
        """One step on the next batch; whether any rank was told to end, as all of them learn one step later."""
        state, config = self.state, self.config
        rate = self.rate(state.step)
        if not 0 <= rate < math.inf:
            raise ValueError(f"the rate of step {state.step} is {rate!r}; needed: a finite learning rate, 0 or more")
        self.watch.at(f"batch of step {state.step}")
        done = train_step(
            config,
            state,
            self.share,
            next(batches),
            self.objective(state.step, state.clock, state.extremes),
            rate=rate,
            text_bytes=self.data.text_bytes,
            told=told,
            at=self.watch.at,
        )
        self._meter.add(done.finite, done.figures)
        self._suspects.note(state.step - 1, done.finite, done.unsound)
        for call in self.after_step:
            call(self)
        return self._told.exchange(done.told) > 0

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation belongs behind `step` steps."""
        return step > 0 and (step == self.config.steps or step % self.config.evaluation.every == 0)

    def _log_evaluation(self, progress: Progress) -> None:
        self.watch.at(f"evaluation after step {self.state.step}")
        self.log.write("evaluation", self.state.step, **self.evaluate(progress))
        self._meter.restart_clock()
        self._owed = False

    @torch.no_grad()
    def evaluate(self, progress: Progress) -> dict[str, Any]:
        """The bound of the averaged weights on held-out rows (S, N), in bits per byte, at levels 0, 1 and learned.

        Every rank measures all rows, so that the figures do not depend on how many ranks there are.
        """
        config, rows = self.config, self.held_out.to(self.device)
        in_bytes = max(1.0, self.data.text_bytes(self.held_out.tokens[self.held_out.loss_mask], held_out=True))
        measured: dict[str, dict[str, Any]] = {}
        # All ranks make the same passes, for which blocks can be gathered one by one.
        with gathered(self.state.ema.model, blocks=False) as model:
            for name, levels in (("0", 0.0), ("1", 1.0), ("learned", None)):
                found = evaluate(
                    model,
                    rows.tokens,
                    levels,
                    lengths=rows.lengths,
                    documents=rows.documents,
                    loss_mask=rows.loss_mask,
                    progress=config.progress and self.first,
                    path=curriculum.PATHS[config.curriculum.path],
                    clock_values=config.evaluation.clock_values,
                    batch_size=config.evaluation.batch_size,
                    # The same noise every time: what changes between evaluations is the model.
                    generator=generator(self.device, config.seed, Purpose.EVALUATION),
                )
                measured[name] = found.bits_per(in_bytes)
        shown = ", ".join(
            f"{name}: {each['bits']:.3f} ± {each['standard_error']:.3f}" for name, each in measured.items()
        )
        progress.note(f"step {self.state.step}: held-out bits per byte at level {shown}")
        return {"levels": measured}

    def _read(self, progress: Progress) -> dict[str, Any]:
        """The figures since the last reading. Raises `FloatingPointError` where too many steps in a row were left out."""
        config, state = self.config, self.state
        sums, counted, speed = self._meter.read()
        skipped, rejected = int(state.skipped), int(state.rejected)
        if skipped > self._skipped:
            blamed = self._blamed()
            self._skipped = skipped
            self.log.write("skipped", state.step, count=skipped, latest=blamed)
            progress.note(f"{skipped} steps were left out in all; {blamed}")
            if rejected >= config.optimizer.patience:
                raise FloatingPointError(
                    f"loss or gradient has not been finite for {rejected} steps in a row, up to step {state.step}; {blamed}. "
                    "Look at these sequences; or start a new run with a lower learning rate, or in fp32"
                )
        asked = self.objective(state.step - 1, state.clock, state.extremes)
        return {
            **report(sums, counted),
            "tokens_per_second": speed * config.batch_size * config.length,
            "utilisation": self._utilisation(asked, speed),
            "memory_bytes": memory_bytes(self.device),
            "learning_rate": self.rate(state.step - 1),
            "auxiliary_weight": asked.aux_weight,
            "skipped": skipped,
        }

    def _blamed(self) -> str:
        """Which sequences spoilt the latest step that was left out."""
        config, (step, rows) = self.config, self._suspects.read()
        if not rows:
            return f"in step {step} the bound of every sequence was finite, and the loss or the gradient was not"
        named = [self.data.describe(config.seed, step, row, config.batch_size, config.length) for row in rows[:_NAMED]]
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        which = "the weights may be to blame, as every bound" if len(rows) == config.batch_size else "the bound"
        return f"in step {step} {which} was not finite of {'; '.join(named)}{more}"

    def _utilisation(self, asked: Objective, speed: float) -> float | None:
        """Share of what the devices of all ranks could compute at most; None for a model whose operations nobody has counted."""
        config, made_of = self.config, self.state.config
        if self._peak is None or made_of is None:
            return None
        recomputed = config.parallel.recompute == "full"
        work = Flops.of(made_of).training(
            asked, sequences=config.batch_size, length=config.length, checkpointing=recomputed
        )
        return work * speed / (self._peak * self.ranks)

    def _export(self) -> None:
        """The averaged weights, whole, to `out`/model; all ranks wait for it. Raises `FloatingPointError` where they are spoilt."""
        if self.first:
            levels = self.log.latest.get("evaluation", {}).get("levels", {})
            if levels and levels["0"]["bits"] is None:
                raise FloatingPointError(
                    f"the averaged weights are spoilt after step {self.state.step}, and no model is made of them: the bound on held-out "
                    f"text is not finite at level 0, and {int(self.state.skipped)} steps were left out. Start a new run with a lower "
                    "learning rate, or in fp32; evo export --step makes a model of an earlier checkpoint"
                )
            # From the checkpoint, which has it whole, however it is spread here.
            export_average(self.saved.folder, self.config.out / "model", self.state.step)
        if self.share.mesh is not None:
            dist.barrier()


def _opened(config: TrainConfig) -> Corpus:
    return open_corpus(config.data, config.out / "data", config.corpus, progress=config.progress)


def _check_fits(model: Evo, data: Data, config: TrainConfig) -> None:
    """Raises `ValueError` where the model has too few entries for the data, or too short a context."""
    entries = model.latent_space.vocab_size
    if data.vocabulary > entries:
        raise ValueError(
            f"the data have a vocabulary of {data.vocabulary}, the model has {entries} entries: "
            "build it with as many, or take its tokenizer"
        )
    if config.length > model.context:
        raise ValueError(
            f"length is {config.length}, the model's context {model.context}: ask for shorter sequences, or build it with a longer context"
        )
