"""OpenAI's Responses API, as another way to write a chat: its items become messages, and a chat's chunks its events."""
