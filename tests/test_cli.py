import json
import os
import re
import subprocess
import sys

import pytest
import torch

from evo import Evo, __version__
from evo.cli import main
from evo.core import PRESETS, Chunk
from evo.text import ByteTokenizer

COMMANDS = ("prepare", "train", "generate", "export", "info", "demo")
TINY = ["--overrides", "width", "16", "depth", "1", "heads", "1", "context", "64"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {i}: the same words again\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def trained(text):
    """A run made by the command itself, in a process of its own."""
    out = text.parent / "run"
    command = [sys.executable, "-W", "error", "-m", "evo", "train", "--data", text, "--out", out, *TINY]
    sizes = ["--steps", "4", "--length", "16", "--batch-size", "2", "--evaluation.sequences", "2"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done


def test_train_reports_figures_on_standard_output_and_progress_on_the_other(trained):
    out, done = trained
    levels = [line.split(",")[1].split()[1] for line in done.stdout.splitlines()]
    assert levels == ["0", "1", "learned"]
    assert "step 4/4: loss" in done.stderr
    assert str(out / "model") in done.stderr
    config = json.loads((out / "config.json").read_text())
    assert (config["steps"], config["overrides"]["width"], config["evaluation"]["sequences"]) == (4, 16, 2)


def test_train_says_how_a_run_differs(trained, text, capsys):
    out, _ = trained
    assert main(["train", "--data", str(text), "--out", str(out), *TINY, "--steps", "9", "--length", "16"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"evo train: {out} holds a run with other options: batch_size was 2 and is now 16")
    assert shown.count("\n") == 1


def test_figures_that_are_not_there_are_measured_anew_and_such_as_are_not_finite_are_no_error(text, tmp_path, capsys):
    sizes = ["--steps", "4", "--length", "16", "--batch-size", "2", "--evaluation.sequences", "1"]
    command = ["train", "--data", str(text), "--out", str(tmp_path / "run"), *TINY, *sizes]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert re.search(r"level 0 +\d+\.\d{4} ± nan\n", shown.out)
    assert f"4 steps; the model is in {tmp_path / 'run' / 'model'}" in shown.err
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(command) == 0
    assert capsys.readouterr().out == shown.out


def written(trained, capsys, *options):
    status = main(["generate", "--model", str(trained[0] / "model"), "--max-new-tokens", "12", *options])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return shown.out, shown.err


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "exponential", "multistep", "dopri5"])
def test_generate_continues_the_prompt_with_every_solver(trained, capsys, solver):
    text, figures = written(trained, capsys, "line", "--solver", solver, "--no-stop")
    assert text.startswith("line")
    assert figures.startswith("12 tokens in ")
    assert f"{solver}: " in figures
    assert written(trained, capsys, "line", "--solver", solver, "--no-stop")[0] == text


def test_generate_writes_what_the_context_has_room_for(trained, capsys):
    model = str(trained[0] / "model")
    assert main(["generate", "--model", model, "--no-stop", "twenty bytes of text"]) == 0
    assert capsys.readouterr().err.startswith("44 tokens in ")
    assert main(["generate", "--model", model, "x" * 64]) == 2
    assert "do not fit the model's context of 64" in capsys.readouterr().err


def test_a_solver_that_had_nothing_to_do_is_told(trained, capsys):
    told = "no token was refined; --solver had no effect, try --level 1\n"
    assert written(trained, capsys, "--level", "0", "--solver", "heun")[1].endswith(told)
    assert (
        told
        not in written(trained, capsys, "--level", "0")[1]
        + written(trained, capsys, "--level", "1", "--solver", "heun")[1]
    )


def test_the_folder_of_a_run_points_to_its_model(trained, capsys):
    out, _ = trained
    assert main(["generate", "--model", str(out)]) == 2
    assert capsys.readouterr().err.endswith(f"; there is a model in {out / 'model'}\n")


@pytest.mark.parametrize("options", [pytest.param(["info"], marks=pytest.mark.slow), ["generate", "--help"]])
def test_nobody_reads_on_and_nothing_is_said(options):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        done = subprocess.run(
            [sys.executable, "-m", "evo", *options], stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_generate_options_reach_the_model(trained, capsys):
    _, figures = written(trained, capsys, "--level", "0", "--no-stop")
    assert "0 network evaluations of refinement, mean level 0.000" in figures
    _, figures = written(trained, capsys, "--level", "1", "--max-steps", "5", "--plan", "full", "--no-stop")
    assert "5 network evaluations of refinement, mean level 1.000" in figures
    _, figures = written(trained, capsys, "--level", "1", "--max-steps", "5", "--window", "4", "--no-stop")
    assert "15 network evaluations" in figures
    texts = {written(trained, capsys, "--seed", str(seed), "--no-stop")[0] for seed in range(4)}
    assert len(texts) > 1
    greedy = {written(trained, capsys, "--seed", str(s), "--level", "0", "--temperature", "0")[0] for s in range(3)}
    assert len(greedy) == 1


def test_generate_is_what_the_library_writes(trained, capsys):
    model, tokenizer = Evo.from_pretrained(trained[0] / "model").eval(), ByteTokenizer()
    made = model.generate(
        tokenizer.encode("line")[None],
        12,
        stop=[tokenizer.eos_id],
        generator=torch.Generator().manual_seed(3),
    )
    expected = "line" + tokenizer.decode(made.tokens[0, : made.lengths[0]])
    assert written(trained, capsys, "line", "--seed", "3")[0] == expected + "\n"


def test_generate_waits_for_the_last_byte_of_a_character(trained, capsys, monkeypatch):
    data, shown = "a€ÿ🙂".encode(), []
    chunks = [
        Chunk(row=0, position=i, tokens=(byte,), levels=(0.0,), last=i + 1 == len(data), nfe=0)
        for i, byte in enumerate(data)
    ]
    monkeypatch.setattr(Evo, "stream", lambda *_, **__: iter(chunks))
    monkeypatch.setattr("builtins.print", lambda *values, **_: shown.append(values[0]))
    assert main(["generate", "--model", str(trained[0] / "model"), "> "]) == 0
    assert [piece for piece in shown[:-1] if piece] == ["> ", "a", "€", "ÿ", "🙂"]


def test_generate_shows_text_before_all_of_it_is_written(trained, monkeypatch):
    shown, stream = [], Evo.stream

    def watched(*args, **kwargs):
        for chunk in stream(*args, **kwargs):
            yield chunk
            # The reader is back for more: what it has been given is on the screen.
            assert len(shown) == 2 + chunk.position

    monkeypatch.setattr(Evo, "stream", watched)
    monkeypatch.setattr("builtins.print", lambda *values, **_: shown.append(values[0]))
    assert main(["generate", "--model", str(trained[0] / "model"), "--max-new-tokens", "6", "--level", "0"]) == 0
    assert len(shown) >= 3


def test_info_lists_presets_and_counts_their_parameters(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line for line in shown.splitlines() if line}
    assert set(PRESETS) <= set(rows)
    tiny = Evo.from_preset("tiny", vocab_size=ByteTokenizer.vocab_size)
    assert f"{sum(p.numel() for p in tiny.parameters()) / 1e6:.2f} M" in rows["tiny"]
    assert f"evo{__version__:>{11 + len(__version__)}}" in shown
    assert torch.__version__ in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_with_its_meaning(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: evo {command}" in shown
    options = [line for line in shown.splitlines() if line.strip("│ ").startswith("--")]
    assert options
    if command == "train":
        assert "Peak rate, reached after the warm-up." in shown
        assert "--data PATH" in shown


def test_the_commands_are_listed(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"evo {__version__}\n"


def test_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    for arguments, message in [
        (["fly"], "no command 'fly'; there are prepare, train, generate, export, info, demo"),
        (["train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")], "no file or folder at"),
        (["train", "--data", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "o")], "is empty"),
        (["generate", "--model", str(tmp_path / "nowhere")], "nowhere"),
        (["generate", "--model", str(tmp_path), "--device", "abacus"], "device 'abacus' cannot be used here"),
    ]:
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "--data", "x", "--steps", "0"],
        ["generate", "--model", "x", "--solver", "magic"],
        ["generate", "--model", "x", "--seed", "99999999999999999999999"],
        ["train", "--data", "x", "--seed", "99999999999999999999999"],
    ],
)
def test_bad_options_end_with_status_2_and_no_traceback(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_model_that_writes_no_bytes_is_refused(tmp_path, capsys):
    Evo.from_preset("tiny", vocab_size=100, width=16, depth=1, heads=1).save_pretrained(tmp_path / "model")
    assert main(["generate", "--model", str(tmp_path / "model")]) == 2
    assert "has a vocabulary of 100 tokens; evo generate writes bytes" in capsys.readouterr().err


def test_a_traceback_is_there_for_those_who_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("EVO_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")])


def test_without_tyro_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["info"]) == 2
    assert "pip install 'evo-lm[train]'" in capsys.readouterr().err


def test_without_a_package_that_an_option_needs_the_remedy_is_named(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["prepare", str(text), str(tmp_path / "tokens"), "--tokenizer", "some/tokenizer"]) == 2
    assert capsys.readouterr().err == "evo prepare: this needs transformers: pip install 'evo-lm[data]'\n"


def test_an_interrupted_command_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("evo.cli.train.train", interrupted)
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "o")]) == 130
    assert capsys.readouterr().err == "evo train: interrupted\n"
