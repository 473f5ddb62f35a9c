"""Comparison: a grid of encoders, projectors and options, each trained, measured and set side by side.

grid ─► trials (what is run) ─► schedule (which device runs what) ─► trial (one worker: train, measure) ─► results
                                                                                       tables, plot, page ◄─┘
"""
