"""One row of a table: a task, a size, a variant, a seed and a budget; trained, judged, and written as JSON."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import describe_machine
from benchmarks.ablation.data import Data
from benchmarks.ablation.samples import sampled
from benchmarks.ablation.scoring import SURE, SUREST_FIRST, WRITTEN_AT, accuracy, bound
from benchmarks.ablation.sizes import SIZES
from benchmarks.ablation.training import Plan, Trained, build, fit
from benchmarks.ablation.variants import VARIANTS
from evo import Evo
from evo.files import write_json
from evo.training import CurriculumConfig
from evo.training.curriculum import PATHS

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row is, all of it; two rows with equal settings have equal results on one machine.

    Args:
        table: what it is a row of.
        task, size, variant: names.
        seed: of weights, order and noise. Training and test examples are the same for every seed.
        budget: tokens trained on, prompts included.
        train_size: different training examples of a planning task.
        length: tokens of a sequence of text.
        samples: texts written, for another model to read.
        test_size: test examples, or sequences of test text.
        clock_values: per sequence, of the bound.
        curriculum: how it is trained, apart from what the variant says.
        label: put behind the variant's name, to tell trials apart.
    """

    table: str
    task: str
    size: str
    variant: str
    seed: int
    budget: int
    train_size: int | None = None
    length: int | None = None
    samples: int = 0
    test_size: int = 512
    clock_values: int = 2
    curriculum: CurriculumConfig = field(default_factory=lambda: CurriculumConfig(window=0.0))
    label: str = ""

    @property
    def name(self) -> str:
        """A file name that tells rows apart that one may want beside each other."""
        examples = f"-n{self.train_size}" if self.train_size else ""
        label = f"-{self.label}" if self.label else ""
        return f"{self.task}-{self.size}{examples}-b{self.budget}-{self.variant}{label}-s{self.seed}"

    def settings(self) -> dict[str, Any]:
        """As JSON values, the size spelt out."""
        return json.loads(json.dumps({**asdict(self), "size_settings": asdict(SIZES[self.size])}))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where rows are kept.

    Args:
        results: their JSON, in a folder for each table.
        scratch: weights, checkpoints, examples and encoded texts, which nobody commits.
    """

    results: Path = HERE / "results"
    scratch: Path = HERE.parent / "out" / "ablation"

    def result(self, row: Row) -> Path:
        return self.results / row.table / f"{row.name}.json"

    def weights(self, row: Row) -> Path:
        return self.scratch / row.table / row.name

    def finished(self, row: Row, judge: Row | None = None) -> dict[str, Any] | None:
        """The result of a row, if there is one with these settings, and by this judge if there is to be one."""
        judged = {} if judge is None else {"judge": judge.settings()}
        return kept(self.result(row), {"row": row.settings(), **judged})


def kept(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON object in `file`, if it is there and has these entries."""
    if not file.is_file():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))
    return known if settings.items() <= known.items() else None


def command() -> str:
    """The command that this process was started with."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def run(
    row: Row,
    data: Data,
    device: torch.device,
    *,
    judge: Row | None = None,
    places: Places | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The result of a row: the one on disk if it has these settings, else a new one. Its weights are kept too.

    `judge` is the row of the model that reads the row's samples; it is trained when it is first needed.
    """
    places = Places() if places is None else places
    known = places.finished(row, judge)
    if known is not None:
        return known
    folder, path = places.weights(row), PATHS[row.curriculum.path]
    _begin_anew_if_other(row, folder)
    begun = time.perf_counter()
    trained = fit(plan_of(row, data, device, folder / "checkpoints", progress=progress))
    model = trained.model
    model.save_pretrained(folder / "model")
    result: dict[str, Any] = {
        "row": row.settings(),
        "command": command(),
        "machine": describe_machine(device),
        "training": _training(trained, data),
        "bound": bound(model, data, path, clock_values=row.clock_values, seed=row.seed),
    }
    if data.task is not None:
        result["accuracy"] = {
            name: accuracy(model, data, plan=path, level=level, seed=row.seed) for name, level in WRITTEN_AT.items()
        }
        result["accuracy"][SUREST_FIRST] = accuracy(model, data, plan=path, level=1.0, fidelity=SURE, seed=row.seed)
    if judge is not None:
        reader = trained_model(judge, data, device, places=places, progress=progress)
        result["samples"] = sampled(model, data, path, reader, count=row.samples, seed=row.seed)
        result["judge"] = judge.settings()
    result["seconds"] = time.perf_counter() - begun
    places.result(row).parent.mkdir(parents=True, exist_ok=True)
    write_json(places.result(row), result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def trained_model(
    row: Row,
    data: Data,
    device: torch.device,
    *,
    judge: Row | None = None,
    places: Places | None = None,
    progress: bool = True,
) -> Evo:
    """The model of a row, in evaluation mode; run now if its weights are not there, and then judged as by `run`."""
    places = Places() if places is None else places
    weights = places.weights(row) / "model"
    if places.finished(row, judge) is None or not (weights / "config.json").is_file():
        places.result(row).unlink(missing_ok=True)
        run(row, data, device, judge=judge, places=places, progress=progress)
    return build(plan_of(row, data, device)).load_weights(weights)


def plan_of(
    row: Row, data: Data, device: torch.device, checkpoints: Path | None = None, *, progress: bool = True
) -> Plan:
    """How a row is trained."""
    return Plan(
        data=data,
        size=SIZES[row.size],
        variant=VARIANTS[row.variant],
        curriculum=row.curriculum,
        seed=row.seed,
        budget=row.budget,
        device=device,
        checkpoints=checkpoints,
        progress=progress,
        description=row.name,
    )


def _training(trained: Trained, data: Data) -> dict[str, Any]:
    return {
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "examples": len(data.train),
        "steps": trained.steps,
        "tokens": trained.tokens,
        "flops": trained.flops,
        "seconds": trained.seconds,
        "tokens_per_second": trained.tokens / trained.seconds,
        "losses": trained.losses,
    }


def _begin_anew_if_other(row: Row, folder: Path) -> None:
    """Checkpoints of a row of this name with other settings are no beginning of this one."""
    note = folder / "row.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != row.settings():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, row.settings())
