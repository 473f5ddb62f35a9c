"""Comparison: a grid of encoders, projectors and options, each trained, measured and set side by side.

grid ─► cells (what is run) ─► schedule (which device runs what) ─► cell (one worker: train, measure) ─► results
                                                                                       tables, plot, page ◄─┘
"""
