"""The benchmark of ``sfp bench``: size, speed and memory of this package and its peers on one model.

Rules: this package measures and computes; only the command prints. A section (`sections`) is a list of
runners, each one way to do the same work. `measure.race` runs them round-robin, with a rotating start, so
that other load on the machine affects all runners equally. Each runner is checked first: contenders that are
not bit-exact are excluded and reported.
"""
