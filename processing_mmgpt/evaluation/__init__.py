"""Prompts from examples, public benchmarks and their scores. Nothing in here travels to the Hub."""
