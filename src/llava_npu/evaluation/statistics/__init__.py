"""Accuracy, intervals and significance."""
