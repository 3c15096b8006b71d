"""What every way of writing owes, whatever it is: memory that is given back, and a model that survives bad weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from evo import Evo
from evo.core import Cache, Chunk


@contextmanager
def caches() -> Iterator[list[weakref.ref[Cache]]]:
    """All that are made meanwhile."""
    made: list[weakref.ref[Cache]] = []
    create = Cache.__init__

    def creating(self: Cache, *args: object, **options: object) -> None:
        create(self, *args, **options)
        made.append(weakref.ref(self))

    with mock.patch.object(Cache, "__init__", creating):
        yield made


def assert_freed(begin: Callable[[], Generator[Chunk, None, None]]) -> None:
    """A stream that has been closed after its first chunk keeps no cache."""
    with caches() as made:
        chunks = begin()
        next(chunks)
        assert any(cache() is not None for cache in made)
        chunks.close()
    gc.collect()
    assert made
    assert all(cache() is None for cache in made)


def assert_survives_nan(model: Evo, write: Callable[[], Tensor], message: str) -> None:
    """A weight that is NaN makes `write` fail, and no more: once it is mended, the same text comes again, in the same mode."""
    expected, mode = write(), model.training
    weight = model.backbone.blocks[1].attention.v.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=message):
        write()
    assert model.training == mode
    with torch.no_grad():
        weight.copy_(kept)
    assert torch.equal(write(), expected)
