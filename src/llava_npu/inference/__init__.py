"""Getting answers out of a model."""
