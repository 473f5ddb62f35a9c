"""Reading the answer out of a response."""
