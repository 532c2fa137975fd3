"""What users did and what is known of their taste: events, blocks of history, exposures. No HTTP, no Ray."""
