"""Generates valid files of every kind from choices: first the contents, then their encoding after SPEC.md.

Rules: it uses no writer of the package. If every choice is 0, it generates the simplest file: one tensor of
one position. It also generates what the package's writer never writes: unused classes and codes in code
tables, index fields wider than necessary, unknown keys. Tensors are small, because a hundred positions
suffice to show a reader's mistakes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from .choices import Choices, Noise
from .forge import (
    Entry,
    Forge,
    Part,
    class_of,
    exact,
    f32_bytes,
    first_levels,
    hand_part,
    mask_levels,
    raw_part,
)
from .generate_codes import MOST_SYMBOLS, any_classes, any_code
from .generate_keyed import any_keyed
from .slow_reader import (
    BYTES,
    FACTORS,
    FLOATS,
    code_count,
    f32,
    level_counts,
    pattern_of,
    positions,
    segment_sizes,
    step_of,
    top,
    used_extra,
    vectors,
)

_SHAPES: tuple[tuple[int, ...], ...] = ((1,), (), (2, 3), (2, 1, 3, 2), (31,), (32,), (33,), (64,), (65,))
_SHAPES += ((1, 70), (70, 1), (4, 24), (97,), (3, 5, 7), (0,), (2, 0, 3))
_RAW_ONLY = tuple(name for name in BYTES if name not in FLOATS)
_SEGMENTS, _CHUNKS = (32, 64, 96, 65536), (1, 2, 3, 256)
_STEPS = (0.25, 1.0, 0.1, 2.0**-149, 2.0**97)
_FACTORS = (1.0, -0.5, 0.1, 0.0, -0.0, 3.0, 2.0**-140)
_CODES = 16


def any_file(choices: Choices) -> Forge:
    """Generates a valid file of up to three tensors, mostly one, and in one case of eight of keyed tables."""
    count = choices.pick((1, 1, 1, 2, 3, 0))
    root: dict[str, Any] = {}
    if choices.seldom(8):
        root["metadata"] = {"": "a", "é": ""}
    if choices.seldom(16):
        root["x-own"] = [{"a": b"\0"}, 2**64 - 1]
    tables = choices.together(_some_tables) if choices.seldom(8) else []
    if tables:
        root |= {"features": ["keyed"], "keyed": [source for source, _ in tables]}
    file = Forge(root, [choices.together(partial(any_tensor, name=f"t{i}")) for i in range(count)])
    file.parts += [part for _, part in tables]
    if choices.seldom(32):
        file.preamble["minor"] = choices.pick((1, 65535))
    return file


def _some_tables(choices: Choices) -> list[tuple[dict[str, Any], Part]]:
    """Generates one keyed table or two."""
    return [any_keyed(choices, f"k{i}") for i in range(choices.pick((1, 1, 2)))]


def any_tensor(choices: Choices, name: str) -> Part:
    """Generates a tensor of any coding, dtype and shape."""
    is_raw = choices.seldom(6)
    entry: Entry = {
        "name": name,
        "dtype": choices.pick((*FLOATS, *_RAW_ONLY) if is_raw else tuple(FLOATS)),
        "shape": list(choices.pick(_SHAPES)),
        "segment": choices.pick(_SEGMENTS),
        "chunk": choices.pick(_CHUNKS),
    }
    if not is_raw:
        return _Fingerprints(choices, entry).part()
    noise, most = choices.noise(), 2 if entry["dtype"] == "BOOL" else 256
    raw = bytes(noise.below(most) for _ in range(positions(entry) * BYTES[entry["dtype"]]))
    return raw_part(name, entry["dtype"], entry["shape"], raw, entry["segment"], entry["chunk"])


@dataclass
class _Stream:
    """A generated stream: its code table, and the levels, the code and the trim of each segment."""

    table: Entry
    levels: list[list[int]]
    codes: list[int]
    trims: list[int]


class _Fingerprints:
    """Generates a tensor of coding `fingerprint`."""

    def __init__(self, choices: Choices, entry: Entry) -> None:
        self.choices = choices
        self.entry = {"coding": "fingerprint", **entry}
        whole = dict(self.entry, chunk=-(-positions(entry) // entry["segment"]) or 1)
        self.sizes = segment_sizes(whole, 0)
        self.survivors = self.sizes

    def part(self) -> Part:
        """Returns the generated tensor."""
        choices, entry, made = self.choices, self.entry, dict[str, _Stream]()
        mask = self._mask(made) if choices.below(2) else None
        made["fingerprints"] = self._quantised("fingerprints", {})
        quantiser = entry["fingerprints"]["quantiser"]
        if quantiser != "exact" and choices.below(2):
            entry["scale"] = {"per": choices.pick(("tensor", "row", "column", "group"))}
            if entry["scale"]["per"] == "group":
                entry["scale"]["size"] = choices.pick((1, 7, 32, 1000, 2**64 - 1))
            entry["scale"]["dtype"] = choices.pick(FACTORS)
        if choices.below(2):
            self._importance(made)
        part = hand_part(
            entry,
            {name: joined(stream.levels) for name, stream in made.items() if name != "mask"},
            mask=mask,
            codes={name: stream.codes for name, stream in made.items()},
            trims={name: stream.trims for name, stream in made.items()},
            vectors=self._vectors(),
        )
        return self._with_loose_index(part)

    def _mask(self, made: dict[str, _Stream]) -> list[int]:
        choices = self.choices
        kind = choices.pick(("octets", "runs"))
        mask: Entry = {"kind": kind}
        if kind == "runs":
            mask["polarity"] = choices.pick((1, 0))
        noise, one_in, bits = choices.noise(), choices.pick((2, 1, 10, 3)), list[list[int]]()
        keep = choices.pick((True, False))  # whether 1 in `one_in` positions survives, or all others
        for size in self.sizes:
            bits.append([int((noise.below(one_in) == 0) == keep) for _ in range(size)])
        self.survivors = [sum(own) for own in bits]
        bound = 256 if kind == "octets" else 65536
        made["mask"] = self._stream(bound, [mask_levels(mask, own) for own in bits])
        self.entry["mask"] = mask | made["mask"].table
        return joined(bits)

    def _importance(self, made: dict[str, _Stream]) -> None:
        choices = self.choices
        over = choices.pick(("survivors", "all", "factors"))
        importance: Entry = {"over": over, "role": choices.pick(("metadata", "multiplier"))}
        self.entry["importance"] = importance
        if over == "factors":
            importance["dtype"] = choices.pick(FACTORS)
        else:
            made["importance"] = self._quantised("importance", importance)

    def _quantised(self, name: str, more: Entry) -> _Stream:
        """Generates a stream of fingerprints or of an importance, and stores its map in the entry."""
        choices, own = self.choices, self.entry["dtype"]
        is_weights = name == "fingerprints"
        source: Entry = {"quantiser": choices.pick(("exact", "uniform", "table"))}
        bound = 1 << (32 if is_weights else 31)
        if source["quantiser"] == "exact":
            narrower = tuple(d for d in FLOATS if is_weights and own in FLOATS[d].widens)
            coded = choices.pick((own, *narrower) if is_weights else FACTORS)
            source = exact(coded, trim=choices.pick((0, 1)))
            is_own = is_weights and coded == own
            bound = 1 << FLOATS[own].bits if is_own else 2 * FLOATS[coded].nonfinite
        if source["quantiser"] == "table":
            source["count"] = choices.pick((1, 2, 5, 300))
            bound = source["count"] * (2 if is_weights else 1)
        self.entry[name] = more | source
        counts = level_counts(self.entry, name, self.sizes, self.survivors)
        stream = self._stream(bound, counts=counts, trimmed=bool(source.get("trim")))
        self.entry[name] |= stream.table
        if source["quantiser"] == "uniform":
            greatest = (top(stream.table) - 1) // (2 if is_weights else 1)
            steps = [step for step in _STEPS if math.isfinite(f32(f32(greatest) * f32(step)))]
            self.entry[name]["step"] = f32_bytes(choices.pick(steps))
        return stream

    def _stream(
        self,
        bound: int,
        levels: list[list[int]] | None = None,
        *,
        counts: list[int] | None = None,
        trimmed: bool = False,
    ) -> _Stream:
        """Generates a code table whose levels lie below a bound, and the levels of each segment.

        Args:
            bound: one past the greatest level allowed.
            levels: the levels of each segment; None generates them.
            counts: the number of levels to generate for each segment.
            trimmed: whether to choose a trim for each segment.
        """
        choices = self.choices
        least = max(map(max, filter(None, levels or [])), default=0)
        base, extra = any_classes(choices, bound, least if levels is not None else None)
        group = 2 if 2 <= len(extra) <= 64 and choices.below(2) else 1
        table: Entry = {"base": base, "extra": bytes(extra), "group": group, "codes": []}
        count = choices.pick((1, 2, 3, _CODES)) if len(extra) > 1 else 0
        if group == 1 and 2 <= len(extra) <= 256 and choices.seldom(3):
            table["window"] = choices.pick([w for w in (3, 1, 2, 4) if (1 << w) - 1 <= len(extra)])
            count = 0
        noise = choices.noise()
        first = first_levels(base, extra)
        classes = [[class_of(first, level) for level in own] for own in levels or []]
        if counts is not None:
            few = min(len(extra), 8 if group == 2 else MOST_SYMBOLS)
            classes = [[noise.below(few) for _ in range(count)] for count in counts]
        codes = [noise.below(count or max(code_count(table), 1)) for _ in classes]
        for number in range(count):
            own = [c for c, code in zip(classes, codes, strict=True) if code == number]
            table["codes"].append(any_code(noise, _symbols(own, len(extra), group), len(extra) ** group))
        trims = [0] * len(classes)
        if trimmed:
            trims = [noise.below(max(used_extra(table)[0], 1)) for _ in classes]
        if levels is None:
            levels = [
                [first[c] + _residual(noise, extra[c], trim) for c in own]
                for own, trim in zip(classes, trims, strict=True)
            ]
        return _Stream(table, levels, codes, trims)

    def _vectors(self) -> dict[str, list[int]]:
        """Generates the bit patterns of the vectors that the entry needs. Every product is finite."""
        out, wanted = dict[str, list[int]](), vectors(self.entry)
        noise = self.choices.noise() if wanted else Noise(0)
        for name, count, dtype in wanted:
            if name.endswith("centroids"):
                steps = [noise.below(0x7F000000 // count) + 1 for _ in range(count)]
                out[name] = [sum(steps[: i + 1]) - 1 for i in range(count)]
                continue
            small = name == "scale" and not math.isfinite(f32(3.0 * self._greatest(out)))
            factors = _FACTORS[:2] if small else _FACTORS
            out[name] = [pattern_of(factors[noise.below(len(factors))], dtype) for _ in range(count)]
        return out

    def _greatest(self, found: dict[str, list[int]]) -> float:
        """Returns a bound on the magnitude of a weight before its scale.

        For centroids it is only 1 or infinity: whether the last centroid is too great to be scaled by 3.
        """
        source = self.entry["fingerprints"]
        if source["quantiser"] == "uniform":
            return f32(f32((top(source) - 1) // 2) * step_of(source))
        return f32(math.inf if found["fingerprint centroids"][-1] > 0x7E000000 else 1.0)

    def _with_loose_index(self, part: Part) -> Part:
        """In one case of eight, writes the first chunk's index with a lower minimum and wider fields."""
        if not (part.chunks and self.choices.seldom(8)):
            return part
        taken, noise = part.take(), self.choices.noise()
        for name, values in taken.quantities.items():
            least = min(values) - min(noise.below(4), min(values))
            width = min((max(values) - least).bit_length() + noise.below(4), 32)
            taken.headers[name] = least, width
        part.put(taken)
        return part


def joined(segments: list[list[int]]) -> list[int]:
    """Concatenates the levels, or bits, of all segments."""
    return list(chain.from_iterable(segments))


def _symbols(segments: list[list[int]], classes: int, group: int) -> set[int]:
    """Returns the symbols that encode levels of those classes."""
    out = set()
    for own in segments:
        padded = own + [0] * (len(own) % group)
        out |= {sum(padded[i + j] * classes**j for j in range(group)) for i in range(0, len(padded), group)}
    return out


def _residual(noise: Noise, extra: int, trim: int) -> int:
    """Returns random residual bits, of which bits 1 to ``trim`` are zero."""
    return noise.below(1 << extra) & ~(((1 << trim) - 1) << 1)
