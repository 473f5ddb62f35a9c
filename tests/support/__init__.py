"""What tests share: tiny models and data, small runs, servers and samples."""
