"""Annotations to the batches of a training. Nothing in here travels to the Hub."""
