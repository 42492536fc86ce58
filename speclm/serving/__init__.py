"""Serve a model with drafts through the OpenAI-compatible server of Transformers."""

from speclm.serving.folder import ServedFolder, export_server
from speclm.serving.runtime import ServedTokenizer, generate

__all__ = ["ServedFolder", "ServedTokenizer", "export_server", "generate"]
