"""From text on disk to a trained model, two tables, a picture and a page."""

from __future__ import annotations

import json
import math
import re
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evo.core import Evaluation, Evo, Generation, evaluate
from evo.demo.config import DemoConfig
from evo.demo.page import write_page
from evo.demo.picture import draw_levels
from evo.schedules import Path as LevelPath
from evo.schedules import early_stop
from evo.solvers import Euler, Exponential, Heun, Solver, TorchDiffEq
from evo.text import BOS, EOS, ByteTokenizer
from evo.training import (
    Corpus,
    CorpusConfig,
    CurriculumConfig,
    EvaluationConfig,
    OptimizerConfig,
    TrainConfig,
    open_corpus,
    train,
)

LENGTH, BATCH, MAX_STEPS = 256, 8, 20
PATH: LevelPath = early_stop
# Of the standard library, what is not a test or a program of its own.
EXCLUDED = ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo")


def main(config: DemoConfig) -> None:
    """Run the whole demonstration.

    Raises:
        FileNotFoundError, ValueError: for data that is not there or too little, or an `out` that holds another run.
    """
    pick_threads(config.preset)
    started = time.perf_counter()
    plan = training_plan(config)
    print(f"training {plan.preset!r} for {plan.steps} steps on {plan.data}", flush=True)
    model = train(plan).model
    print(f"trained in {(time.perf_counter() - started) / 60:.1f} minutes; the model is in {config.out / 'model'}\n")
    corpus = open_corpus(plan.data, config.out / "data", plan.corpus)
    measured = measure_bound(model, corpus, config)
    print(bound_table(measured), end="\n\n", flush=True)
    prompt = functions(corpus, config.prompts, LENGTH // 2)
    completions = complete(model, prompt, config)
    print(solver_table(completions), end="\n\n", flush=True)
    shown = completions[0].generation
    draw_levels(config.out / "levels.png", shown)
    write_page(config.out / "levels.html", prompt, shown)
    write_results(config.out / "results.json", measured, completions)
    print(f"wrote {config.out / 'levels.png'}, {config.out / 'levels.html'} and {config.out / 'results.json'}")
    print(f'now try: evo generate --model {config.out / "model"} "def "')


def training_plan(config: DemoConfig) -> TrainConfig:
    """The training run: the one that `out` holds, or one of as many steps as fill the time."""
    data = Path(sysconfig.get_paths()["stdlib"]) if config.data is None else config.data
    plan = TrainConfig(
        data=data,
        out=config.out,
        preset=config.preset,
        steps=config.steps or 1,
        batch_size=BATCH,
        length=LENGTH,
        seed=config.seed,
        save_every=500,
        corpus=CorpusConfig(suffixes=(".py",), exclude=EXCLUDED) if config.data is None else CorpusConfig(),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=50),
        # Prompts are read in full as any causal model reads them; most of a short run goes into whole windows.
        curriculum=CurriculumConfig(window=0.25),
        evaluation=EvaluationConfig(every=10**9, sequences=16, clock_values=4),
    )
    if config.steps is not None:
        return plan
    known = config.out / "config.json"
    if known.is_file():
        return replace(plan, steps=int(json.loads(known.read_text(encoding="utf-8"))["steps"]))
    return replace(plan, steps=max(100, int(60 * config.minutes / seconds_per_step(config.preset))))


def pick_threads(preset: str) -> None:
    """Use one thread where that is faster than all: on few cores that others use too, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    together = seconds_per_step(preset, timed=3)
    torch.set_num_threads(1)
    if threads > 1 and together < seconds_per_step(preset, timed=3):
        torch.set_num_threads(threads)


def seconds_per_step(preset: str, warm_up: int = 2, timed: int = 12) -> float:
    """How long one training step takes on this machine, from a few of a model that is thrown away."""
    model = Evo.from_preset(preset, vocab_size=ByteTokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 256, (BATCH, LENGTH))
    begun = time.perf_counter()
    for step in range(warm_up + timed):
        if step == warm_up:
            begun = time.perf_counter()
        model(tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - begun) / timed


def measure_bound(model: Evo, corpus: Corpus, config: DemoConfig) -> dict[str, tuple[Evaluation, float]]:
    """The held-out bound at each kind of level, with the factor from nats a token to bits a byte."""
    tokens = corpus.held_out_batch(config.sequences, LENGTH)
    per_byte = tokens.numel() / (math.log(2) * int((tokens < BOS).sum()))
    measured = {}
    for name, levels in (("t = 0", 0.0), ("t = 1/2", 0.5), ("t = 1", 1.0), ("learned t", None)):
        found = evaluate(
            model,
            tokens,
            levels,
            path=PATH,
            snap=1 / MAX_STEPS,
            generator=torch.Generator().manual_seed(config.seed),
            description=f"bound at {name}",
        )
        measured[name] = (found, per_byte)
    return measured


def bound_table(measured: dict[str, tuple[Evaluation, float]]) -> str:
    """The bound at each kind of level, in bits a byte."""
    lines = [
        f"held-out bound in bits per byte, path {PATH}",
        f"{'levels':<12}{'bound':>9}{'± s.e.':>9}{'sketch':>9}{'flow':>9}{'reconstr.':>11}{'mean t':>9}",
    ]
    for name, (found, unit) in measured.items():
        figures = (found.nats, found.standard_error, found.sketch, found.flow)
        lines.append(
            f"{name:<12}"
            + "".join(f"{figure * unit:9.3f}" for figure in figures)
            + f"{found.reconstruction * unit:11.4f}{found.mean_level:9.3f}"
        )
    return "\n".join(lines)


def functions(corpus: Corpus, count: int, length: int) -> Tensor:
    """The beginnings of at most `count` held-out functions, (B, P): a `def` line and what stands before it, P bytes in all.

    Text in which nothing is defined gives plain excerpts.

    Raises:
        ValueError: for held-out text of no more than P bytes.
    """
    # Between files stand BOS and EOS; here a new line does as well.
    text = np.where(corpus.held_out < BOS, corpus.held_out, ord("\n")).astype(np.uint8).tobytes()
    ends = [match.end() for match in re.finditer(rb"\n *def [^\n]*:\n", text) if match.end() >= length]
    ends = ends or list(range(length, len(text), length))
    if not ends:
        raise ValueError(f"the held-out text has {len(text)} bytes; more than {length} are needed to complete anything")
    count = min(count, len(ends))
    chosen = [ends[index * len(ends) // count] for index in range(count)]
    return torch.stack([torch.tensor(list(text[end - length : end])) for end in chosen])


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one solver wrote, how fast, and how likely the causal half finds it."""

    solver: str
    generation: Generation
    tokens_per_second: float
    bits_per_byte: float


def complete(model: Evo, prompt: Tensor, config: DemoConfig) -> list[Completion]:
    """The same completions with every solver: same weights, same seed."""
    solvers: dict[str, Solver] = {
        "Euler": Euler(),
        "Heun": Heun(),
        "Exponential": Exponential(schedule=model.schedule),
        "dopri5": TorchDiffEq("dopri5", rtol=1e-2, atol=1e-2),
    }
    completions = []
    for name, solver in tqdm(solvers.items(), desc="completing", unit="solver", disable=None, leave=False):
        begun = time.perf_counter()
        written = model.generate(
            prompt,
            config.new_tokens,
            solver=solver,
            plan=PATH,
            max_steps=MAX_STEPS,
            stop=EOS,
            generator=torch.Generator().manual_seed(config.seed),
            trajectory=True,
        )
        seconds = time.perf_counter() - begun
        completions.append(
            Completion(
                solver=name,
                generation=written,
                tokens_per_second=int(written.lengths.sum()) / seconds,
                bits_per_byte=likelihood(model, prompt, written),
            )
        )
    return completions


def likelihood(model: Evo, prompt: Tensor, written: Generation) -> float:
    """Bits a byte of the completions under the causal half, behind their prompts."""
    whole = torch.cat([prompt, written.tokens], dim=1)
    nats = -model.log_prob(whole, 0.0, lengths=prompt.shape[1] + written.lengths)[:, prompt.shape[1] :].sum().item()
    return nats / math.log(2) / int(written.lengths.sum())


def solver_table(completions: list[Completion]) -> str:
    """One line a solver."""
    rows = completions[0].generation.tokens.shape
    lines = [
        f"{rows[0]} held-out functions completed by {rows[1]} bytes, K = {MAX_STEPS}, plan {PATH}",
        f"{'solver':<14}{'nfe':>6}{'tokens/s':>10}{'bits/byte at t = 0':>20}{'mean t':>9}",
    ]
    for done in completions:
        mean = done.generation.levels.sum().item() / done.generation.lengths.sum().item()
        lines.append(
            f"{done.solver:<14}{done.generation.nfe:>6}{done.tokens_per_second:>10.1f}{done.bits_per_byte:>20.3f}{mean:>9.3f}"
        )
    return "\n".join(lines)


def write_results(file: Path, measured: dict[str, tuple[Evaluation, float]], completions: list[Completion]) -> None:
    """Both tables as JSON."""
    bound = {
        name: {
            "bits_per_byte": found.nats * unit,
            "standard_error": found.standard_error * unit,
            "sketch": found.sketch * unit,
            "flow": found.flow * unit,
            "reconstruction": found.reconstruction * unit,
            "mean_level": found.mean_level,
            "path": str(found.path),
        }
        for name, (found, unit) in measured.items()
    }
    solvers = {
        done.solver: {
            "nfe": done.generation.nfe,
            "tokens_per_second": done.tokens_per_second,
            "bits_per_byte": done.bits_per_byte,
            "mean_level": done.generation.levels.sum().item() / done.generation.lengths.sum().item(),
        }
        for done in completions
    }
    file.write_text(json.dumps({"bound": bound, "solvers": solvers}, indent=2) + "\n", encoding="utf-8")
