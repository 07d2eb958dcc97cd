"""The benchmark behind ``sfp bench``: size, speed and memory of this package and of its peers on one model.

Rules: everything here measures and computes, and nothing prints; the command does. A section (`sections`) is
a list of runners, each one way to do the same work; `measure.race` lets every runner run once a round, in an
order that turns, so that whatever else the machine does falls on all alike. A runner is asked first to show
that it gives back what it was given; one that does not is left out and told.
"""
