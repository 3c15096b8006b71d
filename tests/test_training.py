import itertools
import json
import math
import resource
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evo.core import Evo, Objective
from evo.data import open_corpus
from evo.training import (
    CurriculumConfig,
    Ema,
    EvaluationConfig,
    OptimizerConfig,
    TrainConfig,
    adamw,
    learning_rate,
    train,
)
from evo.training.config import differences
from evo.training.metrics import Meter, MetricsLog
from evo.training.optimizer import step_if
from evo.training.precision import autocast, pick_device
from evo.training.state import TrainState
from evo.training.step import Share, train_step
from tests.conftest import random_model

SMALL = {"width": 16, "depth": 1, "heads": 1}
steps = st.integers(0, 500)


def small_run(tmp_path, **changes):
    """A run of seconds on a text of a hundred lines."""
    source = tmp_path / "text.txt"
    if not source.exists():
        source.write_text("".join(f"line {i}: the same words again\n" for i in range(100)))
    options = {
        "data": source,
        "out": tmp_path / "run",
        "overrides": SMALL,
        "steps": 6,
        "batch_size": 4,
        "length": 16,
        "log_every": 2,
        "save_every": 4,
        "progress": False,
        "optimizer": OptimizerConfig(warmup=2),
        "evaluation": EvaluationConfig(every=4, sequences=2, clock_values=1),
    }
    return TrainConfig(**(options | changes))


def lines(run):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# The optimizer.


@given(peak=st.floats(1e-5, 1.0), warmup=st.integers(0, 50), extra=st.integers(2, 200), floor=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_its_floor(peak, warmup, extra, floor):
    total = warmup + extra
    config = OptimizerConfig(learning_rate=peak, warmup=warmup, floor=floor)
    rates = [learning_rate(config, step, total) for step in range(total)]
    up, down = rates[:warmup], rates[warmup:]
    assert up == [pytest.approx(peak * (k + 1) / warmup) for k in range(warmup)]
    assert down[0] == pytest.approx(peak)
    assert down[-1] == pytest.approx(peak * floor)
    assert all(a >= b for a, b in itertools.pairwise(down))


def test_decay_shrinks_the_matrices_of_linear_layers_alone():
    model = Evo.from_preset("tiny", vocab_size=7, **SMALL)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, OptimizerConfig(learning_rate=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (1 - 0.5 * 0.1) if id(parameter) in linear else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0, msg=name)
    assert linear


@given(seed=st.integers(0, 100), bad=st.sampled_from([math.nan, math.inf]))
def test_a_rejected_step_leaves_no_trace(seed, bad):
    g = torch.Generator().manual_seed(seed)
    start, gradients = torch.randn(3, 4, generator=g), torch.randn(5, 3, 4, generator=g)

    def run(rejected):
        layer = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            layer.weight.copy_(start)
        optimizer = adamw(layer, OptimizerConfig())
        for index, gradient in enumerate(gradients):
            if index in rejected:
                layer.weight.grad = torch.full_like(gradient, bad)
                step_if(optimizer, torch.tensor(False))
            layer.weight.grad = gradient.clone()
            step_if(optimizer, torch.tensor(True))
        return [layer.weight.detach(), *optimizer.state[layer.weight].values()]

    assert all(torch.equal(a, b) for a, b in zip(run(()), run((0, 3)), strict=True))


@given(seed=st.integers(0, 100), decay=st.floats(0, 0.9999), first=st.integers(0, 30))
def test_the_average_follows_its_recursion(seed, decay, first):
    g = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 2, dtype=torch.float64)
    ema, expected = Ema(model, decay), model.weight.detach().clone()
    for step in range(first, first + 4):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=g, dtype=torch.float64))
        ema.update(model, step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected, rtol=1e-12, atol=1e-12)
    assert not ema.model.training
    assert not ema.model.weight.requires_grad


# The loop.


def test_accumulated_passes_make_the_step_of_one_large_batch(tmp_path):
    weights, figures = [], []
    for size in (6, 2):
        config = small_run(tmp_path, batch_size=6, micro_batch=size)
        corpus = open_corpus(config.data, tmp_path / "cache", config.corpus)
        model = random_model(0, torch.float64, vocab_size=259, width=16)
        state, share = TrainState.begin(model, config.optimizer), Share.of(config, None)
        for _ in range(3):
            batch = corpus.batch(config.seed, state.step, range(6), 6, config.length)
            done = train_step(config, state, share, batch, Objective(), rate=1e-3, text_bytes=corpus.text_bytes)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        figures.append(done.figures)
        assert done.finite
        assert not done.unsound.any()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(figures[1], figures[0], rtol=1e-10, atol=1e-10)


def test_a_step_sends_nothing_to_the_device_that_the_host_waits_for(tmp_path, monkeypatch):
    """A copy that blocks waits for all that an accelerator was asked to do before, the step before this one first of all."""
    config = small_run(tmp_path, batch_size=4, micro_batch=2)
    corpus = open_corpus(config.data, tmp_path / "cache", config.corpus)
    state, share = TrainState.begin(random_model(0, vocab_size=259, width=16), config.optimizer), Share.of(config, None)
    batch, to, waited = corpus.batch(config.seed, 0, range(4), 4, config.length), torch.Tensor.to, []

    def noted(tensor, *arguments, **options):
        caller = sys._getframe(1).f_globals["__name__"]
        if caller in ("evo.training.step", "evo.data.packing", "evo.core.part") and not options.get("non_blocking"):
            waited.append((caller, arguments))
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    train_step(config, state, share, batch, Objective(), rate=1e-3, text_bytes=corpus.text_bytes)
    assert not waited


def test_a_run_leaves_config_metrics_checkpoints_and_the_averaged_model(tmp_path):
    config = small_run(tmp_path)
    result = train(config)
    assert json.loads((config.out / "config.json").read_text()) == config.to_json()
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert [(line["kind"], line["step"]) for line in lines(config.out)] == [
        ("train", 2),
        ("train", 4),
        ("evaluation", 4),
        ("train", 6),
        ("evaluation", 6),
    ]
    assert result.evaluation == lines(config.out)[-1]
    assert (result.steps, result.skipped) == (6, 0)
    tokens = torch.randint(259, (2, 9))
    loaded = Evo.from_pretrained(config.out / "model").eval()
    assert torch.equal(loaded.context_logits(tokens), result.model.context_logits(tokens))


def test_figures_are_what_they_say(tmp_path):
    config = small_run(tmp_path)
    train(config)
    for line in lines(config.out):
        if line["kind"] == "train":
            parts = line["sketch"] + line["flow"] + line["reconstruction"]
            assert line["bits_per_token"] == pytest.approx(parts, rel=1e-5)
            # All but BOS and EOS is bytes, and a crop of this text has at most one of each. The means are sums of float32.
            rounding = 1e-6 * line["bits_per_token"]
            assert line["bits_per_token"] - rounding <= line["bits_per_byte"] <= line["bits_per_token"] * 16 / 14
            assert 0 < line["mean_level"] < 1
            assert sum(line["level_histogram"]) == pytest.approx(1)
            middles = [(k + 0.5) / 10 * share for k, share in enumerate(line["level_histogram"])]
            assert sum(middles) == pytest.approx(line["mean_level"], abs=0.05)
            assert line["utilisation"] > 0
            assert line["memory_bytes"] > 1e6
            assert line["learning_rate"] == learning_rate(config.optimizer, line["step"] - 1, config.steps)
        else:
            levels = line["levels"]
            assert levels["0"]["flow"] == levels["0"]["reconstruction"] == levels["0"]["mean_level"] == 0
            assert levels["1"]["sketch"] == pytest.approx(0, abs=1e-5)
            assert levels["1"]["mean_level"] == 1
            assert 0 < levels["learned"]["mean_level"] < 1


def test_training_learns(tmp_path):
    config = small_run(tmp_path, steps=80, batch_size=8, optimizer=OptimizerConfig(learning_rate=1e-2, warmup=5))
    assert train(config).evaluation["levels"]["0"]["bits"] < math.log2(259) / 2


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    def weights(out, seed):
        return train(small_run(tmp_path, out=tmp_path / out, seed=seed)).model.state_dict()

    one, same, other = weights("a", 1), weights("b", 1), weights("c", 2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def spoil(model, when):
    """Make the loss NaN at the calls whose index satisfies `when`."""
    calls = iter(range(10_000))
    model.register_forward_hook(
        lambda *arguments: replace(arguments[-1], loss=arguments[-1].loss * math.nan) if when(next(calls)) else None
    )
    return model


def test_a_step_without_a_finite_loss_is_left_out_and_counted(tmp_path):
    model = spoil(Evo.from_preset("tiny", vocab_size=259, **SMALL), lambda call: call in (1, 4))
    result = train(small_run(tmp_path), model)
    assert (result.steps, result.skipped) == (6, 2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert [line["skipped"] for line in lines(tmp_path / "run") if line["kind"] == "train"] == [1, 1, 2]


def test_a_loss_that_stays_non_finite_ends_the_run(tmp_path):
    model = spoil(Evo.from_preset("tiny", vocab_size=259, **SMALL), lambda call: call >= 1)
    config = small_run(tmp_path, optimizer=OptimizerConfig(patience=3))
    with pytest.raises(FloatingPointError, match="not been finite for 3 steps in a row, up to step 4"):
        train(config, model)


def test_another_run_is_not_continued(tmp_path):
    train(small_run(tmp_path))
    changed = small_run(tmp_path, seed=5, optimizer=OptimizerConfig(warmup=2, learning_rate=1.0))
    with pytest.raises(ValueError, match=r"optimizer.learning_rate was 0.002 and is now 1.0; seed was 0 and is now 5"):
        train(changed)


def test_what_leads_to_the_same_weights_may_change(tmp_path):
    first = train(small_run(tmp_path))
    moved = small_run(tmp_path, log_every=3, keep=1, evaluation=EvaluationConfig(every=1), progress=True)
    again = train(moved)
    assert again.evaluation == first.evaluation
    assert differences(small_run(tmp_path).to_json(), moved.to_json()) == []


def test_bf16_is_autocast_and_weights_stay_fp32(tmp_path):
    config = small_run(tmp_path, precision="bf16")
    result = train(config)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert result.skipped == 0
    with autocast(torch.device("cpu"), "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_progress_is_lines_where_there_is_no_terminal(tmp_path, capsys):
    train(small_run(tmp_path, progress=True))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step 6/6: loss" in shown.err
    assert "held-out bits per byte at level 0:" in shown.err
    assert "\r" not in shown.err
    train(small_run(tmp_path, progress=True))
    assert capsys.readouterr().err == "going on from step 6 of 6\n"
    train(small_run(tmp_path, out=tmp_path / "silent"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; needed: 1 or more"),
        ({"length": 1}, "length is 1; needed: 2 or more tokens"),
        ({"seed": -1}, "seed is -1"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"preset": "huge"}, "unknown preset 'huge'; known are tiny"),
        ({"precision": "fp16"}, "precision is 'fp16'; needed: one of auto, fp32, bf16"),
        ({"overrides": {"vocab_size": 7}}, "overrides is .* no vocab_size, which is that of the data"),
        ({"overrides": {"colour": 1}}, "unknown entries .*colour"),
        ({"length": 1025}, "length is 1025, the model's context 1024"),
        ({"length": 5000, "overrides": {**SMALL, "context": 5000}}, "held_out has .* tokens, a sequence needs 5000"),
    ],
)
def test_bad_options_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(small_run(tmp_path, **changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(learning_rate=0.0), "optimizer.learning_rate is 0.0"),
        (lambda: OptimizerConfig(learning_rate=math.inf), "optimizer.learning_rate is inf; needed: a positive rate"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), "optimizer.betas is .*; needed: two decays in .0, 1."),
        (lambda: OptimizerConfig(betas=(0.9,)), "optimizer.betas is .*; needed: two decays in .0, 1."),
        (lambda: OptimizerConfig(eps=0.0), "optimizer.eps is 0.0; needed: a positive number"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "optimizer.weight_decay is -0.1; needed: 0 or more"),
        (lambda: OptimizerConfig(ema=1.0), "optimizer.ema is 1.0"),
        (
            lambda: CurriculumConfig(path="slow"),
            "curriculum.path is 'slow'; needed: one of early_stop, late_start, full",
        ),
        (lambda: CurriculumConfig(window=1.1), "curriculum.window is 1.1"),
        (lambda: EvaluationConfig(every=0), "evaluation.every is 0"),
    ],
)
def test_bad_parts_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Metrics.


@settings(max_examples=30)
@given(values=st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), min_size=1, max_size=20))
def test_a_meter_sums_what_counted(values):
    meter = Meter()
    for value, counted in values:
        meter.add(torch.tensor(counted), torch.tensor([value if counted else math.nan, 1.0], dtype=torch.float64))
    (total, steps), counted, speed = meter.read()
    assert steps == counted == sum(counts for _, counts in values)
    assert total == pytest.approx(sum(value for value, counts in values if counts), rel=1e-9, abs=1e-6)
    assert speed > 0
    assert meter.read()[:2] == ([], 0)


@pytest.mark.parametrize(
    "half", [b'{"kind": "train", "st', b"\0\0\0\n", b'\0\0: 1}\n{"kind": "train"', b"\xff\n", b"3\n"]
)
def test_a_log_forgets_what_came_after_a_step_and_half_lines(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, upto=0) as log:
        for step in (1, 2, 3):
            log.write("train", step, loss=math.inf if step == 2 else 1.0)
    with path.open("ab") as file:
        file.write(half)
    with MetricsLog(path, upto=2) as log:
        assert log.latest["train"]["step"] == 2
        log.write("train", 3, loss=0.5)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, None), (3, 0.5)]


def written_on_a_full_disk(path, room_again):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(path, upto=0) as log:
        log.write("train", 1, loss=0.1)
        # Stands in for a full disk, which takes half of the second line.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
        try:
            for step in (2, 3):
                log.write("train", step, loss=0.1)
            log.sync()
            if not room_again:
                log.__exit__()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if room_again:
            log.write("train", 4, loss=0.1)


@pytest.mark.parametrize("room_again", [True, False])
def test_a_full_disk_ends_no_training_and_lines_stay_whole(tmp_path, room_again):
    path = tmp_path / "metrics.jsonl"
    with pytest.warns(UserWarning, match="could not be written to .*metrics.jsonl .*make room there"):
        written_on_a_full_disk(path, room_again)
    with MetricsLog(path, upto=4):
        assert [line["step"] for line in lines(tmp_path)] == ([1, 2, 3, 4] if room_again else [1])


def test_auto_is_a_device():
    assert isinstance(pick_device("auto"), torch.device)
