"""A run that is cut off, anywhere and any number of times, ends as the run left alone: bit for bit."""

import contextlib
import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from evo.training import EvaluationConfig, OptimizerConfig, Preempted, TrainConfig, Trainer, loop, train
from evo.training.checkpoint import checkpoints

OPTIMIZER = OptimizerConfig(warmup=2)


def small_run(folder: Path, name: str, **changes) -> TrainConfig:
    source = folder / "text.txt"
    if not source.exists():
        source.write_text("".join(f"line {i}: the same words again\n" for i in range(60)))
    options = {
        "data": source,
        "out": folder / name,
        "overrides": {"width": 16, "depth": 1, "heads": 1, "dropout": 0.1},
        "steps": 12,
        "batch_size": 4,
        "micro_batch": 2,
        "length": 12,
        "log_every": 2,
        "save_every": 5,
        "progress": False,
        "optimizer": OPTIMIZER,
        "evaluation": EvaluationConfig(every=6, sequences=2, clock_values=1),
    }
    return TrainConfig(**(options | changes))


def outcome(run: Path):
    """All that a run leaves, times aside: tensors of its last checkpoint, and its metrics."""
    last = checkpoints(run / "checkpoints")[-1]
    tensors = load_file(last / "rank-00000.safetensors")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for measured in ("tokens_per_second", "utilisation", "memory_bytes"):
            record.pop(measured, None)
    models = sorted(path.name for path in (run / "model").iterdir())
    return last.name, tensors, records, models


def assert_same_outcome(one: Path, other: Path):
    (name, tensors, records, models), expected = outcome(one), outcome(other)
    assert (name, records, models) == (expected[0], expected[2], expected[3])
    assert tensors.keys() == expected[1].keys()
    for key, value in tensors.items():
        assert torch.equal(value, expected[1][key]), key


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(small_run(folder, "alone"))
    return folder


@settings(max_examples=6)
@given(stops=st.lists(st.integers(1, 12), min_size=1, max_size=4), data=st.data())
def test_a_run_interrupted_between_steps_ends_as_one_left_alone(left_alone, stops, data):
    out = left_alone / "interrupted"
    shutil.rmtree(out, ignore_errors=True)
    step = loop.train_step
    for stop in stops:
        # Not even the interval of checkpoints matters: they may fall anywhere.
        config = small_run(left_alone, "interrupted", save_every=data.draw(st.integers(1, 6)))

        def stopping(config, state, *rest, stop=stop, **options):
            if state.step >= stop:
                raise KeyboardInterrupt
            return step(config, state, *rest, **options)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(loop, "train_step", stopping)
            train(config)
        # Whatever else draws from the global generator in between.
        torch.rand(7)
    train(small_run(left_alone, "interrupted"))
    last, tensors, _, models = outcome(out)
    expected = outcome(left_alone / "alone")
    assert (last, models) == (expected[0], expected[3])
    for key, value in tensors.items():
        # What else drew from the global generator is no part of the run.
        assert key.startswith("random/") or torch.equal(value, expected[1][key]), key


@pytest.fixture(scope="module")
def forks():
    """Processes forked from a server that has imported everything, so that each starts in no time."""
    context = multiprocessing.get_context("forkserver")
    # The optimizer imports dynamo at its first step.
    context.set_forkserver_preload(["evo.training", "torch._dynamo"])
    return context


def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path, forks):
    changes = {"steps": 40, "save_every": 2, "batch_size": 2, "evaluation": EvaluationConfig(every=16, sequences=2)}
    killed, alone = (small_run(tmp_path, name, **changes) for name in ("killed", "alone"))
    reference = forks.Process(target=train, args=(alone,))
    reference.start()
    chance = random.Random()
    for kill in range(6):
        before = checkpoints(killed.out / "checkpoints")
        process = forks.Process(target=train, args=(killed,))
        process.start()
        # Twice anywhere, also while it starts; then once it has come further, so that kills fall all along the run.
        while kill >= 2 and process.is_alive() and checkpoints(killed.out / "checkpoints") == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (
            "the run was over before it was killed six times: it needs more steps"
        )
    process = forks.Process(target=train, args=(killed,))
    process.start()
    process.join()
    reference.join()
    assert (process.exitcode, reference.exitcode) == (0, 0)
    assert_same_outcome(killed.out, alone.out)
    assert all(path in checkpoints(killed.out / "checkpoints") for path in (killed.out / "checkpoints").iterdir())


def test_a_run_told_to_end_or_stopped_in_an_evaluation_makes_it_up(tmp_path):
    def trainer(name, *calls):
        return Trainer(
            small_run(tmp_path, name, evaluation=EvaluationConfig(every=3, sequences=2, clock_values=1)),
            after_step=calls,
        )

    def told_at(step):
        return lambda trainer: signal.raise_signal(signal.SIGTERM) if trainer.state.step == step else None

    def stop_in_evaluation():
        run = trainer("told")
        with mock.patch.object(loop, "evaluate", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            run.run()

    trainer("alone").run()
    stop_in_evaluation()
    # Takes effect two steps later, the first time where an evaluation is due.
    for step, left in ((4, 6), (8, 10)):
        with pytest.raises(Preempted) as told:
            trainer("told", told_at(step)).run()
        assert told.value.step == left
    stop_in_evaluation()
    assert checkpoints(tmp_path / "told" / "checkpoints")[-1].name == "step-00000012"
    result = trainer("told").run()
    assert result.evaluation["step"] == 12
    assert_same_outcome(tmp_path / "told", tmp_path / "alone")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text('{"seed": '), "Expecting value"),
        (lambda file: file.write_bytes(b"\xff"), "can't decode byte"),
        (lambda file: file.write_text("[]"), "a JSON object is needed, and it holds a list"),
        (lambda file: file.unlink(), "No such file"),
    ],
)
def test_checkpoints_of_which_nothing_says_how_they_were_made_are_not_gone_on_with(tmp_path, damage, message):
    config = small_run(tmp_path, "run")
    (config.out / "checkpoints" / "step-00000005").mkdir(parents=True)
    (config.out / "config.json").write_text("{}")
    damage(config.out / "config.json")
    with pytest.raises(
        ValueError, match=rf"has checkpoints, and .*config\.json, .* cannot be read .*{message}.* put it back"
    ):
        train(config)
