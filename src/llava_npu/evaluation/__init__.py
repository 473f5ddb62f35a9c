"""Evaluation: benchmark questions, answers from a model, extraction, scores with intervals, reports.

`runner.evaluate` ties them together. A new benchmark is one file in `benchmarks/` with one `register` call.
"""
