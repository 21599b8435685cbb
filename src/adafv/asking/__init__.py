"""A model that can be asked about a picture: what the command line and the page share."""
