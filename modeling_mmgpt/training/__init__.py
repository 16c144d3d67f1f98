"""What a Trainer of transformers or TRL lacks."""
