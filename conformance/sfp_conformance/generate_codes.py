"""Generates code tables and prefix codes from choices (SPEC.md chapter 8)."""

from __future__ import annotations

from .choices import Choices, Noise
from .forge import flat_code, nibbles

MOST_SYMBOLS = 256  # of a code that are used (R-TAB-006)
_MOST_LENGTH, _MOST_EXTRA = 12, 56


def any_classes(choices: Choices, bound: int, least: int | None) -> tuple[int, list[int]]:
    """Returns a base and the residual bits of classes whose levels lie below a bound.

    Args:
        bound: one past the greatest level allowed.
        least: a level that the classes must cover, starting at base 0; None for no such level.
    """
    most = min(bound.bit_length() - 1, _MOST_EXTRA)
    widths = choices.pick(((0, 1, 2, 3), (0,), tuple(range(most + 1)), (most,), (0, most // 2)))
    widths = tuple(min(width, most) for width in widths)
    count, noise = choices.pick((1, 2, 3, 9, 64, 290)), choices.noise()
    base = choices.pick((0, 1, 2, bound // 2)) if least is None else 0
    extra: list[int] = []
    end = base
    while len(extra) < count or (least is not None and end <= least):
        # Later classes are wider, so that few classes suffice to cover `least`.
        width = min(widths[noise.below(len(widths))] + len(extra) // 64, most)
        while end + (1 << width) > bound and width:
            width -= 1
        if end + (1 << width) > bound:
            break
        extra.append(width)
        end += 1 << width
    return (base, extra) if extra else (bound - 1, [0])


def any_code(noise: Noise, needed: set[int], symbols: int) -> bytes:
    """Returns a complete code for the needed symbols and up to three more, as an entry of `codes`."""
    used = sorted(needed)
    assert len(used) <= MOST_SYMBOLS
    wanted = max(2, min(len(used) + noise.below(4), MOST_SYMBOLS, symbols))
    used += [s for s in range(wanted + len(used)) if s not in needed][: wanted - len(used)]
    order = sorted(range(len(used)), key=lambda i: (noise.below(1 << 16), i))
    out = [0] * symbols
    for i, length in zip(order, _lengths(noise, len(used)), strict=True):
        out[used[i]] = length
    return nibbles(out)


def _lengths(noise: Noise, count: int) -> list[int]:
    """Returns the lengths of a complete code: flat in one case of four and if the noise is 0, else random."""
    if noise.below(4) == 0:
        return flat_code(count)
    leaves = [1, 1]
    while len(leaves) < count:
        i = noise.below(len(leaves))
        if leaves[i] < _MOST_LENGTH:
            leaves[i : i + 1] = [leaves[i] + 1] * 2
    return leaves
