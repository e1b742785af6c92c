"""Defenses, the engine that attackers share, and the exact weight operations."""
