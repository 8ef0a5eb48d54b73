"""Function tools: what a chat template does with them, how calls are read from an answer, and how they are forced."""
