"""The OpenAI-compatible API: protocol, authentication, one request from top to bottom, errors."""
