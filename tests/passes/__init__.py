"""Tests of the passes: expressions, solver, reading rules, facts, legality."""
