"""Prompts as every engine sees them: what is image in them, what is text, and which text counts for which image."""
