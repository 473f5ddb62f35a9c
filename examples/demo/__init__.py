"""The demo: align, tune and evaluate a small LLaVA on real weights and images. Run `python examples/demo --help`."""
