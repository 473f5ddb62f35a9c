"""Answers that a judge model scores."""
