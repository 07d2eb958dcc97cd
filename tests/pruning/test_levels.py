"""Learning by levels: gradients are right, memory is small, and no result is worse than its start."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfpformat.errors import OptionError, SfpWarning
from sfpformat.pruning import scores
from sfpformat.pruning.calibration import statistics
from sfpformat.pruning.hierarchy import Learner, Plan
from sfpformat.pruning.holdout import Split, choose
from sfpformat.pruning.learning import bytes_per_weight, learn_importance
from sfpformat.pruning.learning_settings import Settings
from sfpformat.pruning.levels import Levels, quantile, standard_starts
from sfpformat.pruning.masked import LEVELS, MaskedModel, Masking, ScoredWeight
from sfpformat.pruning.pipeline import prune
from sfpformat.pruning.signal import SignalAdam
from sfpformat.pruning.task import CLASSIFY, Task, divergence, numbered
from sfpformat.pruning.thresholds import Sparsity

from ..support.pruning_nets import CLASSES, WIDTH, loss_of, trained_net

LEVELS_ONLY = Settings(method="levels", steps=60)


def levels_of(net: nn.Module, batches: list[tuple[Tensor, Tensor]], **words: Any) -> Levels:
    found = scores.fisher(net, statistics(net, batches))
    weights = {name: net.get_parameter(name) for name in found}
    usual: dict[str, Any] = {"network": False, "own": torch.float32, "temperature": 0.5}
    return Levels(weights, found, **(usual | words))


# ---------------------------------------------------------------------------------------- masked weights


class Turned(nn.Module):
    """A linear layer with the layout of transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 7), self.weight)


class Joined(nn.Module):
    """Weights that are used in a list, as an attribute and by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(2, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.a, self.b]).T + (x @ self.a.T).matmul(self.a).sum()


class Attention(nn.MultiheadAttention):
    """Self-attention whose weights are arguments of a torch function."""

    def __init__(self) -> None:
        super().__init__(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # for query, key and value
        out: Tensor = super().forward(x, x, x)[0]
        return out


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(7, 5), torch.randn(3, 4, 7)),
        (lambda: nn.Linear(7, 5, bias=False), torch.randn(7)),
        (Turned, torch.randn(6, 7)),
        (Joined, torch.randn(6, 7)),
        (Attention, torch.randn(2, 3, 8)),
        (lambda: nn.Conv1d(2, 3, 2), torch.randn(2, 2, 5)),
        (lambda: nn.Conv2d(1, 3, 2), torch.randn(2, 1, 4, 4)),
        (lambda: nn.Embedding(9, 4), torch.tensor([1, 2, 2])),
    ],
)
def test_gradients_of_scores_equal_those_of_a_straight_through_mask(make: Any, x: Tensor) -> None:
    torch.manual_seed(0)
    module: nn.Module = make()
    weights = {name: weight for name, weight in module.named_parameters() if weight.dim() > 1}
    scored = {
        name: ScoredWeight(
            weight,
            torch.randn(weight.shape),
            torch.arange(0, weight.numel(), 3),
            own=torch.float32,
            temperature=0.5,
        )
        for name, weight in weights.items()
    }
    for part in scored.values():
        part.network = torch.randn(part.start.shape).half()
    logits = [logit for part in scored.values() for logit in part.logits()]
    owns = {name: part.own for name, part in scored.items()}
    with torch.no_grad():
        for logit in [*logits, *owns.values()]:
            assert logit is not None
            logit += torch.randn(logit.shape) / 4
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    of = [*logits, x] if x.is_floating_point() else logits
    with Masking(weights, scored) as masking:
        out = module(x)
    found = torch.autograd.grad(out.square().sum(), of)
    trained = []
    for own in owns.values():
        assert own is not None
        trained.append(own.requires_grad_())

    def masked(name: str) -> Tensor:
        part = scored[name]
        layer, rows, columns = part.logits()
        assert part.network is not None
        assert part.own is not None
        score = part.start + part.network.float() + layer + rows + columns + part.own
        soft = torch.sigmoid(score / 0.5)
        gate = (score > 0).float() + soft - soft.detach()
        return gate.view(weights[name].shape) * weights[name].detach()

    expected = torch.func.functional_call(module, {name: masked(name) for name in weights}, x)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(expected.square().sum(), [*of, *trained])
    for gradient, wanted in zip(found, gradients[: len(of)], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert masking.used == set(weights)
    for part, wanted in zip(scored.values(), gradients[len(of) :], strict=True):
        torch.testing.assert_close(part.own_gradient, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.sampled, wanted.reshape(-1)[part.sample], rtol=1e-4, atol=1e-5)


def test_reading_attributes_of_a_weight_does_not_count_as_use() -> None:
    layer = nn.Linear(4, 4)
    scored = {
        "weight": ScoredWeight(layer.weight, torch.zeros(4, 4), torch.arange(16), own=None, temperature=1)
    }
    with Masking({"weight": layer.weight}, scored) as masking:
        assert layer.weight.dtype == torch.float32
        assert layer.weight.shape == (4, 4)
        assert layer.weight.numel() == layer.weight.size(0) * layer.weight.stride(0)
        assert layer.weight.device.type == "cpu"
    assert not masking.used


def test_autocast_keeps_its_dtype_under_masks() -> None:
    layer = nn.Linear(8, 8)
    part = ScoredWeight(layer.weight, torch.randn(8, 8), torch.arange(64), own=None, temperature=0.5)
    with Masking({"weight": layer.weight}, {"weight": part}), torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(3, 8))
    assert out.dtype == torch.bfloat16
    torch.autograd.backward(out.float().sum(), inputs=[part.rows])
    assert part.rows.grad is not None


def test_no_weight_sized_array_is_kept_for_the_backward_pass() -> None:
    layer = nn.Linear(64, 64)
    part = ScoredWeight(layer.weight, torch.randn(64, 64), torch.arange(64), own=None, temperature=0.5)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    masking = Masking({"weight": layer.weight}, {"weight": part})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), masking:
        layer(torch.randn(2, 64))
    assert sizes
    assert max(sizes) == 2 * 64


_PEAK = """
import sys, torch
from torch import nn
from sfpformat.pruning.learning import learn_importance
from sfpformat.pruning.learning_settings import Settings
from sfpformat.pruning.task import Task
torch.set_num_threads(1)
def peak():  # of this program; ru_maxrss would be that of the process which started it, if larger
    return 1024 * int(next(s for s in open("/proc/self/status") if s.startswith("VmHWM")).split()[1])
net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
x = [(torch.randn(4, 1024), torch.zeros(4, dtype=torch.int64)) for _ in range(3)]
task = Task(run=lambda model, batch: model(batch[0]))
start = None
if sys.argv[3] == "given":
    start = {name: weight.detach().square() for name, weight in net.named_parameters()}
settings = Settings(steps=2, method="levels", logits=sys.argv[1] == "True", half=sys.argv[2] == "True")
# What torch allocates once, and code that is read from disk when it runs.
torch.autograd.grad(net(x[0][0]).sum(), [net[0].weight])
small, y = nn.Linear(1024, 2, bias=False), [(batch[0], batch[1]) for batch in x]
given = None if start is None else {"weight": small.weight.detach().square()}
learn_importance(small, y, 0.5, settings=settings, task=task, start=given)
before = peak()
learn_importance(net, x, 0.5, settings=settings, task=task, start=start)
print((peak() - before) / sum(weight.numel() for weight in net.parameters()))
"""


def peak_bytes_per_weight(logits: bool, half: bool, start: str) -> float:
    # Without its own heap for small blocks, glibc returns freed tensors, so that the peak is of live ones.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    words = [sys.executable, "-c", _PEAK, str(logits), str(half), start]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def test_statistics_and_the_selection_of_the_start_need_at_most_16_bytes_per_weight() -> None:
    assert peak_bytes_per_weight(True, True, "computed") < 16


@pytest.mark.parametrize(("logits", "half"), [(False, True), (True, True), (True, False)])
def test_peak_memory_is_as_stated_and_at_most_16_bytes_per_weight(logits: bool, half: bool) -> None:
    peak = peak_bytes_per_weight(logits, half, "given")
    stated = bytes_per_weight(Settings(method="levels", logits=logits, half=half))
    # Beside what is stated there are a gradient and a masked copy of one of 16 tensors, and working memory.
    assert stated - 0.5 < peak < stated + 2.0
    if half:
        assert peak + 4 < 16  # with the start, which the caller holds


# ------------------------------------------------------------------------------------- levels, thresholds


@pytest.mark.parametrize("share", [0.1, 0.5, 0.73, 0.999])
def test_a_quantile_from_histograms_equals_that_of_sorted_numbers(share: float) -> None:
    values = torch.randn(30_000, generator=torch.Generator().manual_seed(1))
    parts = [(values[:10_000], 1.0), (values[10_000:].view(100, 200), 1.0)]
    found = quantile(lambda: parts, share)
    assert float((values <= found).float().mean()) == pytest.approx(share, abs=2 / len(values))


def test_a_quantile_of_equal_numbers_is_that_number() -> None:
    assert quantile(lambda: [(torch.full((100,), 3.0), 1.0)], 0.5) == pytest.approx(3.0, abs=1e-4)
    assert quantile(lambda: [(torch.zeros(100), 1.0)], 0.0) == -math.inf


def test_weighted_parts_count_in_proportion_to_their_weight() -> None:
    parts = [(torch.zeros(10), 9.0), (torch.ones(10), 1.0)]
    assert quantile(lambda: parts, 0.89) < 0.5 < quantile(lambda: parts, 0.91)


def test_starting_logits_are_standardised_logarithms_and_zeros_are_lowest() -> None:
    generator = torch.Generator().manual_seed(0)
    made = {"a": torch.randn(50, 40, generator=generator).exp(), "b": torch.rand(9, 9, generator=generator)}
    made["a"][0, 0] = 0
    found = standard_starts(made)
    flat = torch.cat([part.flatten() for part in found.values()])
    above = flat[flat > -12]
    assert len(above) == len(flat) - 1
    assert float(above.mean()) == pytest.approx(0, abs=1e-4)
    assert float(above.std()) == pytest.approx(1, abs=1e-3)
    assert (standard_starts({"a": torch.full((3, 3), 0.7)})["a"] == 0).all()


def test_initial_thresholds_prune_by_the_starting_scores() -> None:
    net, batches = trained_net()
    levels = levels_of(net, batches)
    fisher = torch.cat([score.flatten() for score in scores.fisher(net, statistics(net, batches)).values()])
    levels.set_threshold(0.6)
    masked = torch.cat([part.masked().flatten() for part in levels.scored.values()])
    assert ((masked == 0) == (fisher <= fisher.kthvalue(round(0.6 * len(fisher))).values)).all()


def test_a_sample_of_a_large_layer_gives_almost_the_same_threshold() -> None:
    weight = torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0))
    levels = Levels({"w": weight}, {"w": weight.square()}, network=False, own=None, temperature=0.5)
    assert len(levels.scored["w"].sample) == 1 << 20
    assert levels.set_threshold(0.5) == pytest.approx(levels.set_threshold(0.5, exact=True), abs=0.01)


def test_the_network_starts_at_zero_and_learns_from_the_sample() -> None:
    net, batches = trained_net()
    levels = levels_of(net, batches, network=True)
    before = levels.importances(0.5)
    for part in levels.scored.values():
        assert part.network is not None
        assert (part.network == 0).all()
    for part in levels.scored.values():
        part.sampled.copy_(part.start.reshape(-1)[part.sample])
    levels.collect()
    levels.learn_network()
    assert all(x.grad is not None for x in levels.parameters()["network"])
    assert all((part.sampled == 0).all() for part in levels.scored.values())
    with torch.no_grad():
        levels.parameters()["network"][-1].fill_(1.0)
    levels.refresh()
    for name, importance in levels.importances(0.5).items():  # the same for all: nothing changes
        torch.testing.assert_close(importance, before[name], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ signal


def moved(signal: float, steps: int = 60, count: int = 4000) -> tuple[Tensor, float]:
    """Parameters after steps along gradients of unit noise and some signal, and the last gain."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(count, requires_grad=True)
    optimiser = SignalAdam({"x": [x]}, steps)
    for _ in range(steps):
        x.grad = torch.randn(count, generator=generator) + signal
        optimiser.step("x", 0.01)
    return x.detach(), optimiser.gains["x"][0]


def test_noisy_gradients_change_logits_little() -> None:
    x, gain = moved(0.0)
    assert gain < 0.3
    assert float(x.square().mean().sqrt()) < 0.01


def test_consistent_gradients_change_logits_at_the_full_rate() -> None:
    x, gain = moved(3.0)
    assert gain > 0.98
    assert float(x.mean()) < -0.01 * 60 * 0.8


@pytest.mark.parametrize("sizes", [(40, 30), (1, 1, 1)])
def test_stepping_tensors_one_by_one_equals_stepping_them_together(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ways = [[torch.zeros(size, requires_grad=True) for size in sizes] for _ in range(2)]
    together, alone = (SignalAdam({"x": tensors}, 9) for tensors in ways)
    for i in range(9):
        gradients = [torch.randn(size, generator=generator) + 1 for size in sizes]
        for tensors in ways:
            for x, gradient in zip(tensors, gradients, strict=True):
                x.grad = gradient.clone()
        together.step("x", 0.01)
        alone.begin("x", 0.01)
        alone.advance("x", len(sizes) - 1)  # the backward pass reaches the last ones first
        if i % 2:
            alone.advance("x", 0)
        alone.end("x")
        assert all(x.grad is None for x in ways[1])
    assert all(torch.equal(a, b) for a, b in zip(*ways, strict=True))
    assert together.gains == alone.gains
    assert float(ways[0][0].detach().mean()) < 0


@pytest.mark.parametrize("half", [False, True])
def test_gradients_of_weight_logits_are_freed_after_their_step(half: bool) -> None:
    net, batches = trained_net()
    start = scores.fisher(net, statistics(net, batches))
    weights = {name: net.get_parameter(name) for name in start}
    learner = Learner(net, weights, start, CLASSIFY, Plan(steps=9, half=half), (0.5, 0.5))
    parts = list(learner.levels.scored.values())
    alive: list[int] = []
    for part in parts:  # after the learner's own hook
        untyped: Any = part.rows
        untyped.register_post_accumulate_grad_hook(
            lambda x: alive.append(sum(part.own_gradient is not None for part in parts))
        )
    own = [part.own for part in parts if part.own is not None]
    before = [x.clone() for x in own]
    data = numbered(batches)
    for _ in range(6):
        learner.learn(data)
    assert alive == [0] * (6 * len(parts))
    assert len(own) == len(parts)
    assert not all(torch.equal(x, y) for x, y in zip(own, before, strict=True))


def test_gains_rise_with_the_signal() -> None:
    gains = [moved(signal)[1] for signal in (0.0, 0.2, 0.5, 1.0)]
    assert gains == sorted(gains)


# ----------------------------------------------------------------------------- never worse than the start


def nonsense(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Batches of random inputs with random labels."""
    generator = torch.Generator().manual_seed(5)
    return [
        (
            100 * torch.randn(8, WIDTH, generator=generator),
            torch.randint(CLASSES, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def held_out_divergence(importances: dict[str, Tensor], sparsity: float, batches: list[Any]) -> float:
    """Of the pruned net from the dense net."""
    dense, _ = trained_net()
    pruned, _ = trained_net()
    prune(pruned, importances, Sparsity(sparsity))
    dense.eval()
    pruned.eval()
    with torch.no_grad():
        return sum(float(divergence(pruned(x), dense(x))) for x, _ in batches) / len(batches)


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("its own data", "fisher"),
        ("nonsense", "fisher"),
        ("nonsense", "magnitude"),
        ("one batch over and over", "fisher"),
    ],
)
def test_no_result_is_worse_than_its_start(steps: int, kind: str, start: str) -> None:
    net, batches = trained_net()
    data = {"its own data": batches, "nonsense": nonsense(), "one batch over and over": [batches[0]] * 9}[
        kind
    ]
    begun = scores.magnitude(net) if start == "magnitude" else scores.fisher(net, statistics(net, batches))
    # Rates that are far too high: the selection must undo their effect.
    settings = Settings(method="levels", steps=steps, logit_rate=1.0, shared_rate=0.5, network_rate=0.1)
    learned = learn_importance(net, data, 0.6, settings=settings, start=begun, held_out=batches[:3])
    found = held_out_divergence(learned.importances, 0.6, batches[:3])
    before = held_out_divergence(begun, 0.6, batches[:3])
    assert found <= before * (1 + 1e-5)
    assert learned.choice is not None
    assert learned.choice.chosen[0] <= learned.choice.start[0]
    assert learned.choice.chosen[0] == pytest.approx(found, rel=1e-4)


def test_no_result_is_worse_at_any_end_of_a_range() -> None:
    net, batches = trained_net()
    learned = learn_importance(net, batches, (0.5, 0.85), settings=LEVELS_ONLY)
    assert learned.choice is not None
    assert len(learned.choice.start) == 2
    assert all(a <= b for a, b in zip(learned.choice.chosen, learned.choice.start, strict=True))


def test_learned_importances_that_are_worse_than_the_start_are_not_returned() -> None:
    net, batches = trained_net()
    levels = levels_of(net, batches)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensors in levels.parameters().values():
            for x in tensors:
                x.copy_(3 * torch.randn(x.shape, generator=generator))
    weights = {name: net.get_parameter(name) for name in levels.scored}
    pruned = MaskedModel(net, {}, Masking(weights, levels.scored))
    net.eval()
    choice = choose(levels, pruned, net, CLASSIFY, batches[:2], [0.7])
    assert choice.chosen == choice.start
    assert choice.shares == dict.fromkeys(LEVELS, 0.0)
    fisher = scores.fisher(net, statistics(net, batches))
    for name, importance in levels.importances(0.7).items():
        order = fisher[name].flatten().argsort()
        assert (importance.flatten()[order].diff() >= 0).all()


def test_a_task_may_call_the_model_more_than_once_for_a_batch() -> None:
    net, batches = trained_net()

    def run(model: Any, batch: Any) -> Tensor:
        return torch.cat([model(batch[0]), model(-batch[0])])

    task = Task(run=run)
    levels = levels_of(net, batches)
    pruned = MaskedModel(
        net, {}, Masking({name: net.get_parameter(name) for name in levels.scored}, levels.scored)
    )
    net.eval()
    choice = choose(levels, pruned, net, task, batches[:1], [0.7])
    levels.set_threshold(0.7, exact=True)
    with torch.no_grad():
        expected = divergence(run(pruned, batches[0]), run(net, batches[0]))
    assert choice.start[0] == pytest.approx(float(expected), rel=1e-5)


def test_levels_have_much_less_loss_than_their_start() -> None:
    net, batches = trained_net()
    learned = learn_importance(net, batches, 0.8, settings=Settings(method="levels", steps=120))
    fisher = scores.fisher(net, statistics(net, batches))

    def loss(importances: dict[str, Tensor]) -> float:
        pruned, _ = trained_net()
        prune(pruned, importances, Sparsity(0.8))
        return loss_of(pruned, batches)

    assert loss(learned.importances) < 0.4 * loss(fisher)


# --------------------------------------------------------------------------------------- data, settings


def test_every_eighth_of_the_first_batches_is_held_out_and_not_learned_from() -> None:
    split = Split(list(range(20)), 1)
    assert split.held_out == [7]
    batches = split.numbered(0)
    seen = [next(batches) for _ in range(40)]
    assert [batch for _, _, batch in seen] == 2 * [i for i in range(20) if i != 7] + [0, 1]
    assert seen[17:21] == [(0, 17, 18), (0, 18, 19), (1, 0, 0), (1, 1, 1)]
    later = split.numbered(25)
    assert [next(later)[1:] for _ in range(15)] == [place[1:] for place in seen[25:]]


def test_the_last_of_few_batches_is_held_out() -> None:
    split = Split(["a", "b", "c"], 8)
    assert split.held_out == ["c"]
    batches = split.numbered(0)
    assert [next(batches)[2] for _ in range(3)] == ["a", "b", "a"]


def test_a_single_batch_is_used_for_learning_with_a_warning() -> None:
    net, batches = trained_net()
    with pytest.warns(SfpWarning, match="one batch"):
        learn_importance(net, batches[:1], 0.5, settings=Settings(method="levels", steps=1))


def test_one_shot_iterators_are_refused() -> None:
    net, batches = trained_net()
    with pytest.raises(OptionError, match="only once"):
        learn_importance(net, iter(batches), 0.5, settings=LEVELS_ONLY, start=scores.magnitude(net))


def test_a_weight_that_the_outputs_do_not_depend_on_is_named() -> None:
    class Half(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            out: Tensor = self[0](input)
            return out

    net = Half(nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES))
    _, batches = trained_net()
    with pytest.warns(SfpWarning, match=r"did not depend on '1.weight'"):
        learn_importance(
            net, batches, 0.5, settings=Settings(method="levels", steps=2), start=scores.magnitude(net)
        )


def test_learning_ends_when_its_minutes_are_used_up(tmp_path: Path) -> None:
    net, batches = trained_net()
    settings = Settings(method="levels", steps=10**6, minutes=0.01)
    learned = learn_importance(net, batches, 0.5, settings=settings)
    assert 1 <= len(learned.history) < 10**4
    assert learned.choice is not None
    assert learned.choice.chosen <= learned.choice.start


def test_a_learned_network_can_be_used_for_another_model() -> None:
    net, batches = trained_net()
    settings = Settings(method="levels", steps=20, network_rate=1e-2, network_every=2)
    learned = learn_importance(net, batches, 0.6, settings=settings)
    other, data = trained_net(seed=3)
    start = scores.magnitude(other)
    again = learn_importance(other, data, 0.6, settings=settings, start=start, mlp=learned.mlp)
    assert again.choice is not None
    with pytest.raises(OptionError, match="network_rate"):
        learn_importance(other, data, 0.6, settings=LEVELS_ONLY, start=start, mlp=learned.mlp)


def test_invalid_settings_of_levels_are_refused() -> None:
    net, batches = trained_net()
    start = scores.magnitude(net)
    name = next(iter(start))
    for made in (
        lambda: Settings(method="hierarchy"),
        lambda: Settings(method="levels", gate="sigmoid"),
        lambda: Settings(method="levels", weight_rate=1e-3),
        lambda: Settings(method="weights", minutes=1.0),
        lambda: learn_importance(net, batches, 0.5, settings=Settings(minutes=-1.0, method="levels")),
        lambda: learn_importance(net, batches, 0.5, settings=LEVELS_ONLY, start={"x": start[name]}),
        lambda: learn_importance(net, batches, 0.5, settings=LEVELS_ONLY, start={name: start[name]}),
        lambda: learn_importance(
            net, batches, 0.5, settings=LEVELS_ONLY, start={**start, name: -start[name]}
        ),
        lambda: learn_importance(net, batches, 0.5, settings=LEVELS_ONLY, start=start, held_out=[]),
        lambda: learn_importance(
            net, batches, 0.5, settings=Settings(method="weights", steps=1), start=start
        ),
    ):
        with pytest.raises(OptionError):
            made()


def test_a_half_precision_model_is_learned_by_divergence() -> None:
    net, batches = trained_net()
    data = [(x.bfloat16(), y) for x, y in batches]
    start = scores.magnitude(net)
    learned = learn_importance(
        net.bfloat16(), data, 0.5, settings=Settings(method="levels", steps=5), start=start
    )
    assert all(value.dtype == torch.float32 for value in learned.importances.values())
