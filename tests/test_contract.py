"""Bad input: an error that says what came, what is needed, what to do."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from evo import Evo, Objective, evaluate
from evo.core import Exploration, LatentSpace, Transformer
from evo.core.contract import check_tokens
from evo.heads import FixedTimestep
from evo.schedules import Cosine
from evo.solvers import Euler, Heun, integrate
from tests.conftest import generator, random_model

MODEL = random_model()
TOKENS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "error", "said"),
    [
        (
            TOKENS + 7,
            ValueError,
            r"tokens: id 7 is unknown; ids of this model lie in \[0, 7\): use the tokenizer.*vocab_size",
        ),
        (TOKENS - 1, ValueError, "id -1"),
        (TOKENS.float(), TypeError, "int64 tensor of ids, got torch.float32"),
        ([1, 2], TypeError, "got list"),
        (TOKENS[:, :0], ValueError, r"1 token in each, got \(2, 0\)"),
        (TOKENS[:0], ValueError, r"got \(0, 5\)"),
        (TOKENS[0], ValueError, r"\(batch, length\).*got \(5,\); ids.unsqueeze\(0\) makes a batch"),
        (torch.zeros(1, 41, dtype=torch.int64), ValueError, "41 tokens, the model's context is 40"),
    ],
)
def test_tokens(tokens, error, said):
    for call in (MODEL, MODEL.context_logits, MODEL.log_prob):
        with pytest.raises(error, match=said):
            call(tokens)


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        (1.5, "got 1.5"),
        (-0.1, "got -0.1"),
        (float("nan"), "got nan"),
        (torch.full((2, 5), 2.0), "got 2.0"),
        (torch.zeros(2), r"on cpu, of shape \(2, 5\), \(2, 1\).* or \(1, 5\).*, got torch.float32 \(2,\)"),
        (torch.zeros(5), r"\(1, 5\) for one a position, got torch.float32 \(5,\)"),
        (torch.zeros(2, 4), r"got torch.float32 \(2, 4\)"),
        (torch.tensor([[0.5], [float("nan")]]), "got nan"),
        (torch.zeros(2, 5, dtype=torch.int64), "floating-point"),
    ],
)
def test_levels(levels, said):
    with pytest.raises(ValueError, match=said):
        MODEL(TOKENS, levels=levels)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loss_mask": torch.ones(2, 4, dtype=torch.bool)}, r"loss_mask must be bool of shape \(2, 5\)"),
        ({"loss_mask": torch.ones(2, 5)}, "loss_mask must be bool"),
        ({"prompt_length": 6}, r"prompt_length must lie in \[0, 5\]"),
        ({"prompt_length": torch.tensor([1.0, 2.0])}, "prompt_length must be int64"),
        ({"lengths": torch.tensor([0, 5])}, r"lengths must lie in \[1, 5\]"),
        ({"lengths": torch.tensor([5])}, r"shape \(2,\)"),
        ({"lengths": [5, 6]}, r"lengths must lie in \[1, 5\], got \[5, 6\]"),
        ({"prompt_length": [1]}, r"prompt_length must be int64 of shape \(2,\)"),
    ],
)
def test_masks_and_lengths(arguments, said):
    with pytest.raises(ValueError, match=said):
        MODEL(TOKENS, **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 36}, "5 tokens and 36 new ones do not fit the model's context of 40"),
        ({"window": 0}, "window is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"solver": Heun(steps=3)}, "steps=3 and max_steps is 20"),
        ({"stop": 7}, "stop is 7"),
        ({"stop": []}, "stop is empty"),
        ({"lengths": torch.tensor([6, 1])}, r"lengths must lie in \[0, 5\]"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"stop": torch.tensor([9])}, r"stop is tensor\(\[9\]\); it needs ids in \[0, 7\)"),
        ({"plan": lambda levels, steps, t_min: levels[:, None].repeat(1, steps, 1)}, "the plan has shape"),
        ({"plan": lambda levels, steps, t_min: levels[:, None].repeat(1, steps + 1, 1)}, "the plan is wrong"),
    ],
)
def test_generation(arguments, said):
    with pytest.raises(ValueError, match=said):
        MODEL.generate(TOKENS, **{"max_new_tokens": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lengths": "ab"}, "lengths is 'a'; it needs a whole number"),
        ({"prompt_length": 2.5}, "prompt_length is 2.5"),
        ({"loss_mask": [[True] * 5] * 2}, r"loss_mask must be bool of shape \(2, 5\), got list"),
        ({"documents": [[0] * 5] * 2}, r"documents must be int64 ids of shape \(2, 5\) on cpu, got list"),
        ({"levels": [0.5] * 5}, r"it needs None, one number, or a tensor of shape \(2, 5\)"),
        ({"levels": "a"}, "levels is 'a'"),
        ({"levels": True}, "levels is True"),
        ({"prompt_length": True}, "prompt_length is True"),
        ({"prompt_length": [True, 2]}, "prompt_length is True"),
        ({"generator": 3}, "generator is 3; it needs a torch.Generator"),
        ({"path": "full"}, "path is 'full'; it needs a path"),
        ({"part": 3}, "part is 3"),
        ({"objective": {}}, r"objective is {}; it needs an `Objective`"),
        ({"objective": Objective}, "objective is the class Objective"),
    ],
)
def test_what_is_of_another_kind(arguments, said):
    with pytest.raises(TypeError, match=said):
        random_model().train()(TOKENS, **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it needs a whole number"),
        ({"max_new_tokens": [4, "4"]}, "max_new_tokens is '4'"),
        ({"window": 2.5}, "window is 2.5"),
        ({"stride": 2.5}, "stride is 2.5"),
        ({"max_steps": 2.5}, "max_steps is 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True; it needs a whole number"),
        ({"max_new_tokens": torch.tensor([True, True])}, "max_new_tokens is True"),
        ({"max_steps": True}, "max_steps is True"),
        ({"max_steps": torch.tensor(True)}, "max_steps is a bool tensor"),
        ({"refresh": True}, "refresh is True"),
        ({"refresh": 1.5}, "refresh is 1.5; it needs a whole number"),
        ({"fidelity": "a"}, r"fidelity is 'a'; .* in \(0, 1\], or None"),
        ({"fidelity": True}, "fidelity is True"),
        ({"top_p": "a"}, "top_p is 'a'; it needs a number"),
        ({"top_p": None}, "top_p is None"),
        ({"temperature": "a"}, "temperature is 'a'"),
        ({"temperature": None}, "temperature is None"),
        ({"stop": True}, "stop is True; it needs a whole number"),
        ({"stop": "a"}, "stop is 'a'; it needs one id, ids, or 2 sets"),
        ({"generator": [3, 4]}, r"generator is \[3, 4\]"),
        ({"solver": "dopri5"}, r"solver is 'dopri5'; it needs a solver, such as evo.solvers.Euler\(\)"),
        ({"solver": Euler}, "solver is the class Euler"),
        ({"plan": "full"}, "plan is 'full'"),
        ({"plan": torch.zeros(2, 5, 4)}, r"plan is a float32 tensor of shape \(2, 5, 4\)"),
        ({"decoder": "argmax"}, "decoder is 'argmax'"),
        ({"prior": FixedTimestep}, "prior is the class FixedTimestep"),
        ({"timestep_head": 0.5}, r"timestep_head is 0.5; .* such as evo.heads.FixedTimestep\(0.5\)"),
        ({"speculation": 4}, r"speculation is 4; it needs Speculation\(run=4\)"),
    ],
)
def test_parts_of_generation_are_refused_at_once(arguments, said):
    given = {"max_new_tokens": 4, "timestep_head": FixedTimestep(0.0), **arguments}
    for call in (MODEL.generate, MODEL.stream):
        with pytest.raises(TypeError, match=said):
            call(TOKENS, **given)


def test_ids_are_looked_at_once(monkeypatch):
    """On an accelerator every look waits for all that it was asked to do before."""
    looks = []
    for name in ("item", "tolist"):
        look = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, look=look: looks.append(look) or look(tensor))
    check_tokens(MODEL, TOKENS)
    assert len(looks) == 1


def test_whole_numbers_of_any_kind_are_the_same():
    def written(**options):
        return MODEL.generate(TOKENS, generator=generator(), **{"max_new_tokens": 4, **options}).tokens.tolist()

    assert written(max_new_tokens=np.int64(4), window=np.int64(2)) == written(window=2)
    assert written(lengths=[5, 2]) == written(lengths=torch.tensor([5, 2]))
    assert written(stop=np.int64(3)) == written(stop=torch.tensor([3])) == written(stop=3)
    assert written(stop=torch.tensor([[3], [4]])) == written(stop=[[3], [4]])
    listed = MODEL(TOKENS, lengths=[5, 4], prompt_length=[1, 2], generator=generator()).loss
    assert (
        listed
        == MODEL(TOKENS, lengths=torch.tensor([5, 4]), prompt_length=torch.tensor([1, 2]), generator=generator()).loss
    )
    assert (
        MODEL(TOKENS, levels=np.float32(0.5), generator=generator()).loss
        == MODEL(TOKENS, levels=0.5, generator=generator()).loss
    )


@pytest.mark.parametrize("count", [0, -1])
def test_no_clock_value_is_no_bound(count):
    for call in (MODEL.log_prob, partial(evaluate, MODEL)):
        with pytest.raises(ValueError, match=f"clock_values is {count}"):
            call(TOKENS, 1.0, clock_values=count)
    with pytest.raises(ValueError, match=f"batch_size is {count}"):
        evaluate(MODEL, TOKENS, batch_size=count)
    with pytest.raises(ValueError, match=r"levels has shape \(\), tokens \(2, 5\)"):
        evaluate(MODEL, TOKENS, torch.tensor(0.5))


@pytest.mark.parametrize("shape", [(2, 1), (1, 5)])
def test_levels_of_each_sequence_or_of_each_position(shape):
    levels = torch.rand(shape, generator=generator())
    whole = levels.expand(2, 5).clone()
    for call in (MODEL.log_prob, MODEL.edit):
        some, each = (call(TOKENS, given, generator=generator()) for given in (levels, whole))
        assert torch.equal(*(found if isinstance(found, torch.Tensor) else found.tokens for found in (some, each)))
    assert torch.equal(*(MODEL(TOKENS, levels=given, generator=generator()).bound for given in (levels, whole)))
    if shape == (2, 1):
        assert evaluate(MODEL, TOKENS, levels, batch_size=1, generator=generator()) == evaluate(
            MODEL, TOKENS, whole, batch_size=1, generator=generator()
        )


def test_lists_are_cut_into_batches_too():
    tokens = torch.arange(20).view(4, 5) % 7
    for given in ([5, 4, 3, 2], torch.tensor([5, 4, 3, 2])):
        found = evaluate(MODEL, tokens, 0.0, lengths=given, batch_size=2)
        assert found.tokens == 14


def test_prompts():
    with pytest.raises(ValueError, match="prompt: id 9"):
        MODEL.generate(TOKENS + 9, 3)
    with pytest.raises(ValueError, match=r"at least 1 sequence, got \(5,\); ids.unsqueeze\(0\) makes a batch"):
        MODEL.generate(TOKENS[0], 3)
    with pytest.raises(TypeError, match="prompt must be an int64"):
        MODEL.vector_field(TOKENS.float())


def test_fields():
    field, latents = MODEL.vector_field(), torch.zeros(1, 2, 8, dtype=torch.float64)
    for wrong in (
        (latents[..., :5], latents[..., 0]),
        (latents, latents[:, 0, 0]),
        (latents, 0.5),
        (latents[0], latents[0, :, 0]),
    ):
        with pytest.raises(ValueError, match=r"this flow needs latents \(B, N, 8\) and a level for each, \(B, N\)"):
            field(*wrong)
    latents = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\), got shape \(1, 2\)"):
        integrate(lambda z, t: t, latents, 1.0, solver=Euler(steps=2))
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        integrate(lambda z, t: z * torch.nan, latents, 1.0, solver=Euler(steps=2))


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="dimension 4, the backbone takes 6"):
        Evo(latent_space=LatentSpace(7, 4), backbone=Transformer(6, 16, 1, 2, positions=9))
    fitting = {"latent_space": LatentSpace(7, 4), "backbone": Transformer(4, 16, 1, 2, positions=9)}
    for wrong, said in (
        ({"schedule": Cosine}, "schedule is the class Cosine"),
        ({"schedule": "cosine"}, r"schedule is 'cosine'; it needs a `Schedule`, such as Cosine\(\)"),
        ({"latent_space": torch.nn.Embedding(7, 4)}, r"latent_space is Embedding\(7, 4\); it needs an `Embeddings`"),
        ({"backbone": None}, "backbone is None"),
        ({"backbone": torch.nn.Linear(4, 4)}, r"Linear lacks dim \(int\), width \(int\), positions \(int\), self_cond"),
        ({"timestep_head": FixedTimestep}, "timestep_head is the class FixedTimestep"),
        ({"readout": "linear"}, "readout is 'linear'"),
    ):
        with pytest.raises(TypeError, match=said):
            Evo(**{**fitting, **wrong})
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'latent_space'"):
        Evo(backbone=fitting["backbone"])
    with pytest.raises(ValueError, match="share 2"):
        Objective(exploration=Exploration(share=2))


def test_importing_evo_imports_nothing_optional():
    optional = ["xformers", "transformers", "tyro", "matplotlib", "hypothesis", "scipy", "huggingface_hub", "datasets"]
    # torch itself brings some of these along where they are installed; only what evo adds counts.
    code = (
        "import torch, sys; before = set(sys.modules); import evo; "
        f"print([m for m in {optional} if m in sys.modules and m not in before])"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
