"""Real and staged inference servers, and the faults between them and a client."""
