"""Computes the configuration of each tensor in ``sfp pack``, from options for all and ``--like`` rules.

Rules: without ``--like``, an option that changes values applies only to the weights that are usually
compressed: float, of rank 2 or more, of at least 4,096 elements, and not excluded by `not_weights`. A
``--like`` rule applies to every float tensor whose name matches its pattern. A later rule overrides an
earlier one, option by option. The quantiser's options (bits, budget, step, error, table, lossless) override
each other. Lossless cancels all options of earlier rules that change values, including pruning, casts and
positive zeros; in the same rule, it contradicts them. A pruning pattern, such as
2:4, applies along the inputs of a tensor. Tensors that it does not fit are not pruned; it must fit at least
one tensor of its rule.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from ..dtypes import DTYPES, Dtype
from ..encode.weights import MIN_ELEMENTS, Kind, Reason, is_large_float, is_packed_storage, not_weights
from ..errors import SfpWarning
from ..io.safetensors import TensorSpec
from ..names import listed, unmatched
from ..options import PRESETS, ImportanceOptions, Options, Table, Uniform
from ..pruning.masks import reasons
from ..pruning.thresholds import Pattern, pattern_dim
from .errors import CommandError

# Options of `Uniform` that choose its step, and all that choose a quantiser.
_UNIFORM = ("bits", "budget", "step", "error_db")
_QUANTISER = (*_UNIFORM, "table", "lossless")
# Options with the same name in `Uniform` and `Table`, and in `Uniform` alone.
_OF_LOSSY, _OF_UNIFORM = ("scale", "scale_dtype", "weighted"), ("rate_weight",)
# Options that change values, and their secondary options.
_LOSSY = frozenset(
    (
        *_QUANTISER,
        "budget_scope",
        "prune",
        "pattern_dim",
        "scope",
        "scale",
        "scale_dtype",
        "rate_weight",
        "weighted",
        "dtype",
    )
)
# Options with the same name in `Options`.
_PLAIN = (
    "mask",
    "group",
    "segment",
    "chunk",
    "codes",
    "code_limit",
    "window",
    "mantissa_bits",
    "zeros",
)
# Options that change the signs of zeros, but no values. They apply to every float tensor except tensors of
# --keep and storage of packed weights, whose bits are not float numbers. --like rules apply to such storage.
_SIGNS = frozenset(("zeros",))


@dataclass(frozen=True)
class Pruning:
    """Pruning of the weights with the smallest magnitudes.

    Attributes:
        fraction: fraction of all positions to prune, or 0 with a pattern.
        keep, of: with a pattern, keeps ``keep`` of every ``of`` neighbours; else 0.
        scope: ``tensor``, or ``model`` for one cutoff over all tensors with this pruning.
        dim: with a pattern, the dimension of the neighbours.
    """

    fraction: float = 0.0
    keep: int = 0
    of: int = 0
    scope: str = "tensor"
    dim: int = 0


@dataclass(frozen=True)
class TensorConfig:
    """The configuration of one tensor, which is pruned, then cast, then encoded.

    Attributes:
        options: the options of encoding.
        pruning: the pruning, or None.
        cast: the dtype to cast to, or None.
        shares_bits: whether the tensor shares the budget of its options with all such tensors.
        named: whether a ``--like`` rule changes its values.
        unfit: why the requested pruning pattern does not fit; else empty.
        zeros_option_applies: whether ``--zeros`` without ``--like`` applies to the tensor, or would apply if
            given. Recognises storage of packed weights only if `Rules.configs` was given ``excluded``.
    """

    options: Options
    pruning: Pruning | None = None
    cast: Dtype | None = None
    shares_bits: bool = False
    named: bool = False
    unfit: str = ""
    zeros_option_applies: bool = True

    @property
    def lossless(self) -> bool:
        """Whether decoding returns every bit, except signs of zeros that the options change."""
        return self.options.lossless and self.pruning is None and self.cast is None


Layer = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """All options of the command line that apply to tensors.

    Attributes:
        base: options for all tensors.
        likes: pattern and options of each ``--like``, in the order of the command line.
        keep: patterns of tensors that are never changed.
    """

    base: Layer
    likes: list[tuple[str, Layer]]
    keep: list[str]

    def __post_init__(self) -> None:
        """Raises `CommandError` if options that are given together contradict each other."""
        _require_consistent(self.base, "")
        for pattern, layer in self.likes:
            _require_consistent(layer, f" after --like {pattern!r}")

    def with_aliases(self, names: Iterable[str], aliases: Mapping[str, str]) -> Rules:
        """Returns the same rules, with patterns that match an alias extended to the stored name.

        Args:
            names: the names of the tensors.
            aliases: alias -> stored name.
        """
        all_names = list(names)

        def extended(pattern: str) -> list[str]:
            kept = dict.fromkeys(kept for name, kept in aliases.items() if fnmatchcase(name, pattern))
            own = any(fnmatchcase(name, pattern) for name in all_names)
            return [*([pattern] if own or not kept else []), *map(escape, kept)]

        return Rules(
            self.base,
            [(found, layer) for pattern, layer in self.likes for found in extended(pattern)],
            [found for pattern in self.keep for found in extended(pattern)],
        )

    def configs(
        self, specs: Iterable[TensorSpec], excluded: Mapping[str, Reason] | None = None
    ) -> dict[str, TensorConfig]:
        """Returns tensor name -> configuration.

        Args:
            specs: the tensors.
            excluded: tensor name -> why it stays lossless unless a ``--like`` rule names it. None uses
                `not_weights`.

        Raises:
            CommandError: a pattern matches no tensor, or an option applies to none.
            OptionError: options contradict each other.
        """
        specs = list(specs)
        excluded = not_weights(specs) if excluded is None else excluded
        self._require_effect(specs, excluded)
        configs = {spec.name: self._config(spec, excluded) for spec in specs}
        self._require_fit(configs)
        return configs

    def gives(self, option: str) -> bool:
        """Whether an option, by its name in a layer, is given for any tensor."""
        return any(option in layer for layer in (self.base, *(layer for _, layer in self.likes)))

    @property
    def changes_values(self) -> bool:
        """Whether any option that changes values is given."""
        return any(_changes_values(layer) for layer in (self.base, *(layer for _, layer in self.likes)))

    @property
    def changes_signs(self) -> bool:
        """Whether any option writes +0 for -0."""
        return any(
            layer.get("zeros") == "positive" for layer in (self.base, *(layer for _, layer in self.likes))
        )

    def why_lossless(
        self, specs: Iterable[TensorSpec], configs: Mapping[str, TensorConfig], excluded: Mapping[str, Reason]
    ) -> dict[str, Reason]:
        """Returns tensor name -> why it stays lossless; empty if no option that changes values is given.

        Args:
            specs: the tensors.
            configs: the result of `configs` for ``specs`` and ``excluded``.
            excluded: same as for `configs`.
        """
        if not self.changes_values:
            return {}
        return {
            spec.name: self._why(spec, configs[spec.name].unfit, excluded)
            for spec in specs
            if configs[spec.name].lossless
        }

    def _why(self, spec: TensorSpec, unfit: str, excluded: Mapping[str, Reason]) -> Reason:
        kept = next((pattern for pattern in self.keep if fnmatchcase(spec.name, pattern)), None)
        if kept is not None:
            return Reason(Kind.ASKED, f"--keep {kept!r}")
        if not spec.dtype.is_float:
            return Reason(Kind.NOT_FLOAT, spec.words)
        if unfit:
            return Reason(Kind.PATTERN, unfit)
        likes = [pattern for pattern, layer in self.likes if "lossless" in layer]
        undone = next((pattern for pattern in likes if fnmatchcase(spec.name, pattern)), None)
        if undone is not None:
            return Reason(Kind.ASKED, f"--like {undone!r} --lossless")
        if not is_large_float(spec):
            return Reason(Kind.SMALL, spec.words)
        return excluded.get(spec.name) or Reason(Kind.UNCHANGED, "no option changes its values")

    def _require_effect(self, specs: list[TensorSpec], excluded: Mapping[str, Reason]) -> None:
        for pattern in [pattern for pattern, _ in self.likes] + self.keep:
            if not any(fnmatchcase(spec.name, pattern) for spec in specs):
                raise CommandError(unmatched(pattern, [spec.name for spec in specs]))
        usual = [spec for spec in specs if is_large_float(spec)] if _changes_values(self.base) else []
        if _changes_values(self.base) and not usual:
            raise CommandError(
                f"{_flags(self.base)} has no effect: no tensor is float, of rank 2 or more, with at least "
                f"{MIN_ELEMENTS:,} elements; name other tensors with --like"
            )
        if usual and all(spec.name in excluded for spec in usual):
            counts = Counter(excluded[spec.name].kind for spec in usual)
            kinds = ", ".join(f"{kind.value} ({counts[kind]:,})" for kind in Kind if kind in counts)
            words = (
                f"{_flags(self.base)} has no effect: every large float tensor is excluded: {kinds}; "
                "to change them, use --like GLOB"
            )
            warnings.warn(words, SfpWarning, stacklevel=2)
        if _SIGNS & set(self.base) and not any(self._zeros_option_applies(spec, excluded) for spec in specs):
            raise CommandError(
                f"{_flags(self.base, _SIGNS)} has no effect: no tensor is float, outside of --keep, and not "
                "storage of packed weights"
            )
        for pattern, layer in self.likes:
            named = [spec for spec in specs if fnmatchcase(spec.name, pattern)]
            if (_LOSSY | _SIGNS) & set(layer) and not any(spec.dtype.is_float for spec in named):
                flags = _flags(layer, _LOSSY | _SIGNS)
                raise CommandError(
                    f"{flags} has no effect: no tensor that matches --like {pattern!r} is float"
                )
            if _changes_values(layer):
                self._warn_of_quantised(pattern, named, excluded)
            elif layer.get("zeros") == "positive":
                packed = [spec for spec in named if is_packed_storage(spec, excluded)]
                self._warn_of_quantised(pattern, packed, excluded)

    def _require_fit(self, configs: dict[str, TensorConfig]) -> None:
        """Raises `CommandError` if a pruning pattern fits none of the tensors of its rule."""
        by_rule: dict[int, dict[str, TensorConfig]] = {}
        for name, config in configs.items():
            if config.unfit or (config.pruning is not None and config.pruning.of):
                by_rule.setdefault(self._pruned_by(name), {})[name] = config
        for rule, found in by_rule.items():
            if all(config.unfit for config in found.values()):
                like = "" if rule < 0 else f" after --like {self.likes[rule][0]!r}"
                details = reasons({name: config.unfit for name, config in found.items()})
                raise CommandError(f"--prune{like} fits no tensor: {details}")

    def _pruned_by(self, name: str) -> int:
        """Returns the index of the last ``--like`` rule that prunes a tensor; -1 if no rule does."""
        return max(
            (
                number
                for number, (pattern, layer) in enumerate(self.likes)
                if "prune" in layer and fnmatchcase(name, pattern)
            ),
            default=-1,
        )

    def _warn_of_quantised(
        self, pattern: str, named: list[TensorSpec], excluded: Mapping[str, Reason]
    ) -> None:
        """Warns if a rule changes parts of weights that are already quantised."""
        names = [
            spec.name
            for spec in named
            if spec.dtype.is_float
            and spec.name in excluded
            and excluded[spec.name].kind in (Kind.STORAGE, Kind.COMPANION)
            and not any(fnmatchcase(spec.name, keep) for keep in self.keep)
        ]
        if names:
            words = f"--like {pattern!r} changes parts of weights that are already quantised ({len(names):,})"
            warnings.warn(f"{words}: {listed(names)}; to exclude them, use --keep", SfpWarning, stacklevel=3)

    def _config(self, spec: TensorSpec, excluded: Mapping[str, Reason]) -> TensorConfig:
        kept = any(fnmatchcase(spec.name, pattern) for pattern in self.keep)
        can_change = spec.dtype.is_float and not kept
        zeros_option_applies = self._zeros_option_applies(spec, excluded)
        merged = _applicable(self.base, can_change and is_large_float(spec) and spec.name not in excluded)
        if not zeros_option_applies:
            merged = {key: value for key, value in merged.items() if key not in _SIGNS}
        named = False
        for pattern, layer in self.likes:
            if fnmatchcase(spec.name, pattern):
                merged = _merged(merged, _applicable(layer, can_change))
                named = named or (can_change and _changes_values(layer))
        if not can_change:
            merged = {key: value for key, value in merged.items() if key not in _SIGNS}
        return replace(_config_of(merged, spec), named=named, zeros_option_applies=zeros_option_applies)

    def _zeros_option_applies(self, spec: TensorSpec, excluded: Mapping[str, Reason]) -> bool:
        """Returns whether ``--zeros`` without ``--like`` applies to this tensor."""
        kept = any(fnmatchcase(spec.name, pattern) for pattern in self.keep)
        return spec.dtype.is_float and not kept and not is_packed_storage(spec, excluded)


def _applicable(layer: Layer, lossy: bool) -> Layer:
    """Returns the options of a layer that apply to a tensor: with ``lossy``, those that change values too."""
    return layer if lossy else {key: value for key, value in layer.items() if key not in _LOSSY}


def _require_consistent(layer: Layer, where: str) -> None:
    """Raises `CommandError` if ``--lossless`` stands beside options that change values or signs of zeros."""
    if "lossless" not in layer:
        return
    changing = _LOSSY - {"lossless"} | (_SIGNS if layer.get("zeros") == "positive" else frozenset())
    if changing & set(layer):
        raise CommandError(
            f"{_flags(layer, changing)}{where}: not allowed with --lossless, which keeps every bit; omit one "
            "of them, or keep some tensors lossless with --like GLOB --lossless"
        )


def _changes_values(layer: Layer) -> bool:
    return bool((_LOSSY - {"lossless"}) & set(layer))


def _flags(layer: Layer, keys: frozenset[str] = _LOSSY) -> str:
    """Formats the options of a layer that are among ``keys`` as on the command line: ``--prune, --bits``."""
    return ", ".join(f"--{key.replace('_', '-')}" for key in layer if key in keys)


def _merged(earlier: Layer, later: Layer) -> Layer:
    """Merges two layers. Later options override earlier ones, and remove incompatible earlier ones."""
    if "prune" in later:
        other = "scope" if later["prune"].of else "pattern_dim"
        earlier = {key: value for key, value in earlier.items() if key != other}
    if any(key in later for key in _QUANTISER):
        dropped: set[str] | frozenset[str] = {*_QUANTISER, "budget_scope"}
        if "lossless" in later:
            dropped = _LOSSY | _SIGNS
        elif "table" in later:
            dropped |= {*_OF_UNIFORM}
        earlier = {key: value for key, value in earlier.items() if key not in dropped}
    return {**earlier, **later}


def _config_of(layer: Layer, spec: TensorSpec) -> TensorConfig:
    options = PRESETS[layer.get("preset", "default")]
    changes = {key: layer[key] for key in _PLAIN if key in layer}
    quantiser = _quantiser_of(layer)
    if quantiser is not None:
        changes["quantiser"] = quantiser
    if "budget_scope" in layer and "budget" not in layer:
        raise CommandError("--budget-scope needs --budget")
    shares = "budget" in layer and layer.get("budget_scope", "model") == "model"
    if shares and "scale" in layer:
        raise CommandError(
            "a --budget shared by all tensors cannot be combined with --scale; add --budget-scope tensor"
        )
    if "importance_bits" in layer:
        bits = layer["importance_bits"]
        changes["importance"] = ImportanceOptions(bits=bits) if bits else None
    cast = DTYPES[layer["dtype"]] if "dtype" in layer else spec.dtype
    pruning, unfit = _pruning_of(layer, spec)
    to = None if cast == spec.dtype else cast
    return TensorConfig(options.but(**changes), pruning, to, shares, unfit=unfit)


def _quantiser_of(layer: Layer) -> Uniform | Table | None:
    """Returns the lossy quantiser that the options choose, or None.

    Raises:
        CommandError: an option needs a quantiser that is not chosen.
        OptionError: a value is not allowed.
    """
    fields = {key: layer[key] for key in _OF_LOSSY if key in layer}
    rate = {key: layer[key] for key in _OF_UNIFORM if key in layer}
    target = {key: layer[key] for key in _UNIFORM if key in layer}
    if "scale_dtype" in layer and "scale" not in layer:
        raise CommandError("--scale-dtype needs --scale")
    if rate and not target:
        raise CommandError(f"{_flags(rate)} needs one of {_flags(dict.fromkeys(_UNIFORM))}")
    if target:
        return Uniform(**target, **fields, **rate)
    if "table" in layer:
        return Table(layer["table"], **fields)
    if fields:
        needed = _flags(dict.fromkeys(key for key in _QUANTISER if key != "lossless"))
        raise CommandError(f"{_flags(fields)} needs one of {needed}")
    return None


def _pruning_of(layer: Layer, spec: TensorSpec) -> tuple[Pruning | None, str]:
    """Returns the pruning of a tensor, or None, and the reason if a pattern does not fit, else empty.

    Raises:
        CommandError: options contradict each other.
    """
    pruning: Pruning | None = layer.get("prune")
    scope = layer.get("scope", "tensor")
    if pruning is None and "scope" in layer:
        raise CommandError("--scope needs --prune")
    if "pattern_dim" in layer and not (pruning is not None and pruning.of):
        raise CommandError("--pattern-dim needs --prune with a pattern, such as 2:4")
    if pruning is None:
        return None, ""
    if pruning.of:
        if scope == "model":
            raise CommandError(
                "--scope model needs --prune with a fraction; a pattern, such as 2:4, applies to each tensor"
            )
        dim = layer.get("pattern_dim", pattern_dim(spec.shape))
        unfit = Pattern(pruning.keep, pruning.of).why_not(spec.shape, (dim, 1))
        return (None, unfit) if unfit else (replace(pruning, dim=dim), "")
    return (Pruning(pruning.fraction, scope=scope) if pruning.fraction else None), ""
