"""Tensors in parts (SPEC.md 28.4): the parts of a base, and the choice of what a delta stores in parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..coding.quantisers import Exact
from ..container.delta_map import DeltaMap, DeltaTensor
from ..container.delta_parts import PARTS, part_name
from ..decode.parts import Parts
from ..decode.selection import Selection
from ..errors import fault
from .reading import Delta
from .tensors import Array, Spec, Tensors, gathered, spec_of

# A tensor of which more than this part of the levels changed is stored whole: new levels take fewer bits.
_MOST_CHANGED = 0.75


def parts_from(tensors: Tensors, name: str) -> Parts | None:
    """Returns a tensor in parts; None if its source has none, or if it is no more than its elements."""
    find = getattr(tensors, "parts", None)
    found: Parts | None = None if find is None else find(name)
    return found


def separator_for(names: Iterable[str]) -> str:
    """Returns a separator with which no part of a tensor has the name of another tensor."""
    known, separator = set(names), "/"
    while any(name.endswith(f"{separator}{part}") for name in known for part in PARTS):
        separator += "/"
    return separator


def base_parts(new: Parts, base: Tensors, name: str) -> Parts | None:
    """Returns the parts of a base from which those of a result differ little, or None.

    Args:
        new: the tensor in the result.
        base: the tensors of the base.
        name: the tensor's name.
    """
    spec = base.specs.get(name)
    if spec is None or spec.shape != new.shape:
        return None
    old = parts_from(base, name)
    if old is None:
        if new.structure.quantiser != Exact.NAME or spec.dtype != new.structure.dtype:
            return None
        return Parts.of_elements(base.read(name), spec.dtype)
    if old.structure.quantiser != new.structure.quantiser or old.structure.weights != new.structure.weights:
        return None
    changed = int(np.count_nonzero(old.weights != new.weights))
    if new.structure.quantiser != Exact.NAME and changed > _MOST_CHANGED * len(new.weights):
        return None
    return old


class PartTensors:
    """The tensors of a base, with the parts of those that a delta lists as parts.

    Attributes:
        whole: the tensors of the base.
        specs: name -> dtype and shape, of parts too. Those of parts are as the delta lists them; `read`
            compares them with those of the base.
    """

    def __init__(self, whole: Tensors, delta: Delta) -> None:
        """Takes over the parts that the delta lists.

        Raises:
            BaseMismatchError: a part has the name of another tensor of the base.
        """
        self.whole, self._offset = whole, delta.offset
        separator = delta.map.separator
        assert separator is not None
        listed = {tensor.name: tensor for tensor in delta.map.tensors if tensor.kind != "added"}
        self._replaced = {tensor.name for tensor in delta.map.tensors if tensor.kind == "replaced"}
        self._names: dict[str, dict[str, str]] = {}  # tensor -> part -> name
        self._place: dict[str, tuple[str, str]] = {}  # name of a part -> its tensor, part
        self._recent: tuple[str, dict[str, Array]] | None = None
        self.specs: dict[str, Spec] = dict(whole.specs)
        for tensor in delta.map.tensors:
            if tensor.structure is None or tensor.name not in whole.specs or not hasattr(whole, "parts"):
                continue  # arrays and safetensors files have no parts but elements
            names = self._names[tensor.name] = names_of_parts(tensor, separator, listed)
            for part, name in names.items():
                if part and name in whole.specs:
                    words = f"the base has a tensor with the name of a part of {tensor.name!r}"
                    raise fault("R-DLT-009", words, tensor=name, offset=self._offset)
                self.specs[name] = Spec(listed[name].dtype, listed[name].shape)
                self._place[name] = tensor.name, part

    def read(self, name: str) -> Array:
        """Returns a tensor or a part in its dtype and shape.

        Raises:
            BaseMismatchError: the base has other parts than the delta lists.
        """
        if name not in self._place:
            return self.whole.read(name)
        tensor, part = self._place[name]
        if self._recent is None or self._recent[0] != tensor:
            self._recent = tensor, self._parts(tensor)
        return self._recent[1][part]

    def read_part(self, name: str, selection: Selection) -> Array:
        """Returns the selected elements of a tensor or a part, of the selection's shape."""
        if name not in self._place:
            return self.whole.read_part(name, selection)
        flat = self.read(name).reshape(-1)
        return gathered(selection, flat.dtype, lambda start, stop: flat[start:stop])

    def _parts(self, name: str) -> dict[str, Array]:
        found = parts_from(self.whole, name)
        if found is None:
            found = Parts.of_elements(self.whole.read(name), self.whole.specs[name].dtype)
        arrays = found.arrays()
        names = self._names[name]
        for part in sorted(arrays.keys() | names.keys()):
            own = spec_of(name, arrays[part]) if part in arrays else None
            if own is not None and names.get(part) in self._replaced:
                self.specs[names[part]] = own  # the list has that of the result
            if part not in names or own != self.specs[names[part]]:
                words = f"the part {part or 'weights'} of the base is not that from which the delta was made"
                raise fault("R-DLT-009", words, tensor=names.get(part, name), offset=self._offset)
        return arrays

    def metadata(self) -> dict[str, str]:
        """Returns the strings of the base."""
        return self.whole.metadata()


def in_parts(whole: Tensors, delta: Delta) -> Tensors:
    """Returns the tensors of a base as a delta lists them."""
    return whole if delta.map.separator is None else PartTensors(whole, delta)


def result_specs(delta: DeltaMap) -> dict[str, Spec]:
    """Returns the tensors of a result: name -> dtype and shape. Parts are not tensors of the result."""
    own = {
        part_name(tensor.name, delta.separator, part)
        for tensor in delta.tensors
        if tensor.structure is not None and delta.separator is not None
        for part in PARTS
    }
    return {
        tensor.name: Spec(tensor.dtype if tensor.structure is None else tensor.structure.dtype, tensor.shape)
        for tensor in delta.tensors
        if tensor.kind != "removed" and tensor.name not in own
    }


def names_of_parts(tensor: DeltaTensor, separator: str, listed: Mapping[str, object]) -> dict[str, str]:
    """Returns part -> name, for the parts of a tensor of a result."""
    names = {part: part_name(tensor.name, separator, part) for part in ("", *PARTS)}
    return {part: name for part, name in names.items() if name in listed}
