"""Training in one process: a plain loop, to be read in one sitting."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from evo.core import Evo, evaluate
from evo.core.files import write_json
from evo.text import BOS, ByteTokenizer
from evo.training import checkpoint
from evo.training.config import TrainConfig, differences
from evo.training.curriculum import PATHS, objective, windows
from evo.training.data import Corpus, open_corpus
from evo.training.metrics import Meter, MetricsLog
from evo.training.optimizer import learning_rate, step_if
from evo.training.precision import autocast, pick_device
from evo.training.progress import Progress
from evo.training.seeds import Purpose, derive, generator
from evo.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run: the averaged model in evaluation mode, steps made and left out, the last held-out evaluation."""

    model: Evo
    steps: int
    skipped: int
    evaluation: Mapping[str, Any]


def train(config: TrainConfig, model: Evo | None = None) -> TrainResult:
    """Train on `config.data` in the folder `config.out`, or go on where a run of the same options was cut off there.

    `model` is trained in place; by default one is built from the preset. The averaged weights end in `out`/model.
    Everything random is a function of (seed, step): a run cut off anywhere, any number of times, ends with the weights
    of a run left alone, bit for bit on the same machine and number of threads.

    Raises `ValueError` where `out` holds checkpoints of other options or data, `FileNotFoundError` or `ValueError` for
    data not there or empty, and `FloatingPointError` when loss or gradient stay non-finite.
    """
    device = pick_device(config.device)
    checkpoints = config.out / "checkpoints"
    _check_same_run(config)
    corpus = open_corpus(config.data, config.out / "data", config.corpus, progress=config.progress)
    held_out = corpus.held_out_batch(config.evaluation.sequences, config.length)
    if model is None:
        torch.manual_seed(config.seed)
        model = Evo.from_preset(config.preset, vocab_size=ByteTokenizer.vocab_size, **config.overrides)
    state = TrainState.begin(model.to(device), config.optimizer)
    checkpoint.restore(checkpoints, state, corpus=corpus.fingerprint)
    write_json(config.out / "config.json", config.to_json())

    log = MetricsLog(config.out / "metrics.jsonl", upto=state.step)
    with log, Progress(state.step, config.steps, shown=config.progress) as progress:
        if state.step:
            progress.note(f"going on from step {state.step} of {config.steps}")
        meter = Meter()
        while state.step < config.steps:
            train_step(config, state, corpus, meter)
            progress.advance()
            last = state.step == config.steps
            saving = last or state.step % config.save_every == 0
            # A line before each checkpoint makes the lines of a resumed run those of a run left alone.
            if saving or state.step % config.log_every == 0:
                figures = _read(config, state, meter)
                log.write("train", state.step, **figures)
                progress.show(state.step, figures)
            if last or state.step % config.evaluation.every == 0:
                log.write("evaluation", state.step, **_evaluate(config, state, held_out, progress))
                meter.restart_clock()
            if saving:
                log.sync()
                checkpoint.save(checkpoints, state, corpus=corpus.fingerprint, keep=config.keep)
                meter.restart_clock()
    state.ema.model.save_pretrained(config.out / "model")
    return TrainResult(
        model=state.ema.model,
        steps=state.step,
        skipped=int(state.skipped),
        evaluation=log.latest["evaluation"],
    )


def train_step(config: TrainConfig, state: TrainState, corpus: Corpus, meter: Meter) -> None:
    """One step of the optimizer, its figures added to `meter`. Nothing here waits for the device.

    The figures are means over the tokens scored, in bits but for the loss (nats); prompts count with level 0. Made from one
    value of the clock a sequence and a capped weight, they show how training goes and are no bound: `_evaluate` has that.
    """
    step, device = state.step, next(state.model.parameters()).device
    count = config.accumulate * config.batch_size
    tokens = corpus.batch(config.seed, step, count, config.length)
    prompts, ends = windows(config.curriculum.window, config.seed, step, count, config.length)
    asked = objective(config.curriculum, step, config.steps, state.clock, state.extremes)
    scored = int(ends.sum())
    in_bytes = int(((tokens < BOS) & (torch.arange(config.length) < ends[:, None])).sum())
    torch.manual_seed(derive(config.seed, Purpose.DROPOUT, step))
    sums: dict[str, Tensor] = {}
    for index, part in enumerate(torch.arange(count).split(config.batch_size)):
        with autocast(device, config.precision):
            out = state.model(
                tokens[part].to(device),
                prompt_length=prompts[part].to(device),
                lengths=ends[part].to(device),
                path=PATHS[config.curriculum.path],
                generator=generator(device, config.seed, Purpose.LEVELS, step, index),
                objective=asked,
            )
        # The mean over all tokens scored in the step, wherever the cuts between passes fall.
        loss = out.loss * (int(ends[part].sum()) / scored)
        loss.backward()
        bits = 1 / (math.log(2) * scored)
        figures = {
            "loss": loss,
            "bits_per_token": out.bound.sum() * bits,
            "sketch": out.sketch_bits.sum() * bits,
            "flow": out.flow_bits.sum() * bits,
            "reconstruction": out.reconstruction.sum() * bits,
            "bits_per_byte": out.bound.sum() / (math.log(2) * max(1, in_bytes)),
            "mean_level": out.levels.sum() / scored,
        }
        sums = {name: sums.get(name, 0) + value.detach() for name, value in figures.items()}
    rate = learning_rate(config.optimizer, step, config.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    norm = clip_grad_norm_(state.model.parameters(), config.optimizer.clip)
    finite = sums["loss"].isfinite() & norm.isfinite()
    step_if(state.optimizer, finite)
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.model, step)
    state.skipped += ~finite
    state.rejected = torch.where(finite, 0, state.rejected + 1)
    state.step += 1
    meter.add(finite, count * config.length, {**sums, "gradient_norm": norm})


def _read(config: TrainConfig, state: TrainState, meter: Meter) -> dict[str, Any]:
    """The figures since the last reading. Raises `FloatingPointError` where too many steps in a row were left out."""
    if int(state.rejected) >= config.optimizer.patience:
        raise FloatingPointError(
            f"loss or gradient has not been finite for {int(state.rejected)} steps in a row, up to step {state.step}: "
            "start a new run with a lower learning rate, or in fp32"
        )
    made = state.step - 1
    return {
        **meter.read(),
        "learning_rate": learning_rate(config.optimizer, made, config.steps),
        "auxiliary_weight": objective(config.curriculum, made, config.steps).aux_weight,
        "skipped": int(state.skipped),
    }


def _evaluate(config: TrainConfig, state: TrainState, held_out: Tensor, progress: Progress) -> dict[str, Any]:
    """The bound of the averaged weights on held-out crops (S, N), in bits per byte, at levels 0, 1 and learned."""
    device = next(state.model.parameters()).device
    in_bytes = max(1, int((held_out < BOS).sum()))
    measured: dict[str, dict[str, Any]] = {}
    for name, levels in (("0", 0.0), ("1", 1.0), ("learned", None)):
        found = evaluate(
            state.ema.model,
            held_out.to(device),
            levels,
            progress=config.progress,
            path=PATHS[config.curriculum.path],
            clock_values=config.evaluation.clock_values,
            batch_size=config.batch_size,
            # The same noise every time: what changes between evaluations is the model.
            generator=generator(device, config.seed, Purpose.EVALUATION),
        )
        measured[name] = found.bits_per(in_bytes)
    shown = ", ".join(f"{name}: {each['bits']:.3f} ± {each['standard_error']:.3f}" for name, each in measured.items())
    progress.note(f"step {state.step}: held-out bits per byte at level {shown}")
    return {"levels": measured}


def _check_same_run(config: TrainConfig) -> None:
    """Raises `ValueError` where `out` has checkpoints made with options that lead to other weights."""
    known = config.out / "config.json"
    if checkpoint.checkpoints(config.out / "checkpoints") and known.exists():
        changed = differences(json.loads(known.read_text(encoding="utf-8")), config.to_json())
        if changed:
            raise ValueError(
                f"{config.out} holds a run with other options: {'; '.join(changed)}. "
                "Give the same options to go on with it, or another --out to start anew"
            )
