"""Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`, spoken over chat completions: a request
becomes a chat request, so that bounds, refusals and what engines honour are the same, and the answer is
told in Anthropic's words."""
