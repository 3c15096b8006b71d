"""Pieces of one's own in a run: models composed by hand, any optimizer, data that score a part, and what does not fit."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evo import Evo
from evo.core import LatentSpace, Objective, Transformer
from evo.data import Packed, write_shards
from evo.schedules import Cosine, Shifted
from evo.training import (
    Checkpointer,
    CheckpointError,
    Ema,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    Trainer,
    learning_rate,
    train,
)
from evo.training.optimizer import step_if
from evo.training.state import TrainState
from tests.checkpoint_cases import OPTIMIZER, small_evo
from tests.data_cases import LETTERS
from tests.test_composition import tied

LENGTH = 8


@dataclass(frozen=True)
class Answers:
    """Rows of seven words: a question of three tokens, which is not scored, an answer, and padding of which the model knows nothing."""

    fingerprint: str = "answers"
    vocabulary: int = 7
    masked: int = 3
    held_out: int = 2

    def rows(self, rows, length) -> Packed:
        tokens = torch.tensor(
            [[(row * 3 + at) % self.vocabulary for at in range(length)] for row in rows], dtype=torch.int64
        )
        tokens = tokens.reshape(len(rows), length)
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        mask[:, : self.masked] = False
        mask[::2, -2:] = False
        return Packed(tokens=tokens, documents=torch.zeros_like(tokens), loss_mask=mask)

    def batch(self, seed, step, rows, total, length) -> Packed:
        return self.rows([step * total + row for row in rows], length)

    def held_out_batch(self, count, length) -> Packed:
        return self.rows(range(min(count, self.held_out)), length)

    def text_bytes(self, tokens, *, held_out=False) -> float:
        return float(tokens.numel())

    def describe(self, seed, step, row, total, length) -> str:
        return f"row {row}"


def config(folder, **changes) -> TrainConfig:
    base = TrainConfig(
        out=folder / "run",
        overrides={"width": 16, "depth": 1, "heads": 1, "context": 16},
        steps=3,
        batch_size=4,
        length=LENGTH,
        log_every=1,
        progress=False,
        peak_tflops=1.0,
        optimizer=OptimizerConfig(warmup=1),
        evaluation=EvaluationConfig(sequences=2, clock_values=1),
    )
    return replace(base, **changes)


def lines(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def by_hand(schedule=None) -> Evo:
    torch.manual_seed(0)
    return Evo(latent_space=LatentSpace(7, 8), backbone=Transformer(8, 16, 1, 1, positions=17), schedule=schedule)


# Models composed by hand.


def test_a_model_composed_by_hand_with_shared_tensors_is_trained_saved_and_gone_on_with(tmp_path):
    result = Trainer(config(tmp_path), model=tied(), data=Answers()).run()
    loaded = tied().load_weights(tmp_path / "run" / "model")
    assert torch.equal(loaded.latent_space.weight, result.model.latent_space.weight)
    assert loaded.timestep_head.readout is loaded.readout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["preset"] == "none, the model was given"
    assert Trainer(config(tmp_path), model=tied(), data=Answers()).run().steps == 3
    with pytest.raises(ValueError, match="preset was 'none, the model was given' and is now 'tiny'"):
        Trainer(config(tmp_path), data=Answers())


def test_a_run_does_not_go_on_with_another_composition(tmp_path):
    Trainer(config(tmp_path), model=by_hand(), data=Answers()).run()
    message = r"composed otherwise: schedule is evo.Cosine\(t_min=0.1\) there and evo.Shifted"
    with pytest.raises(CheckpointError, match=message):
        Trainer(config(tmp_path), model=by_hand(Shifted(Cosine(), 1.0)), data=Answers())


def test_a_schedule_that_was_exchanged_is_in_the_model_of_the_run(tmp_path):
    model = Evo.from_preset("tiny", vocab_size=7, **config(tmp_path).overrides)
    model.schedule = Shifted(Cosine(), -2.0)
    Trainer(config(tmp_path), model=model, data=Answers()).run()
    assert Evo.from_pretrained(tmp_path / "run" / "model").schedule.config() == model.schedule.config()


class Plain(nn.Module):
    """A backbone that is no Transformer and has no blocks."""

    dim, width, positions, self_conditioned = 8, 16, 17, False

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 16)

    def forward(self, latents, level, **options):
        return self.map(latents)


def test_a_backbone_needs_no_blocks_where_nothing_is_done_to_them(tmp_path):
    def model():
        return Evo(latent_space=LatentSpace(7, 8), backbone=Plain())

    assert Trainer(config(tmp_path), model=model(), data=Answers()).run().steps == 3
    with pytest.raises(ValueError, match=r"Plain has no `blocks`, an nn.ModuleList, and .*recompute='full'"):
        Trainer(config(tmp_path, parallel=ParallelConfig(recompute="full")), model=model(), data=Answers())


# What is averaged, and the optimizer.


def test_the_average_has_the_latest_buffers():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    ema = Ema(model, 0.9)
    for step in range(3):
        model(torch.randn(5, 2) + 3)
        ema.update(model, step)
    for mine, buffer in zip(ema.model.buffers(), model.buffers(), strict=True):
        assert torch.equal(mine, buffer)
    assert ema.model[0].num_batches_tracked == 3


OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(left_out=st.lists(st.booleans(), min_size=1, max_size=5))
def test_any_optimizer_leaves_a_step_out(name, left_out):
    def run(rejected):
        weight = nn.Parameter(torch.ones(3))
        optimizer = OPTIMIZERS[name]([weight])
        for index, bad in enumerate([*left_out, False]):
            if bad and not rejected:
                continue
            weight.grad = torch.full((3,), math.nan) if bad else weight.detach() * (index + 1)
            step_if(optimizer, torch.tensor(not bad))
        state = optimizer.state[weight].items()
        return [weight.detach(), *(each for _, each in sorted(state))]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_a_run_with_an_optimizer_that_is_not_fused_goes_on_as_one_left_alone(tmp_path):
    def trainer(folder, steps):
        return Trainer(
            config(folder, steps=5, save_every=2),
            model=by_hand(),
            data=Answers(),
            optimizer=lambda model, options: torch.optim.RMSprop(model.parameters(), options.learning_rate),
            after_step=[lambda each: [] if each.state.step < steps else stop()],
        )

    def stop():
        raise KeyboardInterrupt

    (tmp_path / "alone").mkdir()
    alone = trainer(tmp_path / "alone", 9).run().model
    cut = trainer(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    # The third step had been made, and is made again from what was saved after the second.
    again = trainer(tmp_path, 9)
    assert again.state.step == 2
    again = again.run().model
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), again.parameters(), strict=True))


def test_an_optimizer_that_keeps_what_no_tensor_holds_is_told():
    state = TrainState.begin(nn.Linear(2, 1), OPTIMIZER)
    state.optimizer.state[state.model.weight]["step"] = 3
    with pytest.raises(TypeError, match="AdamW keeps 'step' of a parameter as int"):
        state.tensors()


@given(step=st.integers(0, 1000), steps=st.integers(3, 200))
def test_behind_the_last_step_the_rate_stays_at_its_floor(step, steps):
    asked = OptimizerConfig(warmup=1)
    last = learning_rate(asked, steps - 1, steps)
    assert learning_rate(asked, steps - 1 + step, steps) == pytest.approx(last)


# What is scored.


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_a_row_ends_with_its_last_scored_token(masks):
    mask = torch.tensor(masks)
    packed = Packed(
        tokens=torch.zeros(mask.shape, dtype=torch.int64), documents=torch.zeros(mask.shape).long(), loss_mask=mask
    )
    assert packed.lengths.tolist() == [max([1, *(at + 1 for at in range(6) if row[at])]) for row in masks]


def test_what_is_not_scored_is_read_and_not_learned(tmp_path, monkeypatch):
    given_to, forward = [], Evo.forward

    def seen(self, tokens, loss_mask=None, *rest, **options):
        out = forward(self, tokens, loss_mask, *rest, **options)
        if self.training:
            given_to.append((loss_mask, options["lengths"], options["part"].scored, options["suffix_length"]))
        return out

    monkeypatch.setattr(Evo, "forward", seen)
    trainer = Trainer(config(tmp_path), data=Answers())
    trainer.run()
    for mask, lengths, scored, suffix in given_to:
        assert not mask[:, :3].any()
        assert lengths[::2].max() <= LENGTH - 2
        ends = (torch.arange(LENGTH) < (lengths - suffix)[:, None]) & mask
        assert scored == ends.sum()
    # Bits a token are those of the answers: of a hundred per question, none is among them.
    for line in lines(tmp_path):
        if line["kind"] == "train":
            assert line["bits_per_token"] == pytest.approx(line["bits_per_byte"])


# What does not fit.


class Wrong(Answers):
    """Data in which one thing is not as it should be."""

    def __init__(self, **changes) -> None:
        super().__init__()
        object.__setattr__(self, "changes", changes)

    def rows(self, rows, length) -> Packed:
        found = super().rows(rows, length)
        return Packed(
            **{**vars(found), **{name: change(getattr(found, name)) for name, change in self.changes.items()}}
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Answers(vocabulary=9), "the data have a vocabulary of 9, the model has 7 entries"),
        (Answers(held_out=0), r"tokens of a batch has shape \(0, 8\) beside .* with at least one row"),
        (Wrong(documents=lambda _: None), "documents of a batch is NoneType; a tensor"),
        (
            Wrong(documents=lambda given: given[:, 1:]),
            r"documents of a batch has shape \(2, 7\) beside tokens \(2, 8\)",
        ),
        (Wrong(loss_mask=lambda given: given.long()), "loss_mask of a batch is torch.int64"),
        (
            Wrong(**dict.fromkeys(("tokens", "documents", "loss_mask"), lambda given: given[:, 1:])),
            r"shape \(2, 7\); needed: 1 to 2 rows of 8",
        ),
    ],
)
def test_data_that_do_not_fit_are_told_before_a_run_begins(tmp_path, data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Trainer(config(tmp_path), model=by_hand(), data=data)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_is_none_is_told_where_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(Answers, "batch", lambda self, seed, step, rows, total, length: self.rows(rows[:1], length))
    with pytest.raises(ValueError, match=r"a batch of shape \(1, 8\); needed: 4 rows of 8 tokens"):
        Trainer(config(tmp_path), model=by_hand(), data=Answers()).run()


def test_sequences_beyond_the_context_and_runs_without_data_are_told(tmp_path):
    with pytest.raises(ValueError, match="length is 17, the model's context 16"):
        Trainer(config(tmp_path, length=17), model=by_hand(), data=Answers())
    with pytest.raises(ValueError, match="there is no data: name a file or folder"):
        train(config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_an_objective_of_ones_own_is_what_steps_ask(tmp_path):
    asked = []

    def objective(step, clock, extremes):
        asked.append(step)
        return Objective(aux_weight=0.25, clock=clock, extremes=extremes)

    Trainer(config(tmp_path), data=Answers(), objective=objective).run()
    assert asked == [0, 0, 1, 1, 2, 2]  # once for the step, once for its line of figures
    assert {line["auxiliary_weight"] for line in lines(tmp_path) if line["kind"] == "train"} == {0.25}


def test_folders_may_be_text(tmp_path):
    asked = TrainConfig(data=f"{tmp_path}/x.txt", out=f"{tmp_path}/y")
    assert (asked.data, asked.out) == (tmp_path / "x.txt", tmp_path / "y")
    with Checkpointer(str(tmp_path / "kept"), keep=1) as checkpointer:
        checkpointer.save(TrainState.begin(small_evo(), OPTIMIZER), corpus="text")
    assert write_shards(["abc"], LETTERS, str(tmp_path / "shards")).folder == tmp_path / "shards"
    for keep in (0, -1):
        with pytest.raises(ValueError, match=f"keep is {keep}; needed: 1 or more"):
            Checkpointer(tmp_path, keep=keep)
