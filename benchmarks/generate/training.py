"""What is timed has to be trained: a model of bytes, and an autoregressive one, trained apart, that judges what is written.

The model begins as an autoregressive one, which a token teaches most cheaply, and goes on as `evo train` does it, with parallel sketches.
Both go on where they were cut off.

T bytes of a text.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.ablation.corpora import CORPORA, Text
from benchmarks.ablation.data import Data
from benchmarks.ablation.sizes import Size
from benchmarks.ablation.training import Plan, fit
from benchmarks.ablation.variants import Phase, Variant
from evo import Evo
from evo.training import CurriculumConfig, OptimizerConfig, TrainConfig, train

VOCABULARY = 259
"""Bytes, BOS, EOS, PAD: what `evo train` reads a text as."""

JUDGE_SEED = 1000
# Room for a thousand new tokens, of however many training had; and no bias for every entry, which could not be exported.
_AUTOREGRESSION = Variant(
    about="t ≡ 0",
    build=lambda config: replace(config, context=2048, readout_bias=False).build(),
    phases=(Phase(levels=0.0),),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model and its judge are trained.

    Attributes:
        corpus: a text of `benchmarks.ablation.corpora`.
        width, depth: of the model; heads have 64 dimensions.
        budget: tokens that the model sees, a share `first` of them at level 0.
        judge_width, judge_depth, judge_budget: of the judge.
        sequences: of a step.
        length: tokens of a sequence.
        parallel: share of sequences sketched in parallel, as `CurriculumConfig` has it: rounded down among those that explore and
            among the others, so that .5 of 4 sequences is one or two.
        seed: of the model.
    """

    corpus: str = "shakespeare"
    width: int = 256
    depth: int = 5
    budget: int = 650_000
    first: float = 0.6
    judge_width: int = 192
    judge_depth: int = 4
    judge_budget: int = 1_200_000
    sequences: int = 4
    length: int = 288
    parallel: float = 0.5
    seed: int = 0

    @property
    def name(self) -> str:
        """A folder name that tells recipes apart."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.corpus}-{self.width}x{self.depth}-{digest}"


def text_of(recipe: Recipe) -> Text:
    """Bytes to train on, and bytes that neither model sees. Raises `Absent` where they are not there."""
    return CORPORA[recipe.corpus].text()


def trained_model(recipe: Recipe, folder: Path, device: torch.device) -> Evo:
    """The model, in evaluation mode: the one in `folder`, or a new one."""
    done = folder / "run" / "model"
    if not (done / "config.json").is_file():
        first = _autoregressive(
            recipe,
            Size(
                width=recipe.width,
                depth=recipe.depth,
                heads=max(1, recipe.width // 64),
                learning_rate=1.5e-3 * (256 / recipe.width) ** 0.5,
                warmup=50,
                step_tokens=recipe.sequences * recipe.length,
            ),
            budget=round(recipe.first * recipe.budget),
            seed=recipe.seed,
            folder=folder / "first",
            device=device,
        )
        train(_second(recipe, folder, device), model=first.train())
    return Evo.from_pretrained(done).to(device)


def trained_judge(recipe: Recipe, folder: Path, device: torch.device) -> Evo:
    """The judge, in evaluation mode: the one in `folder`, or a new one. It shares nothing with the model but the text."""
    size = Size(
        width=recipe.judge_width,
        depth=recipe.judge_depth,
        heads=max(1, recipe.judge_width // 64),
        learning_rate=2e-3,
        warmup=50,
        step_tokens=recipe.sequences * recipe.length,
    )
    return _autoregressive(
        recipe, size, budget=recipe.judge_budget, seed=JUDGE_SEED, folder=folder / "judge", device=device
    )


def _autoregressive(recipe: Recipe, size: Size, *, budget: int, seed: int, folder: Path, device: torch.device) -> Evo:
    done = folder / "model"
    if not (done / "config.json").is_file():
        text = text_of(recipe)
        train_bytes, test_bytes = (
            torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (text.train, text.test)
        )
        data = Data(
            vocab_size=VOCABULARY,
            length=recipe.length,
            prompt_length=0,
            train=train_bytes,
            test=test_bytes[None].long(),
        )
        plan = Plan(
            data=data,
            size=size,
            variant=_AUTOREGRESSION,
            curriculum=CurriculumConfig(),
            seed=seed,
            budget=budget,
            device=device,
            checkpoints=folder / "checkpoints",
            description=folder.name,
            save_seconds=120.0,
        )
        fit(plan).model.save_pretrained(done)
    return Evo.from_pretrained(done).to(device)


def _second(recipe: Recipe, folder: Path, device: torch.device) -> TrainConfig:
    text = folder / "text.txt"
    if not text.is_file():
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_bytes(text_of(recipe).train)
    return TrainConfig(
        data=text,
        out=folder / "run",
        steps=max(1, round((1 - recipe.first) * recipe.budget / (recipe.sequences * recipe.length))),
        batch_size=recipe.sequences,
        length=recipe.length,
        seed=recipe.seed,
        device=str(device),
        save_every=50,
        keep=1,
        optimizer=OptimizerConfig(learning_rate=1e-3 * (256 / recipe.width) ** 0.5, warmup=20, ema=0.999),
        curriculum=CurriculumConfig(parallel=recipe.parallel),
    )
