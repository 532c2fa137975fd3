"""The live notes: a durable table, and an index that follows it. No HTTP, no Ray."""
