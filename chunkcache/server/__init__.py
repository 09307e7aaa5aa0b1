"""An OpenAI-shaped HTTP server around one wrapped model."""

from chunkcache.server.app import create_app
from chunkcache.server.serve import serve

__all__ = ["create_app", "serve"]
