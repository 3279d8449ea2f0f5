"""The REST API: OpenAI's generation endpoints, health and metrics, and the admin endpoints."""
