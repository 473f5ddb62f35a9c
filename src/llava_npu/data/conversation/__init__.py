"""Conversations: templates, tokens and labels."""
