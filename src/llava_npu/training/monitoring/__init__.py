"""What a run shows: metrics, progress, plots, trackers."""
