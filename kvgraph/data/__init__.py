"""Data to train and evaluate on."""
