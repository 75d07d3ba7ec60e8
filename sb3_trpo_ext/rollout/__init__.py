"""Collecting, and what comes of it."""
