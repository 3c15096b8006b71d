"""The demonstration end to end, on a small text and few steps."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch

from evo import Evo
from evo.demo import DemoConfig, main

SOURCE = "".join(f"def add_{n}(a, b):\n    '''Add {n} to the sum.'''\n    return a + b + {n}\n\n\n" for n in range(400))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text").mkdir()
    for name in ("a.py", "b.py", "c.py"):
        (folder / "text" / name).write_text(SOURCE)
    config = DemoConfig(data=folder / "text", out=folder / "out", steps=2, prompts=2, new_tokens=6, sequences=2)
    main(config)
    return config


def test_it_leaves_a_model_a_picture_a_page_and_figures(done):
    assert Evo.from_pretrained(done.out / "model").latent_space.vocab_size == 259
    assert (done.out / "levels.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((done.out / "results.json").read_text())
    assert set(results["bound"]) == {"t = 0", "t = 1/2", "t = 1", "learned t"}
    runs = {(run["levels"], run["solver"]) for run in results["solvers"]}
    assert runs == set(itertools.product(("learned", "entropy"), ("Euler", "Heun", "Exponential", "dopri5")))
    for figures in results["bound"].values():
        parts = figures["sketch"] + figures["flow"] + figures["reconstruction"]
        assert parts == pytest.approx(figures["bits"])
        assert figures["standard_error"] > 0
    assert results["bound"]["t = 0"]["flow"] == 0
    assert abs(results["bound"]["t = 1"]["sketch"]) < 1e-5
    for figures in results["solvers"]:
        assert figures["tokens_per_second"] > 0
        assert math.isfinite(figures["bits_per_byte"])


def test_the_page_is_one_file_that_holds_the_refinement(done):
    page = (done.out / "levels.html").read_text()
    assert not re.search(r"(src|href)\s*=", page), "nothing is loaded from elsewhere"
    (data,) = re.findall(r"const sequences = (.*);\n", page)
    sequences = json.loads(data)
    assert len(sequences) == 2
    for sequence in sequences:
        assert len(sequence["levels"]) == len(sequence["text"]) == 21
        assert all(level == 0 for level in sequence["levels"][-1])
        assert "def " in sequence["prompt"]


@pytest.mark.slow
def test_a_second_run_reuses_the_first(done, capsys):
    before = {file: file.stat().st_mtime_ns for file in (done.out / "checkpoints").rglob("*.safetensors")}
    weights = Evo.from_pretrained(done.out / "model").state_dict()
    # Without a number of steps it would look for one that fills the minutes; the run that is there decides.
    main(replace(done, steps=None))
    assert {file: file.stat().st_mtime_ns for file in (done.out / "checkpoints").rglob("*.safetensors")} == before
    again = Evo.from_pretrained(done.out / "model").state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert "going on with the run of 2 steps" in capsys.readouterr().out


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="minutes is 0"):
        DemoConfig(minutes=0)
    with pytest.raises(ValueError, match="steps is 0"):
        DemoConfig(steps=0)
