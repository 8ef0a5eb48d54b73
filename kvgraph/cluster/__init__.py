"""More than one machine: which replica a request goes to."""
