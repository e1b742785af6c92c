"""Attacks, and what writes their results."""
