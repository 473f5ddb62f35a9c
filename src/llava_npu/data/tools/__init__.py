"""Looking at data before training: check and inspect."""
