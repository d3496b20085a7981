"""Offline, seeded evaluation tasks, one per file, and a timed generate()."""
