"""From text on disk to a trained model, two tables, a picture and a page."""

from __future__ import annotations

import json
import math
import re
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evo.core import Evo, Generation, evaluate
from evo.data import Corpus, CorpusConfig, open_corpus
from evo.demo.config import DemoConfig
from evo.demo.page import write_page
from evo.demo.picture import draw_levels
from evo.files import write_json
from evo.heads import EntropyTimestep
from evo.schedules import Path as LevelPath
from evo.schedules import early_stop
from evo.solvers import Euler, Exponential, Heun, Solver, TorchDiffEq
from evo.text import BOS, EOS, ByteTokenizer
from evo.training import (
    CurriculumConfig,
    EvaluationConfig,
    OptimizerConfig,
    TrainConfig,
    train,
)
from evo.training.precision import pick_device

LENGTH, BATCH, MAX_STEPS = 256, 4, 20
PATH: LevelPath = early_stop
# Of the standard library, what is not a test or a program of its own.
EXCLUDED = ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo")


def main(config: DemoConfig) -> None:
    """Run the whole demonstration.

    Raises:
        FileNotFoundError, ValueError: for data that is not there or too little, or an `out` that holds another run.
    """
    model, plan = trained(config)
    corpus = open_corpus(plan.data, config.out / "data", plan.corpus)
    measured = measure_bound(model, corpus, config)
    print(bound_table(measured), end="\n\n", flush=True)
    prompt = functions(corpus, config.prompts, LENGTH // 2)
    completions = complete(model, prompt, config)
    print(solver_table(completions), end="\n\n", flush=True)
    # Of the two kinds of levels, those that leave more to see.
    shown = max((done for done in completions if done.solver == "Euler"), key=lambda done: done.mean_level).generation
    draw_levels(config.out / "levels.png", shown)
    write_page(config.out / "levels.html", prompt, shown)
    write_json(config.out / "results.json", results(measured, completions))
    print(f"wrote {config.out / 'levels.png'}, {config.out / 'levels.html'} and {config.out / 'results.json'}")
    print(f'now try: evo generate --model {config.out / "model"} "def "')


def trained(config: DemoConfig) -> tuple[Evo, TrainConfig]:
    """The model, on the CPU, and the run it comes from: the one in `out`, gone on with if it was cut off, or a new one."""
    known = config.out / "config.json"
    device = pick_device("auto")
    if known.is_file():
        steps = config.steps or int(json.loads(known.read_text(encoding="utf-8"))["steps"])
        print(f"going on with the run of {steps} steps in {config.out}; delete it to train anew", flush=True)
    else:
        if device.type == "cpu":
            pick_threads(config.preset)
        steps = config.steps or max(100, int(60 * config.minutes / seconds_per_step(config.preset, device)))
    plan = training_plan(config, steps)
    begun = time.perf_counter()
    print(f"training {plan.preset!r} for {plan.steps} steps on {plan.data}", flush=True)
    model = train(plan).model.cpu()
    print(f"trained in {(time.perf_counter() - begun) / 60:.1f} minutes; the model is in {config.out / 'model'}\n")
    return model, plan


def training_plan(config: DemoConfig, steps: int) -> TrainConfig:
    """The training run of so many steps."""
    return TrainConfig(
        data=Path(sysconfig.get_paths()["stdlib"]) if config.data is None else config.data,
        out=config.out,
        preset=config.preset,
        steps=steps,
        batch_size=BATCH,
        length=LENGTH,
        seed=config.seed,
        corpus=CorpusConfig(suffixes=(".py",), exclude=EXCLUDED) if config.data is None else CorpusConfig(),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=50),
        # Prompts are read in full as any causal model reads them; most of a short run goes into whole windows.
        curriculum=CurriculumConfig(window=0.25),
        # The demonstration measures the bound itself, when training is done.
        evaluation=EvaluationConfig(every=10**9, sequences=16, clock_values=4),
    )


def pick_threads(preset: str) -> None:
    """Use one thread where that is faster than all: on few cores that others use too, threads mostly wait for each other."""
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    together = seconds_per_step(preset, cpu, timed=3)
    torch.set_num_threads(1)
    if threads > 1 and together < seconds_per_step(preset, cpu, timed=3):
        torch.set_num_threads(threads)


def seconds_per_step(preset: str, device: torch.device, warm_up: int = 2, timed: int = 12) -> float:
    """How long one training step takes on a device, from a few of a model that is thrown away."""
    model = Evo.from_preset(preset, vocab_size=ByteTokenizer.vocab_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 256, (BATCH, LENGTH), device=device)
    begun = time.perf_counter()
    for step in range(warm_up + timed):
        if step == warm_up:
            begun = time.perf_counter()
        out = model(tokens)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.loss.item()  # waits for the device
    return (time.perf_counter() - begun) / timed


def measure_bound(model: Evo, corpus: Corpus, config: DemoConfig) -> dict[str, dict[str, Any]]:
    """The held-out bound at each kind of level, in bits per byte."""
    held_out = corpus.held_out_batch(config.sequences, LENGTH)
    measured = {}
    for name, levels in (("t = 0", 0.0), ("t = 1/2", 0.5), ("t = 1", 1.0), ("learned t", None)):
        found = evaluate(
            model,
            held_out.tokens,
            levels,
            documents=held_out.documents,
            path=PATH,
            snap=1 / MAX_STEPS,
            generator=torch.Generator().manual_seed(config.seed),
            description=f"bound at {name}",
        )
        measured[name] = found.bits_per(corpus.held_out.text_bytes(held_out.tokens))
    return measured


def bound_table(measured: dict[str, dict[str, Any]]) -> str:
    """The bound at each kind of level."""
    columns = {
        "bits": "bound",
        "standard_error": "± s.e.",
        "sketch": "sketch",
        "flow": "flow",
        "reconstruction": "reconstr.",
        "mean_level": "mean t",
    }
    lines = [
        f"held-out bound in bits per byte, path {PATH}",
        f"{'levels':<12}" + "".join(f"{title:>11}" for title in columns.values()),
    ]
    for name, figures in measured.items():
        lines.append(f"{name:<12}" + "".join(f"{figures[column]:11.3f}" for column in columns))
    return "\n".join(lines)


def functions(corpus: Corpus, count: int, length: int) -> Tensor:
    """The beginnings of at most `count` held-out functions, (B, P): a `def` line and what stands before it, P bytes in all.

    Text in which nothing is defined gives plain excerpts.

    Raises:
        ValueError: for held-out text of no more than P bytes.
    """
    # Between files stand BOS and EOS; here a new line does as well.
    ids = corpus.held_out.read(0, corpus.held_out.tokens)
    text = np.where(ids < BOS, ids, ord("\n")).astype(np.uint8).tobytes()
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
    levels: str
    generation: Generation
    tokens_per_second: float
    bits_per_byte: float

    @property
    def mean_level(self) -> float:
        """Of the tokens written."""
        return self.generation.levels.sum().item() / self.generation.lengths.sum().item()


def complete(model: Evo, prompt: Tensor, config: DemoConfig) -> list[Completion]:
    """The same completions with every solver: same weights, same seed, at learned levels and at those of the entropy heuristic.

    After minutes of training the causal half is far ahead of the flow, and a head that knows it may refine nothing; where the levels
    follow the entropy of the context, as the paper's baseline has it, there is always something for a solver to do.
    """
    solvers: dict[str, Solver] = {
        "Euler": Euler(),
        "Heun": Heun(),
        "Exponential": Exponential(schedule=model.schedule),
        "dopri5": TorchDiffEq("dopri5", rtol=1e-2, atol=1e-2),
    }
    heads = {"learned": model.timestep_head, "entropy": EntropyTimestep()}
    runs = [(name, solver, levels, head) for levels, head in heads.items() for name, solver in solvers.items()]
    completions = []
    for name, solver, levels, head in tqdm(runs, desc="completing", unit="run", disable=None, leave=False):
        begun = time.perf_counter()
        written = model.generate(
            prompt,
            config.new_tokens,
            solver=solver,
            plan=PATH,
            timestep_head=head,
            max_steps=MAX_STEPS,
            # Sharper sampling makes a model this young write blanks and nothing else.
            top_p=0.95,
            temperature=1.0,
            stop=EOS,
            generator=torch.Generator().manual_seed(config.seed),
            trajectory=True,
        )
        seconds = time.perf_counter() - begun
        completions.append(
            Completion(
                solver=name,
                levels=levels,
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
        f"{'levels':<10}{'solver':<14}{'nfe':>6}{'tokens/s':>10}{'bits/byte at t = 0':>20}{'mean t':>9}",
    ]
    for done in completions:
        lines.append(
            f"{done.levels:<10}{done.solver:<14}{done.generation.nfe:>6}{done.tokens_per_second:>10.1f}{done.bits_per_byte:>20.3f}{done.mean_level:>9.3f}"
        )
    return "\n".join(lines)


def results(measured: dict[str, dict[str, Any]], completions: list[Completion]) -> dict[str, Any]:
    """Both tables as JSON values."""
    solvers = [
        {
            "levels": done.levels,
            "solver": done.solver,
            "nfe": done.generation.nfe,
            "tokens_per_second": done.tokens_per_second,
            "bits_per_byte": done.bits_per_byte,
            "mean_level": done.mean_level,
        }
        for done in completions
    ]
    return {"bound": measured, "solvers": solvers}
