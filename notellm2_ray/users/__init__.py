"""The store of users: events, blocks of history with their preferences, exposures. No HTTP, no Ray."""
