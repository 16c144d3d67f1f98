"""What a server needs besides the processor. Nothing in here travels to the Hub."""
