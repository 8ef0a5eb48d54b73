"""Everything that is text before it is tokens: corpora, chat templates, prompts, the records and items of tasks."""
