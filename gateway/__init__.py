"""One edge, many replicas: routes, admits and relays OpenAI-shaped requests. Never imports torch."""
