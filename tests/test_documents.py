"""Every code block of the README and of the documents runs, top to bottom, as a reader would run it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import tyro

from evo import Evo
from evo.cli import main
from evo.cli.train import Options, defaults
from evo.training import Checkpointer, OptimizerConfig
from evo.training.state import TrainState

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]
LINKED = [*PAGES, *sorted((ROOT / "benchmarks").rglob("README.md"))]
COMMANDS = sorted(
    {
        line
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
        if shlex.split(line, comments=True)
    }
)
# What is added to a command so that it is done in seconds.
LESS = {
    "prepare": "",
    "train": "--steps 2 --batch-size 2 --length 16 --overrides depth 1 --evaluation.sequences 2",
    "generate": "--max-new-tokens 4",
    "export": "",
    "info": "",
}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_code_in_documents_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "document"}
    text = document.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks, f"{document.name} has no code"
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        # Leading newlines keep the line numbers of a traceback those of the document.
        exec(compile("\n" * line + block.group(1), str(document), "exec"), namespace)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with what the commands of the documents find: the model that a demo leaves, a run, and a reader's own texts."""
    place = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    model = Evo.from_preset("tiny", vocab_size=259, depth=1)
    model.save_pretrained(place / "demo" / "model")
    with Checkpointer(place / "runs" / "done" / "checkpoints", keep=1) as checkpointer:
        checkpointer.save(TrainState.begin(model, OptimizerConfig()), corpus="text")
    texts = place / "my" / "texts"
    texts.mkdir(parents=True)
    for index in range(8):
        (texts / f"{index}.txt").write_text("the same words again\n" * 20)
    return place


def test_there_are_commands_to_run():
    assert {shlex.split(line, comments=True)[0] for line in COMMANDS} >= {"make", ".venv/bin/evo"}


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_in_documents_run(line, workplace, monkeypatch):
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    if program == "torchrun":
        module = arguments.index("-m")
        assert arguments[module + 1] == "evo.training"
        options = arguments[module + 2 :]
        assert tyro.cli(Options, args=options, default=defaults(options)).out.parts[0] == "runs"
        return
    assert Path(program).name == "evo", f"no way to try {line!r} here: teach this test one"
    monkeypatch.chdir(workplace)
    assert main([*arguments, *LESS[arguments[0]].split()]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_extras_to_install_exist(page):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    known = set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))
    for names in re.findall(r"pip install [^`\n]*?\[([^\]]+)\]", page.read_text(encoding="utf-8")):
        assert set(re.split(r",\s*", names)) <= known, names


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    for target, section in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", document.read_text(encoding="utf-8")):
        page = document.parent / target if target else document
        assert page.exists(), target
        if section:
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert section in anchors, section
