"""Users' histories, blocks, targets and candidates."""
