"""`torchrun ... -m evo.training --data ...`: what `evo train` does, as one rank of a job."""

import sys

from evo.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
