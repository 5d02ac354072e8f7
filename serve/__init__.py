"""The served router: an OpenAI-compatible HTTP endpoint, and the Ray Serve shells that run it."""
