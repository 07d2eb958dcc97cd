"""Losses and divergences: the model's own loss, excluded padding, batches of all kinds."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from sfpformat.errors import LossError, OptionError, SfpWarning
from sfpformat.pruning import prunable, scores
from sfpformat.pruning.calibration import statistics
from sfpformat.pruning.calibration_sums import Statistics
from sfpformat.pruning.layerwise import prune_layerwise
from sfpformat.pruning.learning import learn_importance
from sfpformat.pruning.learning_settings import Settings
from sfpformat.pruning.task import CLASSIFY, Task, cost, cross_entropy, divergence, likelihood, with_weights

from ..support.pruning_transformers import PAD, VOCABULARY, made, padded, tokens

LONG, SHORT, WIDTH = 9, 5, 12
IGNORED = -100


def two_rows(name: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Batches of one row without padding, and the same rows in one batch with padding."""
    rows = [tokens(1, LONG), tokens(2, SHORT)]
    if name == "T5ForConditionalGeneration":
        targets = [tokens(3, 4), tokens(4, 7)]
    elif name == "BertForMaskedLM":
        targets = [row.clone() for row in rows]
        targets[0][::2] = IGNORED
        targets[1][1:3] = IGNORED
    elif name == "BertForTokenClassification":
        targets = [row % 2 for row in rows]
    elif name == "BertForSequenceClassification":
        targets = [torch.tensor([1]), torch.tensor([0])]
    else:
        targets = [row.clone() for row in rows]
    alone = [
        {"input_ids": row[None], "labels": labels[None] if len(labels) > 1 else labels}
        for row, labels in zip(rows, targets, strict=True)
    ]
    width = max(map(len, targets))
    together = {
        "input_ids": padded(rows, PAD, WIDTH),
        "attention_mask": padded([torch.ones_like(row) for row in rows], 0, WIDTH),
        "labels": torch.cat(targets)
        if width == 1
        else padded(targets, IGNORED, WIDTH if width == LONG else width + 2),
    }
    return alone, together


OWN_LOSS = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "BertForTokenClassification",
    "BertForSequenceClassification",
    "T5ForConditionalGeneration",
)


def counted(labels: Tensor, name: str) -> int:
    """Returns the number of labels in the mean of a model's loss."""
    causal = name in ("LlamaForCausalLM", "GPT2LMHeadModel")
    return int((labels[:, 1:] if causal else labels).ne(IGNORED).sum())


@pytest.mark.parametrize("name", OWN_LOSS)
def test_a_transformers_model_computes_its_own_loss(name: str) -> None:
    model = made(name)
    alone, together = two_rows(name)
    for batch in (*alone, together):
        own = model(**batch).loss
        assert torch.equal(CLASSIFY.loss_of(model, batch), own)
        assert torch.equal(cost(with_weights(model, {}), batch, CLASSIFY, None), own)


@pytest.mark.parametrize("name", OWN_LOSS)
def test_pairs_of_inputs_and_labels_use_the_models_own_loss(name: str) -> None:
    model = made(name)
    for batch in two_rows(name)[0]:
        pair = (batch["input_ids"], batch["labels"])
        assert torch.equal(CLASSIFY.loss_of(model, pair), model(**batch).loss)


def test_a_causal_model_that_memorised_its_text_has_almost_no_loss() -> None:
    model = made("LlamaForCausalLM")
    text = torch.arange(3, 15)[None]
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        torch.autograd.backward(model(input_ids=text, labels=text).loss)
        optimiser.step()
    assert float(CLASSIFY.loss_of(model, {"input_ids": text, "labels": text}).detach()) < 0.05
    assert float(cross_entropy(model(text).logits, (text, text)).detach()) > 3


@pytest.mark.parametrize("kind", [dict, UserDict, transformers.BatchEncoding])
def test_every_mapping_is_accepted_as_a_batch(kind: Any) -> None:
    model = made("GPT2LMHeadModel")
    _, together = two_rows("GPT2LMHeadModel")
    batch = kind(together)
    assert torch.equal(CLASSIFY.loss_of(model, batch), model(**together).loss)
    dense = made("GPT2LMHeadModel", n_layer=1)
    assert torch.equal(CLASSIFY.divergence_of(model, dense, batch), cost(model, together, CLASSIFY, dense))


def test_an_output_of_transformers_is_accepted_as_a_batch() -> None:
    model = made("BertForMaskedLM")
    _, together = two_rows("BertForMaskedLM")
    assert torch.equal(CLASSIFY.loss_of(model, ModelOutput(**together)), model(**together).loss)


@pytest.mark.parametrize("name", OWN_LOSS)
def test_padding_is_excluded_from_losses_and_divergences(name: str) -> None:
    model, dense = made(name), made(name)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    alone, together = two_rows(name)
    counts = [counted(batch["labels"], name) for batch in alone]
    for objective in (None, dense):
        with torch.no_grad():
            each = [float(cost(model, batch, CLASSIFY, objective)) for batch in alone]
            both = float(cost(model, together, CLASSIFY, objective))
        expected = sum(c * e for c, e in zip(counts, each, strict=True)) / sum(counts)
        assert both == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_padding_that_the_labels_do_not_mark_is_excluded_by_the_mask(name: str) -> None:
    model = made(name)
    _, together = two_rows(name)
    careless = {**together, "labels": torch.where(together["attention_mask"] == 0, PAD, together["labels"])}
    assert not torch.equal(model(**careless).loss, model(**together).loss)
    assert torch.equal(CLASSIFY.loss_of(model, careless), model(**together).loss)


def test_without_labels_a_divergence_counts_all_positions_except_padding() -> None:
    model, dense = made("LlamaForCausalLM"), made("LlamaForCausalLM", num_hidden_layers=1)
    alone, together = two_rows("LlamaForCausalLM")
    for batch in (*alone, together):
        del batch["labels"]
    with torch.no_grad():
        each = [float(cost(model, batch, CLASSIFY, dense)) for batch in alone]
        both = float(cost(model, together, CLASSIFY, dense))
    assert both == pytest.approx((LONG * each[0] + SHORT * each[1]) / (LONG + SHORT), rel=1e-4)


def assert_like(ours: Statistics, expected: Tensor) -> None:
    assert ours.inputs is not None
    torch.testing.assert_close(ours.inputs, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OWN_LOSS)
def test_padding_is_excluded_from_gradients_and_input_statistics(name: str) -> None:
    model = made(name)
    alone, together = two_rows(name)
    if name != "T5ForConditionalGeneration":
        together["input_ids"][together["attention_mask"] == 0] = 7  # padding must have no effect
    counts = [counted(batch["labels"], name) for batch in alone]
    first, second = (statistics(model, [batch], batches=1) for batch in alone)
    both = statistics(model, [together], batches=1)
    for weight, found in both.items():
        gradient = (counts[0] * first[weight].gradient + counts[1] * second[weight].gradient) / sum(counts)
        torch.testing.assert_close(found.gradient, gradient, rtol=1e-3, atol=1e-6)
        one, other = first[weight].inputs, second[weight].inputs
        assert one is not None
        assert other is not None
        sizes = sizes_of(name, weight)
        assert_like(found, (sizes[0] * one + sizes[1] * other) / sum(sizes))


def sizes_of(name: str, weight: str) -> tuple[int, int]:
    """The number of inputs of a layer in the two rows."""
    if "decoder" in weight and "EncDecAttention.k" not in weight and "EncDecAttention.v" not in weight:
        return 4, 7
    if name == "T5ForConditionalGeneration" and weight.startswith("lm_head"):
        return 4, 7
    if name == "BertForSequenceClassification" and ("pooler" in weight or "classifier" in weight):
        return 1, 1
    return LONG, SHORT


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt-updated"])
def test_padding_does_not_change_layerwise_pruning(name: str, method: str) -> None:
    model = made(name)
    alone, together = two_rows(name)
    one = prune_layerwise(model, alone, 0.5, method, batches=2)
    both = prune_layerwise(model, [together], 0.5, method, batches=1)
    for weight, mask in one.masks.items():
        assert float((mask != both.masks[weight]).float().mean()) < 0.01
        torch.testing.assert_close(one.weights[weight], both.weights[weight], rtol=0.05, atol=1e-3)


def test_padding_on_the_right_of_a_causal_model_is_derived_from_the_labels() -> None:
    model = made("LlamaForCausalLM")
    alone, together = two_rows("LlamaForCausalLM")
    del together["attention_mask"]
    found = statistics(model, [together], batches=1)
    one, other = (statistics(model, [batch], batches=1) for batch in alone)
    for weight, of_both in found.items():
        first, second = one[weight].inputs, other[weight].inputs
        assert first is not None
        assert second is not None
        assert_like(of_both, (LONG * first + SHORT * second) / (LONG + SHORT))


class Tokens(nn.Module):
    """A plain model of tokens; the inputs of its first layer have one of several layouts."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, VOCABULARY)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.way == "flat":
            x = self.one(x.flatten(0, 1)).view(x.shape)
        elif self.way == "time first":
            x = self.one(x.transpose(0, 1)).transpose(0, 1)
        elif self.way == "keyword":
            x = self.one(input=x)
        elif self.way == "chosen":
            x = x + self.one(x[:, 1:4])[:, :1]
        else:
            x = x + self.one(x[:, 0])[:, None]
        result: Tensor = self.two(x)
        return result


@pytest.mark.parametrize("way", ["flat", "time first", "keyword", "pooled"])
def test_padding_is_found_for_every_layout_of_a_layers_inputs(way: str) -> None:
    torch.manual_seed(0)
    model, (alone, together) = Tokens(way), two_rows("LlamaForCausalLM")
    (ids, mask), labels = (together["input_ids"], together["attention_mask"]), together["labels"]
    found = statistics(model, [{"ids": ids, "attention_mask": mask, "labels": labels}], batches=1)
    rows = [batch["input_ids"][0] for batch in alone]
    seen = torch.stack([row[0] for row in rows]) if way == "pooled" else torch.cat(rows)
    assert_like(found["one.weight"], model.embedding(seen).detach().square().mean(0))


def test_inputs_that_do_not_fit_the_mask_are_named() -> None:
    _, together = two_rows("LlamaForCausalLM")
    batch = {"ids": together["input_ids"], "attention_mask": together["attention_mask"]}
    with pytest.warns(SfpWarning, match=r"the statistics of 'one\.weight' include padding"):
        statistics(Tokens("chosen"), [{**batch, "labels": together["labels"]}], batches=1)


@pytest.mark.parametrize("name", ["key_padding_mask", "src_key_padding_mask"])
def test_padding_masks_of_torch_are_true_for_padding(name: str) -> None:
    class Model(Tokens):
        def forward(self, ids: Tensor, **masks: Tensor) -> Tensor:  # type: ignore[override]  # other names
            return super().forward(ids, masks[name])

    model, dense = Model("flat"), Model("flat")
    _, together = two_rows("LlamaForCausalLM")
    batch = {"ids": together["input_ids"], name: together["attention_mask"] == 0}
    with torch.no_grad():
        ours, theirs = model(**batch), dense(**batch)
        expected = divergence(ours[~batch[name]], theirs[~batch[name]])
    assert torch.equal(CLASSIFY.divergence_of(model, dense, batch), expected)


def test_a_task_can_define_its_padding() -> None:
    model, dense = nn.Linear(3, 4), nn.Linear(3, 4)
    x, real = torch.randn(2, 5, 3), torch.arange(10).view(2, 5) % 3 > 0
    task = Task(unpadded=lambda batch: batch[1])
    expected = divergence(model(x)[real], dense(x)[real])
    assert torch.equal(task.divergence_of(model, dense, (x, real)), expected)
    with pytest.raises(OptionError, match="unpadded"):
        Task(unpadded=lambda batch: real[:, :4]).divergence_of(model, dense, (x, None))


def test_plain_modules_are_compared_with_the_label_of_each_output() -> None:
    model, x, labels = nn.Linear(3, 4), torch.randn(2, 5, 3), torch.randint(4, (2, 5))
    labels[0, 2] = IGNORED
    expected = nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten())
    for batch in ((x, labels), [x, labels], {"input": x, "labels": labels}):
        assert torch.equal(CLASSIFY.loss_of(model, batch), expected)
    column = torch.randint(4, (2, 1))
    pooled = nn.functional.cross_entropy(model(x[:, 0]), column[:, 0])
    assert torch.equal(CLASSIFY.loss_of(model, (x[:, 0], column)), pooled)
    shares = torch.rand(2, 4).softmax(-1)
    assert torch.equal(
        CLASSIFY.loss_of(model, (x[:, 0], shares)), nn.functional.cross_entropy(model(x[:, 0]), shares)
    )


def test_a_wrapper_with_keyword_arguments_uses_the_loss_of_its_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made("LlamaForCausalLM")

        def forward(self, **words: Tensor) -> Any:
            return self.inner(**words)

    wrapper, (_, together) = Wrapper(), two_rows("LlamaForCausalLM")
    assert torch.equal(CLASSIFY.loss_of(wrapper, together), wrapper.inner(**together).loss)


def test_outputs_taken_from_a_causal_model_are_compared_with_the_next_labels() -> None:
    model, (_, together) = made("GPT2LMHeadModel"), two_rows("GPT2LMHeadModel")
    inputs = {name: value for name, value in together.items() if name != "labels"}
    task = Task(run=lambda model, batch: model(**inputs).logits)
    torch.testing.assert_close(task.loss_of(model, together), model(**together).loss)


@pytest.mark.parametrize("shape", [(2, 9), (2, 9, 1), (18,)])
def test_the_label_shape_does_not_decide_whether_labels_are_shifted(
    shape: tuple[int, ...],
) -> None:
    outputs, labels = torch.randn(2, 9, VOCABULARY), tokens(5, 2, 9)
    expected = torch.nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(likelihood(outputs, labels.reshape(shape), causal=True), expected)


def test_a_loss_of_the_task_replaces_that_of_the_model() -> None:
    model, (_, together) = made("GPT2LMHeadModel"), two_rows("GPT2LMHeadModel")
    task = Task(loss=lambda outputs, batch: outputs.square().mean()[None])
    inputs = {name: value for name, value in together.items() if name != "labels"}
    assert torch.equal(task.loss_of(model, together), model(**inputs).logits.square().mean())


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (lambda loss, logits: loss, 2.0),
        (lambda loss, logits: (loss, logits), 2.0),
        (lambda loss, logits: {"loss": loss, "logits": logits}, 2.0),
        (lambda loss, logits: {"loss": torch.stack([loss, loss + 2]), "logits": logits}, 3.0),
    ],
)
def test_a_plain_module_that_accepts_labels_returns_its_own_loss(returned: Any, expected: float) -> None:
    class Model(nn.Linear):
        def forward(self, input: Tensor, labels: Tensor | None = None) -> Any:
            return returned(torch.tensor(2.0), super().forward(input))

    assert float(CLASSIFY.loss_of(Model(3, 4), (torch.randn(2, 3), torch.zeros(2)))) == expected


def test_already_shifted_labels_are_refused_for_a_causal_model() -> None:
    model, text = made("LlamaForCausalLM"), tokens(5, 2, 10)
    shifted = torch.cat([text[:, 1:], torch.full((2, 1), IGNORED)], 1)
    for batch in ((text, shifted), {"input_ids": text, "labels": shifted}):
        with pytest.raises(OptionError, match="shifted by one"):
            CLASSIFY.loss_of(model, batch)
        explicit = Task(loss=cross_entropy).loss_of(model, batch)
        torch.testing.assert_close(explicit, model(input_ids=text, labels=text).loss)
    same = torch.full((2, 10), 5)
    assert torch.equal(CLASSIFY.loss_of(model, (same, same)), model(input_ids=same, labels=same).loss)


def test_learning_and_fisher_use_the_loss_of_a_causal_model() -> None:
    model = made("LlamaForCausalLM")
    alone, together = two_rows("LlamaForCausalLM")
    found = statistics(model, alone, batches=2)
    gradients = []
    for batch in alone:
        model.zero_grad()
        torch.autograd.backward(model(**batch).loss)
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
    fisher = scores.fisher(model, found)["model.layers.0.mlp.up_proj.weight"]
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    torch.testing.assert_close(fisher, torch.stack(gradients).square().mean(0) * weight.square())
    settings = Settings(steps=1, objective="loss", start=0.0)
    learned = learn_importance(model, [together], 0.0, settings=settings, found=found, held_out=alone)
    assert learned.history[0] == pytest.approx(float(model(**together).loss.detach()))


def test_an_encoder_decoder_model_runs_with_its_labels() -> None:
    model, (_, together) = made("T5ForConditionalGeneration"), two_rows("T5ForConditionalGeneration")
    assert torch.equal(CLASSIFY.run(model, together), model(**together).logits)
    assert len(prunable(model)) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_divergence_computed_in_parts_has_the_value_and_gradient_of_the_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfpformat.pruning.task._AT_ONCE", {"cpu": 2 * 7})
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 5, 7, generator=generator).to(dtype).requires_grad_()
    dense = torch.randn(3, 5, 7, generator=generator).to(dtype)
    log_p, log_q = dense.float().log_softmax(-1), outputs.float().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    found = divergence(outputs, dense)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(3 * found, outputs)
    (wanted,) = torch.autograd.grad(3 * expected, outputs)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted)
    with torch.no_grad():
        torch.testing.assert_close(divergence(outputs, dense), expected)


def test_a_class_with_probability_zero_adds_nothing_to_a_divergence() -> None:
    outputs, dense = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    with torch.no_grad():
        outputs[:, 2], dense[:, 2] = -torch.inf, -torch.inf
    four = [0, 1, 3, 4]
    expected = divergence(outputs[:, four], dense[:, four])
    found = divergence(outputs, dense)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, outputs)
    assert torch.isfinite(gradient).all()
    for broken in ((outputs * torch.nan, dense), (outputs, dense * torch.nan)):
        assert torch.isnan(divergence(*broken))


def test_models_and_batches_without_a_loss_are_refused_with_the_reason() -> None:
    linear, x = nn.Linear(3, 4), torch.randn(2, 3)
    ids = tokens(1, 2, 6)
    nothing = torch.full((2, 6), IGNORED)
    image = nn.Conv2d(1, 5, 1)
    for error, words, made_wrong in (
        (OptionError, "without logits.*Task", lambda: CLASSIFY.run(made("BertModel"), {"input_ids": ids})),
        (OptionError, "a Task", lambda: CLASSIFY.loss_of(made("BertModel"), (ids, ids))),
        (OptionError, "without labels", lambda: CLASSIFY.loss_of(linear, x)),
        (OptionError, "without labels", lambda: CLASSIFY.loss_of(linear, [x])),
        (OptionError, "no 'labels', only 'input'", lambda: CLASSIFY.loss_of(linear, {"input": x})),
        (OptionError, "no 'labels'", lambda: CLASSIFY.loss_of(made("GPT2LMHeadModel"), {"input_ids": ids})),
        (OptionError, "of 3 elements", lambda: CLASSIFY.loss_of(linear, (x, x, torch.zeros(2).long()))),
        (OptionError, "of 3 elements", lambda: CLASSIFY.run(linear, (x, x, x))),
        (OptionError, "must be a tensor", lambda: CLASSIFY.loss_of(linear, (x, [1, 2]))),
        (OptionError, "float labels", lambda: CLASSIFY.loss_of(linear, (x, torch.zeros(2)))),
        (
            OptionError,
            "classes last",
            lambda: CLASSIFY.loss_of(image, (torch.randn(2, 1, 4, 5), torch.zeros(2, 4, 5).long())),
        ),
        (OptionError, "one class", lambda: divergence(torch.zeros(3, 1), torch.zeros(3, 1))),
        (OptionError, "the dense model's", lambda: divergence(torch.zeros(3, 2), torch.zeros(1, 2))),
        (OptionError, "one number", lambda: Task(loss=lambda o, b: o).loss_of(linear, x)),
        (LossError, "all its labels", lambda: CLASSIFY.loss_of(linear, (torch.randn(2, 6, 3), nothing))),
        (
            LossError,
            "the loss is nan",
            lambda: statistics(made("LlamaForCausalLM"), [{"input_ids": ids, "labels": nothing}]),
        ),
        (
            LossError,
            "all its positions",
            lambda: cost(made("BertForMaskedLM"), (ids, nothing), CLASSIFY, made("BertForMaskedLM")),
        ),
    ):
        with pytest.raises(error, match=words):
            made_wrong()
