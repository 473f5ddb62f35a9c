"""Before a run: how many operations it takes (`flops.py`), how much memory, how long."""
