"""Recognises the usual reasons why the names in a file and those of a module differ."""

from __future__ import annotations

from collections.abc import Collection, Sequence

# Part of a name -> its origin and the remedy.
_PARTS = {
    "_orig_mod.": "torch.compile adds it: load and save the original module, model._orig_mod",
    "module.": "DataParallel and DistributedDataParallel add it: load and save model.module",
    "base_model.model.": "peft adds it: load and save the model that merge_and_unload() returns",
    "base_layer.": "peft adds it: load and save the model that merge_and_unload() returns",
    "_fsdp_wrapped_module.": "FSDP adds it: load and save the state_dict of the whole model",
    "_checkpoint_wrapped_module.": "activation checkpointing adds it",
}
# End of a name -> its origin and the remedy.
_PRUNED = "torch.nn.utils.prune adds it: call sfpformat.pruning.take_masks first"
_NORMED = "torch.nn.utils.weight_norm adds it: call remove_weight_norm first"
_ENDS = {
    "_orig": _PRUNED,
    "_mask": _PRUNED,
    "_g": _NORMED,
    "_v": _NORMED,
}
_PARAMETRISED = "a parametrization adds it: call torch.nn.utils.parametrize.remove_parametrizations first"


def hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Returns the probable reason as a sentence; "" if none is recognised.

    Args:
        missing: names that only the module has.
        unexpected: names that only the file has.
    """
    for names, others, whose in ((unexpected, missing, "file"), (missing, unexpected, "module")):
        known = set(others)
        for part, reason in _PARTS.items():
            if any(part in name and name.replace(part, "") in known for name in names):
                return f"names in the {whose} contain {part!r}; {reason}"
        for part, reason in _ENDS.items():
            if any(name.endswith(part) and name.removesuffix(part) in known for name in names):
                return f"names in the {whose} end in {part!r}; {reason}"
        if any(_without_parametrization(name) in known for name in names):
            return f"names in the {whose} contain 'parametrizations.'; {_PARAMETRISED}"
    return _prefix_hint(missing, unexpected)


def _without_parametrization(name: str) -> str:
    """Maps ``fc.parametrizations.weight.original`` or ``...original0`` to ``fc.weight``; others to ""."""
    before, part, after = name.rpartition("parametrizations.")
    return before + after.rpartition(".original")[0] if part else ""


def _prefix_hint(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Returns a sentence about a prefix that all names of only one side have; "" if there is none."""
    for names, others, whose in ((unexpected, missing, "file"), (missing, unexpected, "module")):
        prefix = _common_prefix(names)
        known: Collection[str] = set(others)
        if prefix and any(name.removeprefix(prefix) in known for name in names):
            return f"names in the {whose} start with {prefix!r}; the other side's names do not"
    return ""


def _common_prefix(names: Sequence[str]) -> str:
    """Returns the part up to the first dot if all names share it, else ""."""
    first = {name.partition(".")[0] for name in names if "." in name}
    return f"{first.pop()}." if len(first) == 1 and all("." in name for name in names) else ""
