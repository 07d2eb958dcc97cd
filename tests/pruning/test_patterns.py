"""Learning which weights of each group of a pattern are kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfpformat.errors import MismatchError, OptionError, SfpWarning
from sfpformat.pruning import Pattern, Settings, learn_importance, prune
from sfpformat.pruning.masked import Groups, ScoredWeight
from sfpformat.pruning.masks import masks_of
from sfpformat.pruning.task import CLASSIFY, evaluating

from ..support.pruning_nets import trained_net


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (3, 8), (5, 16)])
@pytest.mark.parametrize(("shape", "dim"), [((6, 32), 1), ((32, 5), 0), ((3, 16, 3, 2), 1)])
def test_groups_keep_what_the_mask_of_the_pattern_keeps(
    keep: int, of: int, shape: tuple[int, ...], dim: int
) -> None:
    scores = torch.randint(5, shape, generator=torch.Generator().manual_seed(of)).float()  # with ties
    groups = Groups(of, int(torch.tensor(shape[dim + 1 :]).prod()))
    kept, threshold = groups.kept(scores.reshape(shape[0], -1), of - keep)
    expected = masks_of({"w": scores.numpy()}, Pattern(keep, of), along={"w": (dim, 1)})["w"]
    assert torch.equal(kept.view(shape), torch.from_numpy(expected))
    flat = scores.reshape(shape[0], -1)
    assert (flat[kept] >= threshold[kept]).all()
    assert (flat[~kept] <= threshold[~kept]).all()
    everything, lowest = groups.kept(flat, 0)
    assert everything.all()
    assert (lowest == -torch.inf).all()


def test_gradients_are_those_of_a_sigmoid_around_the_threshold_of_the_group() -> None:
    torch.manual_seed(0)
    weight, start, gradient = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8, 8)
    scored = ScoredWeight(
        weight, start, torch.arange(0), own=torch.float32, temperature=0.5, groups=Groups(4, 1)
    )
    scored.threshold = 2.0
    layer, rows, columns = scored.gradients(weight, lambda block: gradient[block])
    ordered = start.view(8, 2, 4).sort(-1).values
    halfway = ((ordered[..., 1] + ordered[..., 2]) / 2)[..., None].expand(8, 2, 4).reshape(8, 8)
    gate = torch.sigmoid((start - halfway) / 0.5)
    expected = gradient * weight * gate * (1 - gate) / 0.5
    assert scored.own_gradient is not None
    torch.testing.assert_close(scored.own_gradient, expected)
    torch.testing.assert_close(columns, expected.sum(0, keepdim=True))
    torch.testing.assert_close(rows, expected.sum(1, keepdim=True))
    torch.testing.assert_close(layer, expected.sum())
    assert ((scored.masked().view(8, 2, 4) != 0).sum(-1) == 2).all()


class Convolutions(nn.Module):
    """Convolutions whose inputs are dimension 1 and 0, and one that 2:4 does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.third, self.head = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x).relu()).relu()).relu()
        out: Tensor = self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        return out


def divergence(model: nn.Module, pruned: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with evaluating(model, pruned), torch.no_grad():
        found = [float(CLASSIFY.divergence_of(pruned, model, batch)) for batch in batches]
    return sum(found) / len(found)


@pytest.mark.parametrize("steps", [1, 10, 60])
def test_each_group_has_its_survivors_and_no_result_is_worse_than_its_start(steps: int) -> None:
    net, batches = trained_net()
    pattern, held_out = Pattern(2, 4), batches[6:]
    noise = [(torch.randn_like(x), y[torch.randperm(len(y))]) for x, y in batches[:6]]
    start = {name: w.detach().abs() for name, w in net.named_parameters() if w.dim() > 1}
    for data in (batches[:6], noise):
        learned = learn_importance(
            net, data, pattern, settings=Settings(steps=steps), start=start, held_out=held_out
        )
        pruned, by_start = copy.deepcopy(net), copy.deepcopy(net)
        masks = prune(pruned, learned.importances, pattern)
        prune(by_start, start, pattern)
        assert masks.keys() == start.keys()
        for mask in masks.values():
            assert (mask.view(len(mask), -1, 4).sum(-1) == 2).all()
        assert learned.choice is not None
        after, before = (divergence(net, one, held_out) for one in (pruned, by_start))
        assert after == pytest.approx(learned.choice.chosen[0], rel=1e-4)
        assert after <= before * (1 + 1e-5)
    if steps == 60:
        learned = learn_importance(
            net, batches[:6], pattern, settings=Settings(steps=steps), start=start, held_out=held_out
        )
        assert learned.choice is not None
        assert learned.choice.chosen[0] < 0.5 * learned.choice.start[0]


def test_patterns_run_along_the_inputs_of_convolutions_and_name_what_they_do_not_fit() -> None:
    torch.manual_seed(0)
    net = Convolutions()
    data = [(torch.randn(8, 3, 9, 9), torch.randint(5, (8,))) for _ in range(6)]
    with pytest.warns(SfpWarning, match=r"2:4 does not fit 'first.weight' \(.*these tensors are not pruned"):
        learned = learn_importance(net, data, Pattern(2, 4), settings=Settings(steps=5))
    assert learned.importances.keys() == {"second.weight", "third.weight", "head.weight"}
    masks = prune(copy.deepcopy(net), learned.importances, Pattern(2, 4))
    second, third = masks["second.weight"], masks["third.weight"]
    assert (second.view(8, 2, 4, 9).sum(2) == 2).all()
    assert (third.view(2, 4, 3 * 4).sum(1) == 2).all()
    odd = nn.Linear(7, 3)
    with pytest.raises(OptionError, match="nothing would be pruned"):
        learn_importance(odd, [torch.randn(4, 7)], Pattern(2, 4), start={"weight": odd.weight.abs()})


def test_a_checkpoint_of_another_pattern_is_refused(tmp_path: Path) -> None:
    net, batches = trained_net()
    start = {name: w.detach().abs() for name, w in net.named_parameters() if w.dim() > 1}
    settings, path = Settings(steps=2), tmp_path / "state.pt"
    learn_importance(net, batches, Pattern(2, 4), settings=settings, start=start, checkpoint=path)
    learn_importance(net, batches, Pattern(2, 4), settings=settings, start=start, checkpoint=path)
    for other in (Pattern(1, 2), 0.5):
        with pytest.raises(MismatchError, match="checkpoint of a run with another pattern"):
            learn_importance(net, batches, other, settings=settings, start=start, checkpoint=path)
    with pytest.raises(OptionError, match="select the method weights"):
        learn_importance(net, batches, Pattern(2, 4), settings=Settings(steps=2, method="weights"))
