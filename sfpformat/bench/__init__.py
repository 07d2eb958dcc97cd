"""The benchmark of ``sfp bench``: size, speed and memory of this package and its peers on one model.

Rules: this package measures and computes; only the command prints. A section (`sections`) is a list of
runners, each one way to do the same work. Each round of `measure.run_round_robin` starts with the next
runner, so that other load affects all runners equally. Each runner is checked first: contenders that are not
bit-exact are excluded and reported.
"""
