"""Examples: an environment, a tour of all services, a client without generated code."""
