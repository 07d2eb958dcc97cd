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
from .keyed.importance import Learned, LinearModel, Texts
from .keyed.importance import curvature_importance as _curvature_importance
from .keyed.importance import learned_importance as _learned_importance
from .keyed.table import KeyedTable
from .limits import DEFAULT_LIMITS, Limits
from .names import quoted
from .options.quantisers import LossyQuantiser, Uniform

__all__ = ["Learned", "LinearTextModel", "curvature_importance", "learned_importance", "load", "save"]

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
        importance: how much each feature matters, in the order of the vectoriser's columns: float [features];
            see `learned_importance` and `curvature_importance`.
        metadata: strings of the caller.

    Returns:
        The table of the weights.

    Raises:
        OptionError: the model has another type or is not fitted, or an argument is not allowed.
        OSError: the file cannot be written.
    """
    kind = type(vectorizer).__name__
    settings = _settings(vectorizer, kind)
    coefficients, intercepts = _coefficients(classifier)
    keys = _keys(vectorizer, kind)
    _require_columns(coefficients, len(keys))
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


def curvature_importance(
    vectorizer: Any,
    classifier: Any,
    texts: Iterable[str],
    labels: Sequence[Any] | NDArray[Any],
    *,
    training: Iterable[str] | None = None,
) -> NDArray[np.float64]:
    """Returns an importance of each feature for `save`: the curvature of the loss, float64 [features].

    It is half of the second derivative of the mean loss by a factor of the feature's weights: about how much
    the loss grows if the feature is pruned (LeCun, Denker and Solla 1990, "Optimal Brain Damage"). The loss
    is the cross-entropy; the squared error, summed over outputs, of a regressor.

    Args:
        vectorizer, classifier: same as for `save`.
        texts: texts that were not in training.
        labels: their labels; of a regressor, their numbers.
        training: more texts that are counted, such as those of training. Recommended, because most features
            are rare.

    Raises:
        OptionError: the model has another type or is not fitted, there are no texts, or a label is unknown.
    """
    model = _linear_model(vectorizer, classifier)
    more = None if training is None else vectorizer.transform(training)
    return _curvature_importance(model, _texts(vectorizer, classifier, texts, labels), more)


def learned_importance(
    vectorizer: Any,
    classifier: Any,
    texts: Iterable[str],
    labels: Sequence[Any] | NDArray[Any],
    *,
    keep: float,
    training: Iterable[str] | None = None,
    rounds: int = 10,
    rate: float = 0.1,
) -> Learned:
    """Learns the importance of each feature for `save`, for the share of features that is kept.

    Learning minimises the loss of texts plus a penalty for each feature that is kept. It starts from
    `curvature_importance`. The last quarter of the texts chooses the round whose importance is returned: the
    start, if no round has a lower loss there. Deterministic.

    Args:
        vectorizer, classifier: same as for `save`.
        texts: texts that were not in training, where rare features look better than they are. If they have
            several sources, such as documents, the last quarter should be of other sources than the rest.
        labels: their labels; of a regressor, their numbers.
        keep: the share of features that `save` will keep, above 0 and at most 1.
        training: same as for `curvature_importance`.
        rounds: how often derivatives are computed.
        rate: the share of the importance that a round replaces, above 0 and at most 1.

    Returns:
        The importance, float64 [features], and the loss after each round.

    Raises:
        OptionError: as in `curvature_importance`, or a number is out of range.

    ``save(path, vectorizer, classifier, keep=0.1, importance=learned_importance(..., keep=0.1).importance)``.
    """
    model = _linear_model(vectorizer, classifier)
    given = _texts(vectorizer, classifier, texts, labels)
    count = len(given.labels)
    if count < 4:
        raise OptionError(f"there are {count} texts; learning needs at least 4, and thousands to be useful")
    part = count - count // 4
    more = None if training is None else vectorizer.transform(training)
    start = _curvature_importance(model, given, more)
    learned = Texts(given.features[:part], given.labels[:part])
    held_out = Texts(given.features[part:], given.labels[part:])
    return _learned_importance(model, learned, held_out, start, keep, rounds=rounds, rate=rate)


def _linear_model(vectorizer: Any, classifier: Any) -> LinearModel:
    """Returns the weights of a fitted model whose features are those of the vectoriser."""
    coefficients, intercepts = _coefficients(classifier)
    _require_columns(coefficients, len(_keys(vectorizer, type(vectorizer).__name__)))
    weights = np.ascontiguousarray(coefficients.T, np.float32)
    return LinearModel(weights, intercepts, getattr(classifier, "classes_", None) is None)


def _texts(vectorizer: Any, classifier: Any, texts: Iterable[str], labels: Any) -> Texts:
    """Returns texts as features, and their labels as numbers."""
    if isinstance(texts, str):
        raise OptionError("the texts are one string; give a list of strings")
    features = vectorizer.transform(texts).tocsr()
    given = np.asarray(labels)
    if not features.shape[0] or len(given) != features.shape[0]:
        raise OptionError(f"there are {features.shape[0]} texts and {len(given)} labels; give one for each")
    classes = getattr(classifier, "classes_", None)
    if classes is None:
        return Texts(features, given.astype(np.float64).reshape(len(given), -1))
    if not np.isin(given, classes).all():
        unknown = given[~np.isin(given, classes)][0]
        raise OptionError(f"the label {quoted(str(unknown))} is not one of the classifier")
    return Texts(features, np.searchsorted(classes, given).astype(np.int64))


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


def _coefficients(classifier: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the weights [C, features] and the intercepts [C] of a fitted model."""
    coefficients = np.atleast_2d(_fitted(classifier, "coef_"))
    intercepts = np.broadcast_to(np.atleast_1d(_fitted(classifier, "intercept_")), coefficients.shape[:1])
    return coefficients, intercepts


def _require_columns(coefficients: NDArray[np.float64], features: int) -> None:
    if coefficients.shape[1] != features:
        raise OptionError(f"the classifier has {coefficients.shape[1]} features, the vectoriser {features}")


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
