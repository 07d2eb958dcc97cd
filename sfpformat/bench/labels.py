"""Places the labels of points without overlaps. Geometry only, in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_RINGS = (1.0, 1.6, 2.5, 4.0, 6.0, 8.5, 11.5, 15.0)  # candidate distances, in gaps
_DIRECTIONS = 24


class Box(NamedTuple):
    """A rectangle with left, lower, right and upper edges."""

    left: float
    low: float
    right: float
    high: float

    def overlap(self, other: Box) -> float:
        """Returns the area that two boxes share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.high, other.high) - max(self.low, other.low)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, bounds: Box) -> float:
        """Returns the area outside of the bounds."""
        return (self.right - self.left) * (self.high - self.low) - self.overlap(bounds)

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """Returns the point of the box that is nearest to a point."""
        x, y = point
        return min(max(x, self.left), self.right), min(max(y, self.low), self.high)

    def distance(self, point: tuple[float, float]) -> float:
        """Returns the distance from a point to the box."""
        return math.dist(point, self.nearest(point))

    def grown(self, by: float) -> Box:
        """Returns a box that is larger on all sides."""
        return Box(self.left - by, self.low - by, self.right + by, self.high + by)


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    gap: float,
    obstacles: Sequence[Box] = (),
) -> list[Box]:
    """Returns a box for the label of each point: the nearest without overlap, else the one with the least.

    Labels must not overlap other labels, points or obstacles. Labels of points that are close together are
    placed first. A label that is nearer to another point than to its own counts as overlapping.

    Args:
        points: coordinates of the points.
        sizes: width and height of each label.
        bounds: the area for labels.
        gap: distance between a point and its label.
        obstacles: areas that must stay free.
    """
    dots = [Box(x, y, x, y).grown(gap / 2) for x, y in points]
    placed: dict[int, Box] = {}
    for i in sorted(range(len(points)), key=lambda i: _distance_to_others(points, i)):
        taken = [*placed.values(), *dots, *obstacles]
        best, least = None, math.inf
        for box in _candidates(points[i], sizes[i], gap):
            cost = sum(box.overlap(other) for other in taken) + box.outside(bounds)
            cost += gap * max(0.0, box.distance(points[i]) - _nearest_other(box, points, i))
            if cost < least:
                best, least = box, cost
            if cost == 0:
                break
        placed[i] = best or Box(*points[i], *points[i])
    return [placed[i] for i in range(len(points))]


def _nearest_other(box: Box, points: Sequence[tuple[float, float]], i: int) -> float:
    return min((box.distance(point) for k, point in enumerate(points) if k != i), default=math.inf)


def _distance_to_others(points: Sequence[tuple[float, float]], i: int) -> float:
    return min((math.dist(points[i], point) for k, point in enumerate(points) if k != i), default=0.0)


def _candidates(point: tuple[float, float], size: tuple[float, float], gap: float) -> list[Box]:
    """Returns boxes around a point, nearest first; within a ring, those to the right first."""
    (x, y), (width, height) = point, size
    out = []
    for ring in _RINGS:
        for k in range(_DIRECTIONS):
            # 0, +1, -1, +2, ... steps away from the right.
            angle = 2 * math.pi * ((k + 1) // 2) * (1 if k % 2 else -1) / _DIRECTIONS
            dx, dy = math.cos(angle), math.sin(angle)
            # The box's nearest edge or corner is on the ring.
            cx = x + dx * ring * gap + width / 2 * max(-1.0, min(1.0, 2 * dx))
            cy = y + dy * ring * gap + height / 2 * max(-1.0, min(1.0, 2 * dy))
            out.append(Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2))
    return out
