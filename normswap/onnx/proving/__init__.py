"""Is this file that model? Runs both and compares, stage by stage. Writes no file of its own."""
