"""The HTTP face of a program: processes, protocol, limits, routes."""
