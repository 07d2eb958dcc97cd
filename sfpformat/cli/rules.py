"""Computes the configuration of each tensor in ``sfp pack``, from options for all and ``--like`` rules.

Rules: without ``--like``, an option that changes values applies only to the weights that are usually
compressed: float, of rank 2 or more, of at least 4,096 elements, and not excluded by `not_weights`. A
``--like`` rule applies to every float tensor that matches its pattern. A later rule overrides an earlier one,
option by option. The quantiser's options (bits, budget, step, error, table, lossless) override each other,
and lossless cancels all options that change values, pruning too. A pruning pattern, such as 2:4, runs along a
tensor's inputs. Tensors that it does not fit are not pruned; it must fit at least one tensor of its rule.
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
        "by",
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
    "mantissa_bits",
    "zeros",
)
# Options that change the signs of zeros, but no values. They apply to every float tensor except those of
# --keep, and except storage of packed weights, whose bits are not float numbers, unless a --like names it.
_SIGNS = frozenset(("zeros",))


@dataclass(frozen=True)
class Pruning:
    """Pruning of the weights of least magnitude.

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
        signs_may_go: whether ``--zeros positive`` for all tensors applies, or would apply. Storage of packed
            weights is recognised only if `Rules.configs` was given ``left``.
    """

    options: Options
    pruning: Pruning | None = None
    cast: Dtype | None = None
    shares_bits: bool = False
    named: bool = False
    unfit: str = ""
    signs_may_go: bool = True

    @property
    def lossless(self) -> bool:
        """Whether decoding gives back every bit, except signs of zeros as the options say."""
        return self.options.lossless and self.pruning is None and self.cast is None


Layer = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """All options of the command line about tensors.

    Attributes:
        base: options for all tensors.
        likes: pattern and options of each ``--like``, in order.
        keep: patterns of tensors that are never changed.
    """

    base: Layer
    likes: list[tuple[str, Layer]]
    keep: list[str]

    def with_aliases(self, names: Iterable[str], aliases: Mapping[str, str]) -> Rules:
        """Returns the same rules, with patterns that match an alias extended to the stored name.

        Args:
            names: the names of the tensors.
            aliases: alias -> stored name.
        """
        there = list(names)

        def reached(pattern: str) -> list[str]:
            kept = dict.fromkeys(kept for name, kept in aliases.items() if fnmatchcase(name, pattern))
            own = any(fnmatchcase(name, pattern) for name in there)
            return [*([pattern] if own or not kept else []), *map(escape, kept)]

        return Rules(
            self.base,
            [(found, layer) for pattern, layer in self.likes for found in reached(pattern)],
            [found for pattern in self.keep for found in reached(pattern)],
        )

    def configs(
        self, specs: Iterable[TensorSpec], left: Mapping[str, Reason] | None = None
    ) -> dict[str, TensorConfig]:
        """Returns tensor name -> configuration.

        Args:
            specs: the tensors.
            left: tensor name -> why it stays lossless unless a ``--like`` names it; None uses `not_weights`.

        Raises:
            CommandError: a pattern matches no tensor, or an option applies to none.
            OptionError: options contradict each other.
        """
        specs = list(specs)
        left = not_weights(specs) if left is None else left
        self._require_effect(specs, left)
        configs = {spec.name: self._config(spec, left) for spec in specs}
        self._require_fit(configs)
        return configs

    @property
    def changes_values(self) -> bool:
        """Whether any option that changes values is given."""
        return any(_changes_values(layer) for layer in (self.base, *(layer for _, layer in self.likes)))

    @property
    def changes_signs(self) -> bool:
        """Whether -0 becomes +0 in some tensors."""
        return any(
            layer.get("zeros") == "positive" for layer in (self.base, *(layer for _, layer in self.likes))
        )

    def why_lossless(
        self, specs: Iterable[TensorSpec], configs: Mapping[str, TensorConfig], left: Mapping[str, Reason]
    ) -> dict[str, Reason]:
        """Returns tensor name -> why it stays lossless; empty if no option that changes values is given.

        Args:
            specs: the tensors.
            configs: the result of `configs` for ``specs`` and ``left``.
            left: same as for `configs`.
        """
        if not self.changes_values:
            return {}
        return {
            spec.name: self._why(spec, configs[spec.name].unfit, left)
            for spec in specs
            if configs[spec.name].lossless
        }

    def _why(self, spec: TensorSpec, unfit: str, left: Mapping[str, Reason]) -> Reason:
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
        return left.get(spec.name) or Reason(Kind.ASKED, "no option that changes values reaches it")

    def _require_effect(self, specs: list[TensorSpec], left: Mapping[str, Reason]) -> None:
        for pattern in [pattern for pattern, _ in self.likes] + self.keep:
            if not any(fnmatchcase(spec.name, pattern) for spec in specs):
                raise CommandError(unmatched(pattern, [spec.name for spec in specs]))
        usual = [spec for spec in specs if is_large_float(spec)] if _changes_values(self.base) else []
        if _changes_values(self.base) and not usual:
            raise CommandError(
                f"no tensor is float, of rank 2 or more and of {MIN_ELEMENTS:,} elements or more, so "
                f"{_flags(self.base)} would reach none; name those you mean with --like"
            )
        if usual and all(spec.name in left for spec in usual):
            counts = Counter(left[spec.name].kind for spec in usual)
            kinds = ", ".join(f"{kind.value} ({counts[kind]:,})" for kind in Kind if kind in counts)
            words = f"{_flags(self.base)} changes nothing: there are only {kinds}; --like GLOB reaches those"
            warnings.warn(words, SfpWarning, stacklevel=2)
        if _SIGNS & set(self.base) and not any(self._signs_may_go(spec, left) for spec in specs):
            raise CommandError(
                f"no tensor is float and may change: {_flags(self.base, _SIGNS)} would reach none"
            )
        for pattern, layer in self.likes:
            named = [spec for spec in specs if fnmatchcase(spec.name, pattern)]
            if (_LOSSY | _SIGNS) & set(layer) and not any(spec.dtype.is_float for spec in named):
                flags = _flags(layer, _LOSSY | _SIGNS)
                raise CommandError(f"no tensor like {pattern!r} is float: {flags} would reach none")
            if _changes_values(layer):
                self._warn_of_quantised(pattern, named, left)
            elif layer.get("zeros") == "positive":
                packed = [spec for spec in named if is_packed_storage(spec, left)]
                self._warn_of_quantised(pattern, packed, left)

    def _require_fit(self, configs: dict[str, TensorConfig]) -> None:
        """Raises `CommandError` if a pruning pattern fits none of the tensors of its rule."""
        by_rule: dict[int, dict[str, TensorConfig]] = {}
        for name, config in configs.items():
            if config.unfit or (config.pruning is not None and config.pruning.of):
                by_rule.setdefault(self._pruned_by(name), {})[name] = config
        for rule, found in by_rule.items():
            if all(config.unfit for config in found.values()):
                like = "" if rule < 0 else f" after --like {self.likes[rule][0]!r}"
                told = reasons({name: config.unfit for name, config in found.items()})
                raise CommandError(f"--prune{like} fits no tensor: {told}")

    def _pruned_by(self, name: str) -> int:
        """Returns the index of the last ``--like`` that prunes a tensor; -1 for the options for all."""
        return max(
            (
                number
                for number, (pattern, layer) in enumerate(self.likes)
                if "prune" in layer and fnmatchcase(name, pattern)
            ),
            default=-1,
        )

    def _warn_of_quantised(self, pattern: str, named: list[TensorSpec], left: Mapping[str, Reason]) -> None:
        """Warns if a rule changes parts of weights that are already quantised."""
        names = [
            spec.name
            for spec in named
            if spec.dtype.is_float
            and spec.name in left
            and left[spec.name].kind in (Kind.STORAGE, Kind.COMPANION)
            and not any(fnmatchcase(spec.name, keep) for keep in self.keep)
        ]
        if names:
            words = f"--like {pattern!r} changes parts of weights that are quantised already ({len(names):,})"
            warnings.warn(f"{words}: {listed(names)}; --keep excludes them", SfpWarning, stacklevel=3)

    def _config(self, spec: TensorSpec, left: Mapping[str, Reason]) -> TensorConfig:
        kept = any(fnmatchcase(spec.name, pattern) for pattern in self.keep)
        can_change = spec.dtype.is_float and not kept
        signs_may_go = self._signs_may_go(spec, left)
        merged = _reaching(self.base, can_change and is_large_float(spec) and spec.name not in left)
        if not signs_may_go:
            merged = {key: value for key, value in merged.items() if key not in _SIGNS}
        named = False
        for pattern, layer in self.likes:
            if fnmatchcase(spec.name, pattern):
                merged = _merged(merged, _reaching(layer, can_change))
                named = named or (can_change and _changes_values(layer))
        if not can_change:
            merged = {key: value for key, value in merged.items() if key not in _SIGNS}
        return replace(_config_of(merged, spec), named=named, signs_may_go=signs_may_go)

    def _signs_may_go(self, spec: TensorSpec, left: Mapping[str, Reason]) -> bool:
        """Returns whether ``--zeros`` for all tensors applies to this one."""
        kept = any(fnmatchcase(spec.name, pattern) for pattern in self.keep)
        return spec.dtype.is_float and not kept and not is_packed_storage(spec, left)


def _reaching(layer: Layer, lossy: bool) -> Layer:
    return layer if lossy else {key: value for key, value in layer.items() if key not in _LOSSY}


def _changes_values(layer: Layer) -> bool:
    return bool((_LOSSY - {"lossless"}) & set(layer))


def _flags(layer: Layer, keys: frozenset[str] = _LOSSY) -> str:
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
        raise CommandError("a --budget of all tensors does not go with --scale; --budget-scope tensor does")
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
        CommandError: an option needs another quantiser.
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
    """Returns the pruning of a tensor, or None, and why a pattern does not fit; empty if it fits.

    Raises:
        CommandError: options contradict each other.
    """
    pruning: Pruning | None = layer.get("prune")
    scope = layer.get("scope", "tensor")
    if pruning is None and ("scope" in layer or "by" in layer):
        raise CommandError("--scope and --by need --prune")
    if "pattern_dim" in layer and not (pruning is not None and pruning.of):
        raise CommandError("--pattern-dim needs a pattern to prune, such as --prune 2:4")
    if pruning is None:
        return None, ""
    if pruning.of:
        if scope == "model":
            raise CommandError("--scope model needs a fraction to prune, not a pattern")
        dim = layer.get("pattern_dim", pattern_dim(spec.shape))
        unfit = Pattern(pruning.keep, pruning.of).why_not(spec.shape, (dim, 1))
        return (None, unfit) if unfit else (replace(pruning, dim=dim), "")
    return (Pruning(pruning.fraction, scope=scope) if pruning.fraction else None), ""
