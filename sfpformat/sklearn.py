"""Linear text classifiers of scikit-learn in files: a vectoriser and a linear model as a keyed table.

`save` writes a fitted model; `load` returns an estimator that predicts from the file. The file contains no
code: unlike a pickle, it cannot run any.

``save("model.sfp", vectorizer, classifier)``, then ``load("model.sfp").predict(["some text"])``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decode.reader import SfpFile
from .encode.sink import Target
from .encode.writer import Writer
from .errors import OptionError, UnsupportedError, fault
from .io.source import Readable
from .keyed.table import KeyedTable
from .limits import DEFAULT_LIMITS, Limits
from .names import quoted
from .options.quantisers import LossyQuantiser, Uniform

__all__ = ["LinearTextModel", "load", "save"]

_KEY = "sklearn"  # of the metadata
_VERSION = 1
# Parameters of a vectoriser that a file stores: those that decide which features a text has.
_COUNTED = (
    *("input", "encoding", "decode_error", "strip_accents", "lowercase", "stop_words", "token_pattern"),
    *("ngram_range", "analyzer", "binary"),
)
_HASHED = (*_COUNTED, "n_features", "norm", "alternate_sign")
_WEIGHTED = ("norm", "use_idf", "sublinear_tf")
_CALLED = ("preprocessor", "tokenizer", "analyzer")


def save(
    target: Target,
    vectorizer: Any,
    classifier: Any,
    *,
    quantiser: LossyQuantiser = Uniform(error_db=-20),  # noqa: B008 - frozen
    false_positive_cost: float | None = None,
    bits_per_key: float | None = None,
    expected_error: float | None = None,
    importance: NDArray[np.floating] | None = None,
    keep: int | float | None = None,
    metadata: dict[str, str] | None = None,
) -> KeyedTable:
    """Writes a fitted vectoriser and a fitted linear classifier or regressor.

    The features with their weights become the keyed table ``weights``, and intercepts a tensor. With
    `TfidfVectorizer`, inverse document frequencies become the table ``idf``: of all features, because all
    count for the norm of a text; or, with ``keep``, of the kept ones. Quantisation, pruned features and rare
    false matches change predictions; `LinearTextModel.score` shows by how much.

    Args:
        target: a path, or a seekable binary object.
        vectorizer: `CountVectorizer`, `TfidfVectorizer` or `HashingVectorizer`, without functions of the
            caller as preprocessor, tokenizer or analyzer.
        classifier: has ``coef_`` and ``intercept_``, such as `SGDClassifier`, `LogisticRegression`,
            `LinearSVC` or `Ridge`.
        quantiser, false_positive_cost, bits_per_key, expected_error, keep: same as for `KeyedTable.build`.
        importance: how much each feature matters, in the order of the vectoriser's columns: float [features].
        metadata: strings of the caller.

    Returns:
        The table of the weights.

    Raises:
        OptionError: the model has another type or is not fitted, or an argument is not allowed.
        OSError: the file cannot be written.
    """
    kind = type(vectorizer).__name__
    settings = _settings(vectorizer, kind)
    coefficients = np.atleast_2d(_fitted(classifier, "coef_"))
    intercepts = np.broadcast_to(np.atleast_1d(_fitted(classifier, "intercept_")), coefficients.shape[:1])
    keys = _keys(vectorizer, kind)
    if coefficients.shape[1] != len(keys):
        raise OptionError(f"the classifier has {coefficients.shape[1]} features, the vectoriser {len(keys)}")
    table = KeyedTable.build(
        keys,
        coefficients.T,
        quantiser=quantiser,
        false_positive_cost=false_positive_cost,
        bits_per_key=bits_per_key,
        expected_error=expected_error,
        importance=None if importance is None else np.asarray(importance, np.float64),
        keep=keep,
    )
    classes = getattr(classifier, "classes_", None)
    described = {"version": _VERSION, "vectorizer": kind, "settings": settings}
    described["classes"] = None if classes is None else _plain_classes(classes)
    own = {**(metadata or {}), _KEY: json.dumps(described)}
    with Writer(target, metadata=own) as writer:
        table.add_to(writer)
        if kind == "TfidfVectorizer":
            known = None if keep is None else table.find(keys).known
            _idf_table(vectorizer, keys, known).add_to(writer)
        writer.add("intercept", np.ascontiguousarray(intercepts, np.float64))
    return table


def load(
    readable: Readable, *, limits: Limits = DEFAULT_LIMITS, engine: str | None = None
) -> LinearTextModel:
    """Opens a file of `save`: maps it into memory, and reads the weights of features when they occur.

    Args:
        readable, limits, engine: same as for `KeyedTable.open`.

    Raises:
        OptionError: the file is not one of `save`.
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
        OSError: the file cannot be read.
    """
    with SfpFile(readable, limits=limits, engine=engine, threads=1) as file:
        text = file.metadata().get(_KEY)
        if text is None:
            raise OptionError("the file has no linear text model; sfpformat.sklearn.save writes one")
        try:
            described = json.loads(text)
            version = described["version"]
        except (ValueError, TypeError, KeyError):
            raise OptionError(
                f"the metadata {_KEY!r} of the file are not those of a linear text model"
            ) from None
        if version != _VERSION:
            raise OptionError(f"the linear text model has version {version}, this reader knows {_VERSION}")
        intercept = np.asarray(file.get_tensor("intercept"), np.float64)
        tables = {table.name for table in file.directory.keyed}
    weights = KeyedTable.open(readable, "weights", limits=limits, engine=engine)
    idf = KeyedTable.open(readable, "idf", limits=limits, engine=engine) if "idf" in tables else None
    return LinearTextModel(described, weights, idf, intercept)


class LinearTextModel:
    """A linear text classifier or regressor that reads its weights from a file.

    Attributes:
        weights: the keyed table of the features' weights.
        idf: the keyed table of inverse document frequencies, or None.
        intercept_: float64 [C].
        classes_: the labels, or None for a regressor.
    """

    def __init__(
        self,
        described: dict[str, Any],
        weights: KeyedTable,
        idf: KeyedTable | None,
        intercept: NDArray[np.float64],
    ) -> None:
        """Rebuilds the vectoriser from its settings. `load` calls this function."""
        self.weights, self.idf, self.intercept_ = weights, idf, intercept
        self._kind, self._settings = described["vectorizer"], dict(described["settings"])
        self._settings["ngram_range"] = tuple(self._settings["ngram_range"])
        classes = described["classes"]
        self.classes_ = None if classes is None else np.array(classes)
        self._vectorizer = _vectorizer(self._kind, self._settings)
        self._analyze = self._vectorizer.build_analyzer()

    def decision_function(self, texts: Iterable[str]) -> NDArray[np.float64]:
        """Returns the scores of texts: float64 [n, C], or [n] with one output."""
        if isinstance(texts, str):
            raise OptionError("the texts are one string; give a list of strings")
        documents = list(texts)
        if self._kind == "HashingVectorizer":
            scores = self._hashed_scores(documents)
        else:
            scores = self._counted_scores(documents)
        scores += self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, texts: Iterable[str]) -> NDArray[Any]:
        """Returns the labels of texts; of a regressor, the numbers."""
        scores = self.decision_function(texts)
        if self.classes_ is None:
            return scores
        best = (scores > 0).astype(np.int64) if scores.ndim == 1 else scores.argmax(axis=1)
        return np.asarray(self.classes_[best])

    def score(self, texts: Iterable[str], labels: Sequence[Any] | NDArray[Any]) -> float:
        """Returns the share of texts whose label is predicted.

        Raises:
            OptionError: the model is a regressor.
        """
        if self.classes_ is None:
            raise OptionError("a regressor has no accuracy")
        return float(np.mean(self.predict(texts) == np.asarray(labels)))

    def _counted_scores(self, documents: list[str]) -> NDArray[np.float64]:
        """Returns the scores without the intercept, from the features of all texts together."""
        numbers: dict[str, int] = {}
        owners: list[int] = []
        features: list[int] = []
        counts: list[int] = []
        for owner, text in enumerate(documents):
            found: dict[int, int] = {}
            for feature in self._analyze(text):
                number = numbers.setdefault(feature, len(numbers))
                found[number] = found.get(number, 0) + 1
            owners += [owner] * len(found)
            features += found.keys()
            counts += found.values()
        looked_up = self.weights.find(list(numbers))
        values = np.array(counts, np.float64)
        if self._settings["binary"]:
            values[:] = 1
        at, owner_of = np.array(features, np.int64), np.array(owners, np.int64)
        if self._kind == "TfidfVectorizer":
            values = self._weighted(values, at, owner_of, list(numbers), len(documents))
        return _sums(values[:, None] * looked_up.weights[at], owner_of, len(documents))

    def _weighted(
        self,
        values: NDArray[np.float64],
        at: NDArray[np.int64],
        owners: NDArray[np.int64],
        features: list[str],
        documents: int,
    ) -> NDArray[np.float64]:
        """Returns counts as tf-idf, as `TfidfTransformer` computes it, over the features of `idf`."""
        assert self.idf is not None
        if self._settings["sublinear_tf"]:
            values = np.log(values) + 1
        values = values * self.idf.find(features).weights[at, 0]
        norm = self._settings["norm"]
        if norm is None:
            return values
        each = np.square(values) if norm == "l2" else np.abs(values)
        sums = np.bincount(owners, each, documents)
        size = np.sqrt(sums) if norm == "l2" else sums
        return np.asarray(values / np.where(size > 0, size, 1)[owners])

    def _hashed_scores(self, documents: list[str]) -> NDArray[np.float64]:
        matrix = self._vectorizer.transform(documents).tocoo()
        columns, at = np.unique(matrix.col, return_inverse=True)
        found = self.weights.find([str(column) for column in columns.tolist()])
        return _sums(matrix.data[:, None] * found.weights[at], matrix.row, len(documents))


def _sums(rows: NDArray[np.float64], owners: NDArray[np.integer], documents: int) -> NDArray[np.float64]:
    """Returns the sum of the rows of each document."""
    columns = [np.bincount(owners, rows[:, c], documents) for c in range(rows.shape[1])]
    return np.stack(columns, axis=1)


def _settings(vectorizer: Any, kind: str) -> dict[str, Any]:
    """Returns the parameters of a vectoriser that a file stores."""
    parameters = {
        "CountVectorizer": _COUNTED,
        "TfidfVectorizer": (*_COUNTED, *_WEIGHTED),
        "HashingVectorizer": _HASHED,
    }
    if kind not in parameters:
        raise OptionError(f"the vectoriser is a {kind}; use {', '.join(parameters)}")
    given = vectorizer.get_params()
    for name in _CALLED:
        if callable(given.get(name)):
            raise OptionError(f"the {name} of the vectoriser is a function, which a file cannot contain")
    if given["input"] != "content":
        raise OptionError("the vectoriser reads files; a model in a file reads texts: input='content'")
    stop = given["stop_words"]
    if stop is not None and not isinstance(stop, str):
        given["stop_words"] = sorted(stop)
    return {name: given[name] for name in parameters[kind]}


def _vectorizer(kind: str, settings: dict[str, Any]) -> Any:
    """Returns a vectoriser that is not fitted.

    Raises:
        OptionError: scikit-learn is not installed.
        UnsupportedError: the file has a vectoriser that this version does not know.
    """
    try:
        from sklearn.feature_extraction import text
    except ImportError:
        raise OptionError("scikit-learn is not installed; pip install 'sfpformat[sklearn]'") from None
    names = ("CountVectorizer", "TfidfVectorizer", "HashingVectorizer")
    if kind not in names:
        error = fault("R-FEA-001", f"the vectoriser {kind!r} is unknown; known are {', '.join(names)}")
        assert isinstance(error, UnsupportedError)
        raise error
    return getattr(text, kind)(**settings)


def _fitted(model: Any, name: str) -> NDArray[np.float64]:
    """Returns an array of a fitted model."""
    found = getattr(model, name, None)
    if found is None:
        raise OptionError(f"the {type(model).__name__} has no {name}: it is not fitted, or not linear")
    dense = found.toarray() if hasattr(found, "toarray") else found
    return np.asarray(dense, np.float64)


def _keys(vectorizer: Any, kind: str) -> list[str]:
    """Returns the key of each column."""
    if kind == "HashingVectorizer":
        return [str(column) for column in range(vectorizer.n_features)]
    vocabulary = getattr(vectorizer, "vocabulary_", None)
    if vocabulary is None:
        raise OptionError(f"the {kind} is not fitted")
    keys = [""] * len(vocabulary)
    for feature, column in vocabulary.items():
        keys[column] = feature
    return keys


def _idf_table(vectorizer: Any, keys: list[str], known: NDArray[np.bool_] | None) -> KeyedTable:
    """Returns the table of inverse document frequencies of all or some features; 1 if they are not used."""
    values = np.ones(len(keys), np.float32)
    if vectorizer.use_idf:
        values = np.asarray(vectorizer.idf_, np.float32)
    if known is not None:
        keys, values = [key for key, has in zip(keys, known.tolist(), strict=True) if has], values[known]
    return KeyedTable.build(keys, values, quantiser=Uniform(error_db=-50), check_bits=8, name="idf")


def _plain_classes(classes: NDArray[Any]) -> list[Any]:
    """Returns labels as JSON values."""
    plain: list[Any] = np.asarray(classes).tolist()
    if not all(isinstance(label, (str, int, float, bool)) for label in plain):
        raise OptionError(f"the label {quoted(str(plain[0]))} is neither a string nor a number")
    return plain
