"""Attention cores that several rooms use: pure functions on query, key and value, masks and positions."""
