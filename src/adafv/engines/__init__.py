"""Engines: the places where the core is put to work. Each depends on the core, never the reverse."""
