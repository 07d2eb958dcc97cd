"""Objects of a checkpoint that are no tensors, such as a learning rate, as JSON text.

``torch.distributed.checkpoint`` stores them as pickles, which run code when they are loaded. A checkpoint in
`.sfp` files has only numbers, strings, None, and lists, tuples and dicts of them.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from typing import Any

import torch

from ...errors import MismatchError, OptionError
from ...names import quoted

# The keys of objects in the metadata of files begin with this.
KEY = "torch.distributed.checkpoint:"
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def text_of(name: str, data: io.BytesIO) -> str:
    """Returns the JSON text of an object.

    Args:
        name: its name in the checkpoint.
        data: the object, as a planner saved it with ``torch.save``.

    Raises:
        OptionError: it is something else than numbers, strings, None, lists, tuples and dicts.
    """
    data.seek(0)
    try:
        value = torch.load(data, weights_only=True)
    except pickle.UnpicklingError as error:
        raise OptionError(f"{quoted(name)}: {_WORDS}; it is an object of another class") from error
    return json.dumps(_to_json(name, value), allow_nan=False, ensure_ascii=False)


_WORDS = (
    "a checkpoint in .sfp files has tensors, numbers, strings, None, and lists, tuples and dicts of them; "
    "convert it, or leave it out"
)


def _to_json(name: str, value: Any) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if math.isfinite(value):
            return value
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if type(value) is list:
        return [_to_json(name, one) for one in value]
    if type(value) is tuple:
        return {"tuple": [_to_json(name, one) for one in value]}
    if type(value) is dict:
        return {"dict": [[_to_json(name, key), _to_json(name, one)] for key, one in value.items()]}
    raise OptionError(f"{quoted(name)}: {_WORDS}; it is or has a {type(value).__name__}")


def data_of(name: str, text: str) -> io.BytesIO:
    """Returns an object as ``torch.save`` does, for a planner.

    Raises:
        MismatchError: the text is not what `text_of` returns.
    """
    try:
        value = _from_json(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MismatchError(
            f"the object {quoted(name)} of the checkpoint is not readable: {text[:80]!r}"
        ) from error
    out = io.BytesIO()
    torch.save(value, out)
    out.seek(0)
    return out


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "float":
        return _FLOATS[inner]
    if kind == "tuple":
        return tuple(_from_json(one) for one in inner)
    if kind == "dict":
        return {_from_json(key): _from_json(one) for key, one in inner}
    raise ValueError(kind)
