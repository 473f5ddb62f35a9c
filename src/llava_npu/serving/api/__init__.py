"""The HTTP server: OpenAI's chat API, LLaVA's worker protocol, health and metrics."""
