"""Checkpoints of one process: whole or not there, read only if undamaged, and nothing in them is executed."""

import json
import pickle
import shutil
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from evo import Evo
from evo.cli import main
from evo.training import Checkpointer, CheckpointError, SaveError, averaged_model, checkpoint
from evo.training.checkpoint import checkpoints
from evo.training.manifest import Manifest
from evo.training.state import TrainState
from tests.checkpoint_cases import DAMAGES, OPTIMIZER, advance, assert_same_state, small_evo, state_after, toy
from tests.conftest import full_disk
from tests.test_composition import tied


def saved(folder, *states, keep=2, background=False):
    with Checkpointer(folder, keep=keep, background=background) as checkpointer:
        for state in states:
            checkpointer.save(state, corpus="text")
    return folder


def restored(folder, state=None, corpus="text"):
    state = state_after(0) if state is None else state
    with Checkpointer(folder, keep=2) as checkpointer:
        path = checkpointer.restore(state, corpus=corpus)
    return state, path


@settings(max_examples=6)
@given(steps=st.integers(0, 4), others=st.integers(0, 2), background=st.booleans())
def test_a_state_comes_back_bit_for_bit_and_with_it_the_random_states(steps, others, background, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    written = state_after(steps)
    written.skipped += 2
    written.rejected += 1
    saved(folder, written, background=background)
    expected = torch.rand(5)
    # Whatever the reader had done before.
    read, path = restored(folder, state_after(others, toy(seed=1)))
    assert torch.equal(torch.rand(5), expected)
    assert path == folder / f"step-{steps:08d}"
    assert_same_state(read, written)
    assert (int(read.skipped), int(read.rejected)) == (2, 1)
    # What was never trained has no moments, not zeros; and the step after is the same.
    assert not read.optimizer.state.get(read.model[2].weight)
    torch.manual_seed(2)
    advance(read)
    torch.manual_seed(2)
    advance(written)
    assert_same_state(read, written)


def test_names_do_not_tell_what_a_module_is_wrapped_in(tmp_path):
    wrapped = toy(seed=1)
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    wrapped[1] = torch.compile(wrapped[1], backend="eager")
    state = TrainState.begin(wrapped, OPTIMIZER)
    saved(tmp_path, state_after(2))
    restored(tmp_path, state)
    assert_same_state(state, state_after(2))


def test_nothing_there_leaves_the_state(tmp_path):
    state, path = restored(tmp_path / "nothing", state_after(1))
    assert path is None
    assert_same_state(state, state_after(1))


def test_the_latest_are_kept(tmp_path):
    saved(tmp_path, *map(state_after, range(1, 6)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    saved(tmp_path, state_after(5))
    assert len(list(tmp_path.iterdir())) == 2


def test_in_the_background_and_not_the_same_bytes_are_written(tmp_path):
    folders = [tmp_path / "blocking", tmp_path / "background"]
    for folder in folders:
        # The second is written from memory that the first has been in.
        saved(folder, state_after(1), state_after(3), background=folder.name == "background")
    for name in ("step-00000001", "step-00000003"):
        files = [sorted(file.name for file in (folder / name).iterdir()) for folder in folders]
        assert files[0] == files[1] == ["checkpoint.json", "rank-00000.safetensors"]
        assert all(len({(folder / name / file).read_bytes() for folder in folders}) == 1 for file in files[0])


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(tmp_path, monkeypatch):
    go_on, write = threading.Event(), checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *given: go_on.wait(60) and write(*given))
    state = state_after(2)
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(state, corpus="text")
        advance(state)
        assert checkpoints(tmp_path) == []
        go_on.set()
        # One at a time: this waits for the one before.
        checkpointer.save(state, corpus="text")
        assert checkpoints(tmp_path)[0].name == "step-00000002"
    assert_same_state(restored(tmp_path)[0], state_after(3))
    shutil.rmtree(tmp_path / "step-00000003")
    assert_same_state(restored(tmp_path)[0], state_after(2))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2; to be copied."""
    return saved(tmp_path_factory.mktemp("two"), state_after(1), state_after(2))


@given(
    name=st.sampled_from(["rank-00000.safetensors", "checkpoint.json"]),
    damage=st.sampled_from(DAMAGES),
    place=st.floats(0, 0.999),
)
def test_a_damaged_checkpoint_is_never_read(two, name, damage, place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(two, folder)
    damage(folder / "step-00000002" / name, place)
    with pytest.warns(
        UserWarning, match=r"step-00000002.*set aside as damaged-step-00000002, going on from step-00000001"
    ):
        state, _ = restored(folder)
    assert_same_state(state, state_after(1))
    # The same once more, and now it is the only one.
    damage(folder / "step-00000001" / name, place)
    untouched = state_after(0)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-00000001.*Delete .* to start"):
            restored(folder, untouched)
    assert_same_state(untouched, state_after(0))


def test_no_byte_of_what_a_checkpoint_says_of_itself_can_change(tmp_path):
    path = saved(tmp_path, state_after(1)) / "step-00000001"
    facts = path / "checkpoint.json"
    written = facts.read_bytes()
    # One in thirteen: they fall on names, digits and brackets alike.
    for place in range(0, len(written), 13):
        data = bytearray(written)
        data[place] ^= 1
        facts.write_bytes(data)
        # The last line may end in another white space.
        if not written[place : place + 1].isspace():
            with pytest.raises(CheckpointError):
                Manifest.read(path)
    facts.write_bytes(written)
    assert Manifest.read(path).step == 1


def test_a_checkpoint_of_other_text_of_another_model_or_format_is_refused(tmp_path, monkeypatch):
    folder = saved(tmp_path, state_after(1))
    with pytest.raises(CheckpointError, match="trained on other text"):
        restored(folder, corpus="other")
    another = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2), torch.nn.Linear(2, 1))
    untouched = state_after(1, another)
    before = {name: tensor.clone() for name, tensor in untouched.tensors().items()}
    with pytest.raises(CheckpointError, match=r"ema/0.weight is \(\(4, 3\).* there and \(\(5, 3\).* here"):
        restored(folder, untouched)
    assert all(torch.equal(tensor, before[name]) for name, tensor in untouched.tensors().items())
    fewer = state_after(0, torch.nn.Sequential(*toy()[:2]))
    with pytest.raises(CheckpointError, match=r"model/2.bias is \(\(1,\), torch.float32\) there and missing here"):
        restored(folder, fewer)
    monkeypatch.setattr("evo.training.manifest.FORMAT", 2)
    with pytest.raises(CheckpointError, match="has format 4, this version of evo reads 2"):
        restored(folder)


def failing(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("call", ["save_file", "sha256", "sync", "write_text", "rename"])
def test_a_disk_that_refuses_is_a_warning_and_keeps_the_one_before(tmp_path, monkeypatch, call, background):
    places = {
        "save_file": "evo.core.shards.save_file",
        "sha256": "evo.training.checkpoint.sha256",
        "sync": "evo.core.shards.sync",
        "write_text": "evo.training.manifest.write_text",
        "rename": "evo.training.checkpoint.os.rename",
    }
    with Checkpointer(tmp_path, keep=1, background=background) as checkpointer:
        checkpointer.save(state_after(1), corpus="text")
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(places[call], failing)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                checkpointer.save(state_after(2), corpus="text")
            with pytest.raises(SaveError, match=r"step 2 could not be written \(.*No space left.*make room there"):
                checkpointer.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert_same_state(restored(tmp_path)[0], state_after(1))
        # Training goes on, and so do checkpoints.
        with warnings.catch_warnings(record=True) as told_later:
            warnings.simplefilter("always")
            checkpointer.save(state_after(3), corpus="text")
        checkpointer.wait()
    assert [len(told), len(told_later)] == ([0, 1] if background else [1, 0])
    assert "step 2 could not be written" in str((told + told_later)[0].message)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_failure_of_the_last_save_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("evo.core.shards.save_file", failing)
    with pytest.raises(SaveError), Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(state_after(1), corpus="text")


def test_an_error_of_the_run_comes_before_that_of_its_last_save(tmp_path, monkeypatch):
    monkeypatch.setattr("evo.core.shards.save_file", failing)

    def interrupted():
        with Checkpointer(tmp_path, keep=1) as checkpointer:
            checkpointer.save(state_after(1), corpus="text")
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="step 1 could not"), pytest.raises(KeyboardInterrupt):
        interrupted()


def test_a_mistake_in_the_background_is_an_error_at_the_next_call(tmp_path, monkeypatch):
    monkeypatch.setattr("evo.core.shards.save_file", lambda *_: 1 / 0)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(state_after(1), corpus="text")
    for call in (lambda: checkpointer.save(state_after(2), corpus="text"), checkpointer.wait, checkpointer.close):
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            call()


def test_a_full_disk_keeps_the_one_before(tmp_path):
    saved(tmp_path, state_after(1))
    state = state_after(2)
    with full_disk(), pytest.raises(SaveError, match="step 2 could not be written"):
        saved(tmp_path, state, keep=1, background=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_same_state(restored(tmp_path)[0], state_after(1))


def test_leftovers_of_a_kill_are_cleared_away(tmp_path):
    saved(tmp_path, state_after(1))
    for name in (".step-00000002", ".step-00000000-old"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    restored(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_is_pickled_and_all_files_are_safetensors_and_json(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle")

    with monkeypatch.context() as patch:
        for module, name in ((pickle, "dumps"), (pickle, "loads"), (pickle, "Pickler"), (pickle, "Unpickler")):
            patch.setattr(module, name, refuse)
        patch.setattr(torch, "save", refuse)
        patch.setattr(torch, "load", refuse)
        saved(tmp_path, state_after(2))
        restored(tmp_path)
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["checkpoint.json", "rank-00000.safetensors"]
    assert json.loads(files[0].read_text()).keys() == {"facts", "sha256"}
    # The format has a header in JSON and numbers, and its reader refuses a file with a byte more.
    assert {"model/0.weight", "ema/0.weight", "optimizer/step/0.weight", "random/0/cpu"} < load_file(files[1]).keys()
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in files} == {(tmp_path / "plain").stat().st_mode}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with two checkpoints of an Evo, and the average at the latter."""
    out = tmp_path_factory.mktemp("run")
    states = [state_after(0, small_evo()), state_after(0, small_evo())]
    for step, state in enumerate(states):
        state.step = step
        torch.nn.init.constant_(next(state.ema.model.parameters()), step + 1.0)
    saved(out / "checkpoints", *states)
    return out, states


@pytest.mark.parametrize("step", [None, 0, 1])
def test_an_exported_checkpoint_is_its_averaged_model(run, step, tmp_path, capsys):
    out, states = run
    options = [] if step is None else ["--step", str(step)]
    assert main(["export", str(out), str(tmp_path / "model"), *options]) == 0, capsys.readouterr().err
    exported = Evo.from_pretrained(tmp_path / "model")
    average = states[1 if step is None else step].ema.model
    assert exported.config == average.config
    assert not exported.training
    assert all(torch.equal(exported.state_dict()[name], value) for name, value in average.state_dict().items())
    tokens = torch.randint(0, 5, (2, 6))
    assert torch.equal(exported.context_logits(tokens), average.context_logits(tokens))


def test_what_cannot_be_exported_says_why(run, tmp_path, capsys):
    out, _ = run
    assert main(["export", str(out), str(tmp_path / "model"), "--step", "7"]) == 2
    assert "no checkpoint of step 7 in" in (shown := capsys.readouterr().err)
    assert "step-00000000, step-00000001" in shown
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; it has none"):
        averaged_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"was composed by hand.*use export_average \(evo export\)"):
        averaged_model(saved(tmp_path, state_after(1)))


def test_a_model_composed_by_hand_is_exported_for_one_composed_alike(tmp_path, capsys):
    state = state_after(0, tied())
    saved(tmp_path / "checkpoints", state)
    assert main(["export", str(tmp_path), str(tmp_path / "model")]) == 0
    assert "was composed by hand: compose it again, and call its load_weights" in capsys.readouterr().err
    loaded = tied().load_weights(tmp_path / "model")
    average = state.ema.model.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in loaded.state_dict().items())


def test_export_passes_over_a_damaged_checkpoint_and_changes_nothing(run, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(run[0] / "checkpoints", folder)
    (folder / "step-00000001" / "rank-00000.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"step-00000001.* passed over"):
        model = averaged_model(folder)
    assert torch.equal(next(model.parameters()), next(run[1][0].ema.model.parameters()))
    assert len(checkpoints(folder)) == 2
    with pytest.raises(CheckpointError, match="cannot be read"):
        averaged_model(folder, step=1)
