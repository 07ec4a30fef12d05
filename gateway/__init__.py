"""One edge, many replicas: routes and relays OpenAI-shaped requests. Never imports torch."""
