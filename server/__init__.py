"""The HTTP server: OpenAI-compatible, in front of one engine."""
