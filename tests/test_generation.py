"""Writing text: steps of every token (K-1), windows, prompts of different lengths, stop tokens, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo import solvers
from evo.core.draws import Draws
from evo.heads import FixedTimestep, LinearDecoder, NearestNeighborDecoder, NucleusPrior
from evo.schedules import Path, by_order, early_stop, full, late_start, step_counts
from evo.solvers import Ancestral, Euler, Exponential, ExponentialMultistep, Heun
from tests.conftest import generator, random_model

MODEL = random_model()
V, D = MODEL.latent_space.vocab_size, MODEL.latent_space.dim


def prompt_of(seed: int, batch: int = 2, length: int = 4) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=generator(seed))


@dataclass(frozen=True, kw_only=True)
class Watched(Euler):
    """Euler that remembers the states it was given."""

    rows: list = field(default_factory=list)

    def step(self, field, latents, level, next_level, state):
        self.rows.append((latents, level))
        return super().step(field, latents, level, next_level, state)


@given(seed=st.integers(0, 10**6), max_steps=st.integers(1, 12), plan=st.sampled_from([early_stop, late_start]))
def test_k_1_every_token_takes_its_steps_and_then_stands_still(seed, max_steps, plan):
    solver = Watched()
    out = MODEL.generate(
        prompt_of(seed), 6, solver=solver, plan=plan, max_steps=max_steps, generator=generator(seed), trajectory=True
    )
    (steps,) = out.trajectory
    counts = step_counts(out.levels, max_steps)
    assert torch.equal(steps.levels, plan(out.levels, max_steps))
    live = (steps.levels[:, :-1] > 0).sum(1)
    waits = (steps.levels[:, :-1] == out.levels[:, None]).sum(1) - 1 if plan is late_start else 0
    assert torch.equal(live - waits * (counts > 0), counts)
    assert torch.equal(steps.tokens[:, -1], out.tokens)
    # From the row where its level is 0 a token is the embedding of its word, bit for bit.
    written = MODEL.latent_space.weight[out.tokens]
    for latents, level in solver.rows:
        done = level == 0
        assert torch.equal(latents[done], written[done])


@given(seed=st.integers(0, 10**6))
def test_a_committed_token_is_decoded_from_the_state_its_last_step_starts_from(seed):
    out = MODEL.generate(prompt_of(seed), 6, generator=generator(seed), trajectory=True, max_steps=5)
    (steps,) = out.trajectory
    for row in range(5):
        commits = (steps.levels[:, row] > 0) & (steps.levels[:, row + 1] == 0)
        assert torch.equal(steps.tokens[:, row][commits], out.tokens[commits])


@pytest.mark.parametrize("plan", [early_stop, late_start, full, by_order(torch.linspace(0, 1, 7), 0.4)], ids=str)
@pytest.mark.parametrize("name", ["euler", "heun", "exponential", "dopri5"])
def test_every_solver_walks_every_plan(plan, name):
    solver = {
        "euler": Euler(),
        "heun": Heun(steps=6),
        "exponential": Exponential(schedule=MODEL.schedule),
        "dopri5": solvers.TorchDiffEq("dopri5", rtol=1e-3, atol=1e-3),
    }[name]
    out = MODEL.generate(
        prompt_of(1), 7, solver=solver, plan=plan, max_steps=6, generator=generator(1), timestep_head=FixedTimestep(0.9)
    )
    assert out.tokens.shape == (2, 7)
    rows = {"euler": 6, "heun": 11, "exponential": 6}
    if name in rows and plan is full:
        assert out.nfe == rows[name]
    assert 0 < out.nfe < 2000


def test_a_plan_made_for_whole_windows_serves_shorter_ones():
    plan = by_order(torch.linspace(0, 1, 4), 0.4)
    out = MODEL.generate(prompt_of(1), 6, window=4, plan=plan, timestep_head=FixedTimestep(0.9), generator=generator(1))
    assert out.tokens.shape == (2, 6)
    MODEL.generate(
        prompt_of(1), 4, plan=plan, stop=list(range(V)), timestep_head=FixedTimestep(0), generator=generator(1)
    )


def test_a_fixed_method_of_torchdiffeq_takes_one_step_a_row():
    options = {"max_steps": 4, "timestep_head": FixedTimestep(0.9), "temperature": 0}
    ours, theirs = (
        MODEL.generate(prompt_of(1), 6, solver=solver, generator=generator(1), **options)
        for solver in (Euler(), solvers.TorchDiffEq("euler"))
    )
    assert theirs.nfe == ours.nfe
    assert torch.equal(theirs.tokens, ours.tokens)
    with pytest.raises(ValueError, match="steps=7 and max_steps is 4"):
        MODEL.generate(prompt_of(1), 6, solver=solvers.TorchDiffEq("euler", steps=7), **options)


@given(
    seed=st.integers(0, 10**6),
    plan=st.sampled_from([early_stop, late_start]),
    window=st.sampled_from([2, 3, 8]),
    eta=st.sampled_from([0.5, 1.0]),
)
def test_a_stochastic_solver_writes_each_sequence_as_if_alone(seed, plan, window, eta):
    options = {"solver": Ancestral(schedule=MODEL.schedule, eta=eta), "plan": plan, "max_steps": 4, "window": window}
    prompt, most = prompt_of(seed, 3), [8, 3, 6]
    seeds = [generator(seed + row) for row in range(3)]
    whole = MODEL.generate(prompt, most, stop=5, generator=seeds, **options)
    levels = torch.rand(3, 4, generator=generator(seed), dtype=torch.float64)
    rewritten = MODEL.edit(
        prompt, levels, generator=[generator(seed + row) for row in range(3)], solver=options["solver"]
    )
    for row, length in enumerate(whole.lengths.tolist()):
        mine = prompt[row : row + 1]
        alone = MODEL.generate(mine, most[row], stop=5, generator=generator(seed + row), **options)
        assert torch.equal(alone.tokens[0, :length], whole.tokens[row, :length])
        again = MODEL.edit(mine, levels[row : row + 1], generator=generator(seed + row), solver=options["solver"])
        assert torch.equal(again.tokens[0], rewritten.tokens[row])


def test_a_stochastic_solver_draws_noise_that_is_new_at_every_step_and_in_every_window():
    drawn = []

    @dataclass(frozen=True, kw_only=True)
    class Listening(Ancestral):
        def _fresh(self, latents):
            drawn.append(super()._fresh(latents))
            return drawn[-1]

    def write(solver):
        return MODEL.generate(prompt_of(0), 6, solver=solver, window=3, max_steps=4, levels=1.0, generator=generator(0))

    text = write(Listening(schedule=MODEL.schedule))
    assert torch.equal(text.tokens, write(Ancestral(schedule=MODEL.schedule)).tokens)
    noise = torch.cat(drawn).flatten(0, 1)
    assert len(drawn) == 6
    assert (torch.pdist(noise) > 0).all()
    with pytest.raises(ValueError, match="the solver has a generator of its own"):
        write(Ancestral(schedule=MODEL.schedule, generator=generator(0)))


def test_a_stochastic_method_of_ones_own_draws_from_each_sequences_stream_too():
    @dataclass(frozen=True, kw_only=True)
    class Shaken(Euler):
        generators: Sequence[torch.Generator] = ()

        def drawing(self, generators):
            return replace(self, generators=generators())

        def step(self, field, latents, level, next_level, state):
            latents, state = super().step(field, latents, level, next_level, state)
            fresh = [torch.randn(latents.shape[1:], generator=each, dtype=latents.dtype) for each in self.generators]
            return latents + (level != next_level).unsqueeze(-1) * torch.stack(fresh), state

    prompt, options = prompt_of(0, 3), {"solver": Shaken(), "levels": 1.0, "max_steps": 4}
    whole, still = (
        MODEL.generate(
            prompt, 6, generator=[generator(row) for row in range(3)], **(options | {"solver": solver})
        ).tokens
        for solver in (Shaken(), Euler())
    )
    assert not torch.equal(whole, still)
    for row in range(3):
        alone = MODEL.generate(prompt[row : row + 1], 6, generator=generator(row), **options).tokens
        assert torch.equal(alone[0], whole[row])


@dataclass(frozen=True, kw_only=True)
class Resting(Path):
    """Half-way every token rests for a while, one from a high level before the others."""

    def ramp(self, levels, clock, t_min):
        begin = torch.where(levels > 0.8, 0.3, 0.6)
        way = torch.minimum(clock, begin) + (clock - begin - 0.2).clamp(min=0)
        return levels * (1 - way / 0.8), levels / 0.8 * ((clock < begin) | (clock > begin + 0.2))


def test_a_method_with_a_memory_forgets_while_a_sequence_rests_whoever_else_moves():
    levels = torch.tensor([[0.9], [0.7]], dtype=torch.float64)
    options = {"plan": Resting(), "max_steps": 10, "solver": ExponentialMultistep(schedule=MODEL.schedule)}
    for seed in range(4):
        seeds = [generator(seed), generator(seed + 100)]
        (whole,) = MODEL.generate(
            prompt_of(0), 8, levels=levels, trajectory=True, generator=seeds, **options
        ).trajectory
        for row, mine in enumerate(prompt_of(0).split(1)):
            (alone,) = MODEL.generate(
                mine, 8, levels=levels[row : row + 1], trajectory=True, generator=generator(seed + 100 * row), **options
            ).trajectory
            assert torch.equal(alone.tokens[0], whole.tokens[row])


def test_solvers_agree_as_steps_grow():
    head = FixedTimestep(0.8)
    written = [
        MODEL.generate(
            prompt_of(3),
            6,
            solver=solver,
            max_steps=steps,
            timestep_head=head,
            temperature=0,
            generator=generator(3),
            plan=full,
        ).tokens
        for solver, steps in ((Euler(), 400), (Heun(), 100), (Exponential(schedule=MODEL.schedule), 400))
    ]
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])


@given(seed=st.integers(0, 10**6))
def test_the_same_seed_gives_the_same_text(seed):
    first, second = (MODEL.generate(prompt_of(seed), 8, generator=generator(seed), max_steps=4) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.levels, second.levels)


def test_another_seed_gives_another_text():
    texts = {
        tuple(MODEL.generate(prompt_of(0), 8, generator=generator(seed), max_steps=4).tokens.flatten().tolist())
        for seed in range(5)
    }
    assert len(texts) > 1


@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 5), min_size=2, max_size=3),
    level=st.sampled_from([0.0, 0.35, 1.0]),
)
def test_prompts_of_different_lengths_are_as_if_alone(seed, lengths, level):
    prompt = prompt_of(seed, len(lengths), 5)
    size = torch.tensor(lengths)
    greedy = {"temperature": 0, "timestep_head": FixedTimestep(level), "max_steps": 4}
    seeds = range(seed, seed + len(lengths))
    together = MODEL.generate(prompt, 5, lengths=size, generator=[generator(each) for each in seeds], **greedy)
    for row, length in enumerate(lengths):
        alone = MODEL.generate(prompt[row : row + 1, :length], 5, generator=generator(seeds[row]), **greedy)
        assert torch.equal(alone.tokens[0], together.tokens[row])


@given(seed=st.integers(0, 10**6), level=st.sampled_from([0.0, 0.6]), window=st.sampled_from([None, 2, 3]))
def test_stop_tokens_end_a_sequence(seed, level, window):
    prompt = prompt_of(seed, 4, 3)
    options = {"timestep_head": FixedTimestep(level), "max_steps": 3, "window": window}
    out = MODEL.generate(prompt, 9, stop=[2, 5], generator=generator(seed), **options)
    for tokens, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True):
        assert not {2, 5} & set(tokens[: length - 1])
        if length < 9:
            assert tokens[length - 1] in (2, 5)
            assert set(tokens[length:]) <= {2}


def test_without_a_stop_token_every_sequence_is_full():
    out = MODEL.generate(prompt_of(0), 9, generator=generator(0))
    assert out.lengths.tolist() == [9, 9]


@pytest.mark.parametrize("window", [None, 1, 4])
def test_an_empty_prompt_is_a_prompt(window):
    out = MODEL.generate(torch.zeros(3, 0, dtype=torch.int64), 6, window=window, generator=generator(0), max_steps=3)
    assert out.tokens.shape == (3, 6)


@given(seed=st.integers(0, 10**6), window=st.integers(1, 5), greedy=st.booleans())
def test_at_level_0_windows_change_nothing(seed, window, greedy):
    """Noise and draws are a position's due, whatever window it falls in; the passes are the same ones, so this holds bit for bit."""
    options = {"timestep_head": FixedTimestep(0), "temperature": 0 if greedy else 0.9, "stop": 5}
    whole, parts = (
        MODEL.generate(prompt_of(seed), 9, window=size, generator=generator(seed), **options) for size in (None, window)
    )
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.lengths, parts.lengths)


@given(seed=st.integers(0, 10**6), new=st.integers(1, 8))
def test_the_beginning_of_a_text_does_not_depend_on_how_long_it_may_become(seed, new):
    options = {"window": 2, "max_steps": 3}
    long = MODEL.generate(prompt_of(seed), 8, generator=generator(seed), **options)
    short = MODEL.generate(prompt_of(seed), new // 2 * 2 or 2, generator=generator(seed), **options)
    assert torch.equal(short.tokens, long.tokens[:, : short.tokens.shape[1]])


@given(seed=st.integers(0, 10**6), level=st.sampled_from([0.4, 1.0]))
def test_a_finished_window_is_prompt_to_the_next(seed, level):
    """A window behind a window is one behind a prompt that ends with its words, under the noise and the draws that are its due."""
    prompt, model = prompt_of(seed, 1), MODEL
    options = {"timestep_head": FixedTimestep(level), "max_steps": 3}
    both = model.generate(prompt, 8, window=4, generator=generator(seed), **options).tokens
    first = model.generate(prompt, 4, generator=generator(seed), **options).tokens
    with pytest.MonkeyPatch.context() as patch:
        take = Draws.take
        patch.setattr(Draws, "take", lambda draws, count, like: (take(draws, 4, like), take(draws, count, like))[1])
        behind = torch.cat([prompt, first], 1)
        second = model.generate(behind, 4, generator=generator(seed), **options).tokens
    assert torch.equal(both, torch.cat([first, second], 1))


def test_decoders_and_priors_are_swapped_by_hand():
    prompt = prompt_of(0)
    out = MODEL.generate(prompt, 6, decoder=NearestNeighborDecoder(), generator=generator(0), max_steps=4)
    sampled = LinearDecoder(prior=NucleusPrior(top_p=1.0, temperature=1.0))
    other = MODEL.generate(prompt, 6, decoder=sampled, generator=generator(0), max_steps=4)
    assert out.tokens.shape == other.tokens.shape == (2, 6)
    banned = NucleusPrior(processors=(lambda logits: logits.index_fill(-1, torch.tensor([0, 1, 2]), -torch.inf),))
    at_once = MODEL.generate(prompt, 20, prior=banned, timestep_head=FixedTimestep(0), generator=generator(0))
    assert at_once.tokens.min() >= 3


def test_generation_leaves_the_mode_as_it_was():
    model = random_model()
    model.train()
    model.backbone.eval()  # frozen, without dropout
    modes = [module.training for module in model.modules()]
    model.generate(prompt_of(0), 3, generator=generator(0), max_steps=2)
    assert [module.training for module in model.modules()] == modes


def test_a_vector_field_behind_a_prompt_is_the_window_of_one_pass():
    prompt = prompt_of(7)
    latents = torch.randn(2, 5, D, generator=generator(7), dtype=torch.float64)
    level = torch.rand(2, 5, generator=generator(8), dtype=torch.float64) * 0.8 + 0.15
    clean = MODEL.latent_space.embed(prompt)
    size = torch.full((2,), 4)
    hidden = MODEL.refine(
        torch.cat([clean, latents], 1), torch.cat([torch.zeros(2, 4).double(), level], 1), prompt=size
    )[:, 4:]
    logits = MODEL.readout(hidden, MODEL.latent_space.weight)
    flow = MODEL.vector_field(prompt)
    torch.testing.assert_close(flow.network(latents, level), logits, rtol=0, atol=1e-12)
    assert (flow(latents, torch.full_like(level, 0.05)) == 0).all()


def test_nan_weights_are_found():
    model = random_model()
    with torch.no_grad():
        model.backbone.own_role[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite latents while refining"):
        model.generate(prompt_of(0), 4, timestep_head=FixedTimestep(1), generator=generator(0))
    with torch.no_grad():
        model.bos[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits while sketching"):
        model.generate(prompt_of(0), 4, temperature=0, generator=generator(0))
