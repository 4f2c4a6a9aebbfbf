"""Notebooks as documents: what is kept of an executed one, and its page for the web browser."""
