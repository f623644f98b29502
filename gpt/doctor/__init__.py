"""`gpt doctor`: what this machine can do, what is wrong with it, and the fix."""
