"""From source tables and event logs to checked notes and events, pairs, sequences and candidates."""
