"""Measures speed, memory and stability; see `README.md` beside this file."""
