"""Bad input: an error that says what came, what is needed, what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from evo import Evo, Objective
from evo.core import Exploration, LatentSpace, Transformer
from evo.solvers import Euler, Heun, integrate
from tests.conftest import random_model

MODEL = random_model()
TOKENS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "error", "said"),
    [
        (TOKENS + 7, ValueError, r"id 7 among the tokens; ids of this model lie in \[0, 7\)"),
        (TOKENS - 1, ValueError, "id -1"),
        (TOKENS.float(), TypeError, "int64 tensor of ids, got torch.float32"),
        ([1, 2], TypeError, "got list"),
        (TOKENS[:, :0], ValueError, r"1 token\(s\) in each, got \(2, 0\)"),
        (TOKENS[:0], ValueError, r"got \(0, 5\)"),
        (TOKENS[0], ValueError, r"\(batch, length\).*got \(5,\)"),
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
        (torch.zeros(2), r"shape \(2, 5\) on cpu, got torch.float32 \(2,\)"),
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
    ],
)
def test_generation(arguments, said):
    with pytest.raises(ValueError, match=said):
        MODEL.generate(TOKENS, **{"max_new_tokens": 4, **arguments})


def test_prompts():
    with pytest.raises(ValueError, match="id 9 among the prompt"):
        MODEL.generate(TOKENS + 9, 3)
    with pytest.raises(TypeError, match="prompt must be an int64"):
        MODEL.vector_field(TOKENS.float())


def test_fields():
    latents = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\), got shape \(1, 2\)"):
        integrate(lambda z, t: t, latents, 1.0, solver=Euler(steps=2))
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        integrate(lambda z, t: z * torch.nan, latents, 1.0, solver=Euler(steps=2))


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="dimension 4, the backbone takes 6"):
        Evo(latent_space=LatentSpace(7, 4), backbone=Transformer(6, 16, 1, 2, positions=9))
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
