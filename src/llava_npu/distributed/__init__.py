"""Launching processes, forming their group, and stopping them."""
