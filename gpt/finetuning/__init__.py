"""Ways to adapt a trained model: what is frozen and when, adapters, teachers, preferences, another tokenizer."""
