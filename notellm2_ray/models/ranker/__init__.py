"""The model that says yes or no to a candidate."""
