"""Strategies of the search against the oracle, several segments, quality budgets, calibration text."""
