"""A run that is cut off, anywhere and any number of times, ends as the run left alone: bit for bit."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from evo.training import CheckpointError, EvaluationConfig, OptimizerConfig, TrainConfig, loop, train
from evo.training.checkpoint import _verified, checkpoints, restore, save
from evo.training.state import TrainState

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
        "batch_size": 2,
        "accumulate": 2,
        "length": 12,
        "log_every": 2,
        "save_every": 5,
        "progress": False,
        "optimizer": OPTIMIZER,
        "evaluation": EvaluationConfig(every=6, sequences=2, clock_values=1),
    }
    return TrainConfig(**(options | changes))


KEPT = ("model", "ema", "optimizer", "clock", "extremes", "random")


def outcome(run: Path):
    """All that a run leaves, times aside: tensors of its last checkpoint, and its metrics."""
    last = checkpoints(run / "checkpoints")[-1]
    tensors = {path.name: load_file(path) for path in sorted(last.glob("*.safetensors"))}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_second", None)
    models = sorted(path.name for path in (run / "model").iterdir())
    return last.name, tensors, records, models


def assert_same_outcome(one: Path, other: Path):
    (name, tensors, records, models), expected = outcome(one), outcome(other)
    assert (name, records, models) == (expected[0], expected[2], expected[3])
    assert tensors.keys() == expected[1].keys() == {f"{x}.safetensors" for x in KEPT}
    for file, values in tensors.items():
        assert values.keys() == expected[1][file].keys()
        for key, value in values.items():
            assert torch.equal(value, expected[1][file][key]), (file, key)


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

        def stopping(config, state, *rest, stop=stop):
            if state.step >= stop:
                raise KeyboardInterrupt
            step(config, state, *rest)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(loop, "train_step", stopping)
            train(config)
        # Whatever else draws from the global generator in between.
        torch.rand(7)
    train(small_run(left_alone, "interrupted"))
    last, tensors, _, models = outcome(out)
    expected = outcome(left_alone / "alone")
    assert (last, models) == (expected[0], expected[3])
    for name in ("model", "ema", "optimizer"):
        for key, value in tensors[f"{name}.safetensors"].items():
            assert torch.equal(value, expected[1][f"{name}.safetensors"][key]), (name, key)


@pytest.fixture(scope="module")
def forks():
    """Processes forked from a server that has imported everything, so that each starts in no time."""
    context = multiprocessing.get_context("forkserver")
    # The optimizer imports dynamo at its first step.
    context.set_forkserver_preload(["evo.training", "torch._dynamo"])
    return context


def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path, forks):
    changes = {"steps": 40, "save_every": 2, "accumulate": 1, "evaluation": EvaluationConfig(every=16, sequences=2)}
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


# Checkpoints by themselves.


def state_after(steps: int) -> TrainState:
    torch.manual_seed(0)
    state = TrainState.begin(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), OPTIMIZER)
    for _ in range(steps):
        state.model(torch.randn(5, 3)).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.update(state.model, state.step)
        state.step += 1
    return state


def assert_same_state(one: TrainState, other: TrainState):
    assert one.step == other.step
    for mine, theirs in ((one.model, other.model), (one.ema.model, other.ema.model)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        mine, theirs = one.optimizer.state[a], other.optimizer.state[b]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_state_comes_back_and_with_it_the_random_states(tmp_path):
    written = state_after(3)
    written.skipped += 2
    written.rejected += 1
    save(tmp_path, written, corpus="text", keep=1)
    expected = torch.rand(5)
    read = state_after(0)
    restore(tmp_path, read, corpus="text")
    assert torch.equal(torch.rand(5), expected)
    assert_same_state(read, written)
    assert (int(read.skipped), int(read.rejected)) == (2, 1)


def test_nothing_there_leaves_the_state(tmp_path):
    state = state_after(1)
    restore(tmp_path / "nothing", state, corpus="text")
    assert_same_state(state, state_after(1))


def test_the_latest_are_kept(tmp_path):
    for steps in range(1, 6):
        save(tmp_path, state_after(steps), corpus="text", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    save(tmp_path, state_after(5), corpus="text", keep=2)
    assert len(list(tmp_path.iterdir())) == 2


FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "random.safetensors", "checkpoint.json"]


def flip(path: Path, place: float):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def cut(path: Path, place: float):
    os.truncate(path, int(place * path.stat().st_size))


def remove(path: Path, _: float):
    path.unlink()


@settings(max_examples=40)
@given(name=st.sampled_from(FILES), damage=st.sampled_from([flip, cut, remove]), place=st.floats(0, 0.999))
def test_a_damaged_checkpoint_is_never_read(name, damage, place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for steps in (1, 2):
        save(folder, state_after(steps), corpus="text", keep=2)
    newest = folder / "step-00000002"
    damage(newest / name, place)
    state = state_after(0)
    with pytest.warns(
        UserWarning, match=r"step-00000002.*set aside as damaged-step-00000002, going on from step-00000001"
    ):
        restore(folder, state, corpus="text")
    assert_same_state(state, state_after(1))
    # The same once more, and now it is the only one.
    damage(folder / "step-00000001" / name, place)
    untouched = state_after(0)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000001.*Delete .* to start"):
            restore(folder, untouched, corpus="text")
    assert_same_state(untouched, state_after(0))


def test_no_byte_of_what_a_checkpoint_says_of_itself_can_change(tmp_path):
    facts = save(tmp_path, state_after(1), corpus="text", keep=1) / "checkpoint.json"
    written = facts.read_bytes()
    for place in range(len(written)):
        data = bytearray(written)
        data[place] ^= 1
        facts.write_bytes(data)
        # White space may.
        with (
            pytest.raises(CheckpointError)
            if not written[place : place + 1].isspace()
            else contextlib.suppress(Exception)
        ):
            _verified(facts.parent)
    facts.write_bytes(written)
    assert _verified(facts.parent)["step"] == 1


def test_a_checkpoint_of_other_text_or_another_model_is_refused(tmp_path):
    save(tmp_path, state_after(1), corpus="text", keep=1)
    with pytest.raises(CheckpointError, match="trained on other text"):
        restore(tmp_path, state_after(0), corpus="other")
    other = TrainState.begin(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), OPTIMIZER)
    with pytest.raises(CheckpointError, match="a model of another shape"):
        restore(tmp_path, other, corpus="text")


@pytest.mark.parametrize("call", ["save_model", "save_file", "sha256", "sync", "write_json"])
def test_a_failure_while_saving_keeps_the_one_before(tmp_path, monkeypatch, call):
    save(tmp_path, state_after(1), corpus="text", keep=1)

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(f"evo.training.checkpoint.{call}", fail)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, state_after(2), corpus="text", keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    state = state_after(0)
    restore(tmp_path, state, corpus="text")
    assert_same_state(state, state_after(1))


def fill_the_disk(folder: Path):
    """Stands in for a full disk: no file of this process may grow beyond a kilobyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    try:
        save(folder, state_after(2), corpus="text", keep=1)
    except Exception:
        os._exit(3)


def test_a_full_disk_keeps_the_one_before(tmp_path, forks):
    save(tmp_path, state_after(1), corpus="text", keep=1)
    process = forks.Process(target=fill_the_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 3
    state = state_after(0)
    restore(tmp_path, state, corpus="text")
    assert_same_state(state, state_after(1))
