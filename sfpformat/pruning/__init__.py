"""Learned importance, thresholds, and the way from a trained network to a pruned `.sfp` file.

Each weight gets an importance: from a score, or learned by a small network that maps features of a weight to
its importance and is trained through the model, which stays as it is. A threshold found from the
distribution of the importances prunes what lies under it. A file holds what is left.

`thresholds`, `grades` and `reprune` need numpy alone; the rest needs torch, and is imported when it is
first asked for.
"""

from __future__ import annotations
