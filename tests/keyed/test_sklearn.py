"""Linear text classifiers of scikit-learn in files: their predictions are those of the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfpformat
from sfpformat.encode.writer import Writer
from sfpformat.errors import OptionError
from sfpformat.options import Uniform
from sfpformat.sklearn import load, save

text = pytest.importorskip("sklearn.feature_extraction.text")
linear = pytest.importorskip("sklearn.linear_model")

SOURCES = {"errors": sfpformat.errors, "option": sfpformat.options, "limits": sfpformat.limits}
LINES = [
    (line.strip(), name)
    for name, module in SOURCES.items()
    for line in Path(str(module.__file__)).read_text("utf-8").splitlines()
    if len(line) > 15
]
TEXTS, LABELS = [line for line, _ in LINES], np.array([name for _, name in LINES])
FINE = Uniform(error_db=-60)


def fitted(vectorizer: Any, labels: Any = LABELS, classifier: Any = None) -> tuple[Any, Any]:
    model = classifier or linear.SGDClassifier(random_state=0)
    return vectorizer, model.fit(vectorizer.fit_transform(TEXTS), labels)


@pytest.mark.parametrize(
    "vectorizer",
    [
        text.CountVectorizer(ngram_range=(1, 2)),
        text.CountVectorizer(binary=True, stop_words=["the", "a"], token_pattern=r"\w+"),
        text.CountVectorizer(analyzer="char_wb", ngram_range=(2, 4), lowercase=False),
        text.TfidfVectorizer(),
        text.TfidfVectorizer(sublinear_tf=True, norm="l1", use_idf=False),
        text.TfidfVectorizer(norm=None, strip_accents="unicode"),
        text.HashingVectorizer(n_features=1 << 10, ngram_range=(1, 2)),
    ],
)
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_from_the_file_are_those_of_the_model(vectorizer: Any, classes: int, tmp_path: Path) -> None:
    labels = LABELS if classes == 3 else (LABELS == "errors")
    vectorizer, model = fitted(vectorizer, labels)
    path = tmp_path / "model.sfp"
    save(path, vectorizer, model, quantiser=FINE, expected_error=1e-9)
    loaded = load(path)
    wanted = model.decision_function(vectorizer.transform(TEXTS))
    found = loaded.decision_function(TEXTS)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert np.mean(loaded.predict(TEXTS) == model.predict(vectorizer.transform(TEXTS))) > 0.99
    assert loaded.score(TEXTS, labels) == pytest.approx(
        model.score(vectorizer.transform(TEXTS), labels), abs=0.01
    )


def test_a_coarse_model_is_small_and_nearly_as_accurate(tmp_path: Path) -> None:
    vectorizer, model = fitted(text.CountVectorizer(ngram_range=(1, 2)))
    path = tmp_path / "model.sfp"
    table = save(path, vectorizer, model, keep=0.7, metadata={"task": "modules"})
    assert len(table) <= 0.7 * len(vectorizer.vocabulary_)
    assert load(path).score(TEXTS, LABELS) > model.score(vectorizer.transform(TEXTS), LABELS) - 0.1
    with sfpformat.open(path) as file:
        assert file.metadata()["task"] == "modules"


def test_a_regressor_predicts_numbers(tmp_path: Path) -> None:
    sizes = np.array([len(line) for line in TEXTS], np.float64)
    vectorizer, model = fitted(text.CountVectorizer(), sizes, linear.Ridge())
    save(tmp_path / "model.sfp", vectorizer, model, quantiser=FINE, expected_error=1e-9)
    loaded = load(tmp_path / "model.sfp")
    assert loaded.classes_ is None
    assert loaded.predict(TEXTS) == pytest.approx(model.predict(vectorizer.transform(TEXTS)), abs=0.5)
    with pytest.raises(OptionError, match="no accuracy"):
        loaded.score(TEXTS, sizes)


def test_models_that_a_file_cannot_contain_are_refused(tmp_path: Path) -> None:
    vectorizer, model = fitted(text.CountVectorizer())
    target = tmp_path / "model.sfp"
    cases: list[tuple[Any, Any, str]] = [
        (text.CountVectorizer(tokenizer=str.split), model, "function"),
        (text.CountVectorizer(input="filename"), model, "input='content'"),
        (text.CountVectorizer(), model, "not fitted"),
        (vectorizer, linear.SGDClassifier(), "not fitted"),
        (text.CountVectorizer().fit(["other words"]), model, "features"),
        (text.TfidfTransformer(), model, "use CountVectorizer"),
    ]
    for given, classifier, words in cases:
        with pytest.raises(OptionError, match=words):
            save(target, given, classifier)
        assert not target.exists()


def test_files_without_such_a_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.sfp"
    for metadata, words in (
        ({}, "no linear text model"),
        ({"sklearn": "{"}, "not those"),
        ({"sklearn": json.dumps({"version": 99})}, "version 99"),
    ):
        with Writer(path, metadata=metadata) as writer:
            writer.add("w", np.ones(3, np.float32))
        with pytest.raises(OptionError, match=words):
            load(path)


def test_one_string_in_place_of_several_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model.sfp", *fitted(text.CountVectorizer()))
    with pytest.raises(OptionError, match="list of strings"):
        load(tmp_path / "model.sfp").predict("text")
