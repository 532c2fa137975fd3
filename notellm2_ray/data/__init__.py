"""From source tables and logs to validated notes, events, splits and training pairs."""
