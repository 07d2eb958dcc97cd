"""The importance of keys of linear models: curvature is a second derivative; learning finds useful keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sfpformat import KeyedTable
from sfpformat.errors import OptionError
from sfpformat.sklearn import curvature_importance, learned_importance, load, save

sparse = pytest.importorskip("scipy.sparse")
linear = pytest.importorskip("sklearn.linear_model")
text = pytest.importorskip("sklearn.feature_extraction.text")

from sfpformat.keyed import importance as module  # noqa: E402 - after the skips
from sfpformat.keyed.importance import LinearModel, Texts  # noqa: E402


def some_model(outputs: int, *, is_regressor: bool = False) -> tuple[LinearModel, Texts]:
    rng = np.random.default_rng(outputs)
    features = sparse.random(60, 9, 0.4, format="csr", random_state=1)
    model = LinearModel(
        rng.normal(size=(9, outputs)).astype(np.float32), rng.normal(size=outputs), is_regressor
    )
    labels: Any = rng.integers(0, max(outputs, 2), 60)
    if is_regressor:
        labels = rng.normal(size=(60, outputs))
    return model, Texts(features, labels)


def loss_of(model: LinearModel, texts: Texts, gates: Any, scale: float) -> float:
    weights = (model.weights * gates[:, None]).astype(np.float64)
    return module._loss(model._replace(weights=weights), texts, np.ones(9, np.bool_), scale)


@pytest.mark.parametrize(("outputs", "is_regressor"), [(1, False), (3, False), (1, True), (2, True)])
def test_curvature_and_slope_are_derivatives_of_the_loss_by_the_gates(
    outputs: int, is_regressor: bool
) -> None:
    model, texts = some_model(outputs, is_regressor=is_regressor)
    scale = 1.0
    if not is_regressor:
        scale = module._scale(module._scores(model, texts.features, None), texts.labels)
    curvature = module.curvature_importance(model, texts)
    ones, step = np.ones(9), 1e-3
    slope = module._slope(
        model, texts.features, texts.features.T.tocsr(), texts.labels, np.ones(9, np.bool_), scale
    )
    for key in range(9):
        moved = [loss_of(model, texts, ones + at * step * (np.arange(9) == key), scale) for at in (-1, 0, 1)]
        assert curvature[key] == pytest.approx(
            (moved[0] - 2 * moved[1] + moved[2]) / step**2 / 2, rel=1e-3, abs=1e-6
        )
        assert slope[key] == pytest.approx((moved[2] - moved[0]) / (2 * step), rel=1e-3, abs=1e-6)
    assert (curvature >= 0).all()


WORDS = [f"w{i}" for i in range(40)]  # of topic 0, of topic 1, and words that tell nothing


def lines(count: int, seed: int, spurious: bool) -> tuple[list[str], list[str]]:
    """Texts of two topics. In those of training, the words w20 to w39 tell the topic too: by chance."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(count):
        topic = int(rng.integers(2))
        useful = [
            WORDS[10 * (topic if rng.random() < 0.8 else 1 - topic) + int(rng.integers(10))] for _ in range(2)
        ]
        half = topic if spurious else int(rng.integers(2))
        other = [WORDS[20 + 10 * half + int(rng.integers(10))] for _ in range(3)]
        texts.append(" ".join(useful + other))
        labels.append("ab"[topic])
    return texts, labels


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Any]:
    texts, labels = lines(600, 1, spurious=True)
    vectorizer = text.CountVectorizer()
    classifier = linear.LogisticRegression(max_iter=50, tol=1e-6)
    return vectorizer, classifier.fit(vectorizer.fit_transform(texts), labels)


def test_learning_keeps_the_keys_that_help_on_other_texts(fitted: tuple[Any, Any], tmp_path: Any) -> None:
    texts, labels = lines(800, 2, spurious=False)
    found = learned_importance(*fitted, texts, labels, keep=0.5)
    names = fitted[0].get_feature_names_out()
    useful = []
    for importance in (curvature_importance(*fitted, texts, labels), found.importance):
        kept = {str(names[i]) for i in np.argsort(-importance)[:20]}
        useful.append(len(kept & set(WORDS[:20])))
    assert useful[0] < 5
    assert useful[1] > 14
    assert found.losses[found.rounds] == min(found.losses) < found.losses[0]
    accuracies = []
    others = lines(500, 3, spurious=False)
    for chosen in (None, curvature_importance(*fitted, texts, labels), found.importance):
        save(tmp_path / "model.sfp", *fitted, importance=chosen, keep=0.5)
        accuracies.append(load(tmp_path / "model.sfp").score(*others))
    assert accuracies[2] > max(accuracies[:2]) + 0.05


def test_the_importance_is_deterministic_and_that_of_the_start_without_rounds(
    fitted: tuple[Any, Any],
) -> None:
    texts, labels = lines(200, 4, spurious=False)
    first, again = (learned_importance(*fitted, texts, labels, keep=0.3) for _ in range(2))
    assert first.importance.tobytes() == again.importance.tobytes()
    assert (first.importance >= 0).all()
    start = learned_importance(*fitted, texts, labels, keep=0.3, rounds=0)
    wanted = curvature_importance(*fitted, texts, labels)
    assert start.rounds == 0
    assert np.argsort(start.importance, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()


def test_texts_of_training_count_for_keys_that_the_other_texts_do_not_have(fitted: tuple[Any, Any]) -> None:
    texts, labels = ["w0 w1", "w10 w11"], ["a", "b"]
    assert np.count_nonzero(curvature_importance(*fitted, texts, labels)) == 4
    assert (
        np.count_nonzero(curvature_importance(*fitted, texts, labels, training=lines(600, 1, True)[0])) == 40
    )


def test_a_regressor_and_several_classes_learn_too() -> None:
    texts, labels = lines(300, 5, spurious=False)
    vectorizer = text.TfidfVectorizer()
    features = vectorizer.fit_transform(texts)
    targets = np.array([label == "a" for label in labels], np.float64)
    ridge = linear.Ridge().fit(features, targets)
    found = learned_importance(vectorizer, ridge, *(lines(300, 6, False)[0], targets), keep=0.5)
    assert found.importance.shape == (40,)
    three = [label + str(i % 2) if label == "a" else label for i, label in enumerate(labels)]
    classifier = linear.SGDClassifier(random_state=0).fit(features, three)
    found = learned_importance(vectorizer, classifier, texts, three, keep=0.5)
    table = KeyedTable.build(WORDS, classifier.coef_.T, importance=found.importance, keep=0.5)
    assert len(table) == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"texts": "one text"}, "one string"),
        ({"texts": []}, "0 texts"),
        ({"labels": ["a"]}, "labels"),
        ({"labels": ["c"] * 8}, "the label 'c' is not one"),
        ({"texts": ["a"] * 3, "labels": ["a"] * 3}, "at least 4"),
        ({"keep": 0.0}, "keep is 0.0"),
        ({"keep": 2}, "keep is 2"),
        ({"rate": 0.0}, "rate 0.0"),
        ({"rounds": -1}, "rounds -1"),
        ({"classifier": linear.LogisticRegression()}, "not fitted"),
    ],
)
def test_a_wrong_argument_is_refused(fitted: tuple[Any, Any], change: dict[str, Any], words: str) -> None:
    texts, labels = lines(8, 7, spurious=False)
    given = {"vectorizer": fitted[0], "classifier": fitted[1], "texts": texts, "labels": labels, "keep": 0.5}
    with pytest.raises(OptionError, match=words):
        learned_importance(**{**given, **change})
