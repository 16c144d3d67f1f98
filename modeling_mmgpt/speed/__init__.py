"""The same model, faster."""
