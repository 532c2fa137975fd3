"""The HTTP interface: routes, checks, error answers."""
