"""Improves a layer's mask by swaps: prunes one survivor of a row and keeps one pruned weight instead.

Theory of operation (SparseSwaps; Zimmer et al., 2025): with H = 2/n Σ x xᵀ and u the pruned weights of a row,
the row's output has the error ½ u H uᵀ. To prune weight i and keep weight j changes twice that by exactly
a_i + b_j − 2 w_i w_j H_ij, with a_i = 2 w_i (uH)_i + w_i² H_ii and b_j = −2 w_j (uH)_j + w_j² H_jj. Each row
makes the best swap of the candidates with the least a and b. If none of these lowers the error, all pairs of
the row are searched, so that the row ends in a local optimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .thresholds import Pattern

SWAPS = 100  # maximum for each row
_CANDIDATES = 32  # of each kind, in a row
_LEAST = 1e-5  # minimum share of a row's error that a swap removes: above the rounding of float32
_AT_ONCE = 1 << 22  # pairs that are searched together, with about 16 bytes of working memory each

# Of each row: the weight to prune, the weight to keep, and the change of u H uᵀ.
_Best = tuple[Tensor, Tensor, Tensor]


def swapped(
    weight: Tensor, mask: Tensor, products: Tensor, *, most: int = SWAPS, pattern: Pattern | None = None
) -> Tensor:
    """Returns a mask with the same number of survivors in each row, and no greater error of any output.

    Rows that have not reached ``most`` swaps are locally optimal: no single swap lowers their error by more
    than rounding.

    Args:
        weight: float32 [outputs, inputs].
        mask: bool, its shape, True for survivors.
        products: 2/n Σ x xᵀ of the layer's inputs, float32 [inputs, inputs].
        most: maximum number of swaps for each row.
        pattern: a pattern that the mask has and keeps: swaps are then within its groups.
    """
    step = max(1, _AT_ONCE // max(weight.shape[1], _CANDIDATES**2))
    found = mask.clone()
    for first in range(0, len(weight), step):
        rows = _Rows(weight[first : first + step], mask[first : first + step], products, pattern)
        rows.improve(most)
        found[first : first + step] = rows.kept
    return found


class _Rows:
    """Rows of a weight and their mask, which is improved in place."""

    def __init__(self, weight: Tensor, kept: Tensor, products: Tensor, pattern: Pattern | None) -> None:
        self.kept = kept.clone()
        self._weight, self._products, self._pattern = weight, products, pattern
        self._diagonal = products.diagonal()
        self._pulled = (weight * ~kept) @ products  # u H

    def improve(self, most: int) -> None:
        """Swaps until no swap lowers the error of a row, or each row has made ``most`` swaps."""
        active = torch.arange(len(self._weight), device=self._weight.device)
        made = torch.zeros_like(active)
        while len(active := active[made[active] < most]):
            best = self._best_in_groups(active) if self._pattern else self._best_of_candidates(active)
            gains = self._gains(active, best)
            if self._pattern is None and not bool(gains.all()):
                left = ~gains
                for place, own in zip(best, self._best_of_all(active[left]), strict=True):
                    place[left] = own
                gains = self._gains(active, best)
            active, out, back = active[gains], best[0][gains], best[1][gains]
            made[active] += 1
            self._swap(active, out, back)

    def _gains(self, rows: Tensor, best: _Best) -> Tensor:
        """Returns whether the best swap of each row lowers its error by more than rounding: bool [rows]."""
        gone = self._weight[rows] * ~self.kept[rows]
        errors = (gone * self._pulled[rows]).sum(1)
        return best[2] < -_LEAST * errors.clamp(min=0)

    def _swap(self, rows: Tensor, out: Tensor, back: Tensor) -> None:
        self.kept[rows, out], self.kept[rows, back] = False, True
        weights = self._weight[rows]
        for places, sign in ((out, 1), (back, -1)):
            moved = weights.gather(1, places[:, None])
            self._pulled.index_add_(0, rows, sign * moved * self._products[places])

    def _costs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a, infinite for pruned weights, and b, infinite for survivors."""
        weight, kept = self._weight[rows], self.kept[rows]
        own, crossed = weight.square() * self._diagonal, 2 * weight * self._pulled[rows]
        return (own + crossed).masked_fill_(~kept, torch.inf), (own - crossed).masked_fill_(kept, torch.inf)

    def _best_of_candidates(self, rows: Tensor) -> _Best:
        count = min(_CANDIDATES, self._weight.shape[1])
        (a, out), (b, back) = (costs.topk(count, dim=1, largest=False) for costs in self._costs(rows))
        weight = self._weight[rows]
        crossed = self._products[out[:, :, None], back[:, None, :]]
        crossed *= weight.gather(1, out)[:, :, None]
        crossed *= weight.gather(1, back)[:, None, :]
        change = (a[:, :, None] + b[:, None, :] - 2 * crossed).flatten(1)
        least, place = change.min(1)
        return (
            out.gather(1, (place // count)[:, None])[:, 0],
            back.gather(1, (place % count)[:, None])[:, 0],
            least,
        )

    def _best_of_all(self, rows: Tensor) -> _Best:
        a, b = self._costs(rows)
        weight, columns = self._weight[rows], self._weight.shape[1]
        found = []
        step = max(1, _AT_ONCE // columns**2)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            change = weight[part, :, None] * self._products
            change *= -2 * weight[part, None, :]
            change += a[part, :, None]
            change += b[part, None, :]
            found.append(change.flatten(1).min(1))
        least = torch.cat([values for values, _ in found])
        place = torch.cat([places for _, places in found])
        return place // columns, place % columns, least

    def _best_in_groups(self, rows: Tensor) -> _Best:
        assert self._pattern is not None
        of, columns = self._pattern.of, self._weight.shape[1]
        groups = columns // of
        a, b = (costs.view(-1, groups, of) for costs in self._costs(rows))
        weight = self._weight[rows].view(-1, groups, of)
        starts = torch.arange(columns, device=rows.device).view(groups, of)
        own = self._products[starts[:, :, None], starts[:, None, :]]  # [groups, of, of]
        crossed = weight[..., None] * weight[..., None, :] * own
        change = (a[..., None] + b[..., None, :] - 2 * crossed).flatten(1)
        least, place = change.min(1)
        group = place // (of * of) * of
        return group + place // of % of, group + place % of, least
