"""Modules that several rooms build on."""
