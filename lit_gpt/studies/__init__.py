"""Comparisons and costs, found by trying."""
