"""The benchmark's own ground: tasks that are what they say, rows that can be trusted to be what their settings are."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ablation import run as rows
from benchmarks.ablation import steps, where
from benchmarks.ablation.corpora import CORPORA, Corpus, Text, windows
from benchmarks.ablation.files import Absent
from benchmarks.ablation.flops import counter
from benchmarks.ablation.options import curriculum_of
from benchmarks.ablation.report import write_report
from benchmarks.ablation.run import Places, plan_of, run, trained_model
from benchmarks.ablation.samples import variety
from benchmarks.ablation.sizes import SIZES
from benchmarks.ablation.subjects import Subject
from benchmarks.ablation.tasks import TASKS
from benchmarks.ablation.tasks.base import draw_examples
from benchmarks.ablation.tasks.countdown import Countdown, solve
from benchmarks.ablation.tasks.parity import ReversedParities
from benchmarks.ablation.tasks.star import StarGraph
from benchmarks.ablation.tasks.sudoku import grids, solves
from benchmarks.ablation.training import build, fit, train_step
from evo.training import CurriculumConfig
from tests.ablation_cases import CPU, PARITY, TINY, small


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "nano", TINY)


@pytest.fixture
def places(tmp_path):
    return Places(results=tmp_path / "results", scratch=tmp_path / "scratch")


@pytest.mark.parametrize("name", [name for name in TASKS if name != "sudoku-9"])
def test_examples_are_solved_kept_apart_and_always_the_same(name):
    task = TASKS[name]
    sides = {split: draw_examples(task, split, 24) for split in ("train", "test")}
    for split, tokens in sides.items():
        assert tokens.shape[1] == task.prompt_length + task.answer_length == len(task.classes()) + task.prompt_length
        assert tokens.max() < len(task.words)
        assert task.grade(tokens).all()
        assert torch.equal(tokens[:12], draw_examples(task, split, 12))
        assert {task.split_of(example) for example in task.decode(tokens)} == {split}
    puzzles_of = [{task.identity(example) for example in task.decode(tokens)} for tokens in sides.values()]
    assert not puzzles_of[0] & puzzles_of[1]


@pytest.mark.parametrize("name", ["star-2x5", "sudoku-4", "addition-6", "parity-8", "chain-5", "total-first-6"])
@given(seed=st.integers(0, 2**32), place=st.integers(0, 10**6))
def test_a_changed_answer_is_wrong(name, seed, place):
    task, rng = TASKS[name], random.Random(seed)
    prompt, answer = task.draw(rng)
    assert task.correct(prompt, answer)
    spoilt = list(answer)
    place %= len(spoilt)
    spoilt[place] = rng.choice([word for word in task.words if word != spoilt[place]])
    assert not task.correct(prompt, spoilt)


def test_a_small_task_is_exhausted_and_says_how_many_there_are():
    task = ReversedParities(bits=4)
    train, test = draw_examples(task, "train", 100), draw_examples(task, "test", 100)
    assert len(train) + len(test) == 2**4


def test_every_way_to_the_goal_counts():
    prompt = "1020000004000000"
    ways = [grid for grid in grids() if solves(prompt, grid, 4)]
    assert len(ways) > 1
    assert all(TASKS["sudoku-4"].correct(prompt, way) for way in ways)
    task = Countdown(numbers=3)
    assert task.correct("102005025", "10+20=30,30-5=25".ljust(task.answer_length, "."))
    assert task.correct("102005025", "20-5=15,10+15=25".ljust(task.answer_length, "."))
    assert not task.correct("102005025", "20+5=25,10+25=35".ljust(task.answer_length, "."))
    assert not task.correct("102005025", "20+5=25".ljust(task.answer_length, "."))
    assert not task.correct("102005025", "20-5=16,10+16=26".ljust(task.answer_length, "."))


def test_there_are_288_grids_of_four():
    assert len(set(grids())) == 288
    assert all(solves(grid, grid, 4) for grid in grids())


@pytest.mark.parametrize(
    ("numbers", "target", "steps"),
    [
        ([15, 44, 79], 50, "44-15=29,79-29=50"),
        ([84, 49, 70, 2], 63, "84/2=42,70-49=21,42+21=63"),
        ([86, 75, 3, 56], 23, "86-75=11,3*11=33,56-33=23"),
    ],
)
def test_countdown_is_solved_as_published(numbers, target, steps):
    assert solve(numbers, target) == tuple(steps.split(","))


def test_the_fork_of_a_star_is_a_guess():
    """Without the edges behind it, the first step of the right arm is as likely as that of any other."""
    task, rng = StarGraph(arms=2, path=4, nodes=10), random.Random(0)
    first = 0
    for _ in range(400):
        prompt, answer = task.draw(rng)
        leaving = [b for a, b in zip(prompt[:-2:2], prompt[1:-2:2], strict=True) if a == answer[0]]
        first += leaving[0] == answer[1]
    assert abs(first / 400 - 0.5) < 4 * 0.025


def test_a_task_out_of_range_says_what_is_needed():
    with pytest.raises(ValueError, match="9 names"):
        StarGraph(arms=2, path=5, nodes=8)


def test_data_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("EVO_DATA", str(tmp_path))
    with pytest.raises(Absent, match="EVO_DATA"):
        draw_examples(TASKS["sudoku-9"], "train", 1)


def test_a_row_is_run_once_and_again_when_its_settings_change(places, monkeypatch):
    fits = []
    monkeypatch.setattr(rows, "fit", lambda plan: fits.append(plan) or fit(plan))
    first = run(small(), PARITY, CPU, places=places, progress=False)
    assert run(small(), PARITY, CPU, places=places, progress=False) == first
    assert len(fits) == 1
    assert first["training"]["tokens"] <= 200
    assert first["training"]["flops"] > 0
    run(small(clock_values=1), PARITY, CPU, places=places, progress=False)
    assert len(fits) == 2
    text = write_report(places.results, "planning")
    assert "| parity | nano |" in text
    assert (places.results / "planning.png").stat().st_size > 0


def test_differences_are_between_rows_of_one_seed_and_label(places):
    asked = [
        ("learned", 0, "x"),
        ("learned", 1, "x"),
        ("learned", 2, "x"),
        ("t0", 0, "x"),
        ("t0", 1, "x"),
        ("t0", 2, ""),
    ]
    bits = {}
    for variant, seed, label in asked:
        row = small(variant=variant, seed=seed, label=label)
        bits[variant, seed] = run(row, PARITY, CPU, places=places, progress=False)["bound"]["own"]["bits"]
    one, other = (bits["learned", seed] - bits["t0", seed] for seed in (0, 1))
    (line,) = (
        line
        for line in write_report(places.results, "planning").split("Differences")[1].splitlines()
        if "| t0 |" in line
    )
    assert "| learned (x) | t0 | 2 |" in line
    assert line.endswith(f"| {(one + other) / 2:+.3f} ± {abs(one - other) / 2:.3f} |")


def test_the_model_of_a_row_comes_back(places):
    model = trained_model(small(), PARITY, CPU, places=places, progress=False)
    again = trained_model(small(), PARITY, CPU, places=places, progress=False)
    assert torch.equal(model.context_logits(PARITY.test), again.context_logits(PARITY.test))


@pytest.mark.parametrize("variant", ["learned", "frozen"])
def test_a_run_cut_off_ends_as_one_left_alone(variant, tmp_path, monkeypatch):
    row = small(variant=variant, budget=8 * 64)
    whole = fit(plan_of(row, PARITY, CPU, progress=False))
    plan = replace(plan_of(row, PARITY, CPU, tmp_path, progress=False), save_seconds=0.0)
    made, step = [], train_step

    def cut(*arguments):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(arguments)
        return step(*arguments)

    monkeypatch.setattr("benchmarks.ablation.training.train_step", cut)
    with pytest.raises(KeyboardInterrupt):
        fit(plan)
    monkeypatch.setattr("benchmarks.ablation.training.train_step", step)
    resumed = fit(plan)
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert (resumed.steps, resumed.flops, resumed.losses) == (whole.steps, whole.flops, whole.losses)


def test_operations_are_counted_with_attention():
    """Of one causal pass: two for each multiply-add of the linear maps, four for each pair of positions and channel."""
    plan = plan_of(small(variant="t0"), PARITY, CPU)
    model = build(plan).eval()
    with torch.no_grad(), counter() as counted:
        model.context_logits(PARITY.test)
    positions = PARITY.test.numel()
    matrices = sum(p.numel() for name, p in model.backbone.named_parameters() if p.dim() == 2)
    size = plan.size
    attention = 4 * len(PARITY.test) * PARITY.length**2 * size.width * size.depth
    dim, vocabulary = model.latent_space.dim, model.latent_space.vocab_size
    readout = dim * size.width + vocabulary * dim
    assert counted.get_total_flops() == 2 * positions * (matrices + readout) + attention


def test_a_run_is_the_same_each_time():
    row = small(variant="t0", budget=3 * 64)
    one, other = (fit(plan_of(row, PARITY, CPU, progress=False)) for _ in range(2))
    assert one.losses == other.losses
    assert one.flops == other.flops > 0


def test_variety_of_the_dullest_and_of_the_most_varied():
    dull = variety(torch.zeros(4, 8, dtype=torch.int64))
    assert dull["entropy"] == 0
    assert dull["distinct_2"] == 1 / (4 * 7)
    varied = variety(torch.arange(32).view(4, 8))
    assert varied["entropy"] == pytest.approx(5)
    assert varied["distinct_1"] == varied["distinct_3"] == 1


def test_entries_of_the_curriculum_are_read():
    found = curriculum_of(["level_price=0.5", "importance=false"])
    assert found == CurriculumConfig(window=0.0, level_price=0.5, importance=False)
    with pytest.raises(ValueError, match="level_price"):
        curriculum_of(["levelprice=1"])


@pytest.fixture
def told(monkeypatch, tmp_path):
    """A way to call a table at a size that suits a test."""
    line = b"Thou art 2 fair, O night!\n"
    monkeypatch.setitem(CORPORA, "shakespeare", Corpus(text=lambda: Text(line * 9, line * 4)))
    monkeypatch.setattr(steps, "STEPS", (1, 3))
    monkeypatch.setattr(steps, "GRID_STEPS", (1, 2))
    monkeypatch.setattr(steps, "SOLVERS", {name: steps.SOLVERS[name] for name in ("Euler", "Ancestral", "dopri5")})

    def call(main, *arguments: str) -> None:
        options = "--budget 150 --seeds 1 --size nano --test-size 4 --quiet --length 16 --samples 3 --judge-size nano"
        folders = f"--train-sizes 8 --results {tmp_path}/results --scratch {tmp_path}/scratch"
        monkeypatch.setattr(sys, "argv", ["table", *options.split(), *folders.split(), *arguments])
        main()

    return call


def test_where_t_goes_and_what_steps_are_worth_is_found_of_trained_rows(told, tmp_path, monkeypatch):
    tasks = ["--tasks", "parity-8", "shakespeare"]
    told(where.main, *tasks)
    # The rows are trained; whatever looks at them next takes them as they are.
    monkeypatch.setattr(rows, "fit", None)
    told(steps.main, *tasks)
    told(steps.main, *tasks, "--grid", "--sizes", "nano")
    results = tmp_path / "results"
    for table, line in (("where", "| word start |"), ("steps", "| dopri5 |"), ("grid", "MFLOP a token")):
        assert line in (results / f"{table}.md").read_text()
        assert (results / f"{table}.png").stat().st_size > 0
    found = {file.name.split("-")[0]: json.loads(file.read_text()) for file in (results / "steps").iterdir()}
    for task, figures in (("parity", {"accuracy"}), ("shakespeare", {"perplexity", "entropy"})):
        written = found[task]["written"]
        assert len(written) == 2 * len(steps.SOLVERS) * 2
        assert all(figures <= each.keys() for each in written)
        # A token's last step commits, so that with one step there is nothing for a solver to do.
        once = [each for each in written if each["steps"] == 1 and each["levels"] == "1"]
        assert all({**each, "solver": ""} == {**once[0], "solver": ""} for each in once)
    # What is finished is not looked at again.
    monkeypatch.setattr(Subject, "model", None)
    told(where.main, *tasks)


def test_a_row_judged_by_another_is_not_finished(places):
    row, judge = small(table="text"), small(table="judge")
    places.result(row).parent.mkdir(parents=True)
    places.result(row).write_text(json.dumps({"row": row.settings(), "judge": judge.settings()}))
    assert places.finished(row, judge) is not None
    assert places.finished(row, replace(judge, size="micro")) is None


def test_operations_of_writing_are_those_of_its_passes(places):
    row = small(variant="t1", table="planning")
    subject = Subject(row=row, data=PARITY, judge=None, device=CPU, places=places, progress=False)
    model = build(plan_of(row, PARITY, CPU)).eval()
    found = [
        steps.quality(subject, model, None, solver="Euler", level=1.0, max_steps=count, count_operations=True)
        for count in (1, 2, 3)
    ]
    assert [each["nfe"] for each in found] == [1, 2, 3]
    first, second, third = (each["flops_per_token"] for each in found)
    assert third - second == second - first > 0


def test_the_levels_of_a_head_that_follows_entropy_rank_as_entropy_does():
    model = build(plan_of(small(variant="entropy"), PARITY, CPU)).eval()
    model.readout.linear.weight.data.normal_(std=0.3)
    found = where.chosen(model, PARITY, 0)
    assert found.levels.shape == (len(PARITY.test), PARITY.length - PARITY.prompt_length)
    torch.testing.assert_close(found.levels, found.entropy, rtol=0, atol=1e-5)  # of two words: bits, and share of ln V
    fixed = where.chosen(build(plan_of(small(variant="t0"), PARITY, CPU)).eval(), PARITY, 0)
    assert not fixed.levels.any()
    torch.testing.assert_close(fixed.entropy, fixed.clean)


def test_a_head_that_sees_the_fork_is_seen_to():
    levels = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.9, 0.2]]).double()
    kinds = [["start", "fork", "goal"]] * 2
    found = where.figures(where.Chosen(levels, levels * 3, -levels), kinds, vocab_size=16)
    assert found["classes"]["fork"]["mean_level"] == pytest.approx(0.95)
    assert found["classes"]["fork"]["highest"] == 1
    assert found["classes"]["start"]["highest"] == 0
    assert found["rank_correlation"] == {"entropy": pytest.approx(1), "clean_entropy": pytest.approx(-1)}
    assert sum(each["share"] for each in found["entropy"]) == pytest.approx(1)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_rank_correlation_is_that_of_mean_ranks(pairs):
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    found = where.rank_correlation(first, second)
    if first.unique().numel() == 1 or second.unique().numel() == 1:
        assert found is None
        return
    ranks = [[sum(b < a for b in side) + sum(b <= a for b in side) for a in side] for side in (first, second)]
    assert found == pytest.approx(torch.tensor(ranks).double().corrcoef()[0, 1].item(), abs=1e-12)
    assert where.rank_correlation(first.exp(), second) == pytest.approx(found)


@pytest.mark.parametrize(
    ("cut", "kinds"),
    [
        ("o|f| |1|9|,|\n|a", "first token|letter|space|digit|digit|punctuation|space|word start"),
        ("of| 19|,|\n| an|ä| b", "first token|digit|punctuation|space|word start|letter|word start"),
    ],
)
def test_tokens_of_text_are_told_by_what_they_begin(cut, kinds):
    assert "|".join(where.kinds_of([text.encode() for text in cut.split("|")])) == kinds


def test_byte_pairs_spell_the_text_they_are_of(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    text = Text("Ä naïve ☃\t and a b and an\x00d\n".encode() * 20, "and a ☃\n".encode() * 20)
    monkeypatch.setitem(CORPORA, "wikitext-bpe", Corpus(text=lambda: text, vocabulary=260))
    for _ in range(2):  # made, and read again
        windows.cache_clear()
        data = windows("wikitext-bpe", 8, 5, tmp_path)
        assert data.spelling is not None
        assert b"".join(data.spelling[token] for token in data.train.tolist()) == text.train
        assert data.test_bytes == sum(len(data.spelling[token]) for token in data.test.flatten().tolist())
    assert data.vocab_size == len(set(data.spelling)) > 256
