"""A run made of pieces: of options, of recipes, of one's own parts; and how ranks and sequences come out even."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from hypothesis import given
from hypothesis import strategies as st

from evo.cli.train import Options, defaults
from evo.training import RECIPES, OptimizerConfig, ParallelConfig, TrainConfig, Trainer, adamw, train
from evo.training.metrics import MetricsLog
from tests.training_ranks import config

SMALL = {"overrides": {"width": 16, "depth": 1, "heads": 1}, "steps": 4}
counts = st.integers(1, 12)


@given(ranks=counts, passes=counts, size=counts)
def test_sequences_that_come_out_even_are_shared_out(ranks, passes, size):
    asked = TrainConfig(data=Path(), batch_size=ranks * passes * size, micro_batch=size)
    assert asked.shares(ranks) == (passes * size, size)
    assert replace(asked, micro_batch=None).shares(ranks) == (passes * size, passes * size)
    uneven = replace(asked, batch_size=asked.batch_size + ranks * size, micro_batch=2 * size * (passes + 1))
    with pytest.raises(ValueError, match=f"batch_size {uneven.batch_size} over {ranks} data-parallel"):
        uneven.shares(ranks)


def test_the_arithmetic_of_what_does_not_come_out_even_is_shown():
    with pytest.raises(ValueError, match=r"batch_size 10 over 4 .* is 2.5 sequences each: needed is a multiple of 4"):
        TrainConfig(data=Path(), batch_size=10).shares(4)
    with pytest.raises(ValueError, match=r"is 5 sequences each, passes of micro_batch 2: needed is a multiple of 4"):
        TrainConfig(data=Path(), batch_size=10, micro_batch=2).shares(2)


@given(tensor=counts, shard=counts, more=counts, name=st.sampled_from(["replicate", "shard"]))
def test_an_elastic_run_takes_all_ranks_there_are(tensor, shard, more, name):
    asked = TrainConfig(data=Path(), elastic=name, parallel=ParallelConfig(tensor=tensor, shard=shard))
    found = asked.over(tensor * shard * more)
    assert found.world == tensor * shard * more
    assert found.tensor == tensor
    assert getattr(found, name) == getattr(asked.parallel, name) * more
    assert replace(asked, elastic="no").over(more) == asked.parallel
    if tensor * shard > 1:
        with pytest.raises(ValueError, match="do not divide"):
            asked.over(tensor * shard * more + 1)


def test_a_world_of_another_size_is_refused_with_the_arithmetic(tmp_path):
    with pytest.raises(ValueError, match=r"replicate 2 .* = 2, but the job has 1 rank"):
        train(config(tmp_path, "run", **SMALL, parallel=ParallelConfig(replicate=2)))


@pytest.mark.parametrize(("preset", "rate", "tokens"), [("S", 2e-4, 2**21), ("B", 2e-4, 2**21), ("XL", 1.5e-4, 2**22)])
def test_the_recipe_is_that_of_the_paper(preset, rate, tokens):
    asked = RECIPES["paper"](Path("data"), preset)
    assert asked.batch_size * asked.length == tokens
    assert asked.length == 4096
    assert asked.steps * tokens == pytest.approx(3.4e12, rel=1e-5)
    expected = OptimizerConfig(
        learning_rate=rate, warmup=3000, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=1.0, ema=0.9999
    )
    assert asked.optimizer == expected
    assert (asked.overrides["dropout"], asked.curriculum.label_smoothing, asked.precision) == (0.1, 0.1, "bf16")


def test_a_recipe_sets_what_is_not_given():
    assert defaults(["--recipe", "paper", "--preset", "XL"]).optimizer.learning_rate == 1.5e-4
    assert defaults(["--recipe=paper"]).preset == "S"
    assert defaults(["--steps", "3"]).batch_size == TrainConfig(data=Path()).batch_size


def test_options_of_the_model_are_of_their_kinds_on_the_command_line():
    arguments = ["--data", "x", "--overrides", "depth", "4", "dropout", "0.1", "self_conditioning", "True"]
    found = tyro.cli(Options, args=arguments, default=defaults(arguments)).overrides
    assert found == {"depth": 4, "dropout": 0.1, "self_conditioning": True}


def test_pieces_may_be_ones_own(tmp_path):
    seen, made = [], []

    def optimizer(model, options):
        made.append(model)
        return adamw(model, replace(options, weight_decay=0.0))

    asked = config(tmp_path, "run", **SMALL)
    trainer = Trainer(
        asked,
        optimizer=optimizer,
        rate=lambda step: 0.0,
        after_step=[lambda each: seen.append(each.state.step)],
    )
    before = [parameter.detach().clone() for parameter in trainer.state.model.parameters()]
    trainer.run()
    assert seen == [1, 2, 3, 4]
    assert made == [trainer.state.model]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.state.model.parameters(), strict=True))
    assert trainer.log.latest["train"]["learning_rate"] == 0.0


def test_figures_for_tensorboard(tmp_path, monkeypatch):
    written, opened = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with MetricsLog(tmp_path / "metrics.jsonl", upto=4, tensorboard=tmp_path / "board") as log:
        log.write("train", 5, loss=1.5, level_histogram=[0.25, 0.75], utilisation=None)
        log.write("evaluation", 5, levels={"0": {"bits": 2.0, "path": "early_stop"}})
    assert opened == [(str(tmp_path / "board"), 5), "closed"]
    assert written == [
        ("train/loss", 1.5, 5),
        ("train/level_histogram/0", 0.25, 5),
        ("train/level_histogram/1", 0.75, 5),
        ("evaluation/levels/0/bits", 2.0, 5),
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_tensorboard_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'evo-lm\[tensorboard\]'"):
        MetricsLog(tmp_path / "metrics.jsonl", upto=0, tensorboard=tmp_path)


def test_ranks_but_the_first_write_nothing(tmp_path):
    with MetricsLog(None, upto=0, tensorboard=tmp_path / "board") as log:
        log.write("train", 1, loss=1.0)
        log.sync()
    assert log.latest["train"]["loss"] == 1.0
    assert not list(tmp_path.iterdir())


def test_how_a_run_is_cut_is_no_other_run(tmp_path):
    first = train(config(tmp_path, "run", **SMALL))
    again = train(config(tmp_path, "run", **SMALL, micro_batch=2, timeout=5.0, elastic="shard"))
    assert again.evaluation == first.evaluation
    known = json.loads((tmp_path / "run" / "config.json").read_text())
    assert known["micro_batch"] == 2
    assert known["parallel"]["shard"] == 1
