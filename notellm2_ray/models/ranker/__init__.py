"""The model that answers yes or no to a candidate."""
