"""Training of the small models that the library ships: data, models and runs."""
