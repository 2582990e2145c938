"""Measuring claims, keeping what was measured, and saying what has changed since."""
