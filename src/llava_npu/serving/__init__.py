"""Using a trained model: terminal chat."""
