"""Training towards a sparsity by ADMM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfpformat.errors import OptionError
from sfpformat.pruning import (
    Alternation,
    Pattern,
    fisher,
    prune,
    statistics,
    train_sparse,
)

from ..support.pruning_nets import loss_of, trained_net

SETTINGS = Alternation(steps=200, rate=1e-2)


def test_training_prunes_to_the_sparsity_and_leaves_the_model() -> None:
    net, batches = trained_net()
    dense = {name: value.clone() for name, value in net.state_dict().items()}
    losses: list[float] = []
    found = train_sparse(net, batches, 0.85, settings=SETTINGS, progress=lambda _, loss: losses.append(loss))
    assert all(torch.equal(value, dense[name]) for name, value in net.state_dict().items())
    assert net.training
    total = sum(mask.numel() for mask in found.masks.values())
    assert sum(int((~mask).sum()) for mask in found.masks.values()) == int(0.85 * total + 0.5)
    assert len(losses) == 200
    for name, mask in found.masks.items():
        assert (found.weights[name][~mask] == 0).all()
        assert not torch.equal(found.weights[name][mask], dense[name][mask])


def test_at_high_sparsity_training_costs_far_less_than_fishers_mask() -> None:
    net, batches = trained_net()
    found = train_sparse(net, batches, 0.85, settings=SETTINGS)
    by_fisher, _ = trained_net()
    prune(by_fisher, fisher(net, statistics(net, batches, batches=8)), 0.85)
    net.load_state_dict(found.weights, strict=False)
    assert loss_of(net, batches) < 0.5 * loss_of(by_fisher, batches)


def test_weights_are_trained_to_patterns() -> None:
    net, batches = trained_net()
    found = train_sparse(net, batches, Pattern(1, 4), settings=Alternation(steps=20, objective="loss"))
    assert all((mask.view(len(mask), -1, 4).sum(2) == 1).all() for mask in found.masks.values())


def test_the_result_is_the_same_each_time() -> None:
    net, batches = trained_net()
    one, other = (train_sparse(net, batches, 0.8, settings=Alternation(steps=12)) for _ in range(2))
    assert all(torch.equal(one.weights[name], weight) for name, weight in other.weights.items())


def test_settings_that_make_no_sense_are_refused() -> None:
    net, batches = trained_net()
    cases: list[dict[str, Any]] = [{"steps": 0}, {"every": 0}, {"rate": 0.0}, {"penalty": float("inf")}]
    for words in (*cases, {"objective": "no"}):
        with pytest.raises(OptionError):
            Alternation(**words)
    with pytest.raises(OptionError, match="sparsity is 2"):
        train_sparse(net, batches, 2.0)
    with pytest.raises(OptionError, match="the data are empty"):
        train_sparse(net, [], 0.5)
