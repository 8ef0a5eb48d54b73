"""Training through plans: the methods that the engine runs, as attention masks of one packed sequence."""
