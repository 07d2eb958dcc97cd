"""Tests of sfpformat. Each names the clauses of SPEC.md that it holds the code to: see `tests.clauses`."""
