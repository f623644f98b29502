"""Looking at data: what a model is given, as text."""
