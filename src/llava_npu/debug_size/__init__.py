"""A recipe at debug size: its stage, projector, template and settings, on tiny models and data drawn on the spot.

It shows in seconds, on any machine and offline, that a run works; its numbers mean nothing.
"""
