"""Steps whose gradient is not finite."""
