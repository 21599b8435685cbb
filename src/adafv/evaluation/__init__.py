"""What pruning loses, saves and keeps, measured: a product of its own on top of the rest; nothing below imports it.

world/      a generated world of simple scenes, with the pictures and the words that describe them
"""
