"""Files: atomic writes, locks, JSON, and the user's cache."""
