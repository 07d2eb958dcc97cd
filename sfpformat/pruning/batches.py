"""The contents of a batch, and the kind of model that it is for.

Rules: a batch is a mapping of the model's keyword arguments (a dict, transformers' ``BatchEncoding``), a pair
of inputs and labels, or the inputs alone. This module neither runs a model nor needs transformers: the kind
of a model follows from its class names and its ``config``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError
from ..names import listed

IGNORED = -100  # label that the loss ignores, as in torch's cross-entropy and in transformers

# Minimum number of equal tokens to recognise shifted labels; fewer can be equal by chance.
_FEWEST_EQUAL = 4


class Kind(Enum):
    """The alignment of a model's labels with its inputs and outputs.

    Attributes:
        CAUSAL: a causal language model: output t is compared with label t + 1.
        SEQ2SEQ: an encoder and a decoder: labels and outputs are the decoder's.
        OTHER: output t is compared with label t.
    """

    CAUSAL = "causal"
    SEQ2SEQ = "seq2seq"
    OTHER = "other"


def kind_of(module: nn.Module | None) -> Kind:
    """Returns the kind of a model, also inside a wrapper such as ``DataParallel`` or a PEFT model.

    A model is causal if a class has a name that transformers uses for these: ``…ForCausalLM``,
    ``…LMHeadModel``, and ``…ForConditionalGeneration`` without an encoder.
    """
    for part in module.modules() if module is not None else ():
        if getattr(getattr(part, "config", None), "is_encoder_decoder", False) is True:
            return Kind.SEQ2SEQ
        if any(_is_causal_name(one.__name__) for one in type(part).__mro__):
            return Kind.CAUSAL
    return Kind.OTHER


def _is_causal_name(name: str) -> bool:
    if name.endswith("LMHeadModel"):
        # These three families compare output t with label t.
        return not name.startswith(("XLNet", "XLM", "Flaubert"))
    return name.endswith(("ForCausalLM", "ForConditionalGeneration"))


def takes_labels(module: nn.Module | None) -> bool:
    """Returns whether a model's ``forward`` has an argument ``labels``.

    If ``forward`` has ``**kwargs``, as in a wrapper, the result is true if any submodule takes ``labels``.
    """
    if module is None:
        return False
    parameters = _parameters(module)
    if "labels" in parameters:
        return True
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return False
    return any("labels" in _parameters(part) for part in module.modules())


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # compiled code without a signature
        return {}


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments of a model for a batch, without the labels.

    Raises:
        OptionError: the batch is a tuple or list that does not have one or two elements.
    """
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    if isinstance(batch, (tuple, list)):
        if not 1 <= len(batch) <= 2:
            raise OptionError(
                f"a batch is a {type(batch).__name__} of {len(batch)} elements, must be (inputs, labels); "
                "give a mapping of the model's arguments, or a Task whose run and loss unpack the batch"
            )
        return (batch[0],), {}
    return (batch,), {}


def labels_of(batch: Any) -> Any:
    """Returns a batch's item ``labels``, or the second element of a pair; None if it has no labels."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None


def required_labels(batch: Any) -> Tensor:
    """Returns the labels of a batch.

    Raises:
        OptionError: the batch has no labels, or they are not a tensor.
    """
    labels = labels_of(batch)
    if isinstance(labels, Tensor):
        return labels
    if labels is not None:
        raise OptionError(f"the labels are a {type(labels).__name__}, must be a tensor")
    if isinstance(batch, Mapping):
        what = f"the batch has no 'labels', only {listed([str(name) for name in batch])}"
    else:
        what = f"the batch is a {type(batch).__name__} without labels"
    raise OptionError(
        f"{what}; add them (a causal language model takes its input_ids, with {IGNORED} for padding), "
        "or give a Task with a loss"
    )


def require_unshifted(module: nn.Module | None, batch: Any) -> None:
    """Refuses labels that are already shifted to the next tokens: a causal model shifts labels itself.

    Raises:
        OptionError: the labels are the inputs shifted by one.
    """
    if kind_of(module) is not Kind.CAUSAL:
        return
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0]
    labels = labels_of(batch)
    if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor):
        return
    if inputs.shape != labels.shape or inputs.dim() != 2 or inputs.is_floating_point():
        return
    ignored = labels == IGNORED
    equal = (labels[:, :-1] == inputs[:, 1:]) & ~ignored[:, :-1]
    shifted = bool((equal | ignored[:, :-1]).all()) and int(equal.sum()) >= _FEWEST_EQUAL
    if shifted and not bool(((labels == inputs) | ignored).all()):
        raise OptionError(
            "the labels are the inputs shifted by one, but a causal language model shifts its labels itself: "
            "give the inputs as labels, or Task(loss=cross_entropy) to compare each output with its own label"
        )
