"""What identifies the model and the data of a run, so that a checkpoint of another one is recognised.

Rules: the weights are compared by a checksum. Data may be any iterable, so only the first batches are
compared, and all of them if the data are a list or a tuple. Two identities are compared by the entries that
both have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from .processes import digest
from .task import Data
from .weight_selection import is_sharded

FIRST = 8  # number of batches that are read to identify data

# Entry -> what differs if it differs.
WORDS = {
    "model": "another model",
    "first batches": "other data",
    "all batches": "other data",
    "held-out batches": "other held-out data",
}

Identity = dict[str, str]


def of_model(model: nn.Module) -> Identity:
    """Returns the checksum of all parameters of a model, by their names.

    If parameters are sharded, all processes call it together. Each is gathered in turn.
    """
    return {"model": digest([(name, _whole(value)) for name, value in model.named_parameters()])}


def of_batches(first: Iterable[Any], data: Data | None = None) -> Identity:
    """Returns the checksums of batches.

    Args:
        first: the first batches; at most `FIRST` are read.
        data: all batches, if ``first`` are of this list or tuple. Other data are not read.
    """
    with torch.random.fork_rng(devices=[]):  # a loader draws from torch's generator, also without shuffling
        found = {"first batches": digest(list(map(digest, islice(first, FIRST))))}
    if isinstance(data, (list, tuple)):
        found["all batches"] = digest(list(map(digest, data)))
    return found


def of_held_out(batches: Sequence[Any]) -> Identity:
    """Returns the checksum of held-out batches."""
    return {"held-out batches": digest(list(map(digest, batches)))}


def identified(data: Data) -> tuple[Data, Identity]:
    """Returns data and their identity. An iterator is replaced by one with the same batches."""
    if not isinstance(data, Iterator):
        return data, of_batches(data, data)
    first = list(islice(data, FIRST))
    return chain(first, data), of_batches(first)


def differences(found: Identity, wanted: Identity) -> list[str]:
    """Returns what differs between two identities, in words; entries that only one has are not compared."""
    wrong = [name for name in WORDS if name in found and name in wanted and found[name] != wanted[name]]
    return list(dict.fromkeys(WORDS[name] for name in wrong))


def _whole(value: Any) -> Tensor:
    """Returns a parameter without gradients, gathered from all processes if it is sharded."""
    whole: Tensor = value.detach()
    if is_sharded(value):
        whole = value.detach().full_tensor()
    return whole
