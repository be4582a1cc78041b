"""Speed, memory and stability, measured; see `README.md` beside this file."""
