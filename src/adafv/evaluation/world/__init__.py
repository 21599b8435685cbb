"""A generated world of simple scenes, with the pictures and the words that describe them."""
