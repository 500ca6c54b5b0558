"""The operators: argument checks, differentiation rules and the call into a backend."""
