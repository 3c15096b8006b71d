"""The benchmark of generation: its measures, its frontier, and one whole run of it at the smallest size."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ablation.corpora import CORPORA, Corpus, Text
from benchmarks.generate.__main__ import main
from benchmarks.generate.anatomy import REST, Clocks, anatomy
from benchmarks.generate.frontier import Point, as_good, beats, frontier, verdict
from benchmarks.generate.overhead import barest
from benchmarks.generate.quality import Quality, conditional_entropy, distinct, quality
from benchmarks.generate.rivals import prompts
from benchmarks.generate.ways import AUTOREGRESSION, counted, of_evo, of_transformers, options_by_name
from evo import Evo
from evo.heads import NucleusPrior

GREEDY = NucleusPrior(temperature=0.0)


def point(name: str, speed: float, bits: float, entropy: float) -> Point:
    return Point(name=name, speed=speed, quality=Quality(bits=bits, error=0.0, entropy=entropy, distinct=1.0))


def small() -> Evo:
    torch.manual_seed(0)
    return Evo.from_preset("tiny", vocab_size=259, depth=1, width=32, heads=1, readout_bias=False).eval()


figures = st.integers(0, 3).map(float)


@given(st.lists(st.tuples(figures, figures, figures), min_size=1, max_size=8))
def test_the_frontier_is_what_nothing_beats_and_beats_all_else(found):
    points = [point(str(index), *each) for index, each in enumerate(found)]
    best = frontier(points)
    assert best
    assert not any(beats(one, other) for one in best for other in best)
    assert all(any(beats(one, other) for one in best) for other in points if other not in best)


def test_the_aim_is_met_by_what_is_as_good_and_twice_as_fast():
    plain = point("plain", 1.0, 2.0, 3.0)
    quick, dull, noisy = point("quick", 2.5, 2.03, 2.95), point("dull", 9.0, 1.0, 2.0), point("noisy", 9.0, 4.0, 4.0)
    assert as_good(quick.quality, plain.quality)
    assert not as_good(dull.quality, plain.quality)
    assert not as_good(noisy.quality, plain.quality)
    assert verdict([plain, quick, dull, noisy], plain).startswith("Met: the fastest with quality")
    assert verdict([plain, point("slow", 1.5, 2.0, 3.0)], plain).startswith("Not met: the fastest")
    assert verdict([plain, dull, noisy], plain).startswith("Not met: nothing else")


def test_variety_of_known_texts():
    assert conditional_entropy(torch.zeros(3, 9, dtype=torch.int64)) == 0
    # What follows is certain, whatever it is that comes first.
    assert conditional_entropy(torch.arange(12).repeat(2, 3)) == pytest.approx(0)
    both = torch.tensor([[0, 0, 1, 1, 0]])
    assert conditional_entropy(both) == pytest.approx(1)
    assert distinct(both, 2) == 1
    assert distinct(torch.zeros(2, 5, dtype=torch.int64), 4) == 1 / 4


def test_bits_are_those_of_the_judge_behind_the_prompt():
    judge, tokens = small().double(), torch.randint(0, 256, (3, 12))
    with torch.no_grad():
        log_probs = judge.context_logits(tokens).log_softmax(-1)
    nats = -log_probs.gather(-1, tokens[..., None])[:, 4:, 0].mean(1)
    found = quality(judge, tokens[:, :4], tokens[:, 4:])
    assert found.bits == pytest.approx(nats.mean().item() / math.log(2), rel=1e-9)
    assert found.error == pytest.approx(nats.std().item() / math.log(2) / math.sqrt(3), rel=1e-9)


def test_prompts_come_from_the_whole_text_with_what_follows_them():
    prompt, after = prompts(bytes(range(100)), 3, 4, 6, torch.device("cpu"))
    assert prompt[:, 0].tolist() == [0, 45, 90]
    assert torch.equal(torch.cat([prompt, after], 1), prompt[:, :1] + torch.arange(10))
    with pytest.raises(ValueError, match="do not fit"):
        prompts(bytes(9), 1, 4, 6, torch.device("cpu"))


def test_passes_are_counted():
    model, prompt = small(), torch.randint(0, 256, (2, 3))
    with counted(model) as work:
        of_evo(model, options_by_name(2)[AUTOREGRESSION], GREEDY)(prompt, 5, torch.Generator())
    # The prompt behind BOS, and all new tokens but the last.
    assert (work.passes, work.rows) == (5, 2 * (4 + 4))
    assert not model.backbone._forward_hooks


def test_every_way_writes_and_speculation_writes_what_autoregression_does():
    model, prompt = small(), torch.randint(0, 256, (2, 3))
    written = {
        name: of_evo(model, options, GREEDY)(prompt, 16, torch.Generator().manual_seed(0))
        for name, options in options_by_name(2).items()
    }
    assert all(each.tokens.shape == (2, 16) for each in written.values())
    guessed = [name for name in written if name.startswith("speculation")]
    assert len(guessed) == 4
    for name in guessed:
        assert torch.equal(written[name].tokens, written[AUTOREGRESSION].tokens)
        assert written[name].accepted is not None


def test_the_barest_loop_writes_what_generation_at_level_0_does():
    model, prompt = small(), torch.randint(0, 256, (2, 3))
    plain = of_evo(model, options_by_name(2)[AUTOREGRESSION], GREEDY)(prompt, 6, torch.Generator())
    assert torch.equal(barest(model, prompt, 6, GREEDY), plain.tokens)


def test_transformers_writes_what_we_do():
    pytest.importorskip("transformers")
    model, prompt = small(), torch.randint(0, 256, (2, 3))
    plain = of_evo(model, options_by_name(2)[AUTOREGRESSION], GREEDY)(prompt, 6, torch.Generator())
    with of_transformers(model, temperature=0.0, top_p=1.0) as write:
        assert torch.equal(write(prompt, 6, torch.Generator()).tokens, plain.tokens)


def test_time_is_divided_among_the_parts_that_spend_it():
    model, prompt = small(), torch.randint(0, 256, (1, 3))
    found = anatomy(model, prompt, 4, GREEDY, options_by_name(2)["diffusion, K = 2"], rounds=1)
    assert found["backbone"] > 0
    assert found["decoder"] > 0
    assert found["prior"] == 0  # nothing is sketched
    assert found[REST] > 0
    clocks = Clocks(torch.device("cpu"))
    assert clocks.timed("twice", lambda x: 2 * x)(torch.ones(1)) == 2
    assert clocks.seconds["twice"] > 0


def test_one_command_trains_times_judges_and_explains(tmp_path, monkeypatch, capsys):
    line = b"Thou art 2 fair, O night!\n"
    monkeypatch.setitem(CORPORA, "shakespeare", Corpus(text=lambda: Text(line * 40, line * 8)))
    model = "--width 32 --depth 1 --budget 256 --judge-width 32 --judge-depth 1 --judge-budget 128 --length 16"
    asked = "--new 16 --batch 2 --prompt 4 --samples 3 --steps 2 --rounds 2 --parts rivals anatomy --ways blocks"
    folders = f"--scratch {tmp_path} --out {tmp_path}/found.json"
    monkeypatch.setattr(sys, "argv", ["generate", *model.split(), *asked.split(), *folders.split()])
    main()
    found = json.loads((tmp_path / "found.json").read_text())
    (rivals,) = found["rivals"]
    by_name = {each["way"]: each for each in rivals["ways"]}
    blocks = [f"block diffusion, blocks of {size}, K = {steps}" for size in (4, 16) for steps in (2, 4)]
    assert set(by_name) == {AUTOREGRESSION, *blocks}
    assert any(each["frontier"] for each in by_name.values())
    assert by_name[AUTOREGRESSION]["level"] == 0
    block = by_name["block diffusion, blocks of 16, K = 2"]
    # Both sequences of a batch are read whole, twice.
    assert (block["level"], block["passes"], block["rows"]) == (1, pytest.approx(3 / 16), pytest.approx(2))
    assert rivals["verdict"] in capsys.readouterr().out
    assert (tmp_path / "found-16x2.png").stat().st_size > 0
    assert found["anatomy"][0]["passes"][0]["floor_ms"] > 0
    # What is trained is found again.
    monkeypatch.setattr("benchmarks.generate.training.fit", None)
    monkeypatch.setattr("benchmarks.generate.training.train", None)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--parts", "anatomy"])
    main()
