"""`Evo.stream`: what `generate` writes, as it becomes final."""

from __future__ import annotations

import contextlib
import gc
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.core import Chunk
from evo.heads import FixedTimestep
from tests.conftest import generator, random_model
from tests.writing_cases import caches

MODEL = random_model()
V = MODEL.latent_space.vocab_size


def prompt_of(seed: int, batch: int = 3, length: int = 4) -> torch.Tensor:
    return torch.randint(0, V, (batch, length), generator=generator(seed))


def joined(chunks: list[Chunk], batch: int) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in range(batch)]
    for chunk in chunks:
        assert chunk.position == len(texts[chunk.row]), "chunks of a sequence come in order, without a gap"
        assert len(chunk.tokens) == len(chunk.levels) > 0
        texts[chunk.row] += chunk.tokens
    return texts


@given(
    seed=st.integers(0, 10**6),
    level=st.sampled_from([None, 0.0, 0.5, 1.0]),
    window=st.sampled_from([None, 1, 3]),
    every=st.integers(1, 9),
    stop=st.sampled_from([None, [2], [1, 5]]),
)
def test_the_chunks_are_what_generate_writes(seed, level, window, every, stop):
    head = None if level is None else FixedTimestep(level)
    options = {
        "timestep_head": head,
        "window": window,
        "stop": stop,
        "max_steps": 4,
        "lengths": torch.tensor([4, 1, 0]),
    }
    whole = MODEL.generate(prompt_of(seed), 9, generator=generator(seed), **options)
    chunks = list(MODEL.stream(prompt_of(seed), 9, generator=generator(seed), every=every, **options))
    texts = joined(chunks, 3)
    assert [len(text) for text in texts] == whole.lengths.tolist()
    assert all(text == row[: len(text)] for text, row in zip(texts, whole.tokens.tolist(), strict=True))
    for row in range(3):
        own = [chunk for chunk in chunks if chunk.row == row]
        assert [chunk.last for chunk in own] == [False] * (len(own) - 1) + [True]
        levels = torch.tensor([level for chunk in own for level in chunk.levels], dtype=torch.float64)
        assert torch.equal(levels, whole.levels[row, : len(levels)])


@pytest.mark.parametrize("every", [1, 4])
def test_at_level_0_tokens_come_as_they_are_written(every):
    passes = []
    handle = MODEL.backbone.register_forward_hook(lambda *_: passes.append(None))
    try:
        seen = [
            (len(passes), len(chunk.tokens))
            for chunk in MODEL.stream(prompt_of(0, 1), 8, timestep_head=FixedTimestep(0), every=every)
        ]
    finally:
        handle.remove()
    assert seen == [(index, every) for index in range(every, 9, every)]


def test_a_token_waits_for_the_noise_before_it_and_for_no_other():
    levels = iter([0.0, 0.0, 0.9, 0.0, 0.0])

    def head(hidden, logits):
        return logits.new_full(logits.shape[:-1], next(levels))

    chunks = list(MODEL.stream(prompt_of(0, 1), 5, timestep_head=head, generator=generator(0)))
    assert [(chunk.position, len(chunk.tokens)) for chunk in chunks] == [(0, 1), (1, 1), (2, 3)]


def test_nothing_is_done_before_the_first_chunk_is_asked_for():
    with mock.patch.object(type(MODEL.backbone), "forward", side_effect=AssertionError):
        MODEL.stream(prompt_of(0), 4).close()


@pytest.mark.parametrize("how", ["close", "let go", "exhaust", "fail"])
@pytest.mark.parametrize("level", [0.0, 0.8])
def test_a_stream_that_has_ended_holds_no_memory(how, level):
    model = random_model()
    gc.collect()
    before = tensors()
    with caches() as made:
        gc.disable()  # what is freed is freed at once, not when somebody sweeps
        try:
            options = {"timestep_head": FixedTimestep(level), "window": 2, "stop": [5], "max_steps": 2}
            chunks = model.stream(prompt_of(0), 12, generator=generator(0), **options)
            next(chunks)
            assert made[0]() is not None
            if how == "close":
                chunks.close()
            elif how == "exhaust":
                list(chunks)
            elif how == "fail":
                handle = model.readout.register_forward_pre_hook(interrupt)
                with contextlib.suppress(KeyboardInterrupt):
                    list(chunks)
                handle.remove()
            if how != "let go":
                assert next(chunks, None) is None
            del chunks
            assert all(cache() is None for cache in made)
            assert tensors() <= before
        finally:
            gc.enable()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def tensors() -> int:
    """Elements of all tensors that are alive, but parameters."""
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum(x.numel() for x in alive)


def test_between_two_chunks_the_model_is_the_callers():
    model = random_model().train()
    expected = list(model.stream(prompt_of(0), 8, generator=generator(0), window=2, max_steps=2))
    found = []
    for chunk in model.stream(prompt_of(0), 8, generator=generator(0), window=2, max_steps=2):
        assert model.training
        assert torch.is_grad_enabled()
        model(prompt_of(1), generator=generator(1)).loss.backward()
        found.append(chunk)
    assert found == expected


def test_two_streams_do_not_meet():
    def begun(seed):
        return MODEL.stream(prompt_of(seed), 8, generator=generator(seed), window=3, max_steps=3)

    apart = [list(begun(seed)) for seed in range(2)]
    one, other = begun(0), begun(1)
    together: list[list[Chunk]] = [[], []]
    for _ in range(max(map(len, apart))):
        together[0] += [chunk] if (chunk := next(one, None)) else []
        together[1] += [chunk] if (chunk := next(other, None)) else []
    assert together == apart


def test_a_callers_generator_moves_by_one_number_a_sequence():
    """Whatever becomes of the text: a stream that is cut off leaves it where one that is read to the end does."""
    source, expected = generator(3), generator(3)
    torch.empty(3, dtype=torch.int64).random_(generator=expected)
    chunks = MODEL.stream(prompt_of(0), 8, generator=source)
    next(chunks)
    chunks.close()
    assert torch.equal(source.get_state(), expected.get_state())


def test_a_look_needs_a_token():
    with pytest.raises(ValueError, match="every is 0"):
        MODEL.stream(prompt_of(0), 4, every=0)


@pytest.mark.parametrize("options", [{"trajectory": True}, {"top_q": 0.9}])
def test_an_option_that_it_does_not_take_is_named_at_the_call(options):
    with pytest.raises(TypeError, match=f"takes no {next(iter(options))}"):
        MODEL.stream(prompt_of(0), 4, **options)
