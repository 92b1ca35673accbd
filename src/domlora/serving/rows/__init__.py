"""Tables larger than a host: their rows lie in Redis or Valkey, and a graph takes those that a request needs."""
