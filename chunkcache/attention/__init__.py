"""Attention over chunks: partial states, their merge, and the two-phase plan."""
