"""The demonstration model: a small character-level language model, evaluated in NumPy alone.

A causal transformer of about one million weights that predicts the next character of Python
source. ``train.py`` trained it and describes its texts. It makes the effect of pruning and
quantising measurable as a perplexity, in about a second and without torch.

The architecture is a minimal modern language model:

- *Characters*: the printable ASCII characters, newline, tab, and one symbol for all others. Nearly
  all weights are therefore in linear layers, as in a large model, and few in the vocabulary table.
- *Pre-norm residual layers* with RMSNorm and without biases: every tensor of two dimensions except
  the embedding is a plain linear layer, [outputs, inputs].
- *Rotary positions*: no weight belongs to a position, so every position uses every weight.
- *Squared ReLU* in the MLPs: in NumPy it takes two cheap passes, while GELU needs a tanh.

All arithmetic is float32, whatever dtype the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.integer[Any]]

# The position of a character in this string is its token; "other" comes after them all.
CHARACTERS = "\t\n" + "".join(chr(code) for code in range(0x20, 0x7F))
OTHER_TOKEN = len(CHARACTERS)

# Windows evaluated at once: 8 windows' attention scores (4 MiB) stay in a core's caches.
WINDOWS_PER_BATCH = 8


@dataclass(frozen=True)
class Config:
    """The sizes of the model; the defaults are those of the weights in the package.

    Attributes:
        vocabulary: number of tokens.
        width: number of features of a position.
        layers: number of layers.
        heads: number of attention heads.
        hidden: number of features of a position inside an MLP.
        context: maximum number of positions (characters) of a window.
        rotary_base: base of the rotary frequencies; the longest wavelength is 2π · rotary_base positions.
        epsilon: constant that prevents division by zero in RMSNorm.
    """

    vocabulary: int = len(CHARACTERS) + 1
    width: int = 128
    layers: int = 5
    heads: int = 2
    hidden: int = 512
    context: int = 256
    rotary_base: float = 10000.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width}, must be a multiple of {2 * self.heads}: rotary positions rotate "
                f"pairs of features in each of the {self.heads} heads"
            )

    @property
    def head_width(self) -> int:
        """The number of features of an attention head."""
        return self.width // self.heads


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every weight, in the order of the torch module's ``state_dict``."""
    width, hidden, vocabulary = config.width, config.hidden, config.vocabulary
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocabulary, width)}
    for layer in range(config.layers):
        prefix = f"layers.{layer}."
        shapes[prefix + "attention_norm.weight"] = (width,)
        for projection in ("query", "key", "value", "output"):
            shapes[f"{prefix}attention.{projection}.weight"] = (width, width)
        shapes[prefix + "mlp_norm.weight"] = (width,)
        shapes[prefix + "mlp.up.weight"] = (hidden, width)
        shapes[prefix + "mlp.down.weight"] = (width, hidden)
    shapes["norm.weight"] = (width,)
    shapes["head.weight"] = (vocabulary, width)
    return shapes


def encode_text(text: str) -> NDArray[np.uint8]:
    """Returns the tokens of ``text``: uint8 [characters], each below ``Config().vocabulary``."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    table = np.full(128, OTHER_TOKEN, dtype=np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    return np.where(codes < 128, table[np.minimum(codes, 127)], np.uint8(OTHER_TOKEN))


def logits(weights: Mapping[str, NDArray[Any]], config: Config, tokens: TokenArray) -> FloatArray:
    """Returns the unnormalised log-probabilities of the next token at every position.

    Args:
        weights: weights of any float dtype, by the names of ``weight_shapes``.
        config: the sizes of the model.
        tokens: integers [..., positions], with at most ``config.context`` positions.

    Returns:
        float32 [..., positions, vocabulary], in nats.

    Raises:
        ValueError: there are too many positions, or a weight is missing or has another shape.
    """
    positions = tokens.shape[-1]
    if positions > config.context:
        raise ValueError(f"{positions} positions exceed the context of {config.context}")
    windows = tokens.reshape(-1, positions)
    result = _forward(_float32_weights(weights, config), config, windows)
    return result.reshape(*tokens.shape, config.vocabulary)


def perplexity(weights: Mapping[str, NDArray[Any]], config: Config, tokens: TokenArray) -> float:
    """Returns the perplexity per character of ``tokens[1:]``: exp(mean negative log-likelihood).

    A perfect model has the perplexity 1, a uniform guess ``config.vocabulary``. The text is cut into
    windows without overlap, so the model predicts the first characters of a window from few others.

    Args:
        weights: weights of any float dtype, by the names of ``weight_shapes``.
        config: the sizes of the model.
        tokens: integers [n], n ≥ 2. If n is 1 plus a multiple of ``config.context``, all windows are whole.

    Raises:
        ValueError: there are fewer than two tokens, or a weight is missing or has another shape.
    """
    if tokens.ndim != 1 or tokens.size < 2:
        raise ValueError(f"tokens have shape {tokens.shape}, must be a vector of at least two")
    cast = _float32_weights(weights, config)
    inputs, targets = tokens[:-1], tokens[1:]
    whole = inputs.size - inputs.size % config.context
    batches = list(_batches(inputs[:whole], targets[:whole], config.context))
    if whole < inputs.size:
        batches.append((inputs[None, whole:], targets[None, whole:]))
    total = sum(_negative_log_likelihood(_forward(cast, config, x), y) for x, y in batches)
    return float(np.exp(total / targets.size))


def _batches(inputs: TokenArray, targets: TokenArray, context: int) -> list[tuple[TokenArray, TokenArray]]:
    """Returns inputs and targets [windows, context], with at most WINDOWS_PER_BATCH windows per batch."""
    x, y = inputs.reshape(-1, context), targets.reshape(-1, context)
    starts = range(0, len(x), WINDOWS_PER_BATCH)
    return [(x[i : i + WINDOWS_PER_BATCH], y[i : i + WINDOWS_PER_BATCH]) for i in starts]


def _negative_log_likelihood(scores: FloatArray, targets: TokenArray) -> float:
    """Returns the sum over all positions, in nats, for logits [..., vocabulary] and targets [...]."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=-1))
    chosen = np.take_along_axis(shifted, targets[..., None].astype(np.intp), axis=-1)[..., 0]
    return float((normaliser - chosen).sum(dtype=np.float64))


def _float32_weights(weights: Mapping[str, NDArray[Any]], config: Config) -> dict[str, FloatArray]:
    """Returns the model's weights as float32 and checks their shapes; ignores other tensors."""
    cast = {}
    for name, shape in weight_shapes(config).items():
        if name not in weights:
            raise ValueError(f"the demonstration model needs a weight named {name!r}")
        if weights[name].shape != shape:
            raise ValueError(f"{name!r} has shape {weights[name].shape}; the model needs {shape}")
        cast[name] = weights[name].astype(np.float32)
    return cast


def _forward(weights: Mapping[str, FloatArray], config: Config, tokens: TokenArray) -> FloatArray:
    """Maps tokens [windows, positions] to logits [windows, positions, vocabulary]."""
    rotation = rotary_angles(config, tokens.shape[1])
    stream: FloatArray = weights["embedding.weight"][tokens]
    for layer in range(config.layers):
        prefix = f"layers.{layer}."
        normed = _rms_norm(stream, weights[prefix + "attention_norm.weight"], config.epsilon)
        stream += _attention(weights, prefix + "attention.", config, normed, rotation)
        normed = _rms_norm(stream, weights[prefix + "mlp_norm.weight"], config.epsilon)
        stream += _mlp(weights, prefix + "mlp.", normed)
    final = _rms_norm(stream, weights["norm.weight"], config.epsilon)
    return _linear(final, weights["head.weight"])


def _attention(
    weights: Mapping[str, FloatArray],
    prefix: str,
    config: Config,
    x: FloatArray,
    rotation: tuple[FloatArray, FloatArray],
) -> FloatArray:
    """Computes causal multi-head attention over [windows, positions, width]."""
    windows, positions, width = x.shape

    def heads(projection: str) -> FloatArray:
        """Returns a projection of x, [windows, heads, positions, head_width]."""
        projected = _linear(x, weights[f"{prefix}{projection}.weight"])
        split = projected.reshape(windows, positions, config.heads, config.head_width)
        return split.transpose(0, 2, 1, 3)

    query = _rotate(heads("query"), rotation)
    query *= np.float32(config.head_width**-0.5)
    scores = query @ _rotate(heads("key"), rotation).swapaxes(-1, -2)
    np.copyto(scores, -np.inf, where=_future(positions))
    mixed = _softmax(scores) @ heads("value")
    joined = mixed.transpose(0, 2, 1, 3).reshape(windows, positions, width)
    return _linear(joined, weights[prefix + "output.weight"])


def _mlp(weights: Mapping[str, FloatArray], prefix: str, x: FloatArray) -> FloatArray:
    hidden = np.maximum(_linear(x, weights[prefix + "up.weight"]), np.float32(0))
    return _linear(np.square(hidden, out=hidden), weights[prefix + "down.weight"])


def _linear(x: FloatArray, weight: FloatArray) -> FloatArray:
    """Multiplies [..., inputs] by a weight [outputs, inputs], as one matrix product."""
    flat = x.reshape(-1, x.shape[-1]) @ weight.T
    return flat.reshape(*x.shape[:-1], weight.shape[0])


def _rms_norm(x: FloatArray, gain: FloatArray, epsilon: float) -> FloatArray:
    mean_square: FloatArray = np.mean(np.square(x), axis=-1, keepdims=True)
    normed: FloatArray = x / np.sqrt(mean_square + np.float32(epsilon))
    normed *= gain
    return normed


def _future(positions: int) -> NDArray[np.bool_]:
    """Returns a mask that is True if a query's position (row) precedes a key's (column)."""
    return np.triu(np.ones((positions, positions), dtype=np.bool_), k=1)


def _softmax(scores: FloatArray) -> FloatArray:
    """Computes the softmax over the last axis in place: ``scores`` is the largest array of the evaluation."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def rotary_angles(config: Config, positions: int) -> tuple[FloatArray, FloatArray]:
    """Returns cosine and sine [positions, head_width / 2] of the angle of each pair of features."""
    half = config.head_width // 2
    frequencies = config.rotary_base ** (-np.arange(half) / half)
    angles = np.outer(np.arange(positions), frequencies)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: FloatArray, rotation: tuple[FloatArray, FloatArray]) -> FloatArray:
    """Rotates each pair (feature i, feature i + half) of [..., positions, head_width]."""
    cosine, sine = rotation
    first, second = np.split(x, 2, axis=-1)
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return np.concatenate(turned, axis=-1)
