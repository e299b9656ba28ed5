"""The HTTP server: OpenAI's Videos API over the engine, with keys, limits and metrics."""
