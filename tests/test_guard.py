"""What a run watches for: samples that spoil it, and being told to end."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import signal
import socket
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo import Evo
from evo.data import open_corpus
from evo.training import PREEMPTED, Preempted, TrainConfig, Trainer, export_average, train
from evo.training.checkpoint import checkpoints
from evo.training.guard import Delayed, FolderLock, Suspects, Termination, Watch
from tests.training_ranks import config


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=10))
def test_a_delayed_number_is_that_of_the_step_before(values):
    delayed = Delayed()
    found = [delayed.exchange(torch.tensor(value, dtype=torch.float64)) for value in values]
    assert found == [0.0, *values[:-1]]


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 5))), max_size=10))
def test_suspects_are_those_of_the_latest_step_that_was_left_out(steps):
    suspects, expected = Suspects(6, torch.device("cpu")), (-1, [])
    for step, (finite, rows) in enumerate(steps):
        unsound = torch.zeros(6, dtype=torch.bool)
        unsound[list(rows)] = True
        suspects.note(step, torch.tensor(finite), unsound)
        if not finite:
            expected = step, sorted(rows)
    assert suspects.read() == expected


def test_sigterm_is_noted_and_then_means_what_it_meant():
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination:
        assert not termination.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_a_thread_nobody_listens():
    found = []

    def work():
        with Termination() as termination:
            found.append(termination.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_one_process_has_nobody_to_watch():
    threads = threading.active_count()
    with Watch(0.001) as watch:
        watch.at("somewhere")
        assert threading.active_count() == threads


def small(folder, **changes) -> TrainConfig:
    return config(folder, "run", **{"steps": 8, "overrides": {"width": 16, "depth": 1, "heads": 1}, **changes})


def test_a_run_told_to_end_saves_leaves_with_its_status_and_goes_on(tmp_path):
    def tell(trainer: Trainer) -> None:
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match=r"told to end after step . of 8; it is saved") as told:
        Trainer(small(tmp_path), after_step=[tell]).run()
    assert told.value.code == PREEMPTED == 75
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")][-1] == f"step-{told.value.step:08d}"
    assert train(small(tmp_path)).steps == 8


def test_a_folder_in_which_a_run_goes_on_is_refused_to_another_process(tmp_path):
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    with lock.open("w") as other:
        other.write("process 7 of there")
        other.flush()
        # The lock belongs to who opened the file: as good as another process.
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            BlockingIOError, match=r"another run is going on in .*run \(process 7 of there\): .* or give another --out"
        ):
            Trainer(small(tmp_path))
        assert not (lock.parent / "data").exists()
    seen = []

    def other_process(trainer: Trainer) -> None:
        with lock.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(lock.read_text())
        if trainer.state.step == 6:
            raise KeyboardInterrupt

    earlier = FolderLock.of(lock.parent)
    trainer = Trainer(small(tmp_path), after_step=[other_process])
    del earlier
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert set(seen) == {f"process {os.getpid()} of {socket.gethostname()}"}
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert Trainer(small(tmp_path)).run().steps == 8


def test_where_files_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert FolderLock.of(tmp_path / "run") is FolderLock.of(tmp_path / "run")


def test_a_trainer_that_was_interrupted_says_how_to_go_on(tmp_path):
    def interrupt(trainer: Trainer) -> None:
        if trainer.state.step == 6:
            raise KeyboardInterrupt

    trainer = Trainer(small(tmp_path), after_step=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    with pytest.raises(RuntimeError, match=r"was left at step 6 of 8, .*: make a new Trainer of the same options"):
        trainer.run()
    again = Trainer(small(tmp_path))
    assert again.state.step == 5
    assert again.run().steps == again.run().steps == 8


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1e-3])
def test_a_rate_that_is_none_is_refused_before_it_spoils_a_weight(tmp_path, rate):
    trainer = Trainer(small(tmp_path), rate=lambda step: rate if step == 2 else 1e-3)
    with pytest.raises(ValueError, match=rf"the rate of step 2 is {rate}; needed: a finite learning rate, 0 or more"):
        trainer.run()
    assert trainer.state.step == 2
    assert all(parameter.isfinite().all() for parameter in trainer.state.model.parameters())


def test_weights_that_are_spoilt_become_no_model(tmp_path):
    trainer = Trainer(small(tmp_path), rate=lambda step: 1e30 if step == 6 else 1e-3)
    with pytest.raises(FloatingPointError, match=r"spoilt after step 8, .* 1 steps were left out"):
        trainer.run()
    assert not (tmp_path / "run" / "model").exists()


def test_weights_that_are_no_numbers_are_not_exported(tmp_path):
    def spoil(trainer: Trainer) -> None:
        with torch.no_grad():
            next(trainer.state.ema.model.parameters()).fill_(math.nan)

    with pytest.raises(FloatingPointError, match="spoilt"):
        Trainer(small(tmp_path), after_step=[spoil]).run()
    with pytest.raises(FloatingPointError, match=r"step-00000008 are not numbers .*take an earlier checkpoint"):
        export_average(tmp_path / "run" / "checkpoints", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_samples_that_spoil_a_step_are_named(tmp_path):
    asked = small(tmp_path, optimizer=replace(small(tmp_path).optimizer, patience=1))
    (asked.data / "100.txt").write_text("what no model reads: \x07 and more of it")
    (asked.data / "101.txt").write_text("held out or not: \x07 once more")

    def spoil(module, arguments, output):
        bad = (arguments[0] == 7).any(1, keepdim=True)
        return replace(
            output,
            loss=output.loss * (math.nan if bad.any() else 1),
            sketch_bits=torch.where(bad, math.nan, output.sketch_bits),
        )

    model = Evo.from_preset("tiny", vocab_size=259, **asked.overrides)
    model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="for 1 steps in a row, up to step") as ended:
        train(replace(asked, steps=200), model)
    said = str(ended.value)
    step = int(re.search(r"in step (\d+) the bound was not finite of row", said)[1])
    rows = {int(row) for row in re.findall(r"row (\d+), which is document", said)}
    corpus = open_corpus(asked.data, asked.out / "data", asked.corpus)
    tokens = corpus.batch(asked.seed, step, range(8), 8, asked.length).tokens
    assert rows == set((tokens == 7).any(1).nonzero().flatten().tolist())
    named = [(int(n), int(a), int(b)) for n, a, b in re.findall(r"document (\d+) \(tokens (\d+) to (\d+)\)", said)]
    starts = [0, *(end for ends in corpus.train.all_ends() for end in ends.tolist())]
    assert any(7 in corpus.train.read(starts[n] + a, starts[n] + b + 1) for n, a, b in named)


def test_every_token_is_in_its_document(tmp_path):
    asked = small(tmp_path)
    shards = open_corpus(asked.data, tmp_path / "cache", asked.corpus, shard_bytes=300).train
    assert len(shards.shards) > 1
    begin = 0
    for number, end in enumerate(end for ends in shards.all_ends() for end in ends.tolist()):
        assert {shards.document(place) for place in range(begin, end)} == {(number, begin)}
        begin = end
    with pytest.raises(IndexError):
        shards.document(shards.tokens)
