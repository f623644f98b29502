"""Runs beside each other: a table of all, and a page that compares some."""
