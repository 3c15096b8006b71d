"""The command line: `evo prepare`, `evo train`, `evo generate`, `evo export`, `evo info`, `evo demo`.

One file per command, each with `Options`, a dataclass whose docstrings are the help, and `run(options)`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from evo._version import __version__

_COMMANDS = {
    "prepare": "tokenize a file or folder of text, once for all runs",
    "train": "train a model on a file or folder of text",
    "generate": "continue a text with a trained model",
    "export": "turn a checkpoint of a run into a model",
    "info": "sizes of the presets, and what this machine offers",
    "demo": "train on the Python standard library, compare solvers, draw the levels",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named by the first of `arguments` (by default the process's own); returns the exit status.

    Mistakes of the caller, and packages that an option needs and that are not there, end with one line and status 2; with EVO_TRACEBACK
    set, with the traceback. Where nobody reads what is printed any more (`evo generate | head`) the status is 141, as of other programs.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still to be flushed when the process ends goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(arguments: Sequence[str] | None) -> int:
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"evo {__version__}")
        return 0
    if name not in _COMMANDS:
        return _fail("evo", f"no command {name!r}; there are {', '.join(_COMMANDS)}")
    try:
        import tyro
    except ImportError:
        return _fail("evo", "the command line needs tyro: pip install 'evo-lm[train]'")
    command = importlib.import_module(f"evo.cli.{name}")
    # Of some options the defaults depend on others.
    default = {"default": command.defaults(rest)} if name == "train" else {}
    options = tyro.cli(command.Options, prog=f"evo {name}", args=rest, **default)
    # These import torch, which help and mistakes in the options need not wait for.
    from evo.solvers import SolverError
    from evo.training.guard import PREEMPTED, Preempted

    try:
        command.run(options)
    except Preempted as told:
        return _fail(f"evo {name}", str(told), status=PREEMPTED)
    except KeyboardInterrupt:
        return _fail(f"evo {name}", "interrupted", status=130)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ArithmeticError, ImportError, SolverError) as error:
        if os.environ.get("EVO_TRACEBACK"):
            raise
        return _fail(f"evo {name}", str(error))
    return 0


def _usage() -> str:
    commands = "\n".join(f"  {name:<10}{purpose}" for name, purpose in _COMMANDS.items())
    return f"usage: evo COMMAND [OPTIONS]\n\n{commands}\n\nevo COMMAND --help lists the options of a command."


def _fail(program: str, message: str, status: int = 2) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return status
