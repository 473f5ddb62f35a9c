"""Vision towers and what images become before them."""
